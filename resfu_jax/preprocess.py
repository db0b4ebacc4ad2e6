"""What is done to images before a model sees them: one frozen object, made once.

    preprocess = training.create_preprocess(config)  # of a config: for batches of images
    preprocess = preprocess_of(model)  # of a model, whose images are not resized

The class is written in `serving.py`, which has to work without the rest of the package.
"""

import math
from typing import Any

from resfu_jax.serving import IMAGENET_MEAN, IMAGENET_STD, Preprocess, is_integer, is_real


def preprocess_of(model: Any, **changes: Any) -> Preprocess:
    """The preprocessing that a model needs.

    Args:
      model: a `SegmentationModel`. What others do not have, colours or the strides of a backbone,
        is ImageNet's, and 32.
      **changes: fields of `Preprocess`.

    Raises:
      ValueError: a field is out of range, or not what the model has inside.
    """
    return check_preprocess(Preprocess(**_known(model) | changes), model)


def check_preprocess(preprocess: Preprocess, model: Any) -> Preprocess:
    """The same, if it is what the model has inside.

    Raises:
      ValueError: other colours than the model normalises with, or sides that its strides do not
        divide.
    """
    known = _known(model)
    for name in ("mean", "std"):
        if name in known and getattr(preprocess, name) != tuple(map(float, known[name])):
            raise ValueError(
                f"{name} must be the model's, {known[name]}, got {getattr(preprocess, name)}"
            )
    strides = _strides(model)
    if any(preprocess.multiple % stride for stride in strides):
        raise ValueError(
            f"multiple must be a multiple of the backbone's strides {strides}, "
            f"got {preprocess.multiple}"
        )
    return preprocess


def _strides(model: Any) -> tuple[int, ...]:
    return tuple(getattr(getattr(model, "backbone", None), "strides", ()))


def _known(model: Any) -> dict[str, Any]:
    known = {name: getattr(model, name, None) for name in ("mean", "std")}
    known = {name: value for name, value in known.items() if isinstance(value, tuple)}
    return known | {"multiple": math.lcm(*_strides(model) or (32,))}


__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Preprocess",
    "check_preprocess",
    "is_integer",
    "is_real",
    "preprocess_of",
]
