"""Backbones: images to a pyramid of feature maps.

A backbone is called with images `(B, H, W, 3)` and returns feature maps, from the finest to the
coarsest; those of a ViT are all of one size. `features` are their channels, `strides` how many
pixels of the image lie between theirs.
"""

from typing import Any

from flax import nnx

from resfu_jax._names import lookup
from resfu_jax.backbones.mit import MiT
from resfu_jax.backbones.resnet import ResNet
from resfu_jax.backbones.vit import ViT

BACKBONES = {"mit": MiT, "resnet": ResNet, "vit": ViT}


def create_backbone(name: str = "mit", **options: Any) -> nnx.Module:
    """Build a backbone by name.

    Args:
      name: one of `BACKBONES`.
      **options: arguments of the class, `rngs` among them.

    Raises:
      ValueError: unknown name (near matches are named), or options that do not fit.
    """
    return lookup("backbone", BACKBONES, name)(**options)


__all__ = ["BACKBONES", "MiT", "ResNet", "ViT", "create_backbone"]
