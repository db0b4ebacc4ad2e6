"""Makes tests/goldens_mit: a small SegFormer of Hugging Face transformers with its outputs.

Run once, with torch==2.13.0 and transformers==5.23.0:

    python scripts/make_mit_goldens.py

The model has every structural part (all reduction ratios, several heads, two blocks in a stage, the
decoder) at small widths, and random weights everywhere, norms and running statistics included, so
that no term is trivially 0 or 1. It runs in float64, in evaluation mode, on an odd, non-square
image. Written are

    model.safetensors   weights, float32, with the names that published checkpoints have
    model.npz           image, the four feature maps, logits; gradients of sum(logits * seed) with
                        respect to the image and some parameters; all NCHW, as PyTorch has them;
                        `names`, pairs of an entry's name in `state_dict()` and in model.safetensors

and, printed, the number of parameters of the encoders B0 .. B5.
"""

import pathlib

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerModel

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "goldens_mit"

# Names in torch's model -> names in published files, which the tests go by.
GRADIENTS = {
    "segformer.stages.0.patch_embeddings.proj.weight": "encoder.patch_embeddings.0.proj.weight",
    "segformer.stages.0.blocks.1.attention.sequence_reduction.sequence_reduction.weight": (
        "encoder.block.0.1.attention.self.sr.weight"
    ),
    "segformer.stages.1.blocks.0.layernorm_before.weight": "encoder.block.1.0.layer_norm_1.weight",
    "segformer.stages.1.blocks.0.mlp.dwconv.dwconv.weight": (
        "encoder.block.1.0.mlp.dwconv.dwconv.weight"
    ),
    "segformer.stages.2.blocks.0.attention.q_proj.weight": (
        "encoder.block.2.0.attention.self.query.weight"
    ),
    "segformer.stages.3.blocks.0.mlp.fc2.bias": "encoder.block.3.0.mlp.dense2.bias",
    "decode_head.linear_fuse.weight": "decode_head.linear_fuse.weight",
    "decode_head.batch_norm.weight": "decode_head.batch_norm.weight",
}


def main() -> None:
    """Builds, randomises, runs, writes."""
    OUT.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    config = SegformerConfig(
        hidden_sizes=[8, 16, 24, 32],
        depths=[2, 1, 1, 1],
        num_attention_heads=[1, 2, 3, 4],
        sr_ratios=[8, 4, 2, 1],
        mlp_ratios=[4, 4, 4, 4],
        decoder_hidden_size=16,
        num_labels=5,
    )
    model = SegformerForSemanticSegmentation(config).eval()
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
    model.save_pretrained(OUT)
    (OUT / "config.json").unlink()
    published = load_file(OUT / "model.safetensors")
    names = [
        (name, next(k for k, v in published.items() if torch.equal(v, value)))
        for name, value in model.state_dict().items()
    ]
    assert len({k for _, k in names}) == len(published)

    model = model.double()
    image = torch.from_numpy(rng.standard_normal((2, 3, 67, 93)).astype(np.float32)).double()
    image.requires_grad_(True)
    result = model(image, output_hidden_states=True)
    seed = torch.from_numpy(rng.standard_normal(result.logits.shape).astype(np.float32)).double()
    (result.logits * seed).sum().backward()
    parameters = dict(model.named_parameters())
    arrays = {"image": image, "seed": seed, "logits": result.logits, "grad/image": image.grad}
    arrays |= {f"hidden/{i}": x for i, x in enumerate(result.hidden_states)}
    arrays |= {f"grad/{ours}": parameters[name].grad for name, ours in GRADIENTS.items()}
    # Computed in float64, rounded once.
    np.savez_compressed(
        OUT / "model.npz",
        names=np.array(names),
        **{k: v.detach().numpy().astype(np.float32) for k, v in arrays.items()},
    )

    wide = dict(hidden_sizes=[64, 128, 320, 512])
    variants = {
        "b0": {},
        "b1": wide,
        "b2": wide | dict(depths=[3, 4, 6, 3]),
        "b3": wide | dict(depths=[3, 4, 18, 3]),
        "b4": wide | dict(depths=[3, 8, 27, 3]),
        "b5": wide | dict(depths=[3, 6, 40, 3]),
    }
    for name, sizes in variants.items():
        with torch.device("meta"):
            encoder = SegformerModel(SegformerConfig(**sizes))
        print(name, sum(p.numel() for p in encoder.parameters()))


if __name__ == "__main__":
    main()
