"""What an output pixel is made of."""

import inspect

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from resfu_jax.ops._interp import Size
from resfu_jax.upsamplers._layers import need


def takes_values(upsampler: nnx.Module | type[nnx.Module]) -> bool:
    """Whether its output is a sum of features times weights, which can be applied to others."""
    cls = upsampler if isinstance(upsampler, type) else type(upsampler)
    return "values" in inspect.signature(cls.__call__).parameters


def pixel_weights(
    upsampler: nnx.Module,
    features: Float[Array, "b h w c"],
    pixel: tuple[int, int],
    *,
    guide: Float[Array, "b H W cg"] | None = None,
    output_size: tuple[Size, Size] | None = None,
) -> Float[Array, "b h w"]:
    """The weights that one output pixel gives to the pixels of the features.

    They are exact: the derivative of the output pixel to the values, with the kernels held. Where
    groups of channels have weights of their own, it is their mean. Weights of a convex kernel sum
    to 1, where nothing beyond the image takes a share; with FADE's gate, the rest is the guide's.

    Args:
      upsampler: one that takes `values`.
      features: low-resolution features.
      pixel: row and column of the output pixel, counted from 0.
      guide: for guided upsamplers.
      output_size: for the others, as in their call.

    Raises:
      ValueError: an upsampler without such weights, or a pixel outside the output.
    """
    need(
        takes_values(upsampler),
        "upsampler must be one that reassembles features, which has weights; "
        f"{type(upsampler).__name__} makes new ones",
    )
    other = guide if upsampler.guide == "features" else output_size

    def up(values: Array) -> Array:
        return upsampler(features, other, values=values)

    out, vjp = jax.vjp(up, features)
    inside = all(0 <= i < n for i, n in zip(pixel, out.shape[1:3], strict=True))
    need(inside, f"pixel must lie in the output of {out.shape[1]}x{out.shape[2]}, got {pixel}")
    (weights,) = vjp(jnp.zeros_like(out).at[:, *pixel].set(1 / out.shape[3]))
    return weights.sum(axis=-1)
