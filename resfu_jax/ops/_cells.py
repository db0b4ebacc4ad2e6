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
    # Per cell (phases x C)(C x window).
    b, hh, ww, _ = y.shape
    (h, w), ratio = _cells(y.shape, x.shape, n)
    rows = jnp.stack([x[:, t : t + h] for t in range(n)], axis=2)
    windows = jnp.stack([rows[..., s : s + w, :] for s in range(n)], axis=3)  # b h t s w c
    windows = windows.reshape(b, h, n * n, w, groups, -1).transpose(0, 1, 3, 4, 5, 2)
    # The barrier keeps the transpose out of the product, which is three times slower that way.
    out = jnp.matmul(_by_cell(y, groups, ratio), jax.lax.optimization_barrier(windows))
    out = out.reshape(b, h, w, groups, *ratio, n * n).transpose(0, 1, 4, 2, 5, 3, 6)
    return out.reshape(b, hh, ww, groups, n * n)


def scatter(weights: Weights, y: Output, size: tuple) -> Padded:
    """Every pixel of y added to its window's pixels, times the weights; `size` is x's shape."""
    b, _, _, g, taps = weights.shape
    n = math.isqrt(taps)
    (h, w), ratio = _cells(weights.shape, size, n)
    # Per cell (window x phases)(phases x C), then the windows overlap-add.
    weights = weights.reshape(b, h, ratio[0], w, ratio[1], g, taps)
    weights = weights.transpose(0, 1, 3, 5, 2, 4, 6).reshape(b, h, w, g, -1, taps)
    cells = jnp.einsum("bhwgpn,bhwgpc->bhwngc", weights, _by_cell(y, g, ratio))
    cells = cells.reshape(b, h, w, n, n, -1)
    bands = sum(
        jnp.pad(cells[..., s, :], ((0, 0), (0, 0), (s, n - 1 - s), (0, 0), (0, 0)))
        for s in range(n)
    )
    return sum(
        jnp.pad(bands[:, :, :, t], ((0, 0), (t, n - 1 - t), (0, 0), (0, 0))) for t in range(n)
    )


def _reassemble_bwd(saved, g):
    # In blocks of rows: the cotangent by cells would be another map of the output's size.
    weights, x = saved
    n, groups = math.isqrt(weights.shape[4]), weights.shape[3]
    (h, _), ratio = _cells(weights.shape, x.shape, n)
    rows = block_rows(h, weights.shape[0] * weights.shape[2] * ratio[0])
    if isinstance(h, int) and rows == h:
        return correlate(g, x, n, groups), scatter(weights, g, x.shape)
    windows, pixels = Rows(1, rows, rows + n - 1), Rows(1, rows * ratio[0], rows * ratio[0])

    def f(_, blocks):
        x, g = blocks
        return (correlate(g, x, n, groups),)

    def d_x(i, total):
        w, y = cut((weights, g), i, (pixels, pixels))
        return add(total, scatter(w, y, (*x.shape[:1], windows.length, *x.shape[2:])), i, windows)

    (d_weights,) = map_row_blocks(f, h // rows, (windows, pixels), (pixels,), (), (x, g))
    return d_weights, loop(h // rows, d_x, jnp.zeros_like(x))


reassemble.defvjp(lambda weights, x: (reassemble(weights, x), (weights, x)), _reassemble_bwd)


def _correlate_bwd(n, groups, saved, g):
    y, x = saved
    return reassemble(g, x), scatter(g, y, x.shape)


correlate.defvjp(
    lambda y, x, n, groups=1: (correlate(y, x, n, groups), (y, x)),
    _correlate_bwd,
)


def _cells(out_shape, padded_shape, n: int):
    """Low-resolution size and ratio."""
    h, w = padded_shape[1] - n + 1, padded_shape[2] - n + 1
    return (h, w), (out_shape[1] // h, out_shape[2] // w)


def _by_cell(y: Output, groups: int, ratio: tuple[int, int]) -> Float[Array, "b h w g phases d"]:
    b, hh, ww, c = y.shape
    h, w = hh // ratio[0], ww // ratio[1]
    y = y.reshape(b, h, ratio[0], w, ratio[1], groups, c // groups)
    return y.transpose(0, 1, 3, 5, 2, 4, 6).reshape(b, h, w, groups, ratio[0] * ratio[1], -1)
