"""Softmax over the taps of a window, which are few, on a CPU."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops.dtypes import at_least_float32


def softmax(scores: Float[Array, "..."]) -> Float[Array, "..."]:
    """Form of `ops.softmax`."""
    return _softmax(scores.astype(at_least_float32(scores.dtype)))


@jax.custom_vjp
def _softmax(scores):
    parts = jnp.exp(scores - _over_taps(jnp.maximum, scores))
    return parts / _over_taps(jnp.add, parts)


def _softmax_bwd(weights, g):
    g = weights * g
    return (g - weights * _over_taps(jnp.add, g),)


_softmax.defvjp(lambda scores: (_softmax(scores),) * 2, _softmax_bwd)


def _over_taps(f: jnp.ufunc, x: Array) -> Array:
    # Tap by tap: XLA's CPU compiler reduces a short last axis several times slower.
    taps = [jax.lax.slice_in_dim(x, t, t + 1, axis=-1) for t in range(x.shape[-1])]
    return functools.reduce(f, taps)
