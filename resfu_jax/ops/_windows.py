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


def window_members(n: Size, kernel_size: int, dilation: Size | Array) -> Int[Array, "n k"]:
    """Pixels of the window of every pixel of an axis of n pixels, which may be symbolic."""
    i, length = jnp.arange(n, dtype=jnp.int32), to_int32(n)
    position, residue = jnp.divmod(i, dilation)
    members = (length - residue + (dilation - 1)) // dilation
    start = jnp.clip(position - kernel_size // 2, 0, members - kernel_size)
    window = jnp.arange(kernel_size, dtype=jnp.int32)
    return residue[:, None] + dilation * (start[:, None] + window[None, :])


def repeated_members(n: Size, size: Size, kernel_size: int) -> Int[Array, "size k"]:
    """The same where `size` pixels show an axis of n by nearest-exact resizing: which of the n.

    The window's members are as far apart as a pixel of the axis is repeated, in whole pixels.
    """
    if isinstance(n, int) and isinstance(size, int):
        dilation = max(1, size // n)
    else:
        dilation = jnp.maximum(to_int32(size // n), 1)
    shown, _ = divide_products(size, n, 2 * size, step=2, first=1)
    return jnp.take(shown, window_members(size, kernel_size, dilation), mode="clip")


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
