"""SegFormer checkpoints of Hugging Face transformers -> MiT and SegFormerHead."""

import re
from collections.abc import Mapping
from typing import Any

from flax import nnx

from resfu_jax.backbones.mit import VARIANTS, MiT
from resfu_jax.convert._state import StateDict
from resfu_jax.heads.segformer import SegFormerHead
from resfu_jax.model import SegmentationModel

# A `state_dict()` of transformers 5 -> the names that published files have, and `save_pretrained`
# still writes.
_RENAMES = (
    (r"^segformer\.", ""),
    (r"^stages\.(\d+)\.patch_embeddings\.", r"encoder.patch_embeddings.\1."),
    (r"^stages\.(\d+)\.blocks\.", r"encoder.block.\1."),
    (r"^stages\.(\d+)\.layer_norm\.", r"encoder.layer_norm.\1."),
    (r"\.layernorm_before\.", ".layer_norm_1."),
    (r"\.layernorm_after\.", ".layer_norm_2."),
    (r"\.attention\.q_proj\.", ".attention.self.query."),
    (r"\.attention\.k_proj\.", ".attention.self.key."),
    (r"\.attention\.v_proj\.", ".attention.self.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.attention\.sequence_reduction\.sequence_reduction\.", ".attention.self.sr."),
    (r"\.attention\.sequence_reduction\.layer_norm\.", ".attention.self.layer_norm."),
    (r"\.mlp\.fc", ".mlp.dense"),
    (r"^decode_head\.linear_projections\.", "decode_head.linear_c."),
)


def load_mit(state: Mapping[str, Any], mit: MiT, source: str) -> list[str]:
    """Load the encoder of a SegFormer checkpoint into a `MiT`, in place.

    The entries are those of `SegformerModel`, `SegformerForImageClassification` or
    `SegformerForSemanticSegmentation`; classifier and decoder are left out. `source` names the
    checkpoint in errors.

    Returns:
      The entries that were not used, sorted.

    Raises:
      Misfit: missing, unexpected or misshapen entries.
    """
    return _load(state, mit, None, source)


def load_segformer(state: Mapping[str, Any], model: SegmentationModel, source: str) -> list[str]:
    """Load encoder and decoder of `SegformerForSemanticSegmentation`, in place, as `load_mit`.

    The head's upsamplers, which such checkpoints do not have, stay as they are.
    """
    return _load(state, model.backbone, model.head, source)


def check_segformer(model: SegmentationModel) -> None:
    """Raises a `ValueError` unless encoder and decoder are those of SegFormer."""
    if not isinstance(model.backbone, MiT):
        raise ValueError(
            f"model.backbone must be a MiT to hold a SegFormer checkpoint, got "
            f"{type(model.backbone).__name__}; pass model.backbone to load a checkpoint of its kind"
        )
    if not (isinstance(model.head, SegFormerHead) and model.head.linear):
        raise ValueError(
            "model.head must be a SegFormerHead with project='linear' to hold a SegFormer decoder; "
            "pass model.backbone to load the encoder only"
        )


def describe(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Which MiT entries of these names and shapes are: `"MiT-b1"`; None if of another network."""
    shapes = {_rename(name): shape for name, shape in shapes.items()}
    if "patch_embed1.proj.weight" in shapes:
        return "a MiT as its authors name it (for transformers it is nvidia/mit-b0 .. b5)"
    embed = [shapes.get(f"encoder.patch_embeddings.{i}.proj.weight") for i in range(4)]
    if not all(embed):
        return None
    widths = tuple(shape[0] for shape in embed)
    blocks = [re.match(r"encoder\.block\.(\d)\.(\d+)\.", name) for name in shapes]
    pairs = {(int(m[1]), int(m[2])) for m in blocks if m}
    depths = tuple(sum(i == stage for stage, _ in pairs) for i in range(4))
    for name, variant in VARIANTS.items():
        if (variant.widths, variant.depths) == (widths, depths):
            return f"MiT-{name}"
    return f"a MiT of widths {widths} and depths {depths}"


def options_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The arguments of the published `MiT` that these are of; None: of none."""
    known = {f"MiT-{name}": name for name in VARIANTS}
    name = known.get(describe(shapes) or "")
    return None if name is None else dict(variant=name)


def _rename(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _load(state: Mapping[str, Any], mit: MiT, head: SegFormerHead | None, source: str) -> list[str]:
    ignored, entries, names = [], {}, {}
    for name, value in state.items():
        key = _rename(name)
        used = key.startswith("encoder.") or (head is not None and key.startswith("decode_head."))
        known = used or key.startswith(("decode_head.", "classifier."))
        if key.endswith(".num_batches_tracked") or (known and not used):
            ignored.append(name)
        else:
            entries[key], names[key] = value, name

    owner = "MiT" if head is None else "MiT and SegFormerHead"
    s = StateDict(entries, owner, source=source, names=names)
    _mit(s, mit)
    if head is not None:
        _head(s, head)
    s.done()
    return sorted(ignored)


def _mit(state: StateDict, mit: MiT) -> None:
    for i, stage in enumerate(mit.stages):
        _layer(state, f"encoder.patch_embeddings.{i}.proj", stage.embed, "OIHW")
        _norm(state, f"encoder.patch_embeddings.{i}.layer_norm", stage.embed_norm)
        for j, block in enumerate(stage.blocks):
            name = f"encoder.block.{i}.{j}"
            _norm(state, f"{name}.layer_norm_1", block.attention_norm)
            attention = block.attention
            _layer(state, f"{name}.attention.self.query", attention.query, "OI")
            _layer(state, f"{name}.attention.self.key", attention.key, "OI")
            _layer(state, f"{name}.attention.self.value", attention.value, "OI")
            _layer(state, f"{name}.attention.output.dense", attention.out, "OI")
            if attention.reduces:
                _layer(state, f"{name}.attention.self.sr", attention.reduce, "OIHW")
                _norm(state, f"{name}.attention.self.layer_norm", attention.reduce_norm)
            _norm(state, f"{name}.layer_norm_2", block.ffn_norm)
            _layer(state, f"{name}.mlp.dense1", block.ffn.expand, "OI")
            _layer(state, f"{name}.mlp.dwconv.dwconv", block.ffn.depthwise, "C1HW")
            _layer(state, f"{name}.mlp.dense2", block.ffn.contract, "OI")
        _norm(state, f"encoder.layer_norm.{i}", stage.norm)


def _head(state: StateDict, head: SegFormerHead) -> None:
    for i, project in enumerate(head.project):
        _layer(state, f"decode_head.linear_c.{i}.proj", project, "OI")
    state.set(head.fuse.conv.kernel, "decode_head.linear_fuse.weight", layout="OI11")
    _norm(state, "decode_head.batch_norm", head.fuse.norm)
    state.set(head.fuse.norm.mean, "decode_head.batch_norm.running_mean")
    state.set(head.fuse.norm.var, "decode_head.batch_norm.running_var")
    _layer(state, "decode_head.classifier", head.classify, "OI11")


def _layer(state: StateDict, name: str, layer: nnx.Module, layout: str) -> None:
    state.set(layer.kernel, f"{name}.weight", layout=layout)
    state.set(layer.bias, f"{name}.bias")


def _norm(state: StateDict, name: str, norm: nnx.Module) -> None:
    state.set(norm.scale, f"{name}.weight")
    state.set(norm.bias, f"{name}.bias")
