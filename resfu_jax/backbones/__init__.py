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


def backbone_strides(name: str, **options: Any) -> tuple[int, ...]:
    """The strides of a backbone's maps, without building it.

    Args:
      name: one of `BACKBONES`. A class without `strides_of` has those of a pyramid, up to 32.
      **options: arguments of the class.

    Raises:
      ValueError: unknown name, or options that no strides follow from.
    """
    family = lookup("backbone", BACKBONES, name)
    return family.strides_of(**options) if hasattr(family, "strides_of") else (4, 8, 16, 32)


__all__ = ["BACKBONES", "MiT", "ResNet", "ViT", "backbone_strides", "create_backbone"]
