"""Attention across scales whose scores never leave the chip.

The arithmetic is that of `ops._xla.cross_scale` at whole ratios: for each row of its queries and
each head a program scores all keys around the row, masks them, and multiplies values with the
softmax.

    in     queries once; keys and values: R + K - 1 rows for R rows of cells, and the columns
           around a tile
    out    every pixel once
    VMEM   two of each block, a head's scores of a row of queries (K x columns x W) and its product

For NAF (K = 9, ratio 16, 256 channels of queries and 384 of values, bfloat16) 6 MiB. Traffic is
queries and output, and 9 times keys and values there, which are 256 times smaller.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array

from resfu_jax.ops._forms import Refusal
from resfu_jax.ops._pallas.kernel import kernel_form
from resfu_jax.ops._pallas.tiles import (
    Tiles,
    compiler_params,
    each_row,
    padded_bytes,
    product,
    refusal,
    result,
    tiles,
)
from resfu_jax.ops._windows import extend
from resfu_jax.ops._xla import cross_scale as xla
from resfu_jax.ops._xla.windows import Position, _in_cells, _lengthen

_MASKED = -1e30


def _tiles(q: Array, k: Array, kernel: tuple[int, int], position: Position | None = None) -> Tiles:
    cut = tiles(k.shape[1:3], q.shape[1:3], 0, position)
    rows, cols = (
        axis._replace(border=taps // 2)
        for axis, taps in zip((cut.rows, cut.cols), kernel, strict=True)
    )
    return Tiles(rows, cols, cut.ratio)


def _attention(q: Array, k: Array, v: Array, *, kernel: tuple[int, int], scale: float) -> Array:
    from jax.experimental import pallas as pl

    b, height, width, heads, _ = q.shape
    cut = _tiles(q, k, kernel, _in_cells)
    rows, cols, (ratio, _) = cut
    shown = cut.column_weights(kernel[1]).sum(axis=0)
    mask = jnp.where(shown > 0, 0.0, _MASKED).astype(jnp.float32)

    def flat(x):
        return x.reshape(*x.shape[:3], -1)

    def around(x):
        for i, (axis, taps) in enumerate(((rows, kernel[0]), (cols, kernel[1])), 1):
            x = _lengthen(extend(x, i, taps), i, x.shape[i] + 2 * axis.border)
        return cut.keys(x)

    def program(q, k, v, mask, out):
        def row(cell, phase):
            p = cell * ratio + phase
            keys, values = (
                x[0, 0, 0, pl.ds(cell, kernel[0])].reshape(-1, x.shape[-1]) for x in (k, v)
            )
            queries = q[0, p]
            for g in range(heads):
                own = [
                    slice(g * (n // heads), (g + 1) * (n // heads))
                    for n in (queries.shape[1], values.shape[1])
                ]
                s = product(keys[:, own[0]], queries[:, own[0]], (1, 1))
                s = scale * s.reshape(kernel[0], *mask.shape) + mask[...][None]
                s = s.reshape(-1, mask.shape[1])
                e = jnp.exp(s - s.max(axis=0, keepdims=True))
                weights = e / e.sum(axis=0, keepdims=True)
                weights = weights.astype(values.dtype)
                out[0, p, :, own[1]] = product(weights, values[:, own[1]], (0, 0)).astype(out.dtype)

        each_row(row, rows.cells, ratio)

    def strip(channels):
        block = (1, rows.pixels, cols.pixels, channels)
        return pl.BlockSpec(block, lambda b, s, n: (b, s, n, 0))

    q, k, v = flat(q), around(flat(k)), around(flat(v))
    own = [
        pl.BlockSpec((1, 1, 1, *x.shape[3:]), lambda b, s, n: (b, s, n, 0, 0, 0)) for x in (k, v)
    ]
    out = pl.pallas_call(
        program,
        grid=(b, rows.parts, cols.parts),
        in_specs=[strip(q.shape[3]), *own, pl.BlockSpec(mask.shape, lambda b, s, n: (0, 0))],
        out_specs=strip(v.shape[5]),
        out_shape=result((b, height, width, v.shape[5]), v),
        compiler_params=compiler_params(),
    )(q, k, v, mask)
    return out.reshape(b, height, width, heads, -1)


def _refusal(q: Array, k: Array, v: Array, *, kernel: tuple[int, int], scale: float) -> Refusal:
    return refusal(v, q.shape[1:3], q, k, needs=functools.partial(_vmem, q, k, v, kernel))


def _vmem(q: Array, k: Array, v: Array, kernel: tuple[int, int]) -> int:
    """Bytes that a program needs, about."""
    cut = _tiles(q, k, kernel)
    rows, cols, _ = cut
    keys, wide = rows.cells + 2 * rows.border, jnp.dtype("float32")
    (d, dv), heads = (a.shape[3] * a.shape[4] for a in (q, v)), q.shape[3]
    blocks = [
        ((rows.pixels, cols.pixels, d), q.dtype),
        ((rows.pixels, cols.pixels, dv), v.dtype),
        ((keys, cut.columns, d), k.dtype),
        ((keys, cut.columns, dv), v.dtype),
        ((cut.columns, cols.pixels), wide),
    ]
    row = padded_bytes((kernel[0] * cut.columns, 3 * cols.pixels + d + dv), wide)
    row += padded_bytes((cols.pixels, d + dv // heads), wide)
    return 2 * sum(padded_bytes(*block) for block in blocks) + row


attention = kernel_form(_attention, xla.attention, _refusal)
