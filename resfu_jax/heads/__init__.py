"""Heads: a pyramid of feature maps to logits, or to depth (`DEPTH_HEADS`).

A head is called with the maps that a backbone returns and the normalised images, and takes its
upsampler by name. `head.upsampled(maps, images)` is what it classifies.
"""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from flax import nnx

from resfu_jax._names import lookup
from resfu_jax.heads.depth import BinsHead, DepthDecoder
from resfu_jax.heads.linear import LinearHead
from resfu_jax.heads.segformer import SegFormerHead
from resfu_jax.heads.upernet import UPerNetHead

# Name -> class, and the options that the name stands for.
HEADS: dict[str, tuple[Any, dict[str, Any]]] = {
    "segformer": (SegFormerHead, {}),
    "upernet": (UPerNetHead, {}),
    "fpn": (UPerNetHead, {"pool_sizes": ()}),
    "linear": (LinearHead, {}),
    "linear_probe": (LinearHead, {"scale": 16, "guide_stride": 1}),
    "bins": (BinsHead, {}),
    "depth_decoder": (DepthDecoder, {}),
}
DEPTH_HEADS = ("bins", "depth_decoder")


def create_head(
    name: str = "segformer", *, in_features: Sequence[int], num_classes: int, **options: Any
) -> nnx.Module:
    """Build a head by name.

    Args:
      name: one of `HEADS`.
      in_features: channels of the backbone's maps.
      num_classes: number of logits a pixel.
      **options: further arguments of the class, `rngs` among them, over those of the name.

    Raises:
      ValueError: unknown name (near matches are named), or options that do not fit.
    """
    check_head_options(name, options)
    cls, preset = HEADS[name]
    return cls(in_features, num_classes, **(preset | options))


def check_head_options(name: str, options: Iterable[str]) -> None:
    """Raises a `ValueError` for a head that does not exist or does not take these options."""
    cls, _ = lookup("head", HEADS, name)
    parameters = inspect.signature(cls.__init__).parameters
    known = {key: p for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    for option in options:
        lookup(f"option of head {name!r}:", known, option)


__all__ = [
    "DEPTH_HEADS",
    "HEADS",
    "BinsHead",
    "DepthDecoder",
    "LinearHead",
    "SegFormerHead",
    "UPerNetHead",
    "check_head_options",
    "create_head",
]
