"""The order in which XLA computes what does not depend on each other, hence what is alive at once.

Large computations that are independent are scheduled side by side, and need the memory of both. An
optimisation barrier does not help: XLA's CPU compiler drops it before it fuses and schedules. So
the later one gets a zero that depends on the earlier one, which must be the result of a loop
(`_row_blocks`) or of a scatter: of anything else, the compiler would compute the one pixel apart.
For any other, a branch that reads it serves (`zeros_once`). Within a loop, what is cut out of an
array comes later by its index (`later`).
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int


@jax.custom_vjp
def after(x: Array, done: Array) -> Array:
    """x, but computed after `done` of the same batch; their gradients in the opposite order."""
    return x + zeros_after(done, (x.shape[0],) + (1,) * (x.ndim - 1), x.dtype)


def zeros_after(done: Array, shape: tuple, dtype: DTypeLike) -> Array:
    """Zeros that exist from when `done`, of the same batch, is computed."""
    pixel = done[(slice(None), *_middle(done.shape[1:]))]
    zero = (pixel > jnp.inf).astype(dtype).reshape(done.shape[0], *[1] * (len(shape) - 1))
    return jnp.broadcast_to(zero, shape)


def later(i: Int[ArrayLike, ""], done: Array) -> Int[ArrayLike, ""]:
    """A loop's index i, but not known before `done` is computed: what it cuts comes after.

    On a CPU; elsewhere all devices would wait for the one that has the pixel. A number, the index
    of the only block, stays as it is.
    """
    if isinstance(i, int) or jax.default_backend() != "cpu":
        return i
    return jnp.asarray(i, jnp.int32) + never(done).astype(jnp.int32)


def never(done: Array) -> Bool[Array, ""]:
    """False, but not known before `done` is computed."""
    return done[_middle(done.shape)] > jnp.inf


def _middle(shape: tuple) -> tuple[int, ...]:
    """An inner pixel, as a padded border is known to the compiler."""
    return tuple(n // 2 if isinstance(n, int) else 0 for n in shape)


def zeros_once(done: Array) -> Float[Array, "b"]:
    """A zero for each image of `done`, any result, that exists once all of it is computed.

    On a CPU; elsewhere a branch costs more than it can save, and the zeros are just zeros.
    """
    if jax.default_backend() != "cpu":
        return jnp.zeros(done.shape[0], done.dtype)

    def pixel(x):
        return x[(slice(None),) + (0,) * (x.ndim - 1)]

    # The compiler does not look into a branch: it gets the array itself, whichever is taken.
    return jax.lax.cond(
        done[(0,) * done.ndim] > 0,
        lambda x: (pixel(x) > jnp.inf).astype(x.dtype),
        lambda x: (pixel(x) < -jnp.inf).astype(x.dtype),
        done,
    )


def _after_bwd(done, g):
    return g, zeros_after(g, done.shape, done.dtype)


after.defvjp(lambda x, done: (after(x, done), done), _after_bwd)
