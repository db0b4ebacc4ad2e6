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
from collections.abc import Mapping
from typing import Any

from resfu_jax.backbones.resnet import VARIANTS, Block, ConvNorm, ResNet
from resfu_jax.convert._state import StateDict, shape_of

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


def load_resnet(state: Mapping[str, Any], resnet: ResNet, source: str) -> list[str]:
    """Load the entries of a checkpoint into a `ResNet`, in place; `source` names it in errors.

    Returns:
      The entries that were not used: those of a classifier or decoder, and counters. Sorted.

    Raises:
      Misfit: missing, unexpected or misshapen entries.
    """
    ignored, entries, names = [], {}, {}
    for name, value in state.items():
        key = _rename(name)
        if key.endswith(".num_batches_tracked") or key.startswith(_HEADS):
            ignored.append(name)
        else:
            entries[key], names[key] = value, name

    s = StateDict(entries, "ResNet", source=source, names=names)
    if any(
        k.endswith(".downsample.1.weight") and len(shape_of(v)) == 4 for k, v in entries.items()
    ):
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


def describe(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Which ResNet entries of these names and shapes are: `"ResNet-50"`; None if of another net."""
    shapes = {_rename(name): shape for name, shape in shapes.items()}
    found = [re.match(r"layer(\d)\.(\d+)\.conv(\d)\.weight$", name) for name in shapes]
    convs = {(int(m[1]), int(m[2]), int(m[3])) for m in found if m}
    if (1, 0, 1) not in convs:
        return None
    bottleneck = (1, 0, 3) in convs
    depths = tuple(len({block for stage, block, _ in convs if stage == i}) for i in (1, 2, 3, 4))
    widths = tuple((*shapes.get(f"layer{i}.0.conv1.weight", ()), 0)[0] for i in (1, 2, 3, 4))
    for name, v in VARIANTS.items():
        if (v.bottleneck, v.depths, v.widths) == (bottleneck, depths, widths):
            return f"ResNet-{name}"
    kind = "bottlenecks" if bottleneck else "basic blocks"
    return f"a ResNet of {kind}, widths {widths} and depths {depths}"


def options_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The arguments of the published `ResNet` that these are of; None: of none."""
    known = {f"ResNet-{name}": name for name in VARIANTS}
    name = known.get(describe(shapes) or "")
    return None if name is None else dict(variant=name)


def _rename(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


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
