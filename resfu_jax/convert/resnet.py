"""ResNet checkpoints of torchvision, timm, transformers and MMSegmentation -> ResNet.

All have the same weights under different names; those of torchvision and timm are

    conv1, bn1                          stem; conv1.{0,1,3,4,6}, bn1 of the deep one
    layer{stage}.{block}.conv{n}, .bn{n}
    layer{stage}.{block}.downsample.0, .1   the shortcut's convolution and BatchNorm

The files do not say which dilations a network has, nor whether its bottlenecks stride in the 3x3
convolution (all four projects, "v1.5") or in the first one (MMSegmentation's `style="caffe"`, some
old ones), which `ResNet` does not have.
"""

import re

import numpy as np

from resfu_jax.backbones.resnet import Block, ConvNorm, ResNet
from resfu_jax.convert._state import StateDict

_RENAMES = (
    (r"^(?:resnet|backbone)\.", ""),
    # transformers
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    (
        r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.",
        lambda m: f"layer{int(m[1]) + 1}.{m[2]}.",
    ),
    (r"\.layer\.(\d+)\.convolution\.", lambda m: f".conv{int(m[1]) + 1}."),
    (r"\.layer\.(\d+)\.normalization\.", lambda m: f".bn{int(m[1]) + 1}."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    # MMSegmentation's deep stem
    (r"^stem\.7\.", "bn1."),
    (r"^stem\.", "conv1."),
)
_HEADS = ("fc.", "classifier.", "aux_classifier.", "decode_head.", "auxiliary_head.")


def load_resnet(state: dict[str, np.ndarray], resnet: ResNet, source: str) -> list[str]:
    """Load the entries of a checkpoint into a `ResNet`, in place; `source` names it in errors.

    Returns:
      The entries that were not used: those of a classifier or decoder, and counters. Sorted.

    Raises:
      ValueError: missing, unexpected or misshapen entries, all named.
    """
    ignored, entries = [], {}
    for name, value in state.items():
        key = name
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        if key.endswith(".num_batches_tracked") or key.startswith(_HEADS):
            ignored.append(name)
        else:
            entries[key] = value

    s = StateDict(entries, source)
    if any(key.endswith(".downsample.1.weight") and v.ndim == 4 for key, v in entries.items()):
        s.problem("its shortcuts pool (ResNet-D, as timm's resnet50d), which ResNet does not have")
    if len(resnet.stem) == 1:
        _conv_norm(s, "conv1", "bn1", resnet.stem[0])
    else:
        _conv_norm(s, "conv1.0", "conv1.1", resnet.stem[0])
        _conv_norm(s, "conv1.3", "conv1.4", resnet.stem[1])
        _conv_norm(s, "conv1.6", "bn1", resnet.stem[2])
    for i, blocks in enumerate(resnet.stages):
        for j, block in enumerate(blocks):
            _block(s, f"layer{i + 1}.{j}", block)
    s.done()
    return sorted(ignored)


def _block(s: StateDict, name: str, block: Block) -> None:
    for n, layer in enumerate(block.layers):
        _conv_norm(s, f"{name}.conv{n + 1}", f"{name}.bn{n + 1}", layer)
    if block.projects:
        _conv_norm(s, f"{name}.downsample.0", f"{name}.downsample.1", block.shortcut)


def _conv_norm(s: StateDict, conv: str, norm: str, layer: ConvNorm) -> None:
    s.set_layer(layer.conv, conv, layout="OI11" if layer.pointwise else "OIHW")
    s.set_layer(layer.norm, norm)
    s.set(layer.norm.mean, f"{norm}.running_mean")
    s.set(layer.norm.var, f"{norm}.running_var")
