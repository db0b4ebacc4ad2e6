"""Rounding to bfloat16 within loops."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def cast(a: Array, dtype: DTypeLike) -> Array:
    """`a.astype(dtype)`, for what a loop puts into a bfloat16 array.

    The bits are made here: XLA's own rounding keeps such a loop from being vectorised (JAX 0.12).
    """
    if a.dtype != jnp.float32 or dtype != jnp.bfloat16:
        return a.astype(dtype)
    bits = jax.lax.bitcast_convert_type(jax.lax.reduce_precision(a, 8, 7), jnp.uint32)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


@cast.defjvp
def _(dtype, primals, tangents):
    return cast(*primals, dtype), tangents[0].astype(dtype)
