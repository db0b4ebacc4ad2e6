"""Dtypes of computations. NumPy's promotion, unlike JAX's, is not affected by its strict mode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array


def promote(*dtypes: DTypeLike) -> np.dtype:
    """The narrowest dtype that holds all of these: float32 for float16 with bfloat16."""
    first, *others = (np.dtype(dtype) for dtype in dtypes)
    if all(dtype == first for dtype in others):
        return first
    # All that holds two different ones has 32 bits. (Of the two above, NumPy knows none that does.)
    return functools.reduce(np.promote_types, [np.dtype(np.float32), first, *others])


def at_least_float32(dtype: DTypeLike) -> np.dtype:
    """For sums, statistics and softmax: float32, or `dtype` if it is wider."""
    return np.promote_types(dtype, np.float32)


def bfloat16_is_native() -> bool:
    """Whether XLA looks up and updates bfloat16 as it is: not on a CPU before JAX 0.11.2."""
    return jax.default_backend() != "cpu" or jax.__version_info__ >= (0, 11, 2)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def cast(a: Array, dtype: DTypeLike) -> Array:
    """`a.astype(dtype)`, for what a loop puts into a bfloat16 array.

    On a CPU the bits are made here: XLA's own rounding keeps such a loop from being vectorised
    (JAX 0.12).
    """
    if a.dtype != jnp.float32 or dtype != jnp.bfloat16 or jax.default_backend() != "cpu":
        return a.astype(dtype)
    bits = jax.lax.bitcast_convert_type(jax.lax.reduce_precision(a, 8, 7), jnp.uint32)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


@cast.defjvp
def _(dtype, primals, tangents):
    return cast(*primals, dtype), tangents[0].astype(dtype)
