"""ViT checkpoints of timm, Hugging Face transformers and the DINO authors -> ViT."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from resfu_jax.backbones.vit import ViT
from resfu_jax.convert._state import StateDict

# Names of transformers (of published files and of a `state_dict()` of transformers 5) and of the
# DINO authors -> those of timm.
_RENAMES = (
    (r"^(vit|dinov2|dinov2_with_registers|dinov3_vit)\.", ""),
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^(register_tokens|storage_tokens)$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^((encoder|model)\.)?layers?\.(\d+)\.", r"blocks.\3."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(attention\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(attention\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(attention\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.(intermediate\.dense|mlp\.up_proj)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.down_proj)\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)

# What a feature extractor has no use for: the pooler of transformers, the token that replaces
# masked patches in training, and two constants in the files of DINOv3's authors.
_UNUSED = re.compile(r"^pooler\.|^mask_token$|\.attn\.qkv\.bias_mask$|^rope_embed\.periods$")


def load_vit(state: Mapping[str, Any], vit: ViT, source: str) -> list[str]:
    """Load a ViT checkpoint into a model, in place.

    Names may be those of timm, of Hugging Face transformers (`ViTModel`,
    `ViTForImageClassification`, `Dinov2Model`, `Dinov2WithRegistersModel`, `DINOv3ViTModel`) or of
    the official repositories of DINO, DINOv2 and DINOv3. The classifier is loaded if the model has
    one.

    Args:
      state: a checkpoint's entries; values may be anything that `np.asarray` reads.
      vit: model of the sizes of the checkpoint.
      source: where the entries are from, for the error message.

    Returns:
      The entries that were not used, sorted.

    Raises:
      ValueError: missing, unexpected or misshapen entries, all named, as timm names them; fused
        entries `attn.qkv` count as three, `attn.q`, `attn.k` and `attn.v`. `vit` is then
        unchanged.
    """
    unused, entries = [], {}
    for name, value in state.items():
        key = name
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        if _UNUSED.search(key) or (vit.head is None and key.startswith("head.")):
            unused.append(name)
            continue
        prefix, fused, kind = key.partition(".attn.qkv.")
        thirds = np.asarray(value)
        if fused and thirds.ndim and thirds.shape[0] % 3 == 0:
            for part, third in zip("qkv", np.split(thirds, 3), strict=True):
                entries[f"{prefix}.attn.{part}.{kind}"] = third
        else:
            entries[key] = value
    keys_are_biased = vit.blocks[0].attention.key.bias is not None
    if not keys_are_biased and any(name.endswith("attn.qkv.bias") for name in state):
        # The authors of DINOv3 store the fused bias whole, and mask the keys' part.
        entries = {k: v for k, v in entries.items() if not k.endswith(".attn.k.bias")}

    # Into a copy, so that an error leaves the model whole.
    loaded = nnx.clone(vit)
    reader = StateDict(entries, source)
    _vit(reader, loaded, entries)
    reader.done()
    nnx.update(vit, nnx.state(loaded))
    return sorted(unused)


def _vit(state: StateDict, vit: ViT, entries: Mapping[str, Any]) -> None:
    state.set_layer(vit.embed, "patch_embed.proj", layout="OIHW")
    c = vit.embed.kernel.shape[-1]
    _store(vit.class_token, state.take("cls_token", (1, 1, c)))
    if vit.registers is not None:
        _store(vit.registers, state.take("reg_token", (1, *vit.registers.shape)))
    if vit.positions is not None:
        _positions(state, vit, np.shape(entries.get("pos_embed", ())))
    for i, block in enumerate(vit.blocks):
        name, attention = f"blocks.{i}", block.attention
        state.set_layer(block.attention_norm, f"{name}.norm1")
        state.set_layer(attention.query, f"{name}.attn.q", layout="OI")
        state.set_layer(attention.key, f"{name}.attn.k", layout="OI")
        state.set_layer(attention.value, f"{name}.attn.v", layout="OI")
        state.set_layer(attention.out, f"{name}.attn.proj", layout="OI")
        state.set_layer(block.ffn_norm, f"{name}.norm2")
        state.set_layer(block.ffn.expand, f"{name}.mlp.fc1", layout="OI")
        state.set_layer(block.ffn.contract, f"{name}.mlp.fc2", layout="OI")
        if block.attention_scale is not None:
            state.set(block.attention_scale, f"{name}.ls1.gamma")
            state.set(block.ffn_scale, f"{name}.ls2.gamma")
    state.set_layer(vit.norm, "norm")
    state.set_layer(vit.head, "head", layout="OI")


def _positions(state: StateDict, vit: ViT, shape: tuple[int, ...]) -> None:
    """Positions of the class token, unless timm has added them to it, and of the patches."""
    h, w, c = vit.positions.shape
    n = h * w
    alone = shape == (1, n, c)
    value = state.take("pos_embed", (1, n, c) if alone else (1, n + 1, c))
    _store(vit.class_position, np.zeros(c, np.float32) if alone else value[0, 0])
    _store(vit.positions, value[0, -n:])
    if len(shape) == 3 and shape[2] == c and not alone and shape[1] != n + 1:
        state.problem(
            f"it has {shape[1]} positions, and the model {n + 1} for images of "
            f"{h * vit.strides[0]}x{w * vit.strides[0]}: build it with the checkpoint's image_size"
        )


def _store(variable: nnx.Variable, value: np.ndarray) -> None:
    ours = variable.get_value()
    variable.set_value(jnp.asarray(value, ours.dtype).reshape(ours.shape))
