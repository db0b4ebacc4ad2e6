"""Softmax over the taps of a window, which are few."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops._dtypes import at_least_float32


def softmax(scores: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """Over an axis, in float32 or better."""
    return _softmax(scores.astype(at_least_float32(scores.dtype)), axis % scores.ndim)


def softmax_gradient(
    weights: Float[Array, "..."], g: Float[Array, "..."], axis: int = -1
) -> Float[Array, "..."]:
    """Gradient to the scores of which `weights` are the softmax, g that to the weights."""
    g = weights * g
    return g - weights * _over_taps(jnp.add, g, axis % g.ndim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _softmax(scores, axis):
    parts = jnp.exp(scores - _over_taps(jnp.maximum, scores, axis))
    return parts / _over_taps(jnp.add, parts, axis)


_softmax.defvjp(
    lambda scores, axis: (_softmax(scores, axis),) * 2,
    lambda axis, weights, g: (softmax_gradient(weights, g, axis),),
)


def _over_taps(f: jnp.ufunc, x: Array, axis: int) -> Array:
    if axis < x.ndim - 1:
        return f.reduce(x, axis=axis, keepdims=True)
    # Tap by tap: XLA's CPU compiler reduces a short last axis several times slower.
    taps = [jax.lax.slice_in_dim(x, t, t + 1, axis=axis) for t in range(x.shape[axis])]
    return functools.reduce(f, taps)
