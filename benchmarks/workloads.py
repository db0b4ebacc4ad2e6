"""What is measured: sizes that come up in practice, named after where they do."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from resfu_jax import create_upsampler
from resfu_jax.upsamplers import upsampler_entry


@dataclasses.dataclass(frozen=True)
class Workload:
    """Sizes of one call, batch 1.

    Attributes:
      channels: of the features.
      size: of the features, (h, w).
      scale: of the output, and of the guide, to the features.
      guide: channels of the guide.
    """

    channels: int
    size: tuple[int, int]
    scale: int
    guide: int

    @property
    def output_size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.size[0] * self.scale, self.size[1] * self.scale


WORKLOADS = {
    "shapes": Workload(64, (8, 8), 4, 64),
    "segformer_x2": Workload(256, (64, 64), 2, 256),
    "segformer_x4": Workload(256, (32, 32), 4, 256),
    "segformer_x8": Workload(256, (16, 16), 8, 256),
    "segmenter": Workload(384, (32, 32), 4, 32),
    "dino_small": Workload(384, (14, 14), 16, 32),
    "dino": Workload(384, (28, 28), 16, 32),
    "dino_base": Workload(768, (28, 28), 16, 32),
    "dino_hd": Workload(768, (64, 64), 16, 32),
    "detection": Workload(256, (100, 168), 2, 256),
}
# The decoder that brings all of its levels to one size.
GROUPS = {"segformer": ("segformer_x2", "segformer_x4", "segformer_x8")}


class Skip(Exception):
    """Why something is not measured."""


def is_guided(name: str) -> bool:
    """Whether the upsampler is called with a guide."""
    return upsampler_entry(name).cls.guide != "none"


def input_shapes(name: str, workload: Workload) -> list[tuple[int, ...]]:
    """Shapes of the features and, where the upsampler takes one, of the guide or the image."""
    shapes: list[tuple[int, ...]] = [(1, *workload.size, workload.channels)]
    if is_guided(name):
        by_image = upsampler_entry(name).cls.guide == "image"
        shapes.append((1, *workload.output_size, 3 if by_image else workload.guide))
    return shapes


def create(name: str, workload: Workload, **options) -> nnx.Module:
    """The upsampler for the workload's sizes."""
    return create_upsampler(
        name,
        features=workload.channels,
        guide_features=workload.guide,
        scale=workload.scale,
        **options,
    )


def has_literal_form(name: str) -> bool:
    """Whether the upsampler can be built with `implementation="reference"`."""
    return "implementation" in inspect.signature(upsampler_entry(name).cls.__init__).parameters


def fit(name: str, workload: Workload) -> tuple[Workload, str]:
    """The workload as the upsampler can run it, and a note of what was changed.

    Upsamplers that mix guide and features need both equally wide: the guide is then made so.

    Raises:
      Skip: the upsampler is not defined at these sizes.
    """
    try:
        _try(name, workload)
        return workload, ""
    except ValueError as error:
        reason = str(error)
    wide = dataclasses.replace(workload, guide=workload.channels)
    try:
        _try(name, wide)
    except ValueError:
        raise Skip(reason) from None
    return wide, " (as wide as the features, which it needs)"


def function(graphdef: nnx.GraphDef, direction: str) -> Callable[..., Any]:
    """An upsampler as a function of its parameters and inputs.

    Forward it is `(params, *inputs) -> y`, with backward `(params, cotangent, *inputs) -> (y,
    gradient to params, *gradients to inputs)`.
    """

    def forward(params, *inputs):
        return nnx.merge(graphdef, params)(*inputs)

    def forward_backward(params, cotangent, *inputs):
        y, vjp = jax.vjp(forward, params, *inputs)
        return y, *vjp(cotangent)

    return forward if direction == "forward" else forward_backward


def abstract_call(
    name: str, workload: Workload, direction: str, dtype: str, **options
) -> tuple[Callable[..., Any], tuple]:
    """A `function` and the shapes of its arguments, to compile: nothing is computed.

    Args:
      name: of the upsampler.
      workload: sizes, which must fit it.
      direction: "forward" or "forward+backward".
      dtype: of inputs and computation; parameters are float32.
      options: of the upsampler.
    """
    dtype = jnp.dtype(dtype)
    module = nnx.eval_shape(lambda: create(name, workload, dtype=dtype, **options))
    graphdef, params = nnx.split(module)

    def array(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    inputs = [array(shape) for shape in input_shapes(name, workload)]
    y = array((1, *workload.output_size, workload.channels))
    return function(graphdef, direction), (
        params,
        *([] if direction == "forward" else [y]),
        *inputs,
    )


def _try(name: str, workload: Workload) -> None:
    arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in input_shapes(name, workload)]
    nnx.eval_shape(lambda *arrays: create(name, workload)(*arrays), *arrays)
