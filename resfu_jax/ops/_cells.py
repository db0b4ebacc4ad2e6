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

from resfu_jax.ops._interp import Size
from resfu_jax.ops._order import zeros_after
from resfu_jax.ops._row_blocks import Rows, add, block_rows, cut, loop, map_row_blocks

Weights = Float[Array, "b H W g taps"]
Padded = Float[Array, "b hp wp c"]
Output = Float[Array, "b H W c"]


@jax.custom_vjp
def reassemble(weights: Weights, x: Padded) -> Output:
    """Sums of the windows of x, weighted by `weights`."""
    # A chain of broadcast products, which XLA fuses into the pass that writes the output.
    b, hh, ww, g, taps = weights.shape
    n = math.isqrt(taps)
    (h, w), ratio = _cells(weights.shape, x.shape, n)
    weights = weights.reshape(b, h, ratio[0], w, ratio[1], g, taps)
    x = x.reshape(*x.shape[:3], g, x.shape[3] // g)
    out = 0
    for t in range(n):
        for s in range(n):
            shifted = x[:, t : t + h, None, s : s + w, None]
            out = out + weights[..., t * n + s, None] * shifted
    return out.reshape(b, hh, ww, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def correlate(y: Output, x: Padded, n: int, groups: int = 1) -> Weights:
    """Inner products of every pixel of y with the pixels of its n x n window in x."""
    count, windows, pixels = blocks(y.shape, x.shape, n)

    def f(_, rows):
        return (_correlate(*rows, n, groups),)

    (out,) = map_row_blocks(f, count, (pixels, windows), (pixels,), (), (y, x))
    return out


def scatter(weights: Weights, y: Output, size: tuple) -> Padded:
    """Every pixel of y added to its window's pixels, times the weights; `size` is x's shape."""
    count, windows, pixels = blocks(y.shape, size, math.isqrt(weights.shape[4]))

    def body(i, total):
        w, y_rows = cut((weights, y), i, (pixels, pixels))
        return add(total, _scatter(w, y_rows, (size[0], windows.length, *size[2:])), i, windows)

    return loop(count, body, zeros_after(y, size, y.dtype))


def _reassemble_bwd(saved, g):
    # Both at once, since what takes time is to bring g into its blocks' order.
    weights, x = saved
    n, groups = math.isqrt(weights.shape[4]), weights.shape[3]
    count, windows, pixels = blocks(g.shape, x.shape, n)

    def body(i, state):
        d_weights, d_x = state
        w, y, window = cut((weights, g, x), i, (pixels, pixels, windows))
        d_weights = add(d_weights, _correlate(y, window, n, groups), i, pixels)
        return d_weights, add(d_x, _scatter(w, y, window.shape), i, windows)

    zeros = (zeros_after(g, a.shape, a.dtype) for a in (weights, x))
    return loop(count, body, tuple(zeros))


reassemble.defvjp(lambda weights, x: (reassemble(weights, x), (weights, x)), _reassemble_bwd)


def _correlate_bwd(n, groups, saved, g):
    y, x = saved
    return reassemble(g, x), scatter(g, y, x.shape)


correlate.defvjp(
    lambda y, x, n, groups=1: (correlate(y, x, n, groups), (y, x)),
    _correlate_bwd,
)


def _correlate(y: Output, x: Padded, n: int, groups: int) -> Weights:
    # Per strip of cells: (pixels x C)(C x what they see), of which each cell keeps its window.
    b, hh, ww, _ = y.shape
    (h, w), ratio = _cells(y.shape, x.shape, n)
    cells = _strip(w, n)
    seen = cells + n - 1
    rows = jnp.stack([x[:, t : t + h] for t in range(n)], axis=2)
    columns = [rows[..., s : s + w, :] for s in range(0, seen, cells)]
    columns = [c.reshape(b, h, n, w // cells, cells, groups, -1) for c in columns]
    windows = jnp.concatenate(columns, axis=4).transpose(0, 1, 3, 5, 2, 4, 6)
    windows = windows.reshape(*windows.shape[:4], n * seen, -1)
    out = jnp.einsum("bhwgpc,bhwgtc->bhwgpt", _by_strip(y, groups, ratio, cells), windows)
    out = out.reshape(*out.shape[:4], ratio[0], cells, ratio[1], n, seen)
    out = jnp.stack([out[..., a, :, :, a : a + n] for a in range(cells)], axis=5)
    return out.transpose(0, 1, 4, 2, 5, 6, 3, 7, 8).reshape(b, hh, ww, groups, n * n)


def _scatter(weights: Weights, y: Output, size: tuple) -> Padded:
    # Per strip of cells: (what they see x pixels)(pixels x C), then the strips overlap-add.
    b, hh, ww, g, taps = weights.shape
    n = math.isqrt(taps)
    (h, w), ratio = _cells(y.shape, size, n)
    cells = _strip(w, n)
    seen = cells + n - 1
    weights = weights.reshape(b, h, ratio[0], w // cells, cells, ratio[1], g, n, n)
    weights = weights.transpose(0, 1, 3, 6, 2, 4, 5, 7, 8)
    border = [(0, 0)] * 7
    weights = [
        jnp.pad(weights[:, :, :, :, :, a], [*border, (a, cells - 1 - a)]) for a in range(cells)
    ]
    weights = jnp.stack(weights, axis=5).reshape(b, h, w // cells, g, -1, n * seen)
    out = jnp.einsum("bhwgpt,bhwgpc->bhwgtc", weights, _by_strip(y, g, ratio, cells))
    out = out.reshape(b, h, w // cells, g, n, seen, -1)
    bands = 0
    for s in range(0, seen, cells):
        band = out[..., s : s + cells, :].transpose(0, 1, 4, 2, 5, 3, 6).reshape(b, h, n, w, -1)
        bands = bands + jnp.pad(band, [(0, 0)] * 3 + [(s, n - 1 - s), (0, 0)])
    return sum(jnp.pad(bands[:, :, t], [(0, 0), (t, n - 1 - t), (0, 0), (0, 0)]) for t in range(n))


def _cells(out_shape, padded_shape, n: int):
    """Low-resolution size and ratio."""
    h, w = padded_shape[1] - n + 1, padded_shape[2] - n + 1
    return (h, w), (out_shape[1] // h, out_shape[2] // w)


def _strip(w: Size, n: int) -> int:
    """Cells side by side that are multiplied at once, a divisor of w and of n - 1.

    Alone, each would need a copy of its n x n window. A strip of n - 1 cells needs 2 (n - 1)
    columns, fewer than two a cell, for nearly twice the products.
    """
    if not isinstance(w, int):
        return 1
    return max(k for k in range(1, max(n, 2)) if (n - 1) % k == 0 and w % k == 0)


def _by_strip(
    y: Output, groups: int, ratio: tuple[int, int], cells: int
) -> Float[Array, "b h strips g pixels d"]:
    b, hh, ww, c = y.shape
    h, width = hh // ratio[0], cells * ratio[1]
    y = y.reshape(b, h, ratio[0], ww // width, width, groups, c // groups)
    return y.transpose(0, 1, 3, 5, 2, 4, 6).reshape(b, h, ww // width, groups, -1, c // groups)


def blocks(
    out_shape: tuple[Size, ...], padded_shape: tuple[Size, ...], n: int, tile: int | None = None
) -> tuple[Size, Rows, Rows]:
    """Number of blocks of rows, at most `tile`, and their rows of the padded map and the output."""
    (h, _), (ratio, _) = _cells(out_shape, padded_shape, n)
    rows = block_rows(
        h,
        out_shape[0] * ratio * out_shape[2] * padded_shape[3],
        None if tile is None else tile // ratio,
    )
    return h // rows, Rows(1, rows, rows + n - 1), Rows(1, rows * ratio, rows * ratio)
