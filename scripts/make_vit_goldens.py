"""Makes tests/goldens_vit: small ViTs of timm and Hugging Face transformers with their outputs.

Run once, with torch==2.13.0, transformers==5.23.0, timm==1.0.31 and torchvision==0.29.2, which timm
imports (a build for a GPU does on a CPU, too: its operators are not called):

    python scripts/make_vit_goldens.py

Every model has random weights everywhere, so that no term is trivially 0 or 1, and runs in float64,
in evaluation mode, on images whose grid of patches is larger than that of the learned positions on
one axis and smaller on the other. One file per model:

    timm               VisionTransformer, positions for a non-square image
    vit                ViTForImageClassification
    dinov2             Dinov2Model
    dinov2_registers   Dinov2WithRegistersModel
    dinov3             DINOv3ViTModel

    param/*   weights, float32, with the names that published checkpoints have
    names     pairs of an entry's name in `state_dict()` and in published checkpoints
    image     (NCHW)
    map/i     output of block i after the final norm, without class and register tokens (NCHW)
    logits    of timm and vit
    seed/*    weights of the outputs above in the sum whose gradients are
    grad/*    with respect to image and parameters

and, printed, the number of parameters of published sizes, without what features do not depend on.
"""

import pathlib
import tempfile

import numpy as np
import torch

# Where torchvision's compiled operators cannot be loaded, importing it fails for want of these.
try:
    import torchvision  # noqa: F401
except RuntimeError:
    _library = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm
import transformers
from safetensors.torch import load_file
from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "goldens_vit"
SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=4)


def stay_in_float64() -> None:
    """Where transformers rounds to float32 on the way, whatever the type of the model, does not."""
    interpolate = torch.nn.functional.interpolate
    torch.nn.functional.interpolate = lambda x, **kw: interpolate(x.double(), **kw)
    coordinates = dinov3.get_patches_center_coordinates
    dinov3.get_patches_center_coordinates = lambda h, w, dtype, device: coordinates(
        h, w, dtype=torch.float64, device=device
    )


def models() -> dict[str, tuple]:
    """For each golden: model, blocks, final norm, number of tokens that are no patches."""
    vit = transformers.ViTForImageClassification(
        transformers.ViTConfig(**SIZES, image_size=24, intermediate_size=32, num_labels=5)
    )
    dinov2 = transformers.Dinov2Model(
        transformers.Dinov2Config(**SIZES, image_size=24, mlp_ratio=2)
    )
    registers = transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(
            **SIZES, image_size=24, mlp_ratio=2, num_register_tokens=3
        )
    )
    v3 = transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**SIZES, intermediate_size=32, num_register_tokens=3)
    )
    v3.rope_embeddings.inv_freq = 100.0 ** -torch.arange(0, 1, 4 / 8, dtype=torch.float64)
    plain = timm.models.VisionTransformer(
        img_size=(24, 16),
        patch_size=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
        mlp_ratio=2,
        num_classes=5,
        dynamic_img_size=True,
    )
    return {
        "timm": (plain, plain.blocks, plain.norm, 1),
        "vit": (vit, vit.vit.layers, vit.vit.layernorm, 1),
        "dinov2": (dinov2, blocks(dinov2), dinov2.layernorm, 1),
        "dinov2_registers": (registers, blocks(registers), registers.layernorm, 4),
        "dinov3": (v3, v3.model.layer, v3.norm, 4),
    }


def blocks(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The model's only list of blocks."""
    (found,) = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    return found


def randomise(model: torch.nn.Module, rng: np.random.Generator) -> None:
    """Norms and layer scales around 1, the rest around 0."""
    for name, value in model.state_dict().items():
        noise = torch.from_numpy(rng.standard_normal(value.shape)).float()
        if value.ndim == 1 and name.endswith(("weight", "lambda1")):
            value.copy_(1 + 0.3 * noise)
        elif value.ndim == 1 or "token" in name or "pos" in name:
            value.copy_(0.3 * noise)
        else:
            value.copy_(noise * (1.5 / value[0].numel()) ** 0.5)


def published(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The entries that a published checkpoint of the model has."""
    if not hasattr(model, "save_pretrained"):
        return {name: value.clone() for name, value in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(f"{folder}/model.safetensors")


def main() -> None:
    """Builds, randomises, runs, writes."""
    OUT.mkdir(parents=True, exist_ok=True)
    stay_in_float64()
    for number, (golden, (model, layers, norm, prefix)) in enumerate(models().items()):
        rng = np.random.default_rng(number)

        def normal(*shape: int, rng: np.random.Generator = rng) -> torch.Tensor:
            return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

        model.eval()
        randomise(model, rng)
        entries = published(model)
        names = {
            name: next(k for k, v in entries.items() if torch.equal(v, value))
            for name, value in model.state_dict().items()
        }
        assert sorted(names.values()) == sorted(entries)

        model.double()
        h, w = 28, 12
        image = normal(1, 3, h, w).double().requires_grad_(True)
        tokens = []
        for layer in layers:
            layer.register_forward_hook(lambda module, args, out, tokens=tokens: tokens.append(out))
        result = model(image, **(dict(interpolate_pos_encoding=True) if golden == "vit" else {}))
        outputs = {
            f"map/{i}": norm(x)[:, prefix:].transpose(1, 2).reshape(1, -1, h // 4, w // 4)
            for i, x in enumerate(tokens)
        }
        if golden in ("timm", "vit"):
            outputs["logits"] = result if golden == "timm" else result.logits
        seeds = {f"seed/{name}": normal(*x.shape) for name, x in outputs.items()}
        sum((x * seeds[f"seed/{name}"]).sum() for name, x in outputs.items()).backward()
        arrays = {"image": image, "grad/image": image.grad} | outputs | seeds
        arrays |= {f"param/{name}": value for name, value in entries.items()}
        arrays |= {
            f"grad/{names[name]}": p.grad
            for name, p in model.named_parameters()
            if p.grad is not None
        }
        # Computed in float64, rounded once.
        np.savez_compressed(
            OUT / f"{golden}.npz",
            names=np.array(list(names.items())),
            **{k: v.detach().numpy().astype(np.float32) for k, v in arrays.items()},
        )

    with torch.device("meta"):
        for name in ("tiny", "small", "base", "large"):
            count(f"{name}, 1000 classes", timm.create_model(f"vit_{name}_patch16_224"))
        widths = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
        for name, (width, depth, heads) in widths.items():
            sizes = dict(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads)
            v2 = dict(sizes, patch_size=14, image_size=518)
            count(f"dinov2_{name}", transformers.Dinov2Model(transformers.Dinov2Config(**v2)))
            config = transformers.Dinov2WithRegistersConfig(**v2, num_register_tokens=4)
            count(f"dinov2_registers_{name}", transformers.Dinov2WithRegistersModel(config))
            config = transformers.DINOv3ViTConfig(
                **sizes, intermediate_size=4 * width, num_register_tokens=4
            )
            count(f"dinov3_{name}", transformers.DINOv3ViTModel(config))


def count(name: str, model: torch.nn.Module) -> None:
    """Prints the number of parameters."""
    print(name, sum(p.numel() for n, p in model.named_parameters() if "mask_token" not in n))


if __name__ == "__main__":
    main()
