"""ViT checkpoints of timm, Hugging Face transformers, the DINO and the MIRL authors -> ViT."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from resfu_jax.backbones.transformer import sincos_positions
from resfu_jax.backbones.vit import VARIANTS, ViT
from resfu_jax.convert._state import StateDict, as_array, shape_of, store

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

_SIZES = {(v.width, v.depth): name for name, v in reversed(VARIANTS.items())}
_HEADS = {v.width: v.heads for v in VARIANTS.values() if v.positions != "sincos"}
# What a feature extractor has no use for: the pooler of transformers, the token that replaces
# masked patches in training, two constants in the files of DINOv3's authors, and the decoders of
# MIRL with the norms before them.
_UNUSED = re.compile(
    r"^pooler\.|^mask_token\d*$|\.attn\.qkv\.bias_mask$|^rope_embed\.periods$"
    r"|^decoder_(embed|pos_embed|blocks|norm|pred)\d|^norm(_low|\d)\."
)
# Matrices that PaddlePaddle stores as (in, out), and all others as (out, in).
_MATRICES = re.compile(r"(\.attn\.(qkv|proj)|\.mlp\.fc[12]|^head)\.weight$")


def load_vit(state: Mapping[str, Any], vit: ViT, source: str) -> list[str]:
    """Load a ViT checkpoint into a model, in place.

    Names may be those of timm, of Hugging Face transformers (`ViTModel`,
    `ViTForImageClassification`, `Dinov2Model`, `Dinov2WithRegistersModel`, `DINOv3ViTModel`) or of
    the official repositories of DINO, DINOv2, DINOv3 and MIRL, whose matrices are those of
    PaddlePaddle, (in, out), or converted ones. The classifier is loaded if the model has one.

    Args:
      state: a checkpoint's entries; values may be anything that `as_array` reads.
      vit: model of the sizes of the checkpoint.
      source: where the entries are from, for the error message.

    Returns:
      The entries that were not used, sorted.

    Raises:
      Misfit: missing, unexpected or misshapen entries, as timm names them; fused entries
        `attn.qkv` count as three, `attn.q`, `attn.k` and `attn.v`. `vit` is then unchanged.
    """
    unused, entries, names = [], {}, {}
    turned = _is_paddle({_rename(name): shape_of(value) for name, value in state.items()})
    for name, value in state.items():
        key = _rename(name)
        if _UNUSED.search(key) or (vit.head is None and key.startswith("head.")):
            unused.append(name)
            continue
        if turned and _MATRICES.search(key) and len(shape_of(value)) == 2:
            value = as_array(value).T
        prefix, fused, kind = key.partition(".attn.qkv.")
        shape = shape_of(value)
        if fused and shape and shape[0] % 3 == 0:
            try:
                thirds = np.split(as_array(value), 3)
            except ValueError as error:
                raise ValueError(f"{source}: {name!r} {error}") from error
            for part, third in zip("qkv", thirds, strict=True):
                entries[f"{prefix}.attn.{part}.{kind}"] = third
                names[f"{prefix}.attn.{part}.{kind}"] = name
        else:
            entries[key], names[key] = value, name
    keys_are_biased = vit.block(0).attention.key.bias is not None
    if not keys_are_biased and any(name.endswith("attn.qkv.bias") for name in state):
        # The authors of DINOv3 store the fused bias whole, and mask the keys' part.
        entries = {k: v for k, v in entries.items() if not k.endswith(".attn.k.bias")}

    # Into a copy, so that an error leaves the model whole.
    loaded = nnx.clone(vit)
    reader = StateDict(entries, "ViT", source=source, names=names)
    _vit(reader, loaded, entries)
    reader.done()
    nnx.update(vit, nnx.state(loaded))
    return sorted(unused)


def describe(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Which ViT entries of these names and shapes are: `"ViT-small/14"`; None if of another net."""
    found = options_of(shapes)
    if found is None:
        return None
    width, depth, registers = found["width"], found["depth"], found["registers"]
    size = _SIZES.get((width, depth), f"{depth} blocks of {width}")
    extras = f", {registers} registers" * bool(registers) + ", layer scale" * found["layer_scale"]
    return f"ViT-{size}/{found['patch_size']}{extras}"


def options_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The arguments of the `ViT` that entries of these names and shapes are of; None: of no ViT.

    Shapes do not tell the number of heads: it is that of the published model of this width, or one
    for every 64 channels. Nor do they tell the interpolation of positions: it is DINOv2's plain one
    for a ViT with layer scale and no registers.
    """
    shapes = {_rename(name): shape for name, shape in shapes.items()}
    if _is_paddle(shapes):
        shapes = {k: s[::-1] if _MATRICES.search(k) else s for k, s in shapes.items()}
    embed = shapes.get("patch_embed.proj.weight", ())
    blocks = {m[1] for name in shapes if (m := re.match(r"blocks\.(\d+)\.", name))}
    if len(embed) != 4 or not blocks:
        return None
    width, depth, patch = embed[0], len(blocks), embed[-1]
    scaled = any(name.endswith(".ls1.gamma") for name in shapes)
    registers = (*shapes.get("reg_token", ()), 0)[1] if "reg_token" in shapes else 0
    rope = "pos_embed" not in shapes
    published = VARIANTS.get(_SIZES.get((width, depth), ""))
    fixed = published is not None and published.positions == "sincos"
    found: dict[str, Any] = dict(
        patch_size=patch,
        width=width,
        depth=depth,
        heads=published.heads
        if published is not None and fixed
        else _HEADS.get(width, max(1, width // 64)),
        mlp_ratio=(*shapes.get("blocks.0.mlp.fc1.weight", ()), 4 * width)[0] / width,
        registers=registers,
        layer_scale=scaled,
        positions="rope" if rope else "sincos" if fixed else "learned",
        scan=fixed,
        key_bias=not rope,
        norm_epsilon=1e-5 if rope else 1e-6,
        antialias=not scaled or registers > 0,
    )
    if not rope:
        # The patches' positions are a square; that of the class token may be among them.
        count = (*shapes["pos_embed"], 0, 0)[1]
        side = math.isqrt(count)
        found["image_size"] = patch * side if side * side in (count, count - 1) else None
    return found


def _rename(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _is_paddle(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether matrices are stored as PaddlePaddle does, by that of query, key and value."""
    shape = shapes.get("blocks.0.attn.qkv.weight", ())
    return len(shape) == 2 and shape[1] == 3 * shape[0]


def _vit(state: StateDict, vit: ViT, entries: Mapping[str, Any]) -> None:
    state.set_layer(vit.embed, "patch_embed.proj", layout="OIHW")
    c = vit.embed.kernel.shape[-1]
    store(vit.class_token, state.take("cls_token", (1, 1, c)))
    if vit.registers is not None:
        store(vit.registers, state.take("reg_token", (1, *vit.registers.shape)))
    if vit.positions is None and not vit.rotates:
        _fixed_positions(state, c, shape_of(entries.get("pos_embed")))
    if vit.positions is not None:
        _positions(state, vit, shape_of(entries.get("pos_embed")))
    blocks = [vit.block(i) for i in range(vit.depth)]
    for i, block in enumerate(blocks):
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
    if vit.scan:
        vit.set_blocks(blocks)
    state.set_layer(vit.norm, "norm")
    state.set_layer(vit.head, "head", layout="OI")


def _positions(state: StateDict, vit: ViT, shape: tuple[int, ...]) -> None:
    """Positions of the class token, unless timm has added them to it, and of the patches."""
    h, w, c = vit.positions.shape
    n = h * w
    alone = shape == (1, n, c)
    value = state.take("pos_embed", (1, n, c) if alone else (1, n + 1, c))
    store(vit.class_position, np.zeros(c, np.float32) if alone else value[0, 0])
    store(vit.positions, value[0, -n:])
    if len(shape) == 3 and shape[2] == c and not alone and shape[1] != n + 1:
        state.problem(
            f"it has {shape[1]} positions, and the model {n + 1} for images of "
            f"{h * vit.strides[0]}x{w * vit.strides[0]}: build it with the checkpoint's image_size"
        )


def _fixed_positions(state: StateDict, width: int, shape: tuple[int, ...]) -> None:
    """Checks that positions in the file, of a square of patches, are those that we compute."""
    count = (*shape, 0, 0)[1] - 1
    side = math.isqrt(max(count, 1))
    grid = sincos_positions(side, side, width, jnp.float32)
    table = np.concatenate([np.zeros((1, width), np.float32), grid.reshape(-1, width)])
    state.buffer(
        "pos_embed",
        table[None],
        "is not the table of sines and cosines: positions that were trained on need "
        "positions='learned'",
    )
