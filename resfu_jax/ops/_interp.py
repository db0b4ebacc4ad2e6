"""Where the samples of a resized axis lie on the source axis, in exact integer arithmetic.

A source position is returned as the index below it and the fraction beyond that index. Computed in
floating point, the index is off by one for some size pairs; with integers it never is. Sizes may
be symbolic (`jax.export`). Exact for axes of up to `LONGEST` pixels.
"""

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from resfu_jax.ops.sizes import Size, divide_products, to_int32

Taps = tuple[Int[Array, " n"], Float[Array, " n"]]


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
      it in [0, 1), which a float32 rounds to 1 at worst.
    """
    count = n_out if count is None else count
    lower, rest = divide_products(count, n_in, 2 * n_out, step=2, first=1, offset=-n_out)
    return lower, _quotient(rest, 2 * n_out, dtype)


def align_corners_taps(n_in: Size, n_out: Size, *, dtype: DTypeLike = jnp.float32) -> Taps:
    """Source positions `p * (n_in - 1) / (n_out - 1)`: the first and last pixels coincide.

    A single output pixel lies on the first source pixel. Returns as `half_pixel_taps`.
    """
    last = max(n_out - 1, 1) if isinstance(n_out, int) else jnp.maximum(to_int32(n_out) - 1, 1)
    lower, rest = divide_products(n_out, n_in - 1, last)
    return lower, _quotient(rest, last, dtype)


def _quotient(a: Array, d: Size, dtype: DTypeLike) -> Float[Array, " n"]:
    return a.astype(dtype) / to_int32(d).astype(dtype)


def take_clamped(x: Array, index: Int[Array, " n"], axis: int) -> Array:
    """`x` at `index` along `axis`; indices beyond the ends read the edge."""
    return jnp.take(x, index, axis=axis, mode="clip")


def neighbours(
    n: Size,
    size: Size,
    ratio: tuple[Size, Size],
    method: str,
    align_corners: bool,
    dtype: DTypeLike,
) -> list[tuple[Int[Array, " n"], Float[Array, " n"]]]:
    """Of an axis of n pixels that is resized: index and weight of the pixels that outputs combine.

    `ratio` are n_in and n_out; indices beyond the axis stand for its ends.
    """
    if align_corners:
        lower, t = align_corners_taps(n, size, dtype=dtype)
    else:
        lower, t = half_pixel_taps(*ratio, count=size, dtype=dtype)
    return [(lower + offset, weight) for offset, weight in kernel_weights(method, t).items()]


def kernel_weights(method: str, t: Any) -> dict[int, Any]:
    """Weights of the pixels around a position, by their offset from the pixel below it.

    `t`, a number or an array, is the distance to that pixel, in [0, 1).
    """
    if method == "bilinear":
        return {0: 1 - t, 1: t}
    a = -0.75  # Keys, "Cubic convolution interpolation for digital image processing", 1981, eq. 4

    def near(d):
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d):
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    return {-1: far(1 + t), 0: near(t), 1: near(1 - t), 2: far(2 - t)}
