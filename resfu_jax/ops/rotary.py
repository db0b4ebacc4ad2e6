"""Rotary positions: pairs of channels turned by angles that tell where a pixel is.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops.dtypes import at_least_float32


def rotate(x: Float[Array, "*axes d"], *angles: Float[Array, "... d"]) -> Float[Array, "*axes d"]:
    """Channels turned in pairs: x cos(a) + turn(x) sin(a), turn(x) = [-second half, first half].

    Where a channel of the first half and its partner in the second have the same angle, this turns
    their pair by it; by minus the angle, it turns it back. (JAFAR and AnyUp give the two angles of
    their own.) Sines and products are in float32 or better, whatever the types: in float16, the
    phase of a far pixel would be lost.

    Args:
      x: d channels, an even number, last.
      angles: radians, for all channels; of as many axes as x, of which some may have length 1. Of
        several, such as of rows and of columns, a is the sum; sines and cosines are then taken of
        each by itself, which are few.

    Returns:
      The turned channels, in the dtype of x.

    Raises:
      ValueError: an odd number of channels, no angles, or angles of another number of channels.
    """
    if (
        x.shape[-1] % 2
        or not angles
        or any(a.shape[-1] != x.shape[-1] or a.ndim != x.ndim for a in angles)
    ):
        raise ValueError(
            "x must have an even number of channels, and angles as many axes and channels as x, "
            f"got x {x.shape} and angles {', '.join(str(a.shape) for a in angles)}"
        )
    dtype, half = at_least_float32(x.dtype), x.shape[-1] // 2
    wide = x.astype(dtype)
    turned = jnp.concatenate([-wide[..., half:], wide[..., :half]], axis=-1)
    waves = ((jnp.cos(a), jnp.sin(a)) for a in (a.astype(dtype) for a in angles))
    cos, sin = functools.reduce(_sum_of_angles, waves)
    return (wide * cos + turned * sin).astype(x.dtype)


def _sum_of_angles(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """Cosine and sine of a sum, from those of its terms."""
    return a[0] * b[0] - a[1] * b[1], a[1] * b[0] + a[0] * b[1]
