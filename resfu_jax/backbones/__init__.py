"""Backbones: images to a pyramid of feature maps.

A backbone is called with images `(B, H, W, 3)` and returns feature maps, from the finest to the
coarsest; those of a ViT are all of one size. `features` are their channels, `strides` how many
pixels of the image lie between theirs.
"""

import inspect
from collections.abc import Iterable
from typing import Any

from flax import nnx

from resfu_jax._names import lookup
from resfu_jax.backbones.mit import MiT
from resfu_jax.backbones.resnet import ResNet
from resfu_jax.backbones.vit import ViT

BACKBONES: dict[str, Any] = {"mit": MiT, "resnet": ResNet, "vit": ViT}


def create_backbone(name: str = "mit", **options: Any) -> nnx.Module:
    """Build a backbone by name.

    Args:
      name: one of `BACKBONES`.
      **options: arguments of the class, `rngs` among them.

    Raises:
      ValueError: unknown name or option (near matches are named), or options that do not fit.
    """
    check_backbone_options(name, options)
    return BACKBONES[name](**options)


def check_backbone_options(name: str, options: Iterable[str]) -> None:
    """Raises a `ValueError` for a backbone that does not exist or does not take these options."""
    parameters = inspect.signature(lookup("backbone", BACKBONES, name).__init__).parameters
    known = {key: parameter for key, parameter in parameters.items() if key != "self"}
    for option in options:
        lookup(f"option of backbone {name!r}:", known, option)


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


__all__ = [
    "BACKBONES",
    "MiT",
    "ResNet",
    "ViT",
    "backbone_strides",
    "check_backbone_options",
    "create_backbone",
]
