"""Rotary positions: pairs of channels turned by angles that tell where a pixel is.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops.dtypes import at_least_float32


def rotate(x: Float[Array, "*axes d"], angles: Float[Array, "... d"]) -> Float[Array, "*axes d"]:
    """X cos(a) + turn(x) sin(a), with turn(x) = [-second half of the channels, first half].

    Where a channel of the first half and its partner in the second have the same angle, this turns
    their pair by it; by minus the angle, it turns it back. (JAFAR and AnyUp give the two angles of
    their own.) Sines and products are in float32 or better, whatever the types: in float16, the
    phase of a far pixel would be lost.

    Args:
      x: d channels, an even number, last.
      angles: radians, for all channels; of as many axes as x, of which some may have length 1.

    Returns:
      The turned channels, in the dtype of x.

    Raises:
      ValueError: an odd number of channels, or angles of another number.
    """
    if x.shape[-1] % 2 or angles.shape[-1] != x.shape[-1] or angles.ndim != x.ndim:
        raise ValueError(
            "x must have an even number of channels, and angles as many axes and channels as x, "
            f"got x {x.shape} and angles {angles.shape}"
        )
    dtype, half = at_least_float32(x.dtype), x.shape[-1] // 2
    wide, angles = x.astype(dtype), angles.astype(dtype)
    turned = jnp.concatenate([-wide[..., half:], wide[..., :half]], axis=-1)
    return (wide * jnp.cos(angles) + turned * jnp.sin(angles)).astype(x.dtype)
