"""Where the samples of a resized axis lie on the source axis, in exact integer arithmetic.

A source position is returned as the index below it and the fraction beyond that index. Computed in
floating point, the index is off by one for some size pairs; with integers it never is. Sizes may
be symbolic (`jax.export`). Exact while `2 * n_in * n_out < 2**31`.
"""

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

Size = Any  # int, or a symbolic dimension of `jax.export`
Taps = tuple[Int[Array, " n"], Float[Array, " n"]]


def _divide(
    numerator: Int[Array, " n"], denominator: Int[Array, ""], dtype: DTypeLike
) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    """Floor and fractional part of `numerator / denominator`."""
    lower, remainder = jnp.divmod(numerator, denominator)
    return lower, remainder.astype(dtype) / denominator.astype(dtype)


def half_pixel_taps(
    n_in: Size, n_out: Size, *, count: Size | None = None, dtype: DTypeLike = jnp.float32
) -> Taps:
    """Source positions `(p + 1/2) * n_in / n_out - 1/2` of the pixels p of a resized axis.

    This is the convention of PyTorch's `align_corners=False`: pixels are cells, and the two axes
    share their outer borders. Positions before the first or after the last pixel centre are left
    unclamped (index -1 is possible): replicate the edges, with `clip(i)` and `clip(i + 1)` and the
    same fraction.

    Args:
      n_in: size of the source axis.
      n_out: size of the resized axis.
      count: number of positions, `n_out` if not given. With it, `n_in / n_out` is only a ratio.
      dtype: of the fraction.

    Returns:
      `(lower, fraction)`: int32 index of the pixel at or before the position, and the distance to
      it in [0, 1).
    """
    p = jnp.arange(n_out if count is None else count, dtype=jnp.int32)
    n, m = jnp.asarray(n_in, jnp.int32), jnp.asarray(n_out, jnp.int32)
    return _divide((2 * p + 1) * n - m, 2 * m, dtype)


def align_corners_taps(n_in: Size, n_out: Size, *, dtype: DTypeLike = jnp.float32) -> Taps:
    """Source positions `p * (n_in - 1) / (n_out - 1)`: the first and last pixels coincide.

    A single output pixel lies on the first source pixel. Returns as `half_pixel_taps`.
    """
    p = jnp.arange(n_out, dtype=jnp.int32)
    last_in, last_out = (jnp.asarray(n, jnp.int32) - 1 for n in (n_in, n_out))
    return _divide(p * last_in, jnp.maximum(last_out, 1), dtype)


def take_clamped(x: Array, index: Int[Array, " n"], axis: int) -> Array:
    """`x` at `index` along `axis`; indices beyond the ends read the edge."""
    return jnp.take(x, index, axis=axis, mode="clip")
