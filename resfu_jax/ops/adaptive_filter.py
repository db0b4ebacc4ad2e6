"""A filter with weights of its own for every pixel, of a map that is upsampled on the way.

    R = resize(x, size of the weights, bicubic)                     reflected beyond its border
    out[p] = sum_uv weights[p, uv] R[p + (u, v) - r],               r = (K - 1) / 2

R, which is as large as the result, exists for a few rows at a time only.

Source: FeatUp (Fu et al., ICLR 2024), whose adaptive convolution takes R as it is.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from resfu_jax.ops._cpu import adaptive_filter as cpu
from resfu_jax.ops._forms import Forms, Implementation
from resfu_jax.ops._interp import neighbours
from resfu_jax.ops._rows import Rows, block_rows, map_row_blocks
from resfu_jax.ops._xla import windows as xla
from resfu_jax.ops.checks import takes_maps
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.pad import pad_axis
from resfu_jax.ops.resize import resize
from resfu_jax.ops.sizes import Size, to_int32, whole_ratio
from resfu_jax.ops.unfold import unfold


@takes_maps("x", "weights")
def adaptive_filter(
    x: Float[Array, "b h w c"],
    weights: Float[Array, "b H W taps"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "b H W c"]:
    """The filtered map; see the module's docstring.

    Args:
      x: the map; of the weights' size, it is filtered as it is.
      weights: K*K of every output pixel, row-major, K odd, for all channels.
      implementation: `"reference"` gathers every pixel's window. The others take blocks of rows, of
        which `"xla"` spreads the weights over all pixels around a strip, for one matrix product,
        and `"cpu"` sums up shifted maps. `None` takes the best of the platform.

    Returns:
      A map of the weights' size, in the dtype of x; sums are in float32 or better.

    Raises:
      ValueError: shapes that do not fit, or an even K.
    """
    if x.ndim != 4 or weights.ndim != 4 or x.shape[0] != weights.shape[0]:
        raise ValueError(
            "x (B, h, w, C) and weights (B, H, W, K*K) must have 4 axes and the same batch size, "
            f"got {x.shape} and {weights.shape}"
        )
    kernel_size = math.isqrt(weights.shape[3])
    if kernel_size**2 != weights.shape[3] or kernel_size % 2 == 0:
        raise ValueError(
            f"weights must have K*K channels for an odd K, got {weights.shape[3]} channels"
        )
    return _FORMS(implementation, x, weights)


def reflected(x: Float[Array, "b h w c"], border: int, axis: int) -> Array:
    """Rows (axis 1) or columns (axis 2) reflected in the outer ones, however few there are."""
    n = x.shape[axis]
    try:
        fits = n > border
    except jax.errors.InconclusiveDimensionOperation:
        fits = False  # known when it runs
    if not fits:
        return jnp.take(x, _reflect(jnp.arange(-border, n + border, dtype=jnp.int32), n), axis=axis)
    return pad_axis(x, border, axis, "reflect")


def _reflect(index: Int[Array, "*n"], n: Size) -> Int[Array, "*n"]:
    """Of any index, the one in 0 .. n - 1 that its pixel reflects."""
    last = to_int32(n) - 1
    index = jnp.mod(index, jnp.maximum(2 * last, 1))
    return jnp.minimum(index, 2 * last - index)


def _reference(x: Array, weights: Array) -> Array:
    dtype, k = at_least_float32(x.dtype), math.isqrt(weights.shape[3])
    r = _upsampled(x.astype(dtype), weights.shape[1:3])
    for axis in (1, 2):
        r = reflected(r, k // 2, axis)
    return jnp.einsum("bhwt,bhwtc->bhwc", weights.astype(dtype), unfold(r, k)).astype(x.dtype)


def _upsampled(x: Array, size: tuple[Size, Size]) -> Array:
    return x if size == x.shape[1:3] else resize(x, size, method="bicubic")


def _in_blocks(filtered: Callable[..., Array], x: Array, weights: Array) -> Array:
    """Block of rows by block of rows; `filtered` is of weights and of a map with a border."""
    size, taps = weights.shape[1:3], weights.shape[3]
    ratio = whole_ratio(x.shape[1:2], size[:1])
    if ratio is None:  # blocks would have to begin at different places between rows of x
        x, ratio = _upsampled(x, size), (1,)
    (ratio,), reach, (batch, h) = ratio, math.isqrt(taps) // 2, x.shape[:2]
    # Rows of x that the first row of a block needs before its own, for what `reach` rows above it
    # interpolates.
    halo = 1 - (1 - 2 * reach - ratio) // (2 * ratio)
    least = -(-4 * reach // ratio)
    rows = block_rows(h, batch * ratio * size[1] * taps, least=max(1, least))
    matrices = _interpolation(h, size[0], rows, halo, reach, at_least_float32(x.dtype))

    def block(x: Array, weights: Array, matrix: Array) -> tuple[Array]:
        r = _upsampled(x, (x.shape[1], size[1]))
        r = jnp.einsum(
            "yk,bkxc->byxc",
            jax.lax.stop_gradient(matrix[0]),
            r.astype(matrix.dtype),
            precision=jax.lax.Precision.HIGHEST,
        )
        return (filtered(weights, reflected(r, reach, 2)).astype(x.dtype),)

    (out,) = map_row_blocks(
        block,
        h // rows,
        (Rows(1, rows, rows + 2 * halo), Rows(1, ratio * rows, ratio * rows), Rows(0, 1, 1)),
        (Rows(1, ratio * rows, ratio * rows),),
        pad_axis(x, halo, 1),
        weights,
        matrices,
    )
    return out


def _interpolation(
    h: Size, height: Size, rows: int, halo: int, reach: int, dtype: DTypeLike
) -> Float[Array, "blocks out in"]:
    """For each block, what its `rows` rows of x, and `halo` more at both ends, give to R's.

    Of R there are `reach` more at both ends, too, which may be reflected.
    """
    out = height // h * rows
    first = rows * jnp.arange(h // rows, dtype=jnp.int32)[:, None]
    row = height // h * first + jnp.arange(-reach, out + reach, dtype=jnp.int32)[None]
    row = _reflect(row, height)
    near = first[..., None] + jnp.arange(-halo, rows + halo, dtype=jnp.int32)[None, None]
    return sum(
        jnp.where(
            jnp.clip(jnp.take(index, row), 0, h - 1)[..., None] == near,
            jnp.take(weight, row)[..., None],
            0,
        )
        for index, weight in neighbours(h, height, (h, height), "bicubic", False, dtype)
    )


_FORMS = Forms(
    "adaptive_filter",
    _reference,
    xla=functools.partial(_in_blocks, xla.filtered),
    cpu=functools.partial(_in_blocks, cpu.filtered),
)
