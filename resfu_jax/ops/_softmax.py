"""Softmax over the taps of a window, which are few and the last axis."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops._dtypes import at_least_float32

_FEW = 64  # taps, beyond which XLA's reduction is better


def softmax(scores: Float[Array, "... taps"]) -> Float[Array, "... taps"]:
    """Over the last axis, in float32 or better."""
    scores = scores.astype(at_least_float32(scores.dtype))
    return _softmax(scores) if scores.shape[-1] <= _FEW else jax.nn.softmax(scores)


@jax.custom_vjp
def _softmax(scores):
    largest = _over_taps(jnp.maximum, scores)
    parts = jnp.exp(scores - largest)
    # One division a pixel, which XLA computes by itself: the sum is not made again for each tap.
    return parts * (1 / _over_taps(jnp.add, parts))


def _softmax_bwd(weights, g):
    g = weights * g
    return (g - weights * _over_taps(jnp.add, g),)


_softmax.defvjp(lambda scores: (_softmax(scores),) * 2, _softmax_bwd)


def _over_taps(f, x: Float[Array, "... taps"]) -> Float[Array, "... 1"]:
    # Tap by tap: XLA's CPU compiler reduces a short last axis several times slower.
    taps = [jax.lax.slice_in_dim(x, t, t + 1, axis=x.ndim - 1) for t in range(x.shape[-1])]
    return functools.reduce(f, taps)
