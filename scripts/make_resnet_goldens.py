"""Makes tests/goldens_resnet: small ResNets of timm and transformers with their outputs.

Run once, with torch==2.13.0, timm==1.0.31, torchvision==0.28.0 and transformers==5.23.0:

    python scripts/make_resnet_goldens.py

There are three networks at small widths:

    basic         timm, basic blocks, 7x7 stem, stride 8 by dilation (1, 1, 2, 4)
    bottleneck    timm, bottlenecks, deep stem, stride 16 by dilation (1, 1, 1, 2)
    transformers  ResNetForImageClassification, bottlenecks, 7x7 stem, stride 32

Weights are random everywhere, norms and running statistics included, so that no term is trivially 0
or 1. All run in float64, on two odd, non-square images. Written are

    NAME.safetensors   weights and running statistics, float32, with the names of published files
    outputs.npz        `image`; of each network the four maps in evaluation mode, `NAME/eval/i`; of
                       those of timm, gradients of sum_i <map_i, sin(0, 1, 2, ...)> with respect to
                       some parameters, `NAME/grad/KEY`, and of `bottleneck` to the image, and a
                       forward pass in training mode: `basic/train/i`, and running statistics after
                       it, `basic/stat/KEY`. All NCHW, as PyTorch has them.

and, printed, the number of parameters of torchvision's ResNets without their classifier, and of
timm's resnet50c.
"""

import pathlib

import numpy as np
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from transformers import ResNetConfig, ResNetForImageClassification

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "goldens_resnet"

GRADIENTS = {
    "basic": (
        "bn1.weight",
        "layer2.0.conv1.weight",
        "layer2.0.downsample.0.weight",
        "layer3.0.conv2.weight",
        "layer4.0.conv1.weight",
        "layer4.1.conv1.weight",
        "layer4.1.bn2.bias",
    ),
    "bottleneck": (
        "conv1.0.weight",
        "conv1.6.weight",
        "layer1.0.downsample.1.bias",
        "layer3.0.conv2.weight",
        "layer3.0.downsample.0.weight",
        "layer4.0.conv2.weight",
        "layer4.1.conv2.weight",
        "layer4.1.bn3.weight",
    ),
}


def randomize(model: torch.nn.Module, rng: np.random.Generator) -> None:
    """Float32 values for all weights and running statistics."""
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = torch.from_numpy(rng.standard_normal(value.shape)).float()
        if name.endswith("running_var"):
            value.copy_(0.5 + noise.abs())
        elif value.ndim == 1 and name.endswith("weight"):
            value.copy_(1 + 0.3 * noise)
        elif value.ndim == 1:
            value.copy_(0.3 * noise)
        else:
            value.copy_(noise * (1.5 / value[0].numel()) ** 0.5)


def timm_maps(model: ResNet, x: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of the four stages."""
    x = model.maxpool(model.act1(model.bn1(model.conv1(x))))
    maps = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = stage(x)
        maps.append(x)
    return maps


def main() -> None:
    """Builds, randomises, runs, writes."""
    OUT.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.standard_normal((2, 3, 33, 45)).astype(np.float32)).double()
    arrays = {"image": image}
    networks = {
        "basic": ResNet(
            BasicBlock, (1, 1, 1, 2), num_classes=5, channels=(6, 6, 8, 8), output_stride=8
        ),
        "bottleneck": ResNet(
            Bottleneck,
            (2, 1, 2, 2),
            num_classes=5,
            channels=(4, 4, 6, 8),
            output_stride=16,
            stem_type="deep",
            stem_width=4,
        ),
    }
    for name, model in networks.items():
        randomize(model, rng)
        save_file(model.state_dict(), OUT / f"{name}.safetensors")
        model = model.double().eval()
        x = image.clone().requires_grad_(True)
        maps = timm_maps(model, x)
        loss = sum(
            (y * torch.arange(y.numel(), dtype=y.dtype).sin().reshape(y.shape)).sum() for y in maps
        )
        loss.backward()
        parameters = dict(model.named_parameters())
        arrays |= {f"{name}/eval/{i}": y for i, y in enumerate(maps)}
        arrays |= {f"{name}/grad/{key}": parameters[key].grad for key in GRADIENTS[name]}
        if name == "bottleneck":
            arrays[f"{name}/grad/image"] = x.grad
        else:
            maps = timm_maps(model.train(), image)
            arrays |= {f"{name}/train/{i}": y for i, y in enumerate(maps)}
            arrays |= {
                f"{name}/stat/{key}": value
                for key, value in model.state_dict().items()
                if "running" in key
            }

    model = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 1, 1], num_labels=5
        )
    )
    randomize(model, rng)
    model.save_pretrained(OUT)
    (OUT / "config.json").unlink()
    (OUT / "model.safetensors").rename(OUT / "transformers.safetensors")
    hidden = model.double().eval()(image, output_hidden_states=True).hidden_states[1:]
    arrays |= {f"transformers/eval/{i}": y for i, y in enumerate(hidden)}
    # Computed in float64, rounded once.
    np.savez_compressed(
        OUT / "outputs.npz",
        **{k: v.detach().numpy().astype(np.float32) for k, v in arrays.items()},
    )

    with torch.device("meta"):
        published = {
            name: getattr(torchvision.models, name)()
            for name in ("resnet18", "resnet34", "resnet50", "resnet101")
        }
        published["resnet50c"] = timm.create_model("resnet50c")
    for name, model in published.items():
        print(name, sum(p.numel() for k, p in model.named_parameters() if not k.startswith("fc.")))


if __name__ == "__main__":
    main()
