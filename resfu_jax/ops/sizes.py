"""Sizes of axes, which may be symbolic, and exact integer arithmetic with them."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

Size = Any  # int, or a symbolic dimension of `jax.export`

LONGEST = 2**29  # pixels of an axis


def whole_ratio(size: tuple[Size, ...], out_size: tuple[Size, ...]) -> tuple[int, ...] | None:
    """`out_size / size` if all quotients are whole, else `None`. Sizes may be symbolic."""
    if any(isinstance(n, int) and n < 1 for n in size):
        return None
    if any(o % n != 0 for n, o in zip(size, out_size, strict=True)):
        return None
    ratio = tuple(o // n for n, o in zip(size, out_size, strict=True))
    # The quotient of unrelated symbolic sizes is symbolic, and has no phases to enumerate.
    return ratio if all(isinstance(r, int) and r >= 1 for r in ratio) else None


def divide_products(
    count: Size, n: Size, d: Size, *, step: int = 1, first: Size = 0, offset: Size = 0
) -> tuple[Int[Array, " n"], Int[Array, " n"]]:
    """Floor and remainder of `(p n + offset) / d` for `count` numbers p = first, first + step, ...

    All are int32, products need not be: p, n and the quotients must be below 2**31, d at most twice
    `LONGEST`, and offset within -d / 2 .. d / 2.
    """
    p = first + step * jnp.arange(count, dtype=jnp.int32)
    narrow = all(isinstance(i, int) for i in (count, n, d, first, offset)) and (
        (first + step * count) * n + abs(offset) < 2**31
    )
    n, d, offset = (to_int32(i) for i in (n, d, offset))
    if narrow:
        return jnp.divmod(p * n + offset, d)

    # Long division by d, with 15 bits of p to a digit. A quotient is estimated in float32; what it
    # leaves of the product is below 2**31, so right although the product wraps around, and one
    # integer division of that mends the estimate.
    def estimate(rest, digit, offset):
        product = rest.astype(jnp.float32) * 2.0**15
        product = product + digit.astype(jnp.float32) * n.astype(jnp.float32)
        return jnp.floor((product + offset.astype(jnp.float32)) / d.astype(jnp.float32))

    quotient = rest = jnp.zeros_like(p)
    for digit, added in ((p >> 15, jnp.zeros_like(offset)), (p & (2**15 - 1), offset)):
        guess = estimate(rest, digit, added).astype(jnp.int32)
        correction, rest = jnp.divmod((rest << 15) + digit * n + added - guess * d, d)
        quotient = (quotient << 15) + guess + correction
    return quotient, rest


def cell_index(n_in: Size, n_out: Size) -> Int[Array, " n"]:
    """The cell floor(p n_in / n_out) of every output pixel p of an axis."""
    return divide_products(n_out, n_in, n_out)[0]


def to_int32(n: Size) -> Int[Array, ""]:
    """A size, which may be symbolic, as an array."""
    return jnp.asarray(n, jnp.int32)
