"""Weighted means around pixels as products of tiles of pixels with all cells around them.

The windows of a tile of neighbouring pixels lie in a few rows and columns of cells. Their weights
are one dense matrix, whose entries outside a pixel's window are zero: for the tiles of one row of
tiles, block n,

    out[n, x] = sum_tv softmax_tv(log_weights)[n, t, v, x] values[n, t, v].

Where a ratio is whole, tiles hold whole cells or are whole parts of one, so that little is wasted.
Rows of tiles come one after the other, and backward their weights are computed again.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from resfu_jax.ops._around import Axis, Centre, LogWeights, Steps, axis
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.sizes import Size, whole_ratio

_PIXELS = 16  # of a tile along an axis, about

# Letters of axes: b images; s rows of n tiles of p x q pixels; t rows and v columns of cells.


def weighted_means(
    log_weights: LogWeights,
    pixels: Float[Array, "b H W f"],
    cells: Float[Array, "b h w g"],
    values: Float[Array, "b h w c"],
    *,
    reach: int,
    centre: Centre,
) -> Float[Array, "b H W c"]:
    """As `_around.reference`."""
    rows, columns = (
        _tiles(n, size, reach, centre, pixels.dtype)
        for n, size in zip(values.shape[1:3], pixels.shape[1:3], strict=True)
    )
    tile = rows.pixel.shape[1], columns.pixel.shape[1]
    column_steps = Steps(*(a[:, :, None, :] for a in columns.steps()))  # n v 1 q

    def flat(a):  # the pixels of a tile as one axis
        return jnp.broadcast_to(a, (*a.shape[:-2], *tile)).reshape(*a.shape[:-2], -1)

    def windows(x, row):  # b n t v g
        x = jnp.take(jnp.take(x, row, axis=1, mode="clip"), columns.cell, axis=2, mode="clip")
        return jnp.moveaxis(x, 2, 1)

    def strip(inputs):
        row, row_steps, pixels = inputs  # t; t p; f b n x
        scores = log_weights(
            pixels[:, :, :, None, None],
            jnp.moveaxis(windows(cells, row), 4, 0)[..., None],
            Steps(*(flat(a[None, None, :, None, :, None]) for a in row_steps)),
            Steps(*(flat(a[None, :, None]) for a in column_steps)),
        )
        p = jax.nn.softmax(scores, axis=(2, 3)).astype(values.dtype)
        dtype = at_least_float32(values.dtype)
        out = jnp.einsum(
            "bntvx,bntvc->bnxc", p, windows(values, row), preferred_element_type=dtype
        )
        out = out.astype(values.dtype).reshape(*out.shape[:2], *tile, out.shape[3])
        out = jnp.moveaxis(out, 1, 2)  # b p n q c
        return out.reshape(*out.shape[:2], -1, out.shape[4])[:, :, : pixels_width]

    pixels_width = pixels.shape[2]
    of_tiles = jnp.take(jnp.take(pixels, rows.pixel, axis=1), columns.pixel, axis=3)
    of_tiles = of_tiles.transpose(1, 5, 0, 3, 2, 4)  # s f b n p q
    of_tiles = of_tiles.reshape(*of_tiles.shape[:4], -1)
    out = jax.lax.map(
        jax.checkpoint(strip, prevent_cse=False), (rows.cell, rows.steps(), of_tiles)
    )
    out = jnp.moveaxis(out, 0, 1)
    out = out.reshape(out.shape[0], -1, *out.shape[3:])
    return out[:, : pixels.shape[1]]


class _Tiles(NamedTuple):
    """The tiles of an axis: their pixels, the last ones maybe one pixel again, and their cells."""

    axis: Axis
    pixel: Int[Array, "tiles pixels"]
    cell: Int[Array, "tiles cells"]

    def steps(self) -> Steps:
        """Between a tile's cells and pixels, (tiles, cells, pixels)."""
        return self.axis.steps(self.pixel[:, None, :], self.cell[:, :, None])


def _tiles(n: Size, size: Size, reach: int, centre: Centre, dtype) -> _Tiles:
    ratio, known = whole_ratio((n,), (size,)), isinstance(n, int) and isinstance(size, int)
    pixels = _PIXELS if ratio is None else _tile_of_ratio(*ratio)
    pixels = min(pixels, size) if known else pixels
    own = axis(n, size, centre, dtype)
    tiles = -(-size // pixels)
    pixel = jnp.arange(tiles * pixels, dtype=jnp.int32).reshape(tiles, pixels)
    pixel = jnp.minimum(pixel, jnp.asarray(size - 1, jnp.int32))
    if known:
        spread = _spread(n, size, pixels, centre)
    elif ratio is not None:
        spread = _spread(pixels, pixels * ratio[0], pixels, centre)  # all that tiles may see
    else:
        spread = pixels * n // size + 1
    first = jnp.take(own.centre, pixel[:, 0]) - reach
    cells = jnp.arange(spread + 2 * reach + 1, dtype=jnp.int32)
    return _Tiles(own, pixel, first[:, None] + cells[None])


def _tile_of_ratio(ratio: int) -> int:
    """Pixels of a tile: some whole cells, or a part of one."""
    if ratio <= _PIXELS:
        return _PIXELS // ratio * ratio
    return -(-ratio // -(-ratio // _PIXELS))


def _spread(n: int, size: int, pixels: int, centre: Centre) -> int:
    """The most steps between centres of a tile's pixels."""
    p = np.arange(size, dtype=np.int64)
    centres = ((2 * p + 1) * n - (0 if centre == "nearest" else size)) // (2 * size)
    first = np.arange(0, size, pixels)
    last = np.minimum(first + pixels, size) - 1
    return int((centres[last] - np.maximum(centres[first], 0)).max())
