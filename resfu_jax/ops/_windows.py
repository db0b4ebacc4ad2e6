"""Windows of neighbourhood attention: which pixels of an axis a pixel attends to."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from resfu_jax.ops.sizes import Size, divide_products, to_int32


def check_pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """Two positive ints, of two or of one for both axes."""
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2 or not all(isinstance(n, int) and n >= 1 for n in pair):
        raise ValueError(f"{name} must be a positive int or two of them, got {value!r}")
    return pair


NO_MEMBER = 2**30


def is_at_least(n: Size, least: Size) -> bool:
    """Whether n, which may be symbolic, is known to be."""
    try:
        return bool(n >= least)
    except jax.errors.InconclusiveDimensionOperation:
        return False


def window_members(n: Size, kernel_size: int, dilation: Size | Array) -> Int[Array, "n k"]:
    """Pixels of the window of every pixel of an axis of n pixels, which may be symbolic."""
    return _members(n, kernel_size, dilation, kernel_size)


def _members(
    n: Size, kernel_size: int, dilation: Size | Array, shown: int | Array
) -> Int[Array, "n k"]:
    """Those of windows of `shown` members, and then `NO_MEMBER`."""
    i, length = jnp.arange(n, dtype=jnp.int32), to_int32(n)
    position, residue = jnp.divmod(i, dilation)
    members = (length - residue + (dilation - 1)) // dilation
    start = jnp.clip(position - shown // 2, 0, members - shown)
    window = jnp.arange(kernel_size, dtype=jnp.int32)[None]
    pixels = residue[:, None] + dilation * (start[:, None] + window)
    return pixels if isinstance(shown, int) else jnp.where(window < shown, pixels, NO_MEMBER)


def repeated_members(n: Size, size: Size, kernel_size: int) -> Int[Array, "size k"]:
    """The same where `size` pixels show an axis of n by nearest-exact resizing: which of the n.

    The window's members are as far apart as a pixel of the axis is repeated, in whole pixels. Where
    a symbolic axis turns out to be smaller than the window, it has fewer, and then `NO_MEMBER`.
    """
    fits: int | Array = kernel_size
    if isinstance(n, int) and isinstance(size, int):
        dilation = max(1, size // n)
    else:
        dilation = jnp.maximum(to_int32(size // n), 1)
        fits = jnp.minimum(kernel_size, to_int32(size) // dilation)
    members = _members(size, kernel_size, dilation, fits)
    shown, _ = divide_products(size, n, 2 * size, step=2, first=1)
    return jnp.where(members < NO_MEMBER, jnp.take(shown, members, mode="clip"), NO_MEMBER)


def extend(x: Array, axis: int, kernel_size: int, dilation: int = 1) -> Array:
    """Extend an axis periodically, by half a window before and after it.

    The windows that are shifted inwards equal centred windows of an axis that is extended with the
    period of a window: position -m shows pixel K d - m, and position n - 1 + m shows pixel
    n - 1 + m - K d. (A centred window that hangs over an end by m members lacks just the m members
    that follow its other end, and the order of members does not matter.)
    """
    n, period = x.shape[axis], kernel_size * dilation
    before, after = kernel_size // 2 * dilation, (kernel_size - 1) // 2 * dilation
    parts = [
        jax.lax.slice_in_dim(x, period - before, period, axis=axis),
        x,
        jax.lax.slice_in_dim(x, n - period, n - period + after, axis=axis),
    ]
    return jnp.concatenate(parts, axis)
