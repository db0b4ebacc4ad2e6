"""Windows of low-resolution pixels as products with a band matrix that never leaves the chip.

The arithmetic is that of `ops._xla.windows`: for each row of its pixels a program makes the weights
(softmax, scale), spreads them over the keys around the row, the band, and multiplies the two.

    in     the weights, planes of taps (B, H, taps, W), and factors of groups: once
           the map: of each strip of R rows of cells R + K - 1 rows (K + 1 for `fns_attention`)
    out    every pixel once
    VMEM   two of each block, the band of a row of pixels (K rows of keys x W) and its product

A strip has 16 rows of pixels or one cell's, a tile up to 256 columns or 128 of a wider map
(`tiles`): 6 MiB for CARAFE (K = 5, ratio 4, 384 channels in bfloat16), whose traffic is 1.1 times
the output.
"""

import functools
import math

import jax.numpy as jnp
from jaxtyping import Array

from resfu_jax.ops._forms import Refusal
from resfu_jax.ops._interp import half_pixel_taps
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
from resfu_jax.ops._xla import windows as xla
from resfu_jax.ops.pad import Mode, pad


def _attention(scores: Array, scale: Array | None, v: Array, *, groups, softmax, border) -> Array:
    reach = math.isqrt(scores.shape[3] // groups) // 2
    cut = tiles(v.shape[1:3], scores.shape[1:3], reach, xla._in_cells)
    return _reassemble(scores, scale, v, cut, border, groups=groups, softmax=softmax)


def _attention_refusal(scores, scale, v, *, groups, softmax, border) -> Refusal:
    reach = math.isqrt(scores.shape[3] // groups) // 2
    return _refusal(v, scores, reach, *([] if scale is None else [scale]))


def _fns_attention(attn: Array, x: Array, *, tile: int | None = None) -> Array:
    border = math.isqrt(attn.shape[3]) // 2 + 1
    cut = tiles(x.shape[1:3], attn.shape[1:3], border, _first_key)
    return _reassemble(attn, None, x, cut, "edge", groups=1, softmax=False, between=True)


def _first_key(n: int, size: int) -> tuple[Array, Array]:
    """Of n pixels with a border for the window and one more pixel, and the fraction beyond it."""
    index, fraction = half_pixel_taps(n, size)
    return index + 1, fraction


def _fns_refusal(attn: Array, x: Array, *, tile: int | None = None) -> Refusal:
    return _refusal(x, attn, math.isqrt(attn.shape[3]) // 2 + 1)


def _refusal(x: Array, planes: Array, border: int, *others: Array) -> Refusal:
    def needs():
        return _vmem(planes, x, tiles(x.shape[1:3], planes.shape[1:3], border))

    return refusal(x, planes.shape[1:3], planes, *others, needs=needs)


attention = kernel_form(_attention, xla.attention, _attention_refusal)
fns_attention = kernel_form(_fns_attention, xla.fns_attention, _fns_refusal)


def _reassemble(
    planes: Array,
    scale: Array | None,
    x: Array,
    cut: Tiles,
    mode: Mode,
    *,
    groups,
    softmax,
    between: bool = False,
) -> Array:
    """Of windows of keys or, `between` them, of samples at fractions of a key."""
    from jax.experimental import pallas as pl

    (b, height, width, taps), (*_, channels) = planes.shape, x.shape
    rows, cols, (ratio, _) = cut
    k, wide = math.isqrt(taps // groups), channels // groups
    seen = 2 * rows.border + 1  # rows of keys that a row of pixels sees
    keys = cut.keys(pad(x, (rows.border, cols.border), mode))
    strip = functools.partial(_block, lambda b, s, n: (b, s, 0, n))
    args = {
        "planes": (jnp.moveaxis(planes, 3, 2), strip(1, rows.pixels, taps, cols.pixels)),
        "keys": (keys, _block(lambda b, s, n: (b, s, n, 0, 0, 0), 1, 1, 1, *keys.shape[3:])),
        "cols": (cut.column_weights(k), None),
    }
    if scale is not None:
        scale = jnp.moveaxis(scale, 3, 2)
        args["scale"] = (scale, strip(1, rows.pixels, groups, cols.pixels))
    if between:
        args["rows"] = (_row_weights(rows, ratio, k), None)

    def kernel(*refs):
        *refs, out = refs
        ref = dict(zip(args, refs, strict=True))

        def row(cell, phase):
            p = cell * ratio + phase
            keys = ref["keys"][0, 0, 0, pl.ds(cell, seen)].reshape(-1, channels)
            planes = ref["planes"][0, p].astype(jnp.float32)
            for g in range(groups):
                weights = planes[g * k * k : (g + 1) * k * k]
                if softmax:
                    weights = jnp.exp(weights - weights.max(axis=0, keepdims=True))
                    weights = weights / weights.sum(axis=0, keepdims=True)
                if scale is not None:
                    weights = weights * ref["scale"][0, p].astype(jnp.float32)[g : g + 1]
                if "rows" in ref:
                    weights = jnp.dot(ref["rows"][phase], weights, precision="highest")
                band = [
                    sum(weights[t * k + j][None] * ref["cols"][j] for j in range(k))
                    for t in range(seen)
                ]
                part = slice(g * wide, (g + 1) * wide)
                band = jnp.concatenate(band).astype(x.dtype)
                out[0, p, :, part] = product(band, keys[:, part], (0, 0)).astype(x.dtype)

        each_row(row, rows.cells, ratio)

    return pl.pallas_call(
        kernel,
        grid=(b, rows.parts, cols.parts),
        in_specs=[_whole(a) if spec is None else spec for a, spec in args.values()],
        out_specs=_block(lambda b, s, n: (b, s, n, 0), 1, rows.pixels, cols.pixels, channels),
        out_shape=result((b, height, width, channels), x),
        compiler_params=compiler_params(),
    )(*(a for a, _ in args.values()))


def _row_weights(rows: xla._Axis, ratio: int, k: int) -> Array:
    """From weights of taps to those of rows of keys and columns of taps, for each row of a cell."""
    index, fraction = _first_key(1, ratio)
    cell = rows._replace(cells=1, pixels=ratio, index=index[None], fraction=fraction[None])
    taps = jnp.stack([cell.weights(i, jnp.float32)[:, 0] for i in range(k)])
    weights = jnp.einsum("itp,jk->ptjik", taps, jnp.eye(k), precision="highest")
    return weights.reshape(ratio, -1, k * k)


def _block(index, *shape):
    from jax.experimental import pallas as pl

    return pl.BlockSpec(shape, index)


def _whole(a: Array):
    return _block(lambda b, s, n: (0,) * a.ndim, *a.shape)


def _vmem(planes: Array, x: Array, cut: Tiles) -> int:
    """Bytes that a program needs, about: two of each block, and float32 arrays of one row."""
    rows, cols, _ = cut
    taps, channels, wide = planes.shape[3], x.shape[3], jnp.dtype("float32")
    blocks = [
        ((rows.pixels, 2 * taps, cols.pixels), planes.dtype),
        ((rows.cells + 2 * rows.border, cut.columns, channels), x.dtype),
        ((rows.pixels, cols.pixels, channels), x.dtype),
        ((2 * cols.border + 1, cut.columns, cols.pixels), wide),
    ]
    row = padded_bytes(((2 * rows.border + 1) * cut.columns, cols.pixels + channels), wide)
    row += padded_bytes((cols.pixels, channels), wide)
    return 2 * sum(padded_bytes(*block) for block in blocks) + 2 * row
