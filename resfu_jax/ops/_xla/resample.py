"""Separable linear maps of pixels as two products with small matrices.

A shift by a pixel is costly on a TPU, a product is not.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resfu_jax.ops._interp import neighbours
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.sizes import Size, whole_ratio

_MATRIX = 2**24  # elements of a matrix, at most


def resize(x: Array, *, size, n_in, n_out, method: str, align_corners: bool) -> Array:
    """Form of `ops.resize`."""
    for axis in (2, 1):
        n, m, ratio = x.shape[axis], size[axis - 1], (n_in[axis - 1], n_out[axis - 1])
        if method.startswith("nearest"):
            shape = (*x.shape[: axis + 1], m // n, *x.shape[axis + 1 :])
            repeated = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), shape)
            x = repeated.reshape(*x.shape[:axis], m, *x.shape[axis + 1 :])
        else:
            taps = neighbours(n, m, ratio, method, align_corners, x.dtype)
            x = along(x, _matrix(taps, n), axis)
    return x


def resize_refusal(x: Array, *, size, n_in, n_out, method: str, align_corners: bool) -> str | None:
    """Why `resize` does not apply."""
    if method.startswith("nearest"):
        whole = whole_ratio(x.shape[1:3], size) is not None and whole_ratio(n_in, n_out) is not None
        return None if whole else f"nearest needs whole ratios, got {x.shape[1:3]} -> {size}"
    large = [
        isinstance(n, int) and isinstance(m, int) and n * m > _MATRIX
        for n, m in zip(x.shape[1:3], size, strict=True)
    ]
    return f"its matrices would be too large, got {x.shape[1:3]} -> {size}" if any(large) else None


def upsample(
    x: Float[Array, "b h w c"], size: tuple[Size, Size], *, border: int = 0
) -> Float[Array, "b H W c"]:
    """Bilinear upsampling of what is inside a border of so many pixels, in the dtype of x.

    Pixels beyond the border repeat its edge.
    """
    for axis, m in ((1, size[0]), (2, size[1])):
        x = along(x, upsampling(x.shape[axis] - 2 * border, m, border, x.dtype), axis)
    return x


def upsampling(n: Size, m: Size, border: int, dtype: DTypeLike) -> Float[Array, "m n2"]:
    """Matrix of the bilinear upsampling of n pixels, with a border of others around them, to m."""
    taps = neighbours(n, m, (n, m), "bilinear", False, at_least_float32(dtype))
    taps = [(index + border, weight) for index, weight in taps]
    return _matrix(taps, n + 2 * border).astype(dtype)


def _matrix(taps: list[tuple[Array, Array]], n: Size) -> Float[Array, "m n"]:
    """Of the weights of pixels; those beyond the ends are the ends'."""
    key = jnp.arange(n, dtype=jnp.int32)[None]
    return sum(
        jnp.where(jnp.clip(index, 0, n - 1)[:, None] == key, weight[:, None], 0)
        for index, weight in taps
    )


def along(x: Float[Array, "b h w c"], matrix: Float[Array, "m n"], axis: int) -> Array:
    """The rows (axis 1) or columns (axis 2) of the map multiplied by a matrix, exactly."""
    subscripts = {1: "bhwc,yh->bywc", 2: "bhwc,xw->bhxc"}[axis]
    out = jnp.einsum(
        subscripts,
        x,
        matrix,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=at_least_float32(x.dtype),
    )
    return out.astype(x.dtype)
