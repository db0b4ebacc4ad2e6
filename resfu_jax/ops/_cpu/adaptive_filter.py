"""Sums of windows with weights of every pixel's own, on a CPU, where maps have one size.

`cells` serves this too, but shares windows between the pixels of a cell, of which there is one.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_TILE = 16  # pixels of a row that are multiplied at once

Weights = Float[Array, "b h w taps"]
Padded = Float[Array, "b hp wp c"]
Output = Float[Array, "b h w c"]


@jax.custom_vjp
def filtered(weights: Weights, x: Padded) -> Output:
    """The sums of `ops.adaptive_filter`, of weights and of a map with a border."""
    # Broadcast products, which XLA fuses into the pass that writes the output. Each row of the
    # window has a sum of its own: they do not wait for each other.
    (_, h, w, taps), out = weights.shape, 0
    k, weights = math.isqrt(taps), weights.astype(x.dtype)
    for t in range(k):
        row = 0
        for s in range(k):
            row = row + weights[..., t * k + s, None] * x[:, t : t + h, s : s + w]
        out = out + row
    return out


def _backward(saved: tuple[Weights, Padded], g: Output) -> tuple[Weights, Padded]:
    weights, x = saved
    return _correlated(g, x, math.isqrt(weights.shape[3])).astype(weights.dtype), _scattered(
        weights.astype(g.dtype), g
    )


filtered.defvjp(lambda weights, x: (filtered(weights, x), (weights, x)), _backward)


def _scattered(weights: Weights, g: Output) -> Padded:
    """Every pixel of g added to its window's pixels, times the weights: a filter, mirrored."""
    k = math.isqrt(weights.shape[3])
    border = [(0, 0), (k - 1, k - 1), (k - 1, k - 1), (0, 0)]
    weights = jnp.flip(jnp.pad(weights, border), 3)
    (_, h, w, _), out, g = weights.shape, 0, jnp.pad(g, border)
    h, w = h - k + 1, w - k + 1
    for t in range(k):
        row = 0
        for s in range(k):
            own = slice(None), slice(t, t + h), slice(s, s + w)
            row = row + weights[(*own, t * k + s, None)] * g[own]
        out = out + row
    return out


def _correlated(g: Output, x: Padded, k: int) -> Weights:
    """Inner products of every pixel of g with the pixels of its window in x."""
    # Per tile of a row: (pixels x C)(C x what they see of a row of x), of which each pixel keeps k.
    b, h, w, c = g.shape
    n, seen = -(-w // _TILE), _TILE + k - 1
    over = -(-(k - 1) // _TILE)  # tiles in which the windows of the last pixels end
    g = jnp.pad(g, [(0, 0), (0, 0), (0, n * _TILE - w), (0, 0)])
    x = jnp.pad(x, [(0, 0), (0, 0), (0, (n + over) * _TILE - x.shape[2]), (0, 0)])
    tiles = [
        x[:, :, i * _TILE : (i + n) * _TILE].reshape(b, h + k - 1, n, _TILE, c)
        for i in range(over + 1)
    ]
    tiles = jnp.concatenate(tiles, axis=3)[:, :, :, :seen]
    rows = []
    for t in range(k):
        y = jnp.einsum("bhnxc,bhnvc->bhnxv", g.reshape(b, h, n, _TILE, c), tiles[:, t : t + h])
        # Entry (x, x + s), where rows have `seen` entries, is (x, s) where they have one more.
        y = jnp.pad(y.reshape(b, h, n, _TILE * seen), [(0, 0)] * 3 + [(0, _TILE)])
        y = y.reshape(b, h, n * _TILE, seen + 1)[:, :, :w, :k]
        rows.append(y)
    return jnp.concatenate(rows, axis=3)
