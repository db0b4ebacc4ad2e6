"""What an output pixel is made of."""

import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Integer

from resfu_jax._checks import need

Index = int | Integer[Array, ""]


def takes_values(upsampler: nnx.Module | type[nnx.Module]) -> bool:
    """Whether its output is a sum of features times weights, which can be applied to others."""
    cls = upsampler if isinstance(upsampler, type) else type(upsampler)
    return "values" in inspect.signature(cls.__call__).parameters


def keeps_space(upsampler: Any) -> bool:
    """Whether every output is a sum of features alone, so that the two can be compared."""
    return takes_values(upsampler) and not upsampler.mixes


def pixel_weights(
    upsampler: nnx.Module,
    features: Float[Array, "b h w c"],
    pixel: tuple[Index, Index],
    *inputs: Any,
) -> Float[Array, "b h w"]:
    """The weights that one output pixel gives to the pixels of the features.

    They are exact: the derivative of the output pixel to the values, with the kernels held. Where
    groups of channels have weights of their own, it is their mean. Weights of a convex kernel sum
    to 1, where nothing beyond the image takes a share; with FADE's gate, the rest is the guide's.

    Args:
      upsampler: one that takes `values`.
      features: low-resolution features.
      pixel: row and column of the output pixel, counted from 0.
      *inputs: what the upsampler is called with after the features: the guide, or the output's
        size, if any.

    Raises:
      ValueError: an upsampler without such weights, or a pixel outside the output.
    """
    return path_weights([(upsampler, features, *inputs)], pixel)


def path_weights(
    path: Sequence[tuple[Any, ...]], pixel: tuple[Index, Index]
) -> Float[Array, "b h w"]:
    """`pixel_weights` of upsamplers one after the other, for pixels of the first one's features.

    Args:
      path: each upsampler with what it is called with: features, and the guide, if any.
      pixel: row and column of the last one's output.
    """
    for upsampler, *_ in path:
        need(
            takes_values(upsampler),
            "upsampler must be one that reassembles features, which has weights; "
            f"{type(upsampler).__name__} makes new ones",
        )

    def up(values: Array) -> Array:
        for upsampler, *inputs in path:
            values = upsampler(*inputs, values=values)
        return values

    out, vjp = jax.vjp(up, path[0][1])
    for i, n in zip(pixel, out.shape[1:3], strict=True):
        need(
            isinstance(i, Array) or 0 <= i < n,
            f"pixel must lie in the output of {out.shape[1]}x{out.shape[2]}, got {pixel}",
        )
    (weights,) = vjp(jnp.zeros_like(out).at[:, *pixel].set(1 / out.shape[3]))
    return weights.sum(axis=-1)
