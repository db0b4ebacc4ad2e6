"""SegFormer checkpoints of Hugging Face transformers -> MiT and SegFormerHead."""

import re

import jax.numpy as jnp
import numpy as np
from flax import nnx

from resfu_jax.backbones.mit import MiT
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


def load_mit(state: dict[str, np.ndarray], mit: MiT, source: str) -> list[str]:
    """Load the encoder of a SegFormer checkpoint into a `MiT`, in place.

    The entries are those of `SegformerModel`, `SegformerForImageClassification` or
    `SegformerForSemanticSegmentation`; classifier and decoder are left out. `source` names the
    checkpoint in errors.

    Returns:
      The entries that were not used, sorted.

    Raises:
      ValueError: missing, unexpected or misshapen entries, all named.
    """
    return _load(state, mit, None, source)


def load_segformer(
    state: dict[str, np.ndarray], model: SegmentationModel, source: str
) -> list[str]:
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


def _load(
    state: dict[str, np.ndarray], mit: MiT, head: SegFormerHead | None, source: str
) -> list[str]:
    ignored, entries = [], {}
    for name, value in state.items():
        key = name
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        used = key.startswith("encoder.") or (head is not None and key.startswith("decode_head."))
        known = used or key.startswith(("decode_head.", "classifier."))
        if key.endswith(".num_batches_tracked") or (known and not used):
            ignored.append(name)
        else:
            entries[key] = value

    s = StateDict(entries, source)
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
            _depthwise(state, f"{name}.mlp.dwconv.dwconv", block.ffn.depthwise)
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


def _depthwise(state: StateDict, name: str, layer: nnx.Module) -> None:
    kernel = layer.kernel[...]
    h, w, c = kernel.shape
    value = state.take(f"{name}.weight", (c, 1, h, w))[:, 0].transpose(1, 2, 0)
    layer.kernel.set_value(jnp.asarray(value, kernel.dtype))
    state.set(layer.bias, f"{name}.bias")


def _norm(state: StateDict, name: str, norm: nnx.Module) -> None:
    state.set(norm.scale, f"{name}.weight")
    state.set(norm.bias, f"{name}.bias")
