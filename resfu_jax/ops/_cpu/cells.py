"""Windows of low-resolution pixels that the output pixels of a cell share.

At a whole ratio r, output pixel (a r + p, b r + q) lies in the low-resolution cell (a, b), and all
r x r pixels of a cell see the same n x n pixels around it. With w the weights of the output pixels
on their window, x the low-resolution map (padded by its caller) and y a map at output size, the
three functions below are the derivatives of one form to its three arguments:

    T(w, x, y) = sum w[a, p, b, q, ts] x[a + t, b + s] y[a r + p, b r + q]

    reassemble  dT/dy: weighted sums of windows        correlate  dT/dw: inner products with windows
    scatter     dT/dx: windows overlap-added

so that the gradients of `reassemble` and `correlate` are exact and again of these forms.
Differentiated by JAX, the slices of x would each become a padded map.

Shapes: w (B, H, W, G, n*n), x (B, h + n - 1, w + n - 1, C), y (B, H, W, C); G groups of channels,
contiguous, with weights of their own. Sums are in the arrays' dtype, which callers choose wide.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops._rows import Rows, block_rows
from resfu_jax.ops.sizes import Size

_PATCH_PIXELS = 64  # of the output, at most, in a patch of several rows of cells

Weights = Float[Array, "b H W g taps"]
Padded = Float[Array, "b hp wp c"]
Output = Float[Array, "b H W c"]


@jax.custom_vjp
def reassemble(weights: Weights, x: Padded) -> Output:
    """Sums of the windows of x, weighted by `weights`."""
    # Broadcast products, which XLA fuses into the pass that writes the output. Each row of the
    # window has a sum of its own: they do not wait for each other.
    b, hh, ww, g, taps = weights.shape
    n = math.isqrt(taps)
    (h, w), ratio = _cells(weights.shape, x.shape, n)
    weights = weights.reshape(b, h, ratio[0], w, ratio[1], g, taps)
    x = x.reshape(*x.shape[:3], g, x.shape[3] // g)
    out = 0
    for t in range(n):
        row = 0
        for s in range(n):
            shifted = x[:, t : t + h, None, s : s + w, None]
            row = row + weights[..., t * n + s, None] * shifted
        out = out + row
    return out.reshape(b, hh, ww, -1)


def _reassemble_bwd(saved, g):
    weights, x = saved
    n, groups = math.isqrt(weights.shape[4]), weights.shape[3]
    # As arrays: XLA would make them anew for each sum that they are in.
    weights, g = jax.lax.optimization_barrier((weights, g))
    return correlate(g, x, n, groups), scatter(weights, g, x.shape)


reassemble.defvjp(lambda weights, x: (reassemble(weights, x), (weights, x)), _reassemble_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def correlate(y: Output, x: Padded, n: int, groups: int = 1) -> Weights:
    """Inner products of every pixel of y with the pixels of its n x n window in x."""
    # Per patch of cells: (pixels x C)(C x what they see), of which each cell keeps its window.
    b, hh, ww, _ = y.shape
    (h, w), ratio = _cells(y.shape, x.shape, n)
    patch = rows, cols = _patch(h, w, n, ratio)
    seen_rows, seen_cols = rows + n - 1, cols + n - 1
    # Axes of patches first, h and w, then those within: rows, columns and what a cell sees.
    bands = [x[:, t : t + h - rows + 1 : rows] for t in range(seen_rows)]
    bands = jnp.stack(bands, axis=2)
    columns = [bands[..., s : s + w, :] for s in range(0, seen_cols, cols)]
    columns = [c.reshape(*bands.shape[:3], w // cols, cols, groups, -1) for c in columns]
    seen = jnp.concatenate(columns, axis=4).transpose(0, 1, 3, 5, 2, 4, 6)
    seen = seen.reshape(*seen.shape[:4], seen_rows * seen_cols, -1)
    out = jnp.einsum("bhwgpc,bhwgtc->bhwgpt", _by_patch(y, groups, ratio, patch), seen)
    out = out.reshape(*out.shape[:4], rows, ratio[0], cols, ratio[1], seen_rows, seen_cols)
    out = jnp.stack([out[:, :, :, :, a, ..., a : a + n, :] for a in range(rows)], axis=4)
    out = jnp.stack([out[..., a, :, :, a : a + n] for a in range(cols)], axis=6)
    return out.transpose(0, 1, 4, 5, 2, 6, 7, 3, 8, 9).reshape(b, hh, ww, groups, n * n)


def _correlate_bwd(n, groups, saved, g):
    y, x = saved
    return reassemble(g, x), scatter(g, y, x.shape)


correlate.defvjp(lambda y, x, n, groups=1: (correlate(y, x, n, groups), (y, x)), _correlate_bwd)


def scatter(weights: Weights, y: Output, size: tuple) -> Padded:
    """Every pixel of y added to its window's pixels, times the weights; `size` is x's shape."""
    # Per patch of cells: (what they see x pixels)(pixels x C).
    b, hh, ww, g, taps = weights.shape
    n = math.isqrt(taps)
    (h, w), ratio = _cells(y.shape, size, n)
    patch = rows, cols = _patch(h, w, n, ratio)
    seen_rows, seen_cols = rows + n - 1, cols + n - 1
    weights = weights.reshape(b, h // rows, rows, ratio[0], w // cols, cols, ratio[1], g, n, n)
    weights = weights.transpose(0, 1, 4, 7, 2, 3, 5, 6, 8, 9)
    # Each cell's window at its place in what the patch sees: columns, then rows.
    border = [(0, 0)] * 7
    weights = jnp.stack(
        [
            jnp.pad(weights[..., a, :, :, :], [*border, (0, 0), (a, cols - 1 - a)])
            for a in range(cols)
        ],
        axis=6,
    )
    weights = jnp.stack(
        [
            jnp.pad(weights[:, :, :, :, a], [*border, (a, rows - 1 - a), (0, 0)])
            for a in range(rows)
        ],
        axis=4,
    )
    weights = weights.reshape(b, h // rows, w // cols, g, -1, seen_rows * seen_cols)
    out = jnp.einsum("bhwgpt,bhwgpc->bhwgtc", weights, _by_patch(y, g, ratio, patch))
    # Each pixel that a patch sees, added to its place in x: columns, then rows.
    out = out.reshape(*out.shape[:4], seen_rows, seen_cols, -1)
    bands = 0
    for s in range(0, seen_cols, cols):
        band = out[..., s : s + cols, :].transpose(0, 1, 4, 2, 5, 3, 6)
        band = band.reshape(b, h // rows, seen_rows, w, -1)
        bands = bands + jnp.pad(band, [(0, 0)] * 3 + [(s, n - 1 - s), (0, 0)])
    if h == rows:
        return bands[:, 0]  # of one row of patches; XLA would write each padded map below
    total = 0
    for t in range(0, seen_rows, rows):
        band = bands[:, :, t : t + rows].reshape(b, h, *bands.shape[3:])
        total = total + jnp.pad(band, [(0, 0), (t, n - 1 - t), (0, 0), (0, 0)])
    return total


def _cells(out_shape, padded_shape, n: int):
    """Low-resolution size and ratio."""
    h, w = padded_shape[1] - n + 1, padded_shape[2] - n + 1
    return (h, w), (out_shape[1] // h, out_shape[2] // w)


def _patch(h: Size, w: Size, n: int, ratio: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of cells that are multiplied at once, divisors of the map's and of n - 1.

    Alone, each cell would need a copy of its n x n window. A row of n - 1 cells needs 2 (n - 1)
    columns, fewer than two a cell, for nearly twice the products. Where cells have few pixels,
    several rows make larger products of them.
    """

    def most(size: Size, limit: int) -> int:
        if not isinstance(size, int):
            return 1
        sides = range(1, min(max(n - 1, 1), limit) + 1)
        return max((k for k in sides if (n - 1) % k == 0 and size % k == 0), default=1)

    columns = most(w, n)
    return most(h, _PATCH_PIXELS // (columns * math.prod(ratio))), columns


def _by_patch(
    y: Output, groups: int, ratio: tuple[int, int], patch: tuple[int, int]
) -> Float[Array, "b rows cols g pixels d"]:
    b, hh, ww, c = y.shape
    height, width = patch[0] * ratio[0], patch[1] * ratio[1]
    y = y.reshape(b, hh // height, height, ww // width, width, groups, c // groups)
    return y.transpose(0, 1, 3, 5, 2, 4, 6).reshape(
        b, hh // height, ww // width, groups, -1, c // groups
    )


def blocks(
    out_shape: tuple[Size, ...], padded_shape: tuple[Size, ...], n: int, tile: int | None = None
) -> tuple[Size, Rows, Rows]:
    """Number of blocks of rows, at most `tile`, and their rows of the padded map and the output."""
    (h, _), (ratio, _) = _cells(out_shape, padded_shape, n)
    row_values = out_shape[0] * ratio * out_shape[2] * padded_shape[3]
    rows = block_rows(h, row_values, None if tile is None else tile // ratio)
    return h // rows, Rows(1, rows, rows + n - 1), Rows(1, rows * ratio, rows * ratio)
