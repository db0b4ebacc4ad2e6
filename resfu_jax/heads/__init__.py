"""Heads: a pyramid of feature maps to logits.

A head is called with the maps that a backbone returns and takes its upsampler by name.
"""

from collections.abc import Sequence
from typing import Any

from flax import nnx

from resfu_jax._names import lookup
from resfu_jax.heads.segformer import SegFormerHead

HEADS = {"segformer": SegFormerHead}


def create_head(
    name: str = "segformer", *, in_features: Sequence[int], num_classes: int, **options: Any
) -> nnx.Module:
    """Build a head by name.

    Args:
      name: one of `HEADS`.
      in_features: channels of the backbone's maps.
      num_classes: number of logits a pixel.
      **options: further arguments of the class, `rngs` among them.

    Raises:
      ValueError: unknown name (near matches are named), or options that do not fit.
    """
    return lookup("head", HEADS, name)(in_features, num_classes, **options)


__all__ = ["HEADS", "SegFormerHead", "create_head"]
