"""Means around pixels as products of tiles of pixels with all cells around them.

The windows of a tile of neighbouring pixels lie in a few rows and columns of cells. Their weights
are one dense matrix, with zeros outside of a pixel's window; for tile n

    out[n, x] = sum_k softmax_k(log w[n, k, x]) values[n, k].

Where a ratio is whole, tiles hold whole cells or are whole parts of one, so that little is wasted.
Rows of tiles come one after the other, and backward their weights are computed again.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from resfu_jax.ops import _gaussians
from resfu_jax.ops._gaussians import Axis, Centre, Places
from resfu_jax.ops._xla.windows import _lengthen
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.sizes import Size, to_int32, whole_ratio

_PIXELS = 16  # of a tile along an axis, about

# Letters of axes: b images; s rows of n tiles of p x q pixels, x in all, that see t rows and v
# columns of cells, k in all; f and g components.


def weighted_means(
    values: Float[Array, "b h w c"],
    forms: Float[Array, "b h w 4"],
    low_guide: Float[Array, "b h w g"],
    guide: Float[Array, "b H W g"],
    radius: Float[Array, "b H W 1"] | None,
    *,
    reach: int,
    centre: Centre,
) -> Float[Array, "b H W c"]:
    """As `_gaussians.reference`."""
    out_size = guide.shape[1:3]
    axes = _gaussians.axes(
        values.shape[1:3], out_size, centre=centre, disc=radius is not None, dtype=guide.dtype
    )
    rows, columns = (_tiles(a, m, reach, centre) for a, m in zip(axes, out_size, strict=True))
    tile, seen = ((rows[i].shape[1], columns[i].shape[1]) for i in (0, 1))
    cells = jnp.concatenate([forms, low_guide], axis=-1)
    pixels = guide if radius is None else jnp.concatenate([guide, radius], axis=-1)

    def windows(x, row):  # b n k g
        x = jnp.take(jnp.take(x, row, axis=1, mode="clip"), columns.cells, axis=2, mode="clip")
        x = jnp.moveaxis(x, 2, 1)
        return x.reshape(*x.shape[:2], -1, x.shape[4])

    # To be broadcast to b n k x.
    of_columns = (
        _along_columns(columns.of_cells, seen[0], lambda a: a[None, :, :, None]),
        _along_columns(columns.of_pixels, tile[0], lambda a: a[None, :, None]),
    )

    def strip(inputs):
        row, of_cells, of_pixels, pixels = inputs  # t, t, p, f b n x
        of_rows = (
            _along_rows(of_cells, seen[1], lambda a: a[None, None, :, None]),
            _along_rows(of_pixels, tile[1], lambda a: a[None, None, None]),
        )
        own = jnp.moveaxis(windows(cells, row), 3, 0)[..., None]
        i_p, radii = pixels[: guide.shape[3], :, :, None], pixels[guide.shape[3] :, :, :, None]
        scores = _log_weights(own[:4], own[4:], i_p, of_rows, of_columns)
        near = _gaussians.inside(of_rows, of_columns, None if radius is None else radii[0], reach)
        p = jax.nn.softmax(jnp.where(near, scores, -jnp.inf), axis=2).astype(values.dtype)
        dtype = at_least_float32(values.dtype)
        out = jnp.einsum("bnkx,bnkc->bnxc", p, windows(values, row), preferred_element_type=dtype)
        out = out.astype(values.dtype).reshape(*out.shape[:2], *tile, out.shape[3])
        out = jnp.moveaxis(out, 1, 2)
        out = out.reshape(*out.shape[:2], -1, out.shape[4])  # b p W c
        return jax.lax.slice_in_dim(out, 0, out_size[1], axis=2)

    strips = rows.cells, rows.of_cells, rows.of_pixels, _split(pixels, rows, columns)
    out = jax.lax.map(jax.checkpoint(strip, prevent_cse=False), strips)
    out = jnp.moveaxis(out, 0, 1)
    out = out.reshape(out.shape[0], -1, *out.shape[3:])
    return jax.lax.slice_in_dim(out, 0, out_size[0], axis=1)


class _Tiles(NamedTuple):
    """The tiles of an axis: their pixels, of which the last may repeat, and the cells they see."""

    pixels: Int[Array, "tiles pixels"]
    cells: Int[Array, "tiles cells"]
    of_pixels: Places
    of_cells: Places


def _tiles(axis: Axis, size: Size, reach: int, centre: Centre) -> _Tiles:
    ratio = whole_ratio((axis.cells,), (size,))
    count = _PIXELS if ratio is None else _tile_of_ratio(*ratio)
    if isinstance(axis.cells, int) and isinstance(size, int):
        count = min(count, size)
        spread = _spread(axis.cells, size, count, centre)
    elif ratio is not None:
        spread = _spread(count, count * ratio[0], count, centre)  # shows all that tiles may see
    else:
        spread = count * axis.cells // size + 1
    pixels = jnp.arange(-(-size // count) * count, dtype=jnp.int32).reshape(-1, count)
    pixels = jnp.minimum(pixels, to_int32(size) - 1)
    first = jnp.take(axis.centre, pixels[:, :1])
    cells = first + jnp.arange(-reach, spread + reach + 1, dtype=jnp.int32)[None]
    return _Tiles(
        pixels, cells, axis.places_of_pixels(pixels, first), axis.places_of_cells(cells, first)
    )


def _tile_of_ratio(ratio: int) -> int:
    """Pixels of a tile: some whole cells, or a part of one."""
    if ratio <= _PIXELS:
        return _PIXELS // ratio * ratio
    return -(-ratio // -(-ratio // _PIXELS))


def _spread(n: int, size: int, count: int, centre: Centre) -> int:
    """The most steps between the centres of a tile's pixels."""
    p = np.arange(size, dtype=np.int64)
    below = 0 if centre == "nearest" else size
    centres = np.maximum(((2 * p + 1) * n - below) // (2 * size), 0)
    first = p[::count]
    last = np.minimum(first + count, size) - 1
    return int((centres[last] - centres[first]).max())


def _split(pixels: Float[Array, "b H W f"], rows: _Tiles, columns: _Tiles) -> Array:
    """The pixels of all tiles, (s, f, b, n, x), with zeros over the ends."""
    for axis, tiles in ((2, columns), (1, rows)):
        count, length = tiles.pixels.shape
        x = _lengthen(pixels, axis, count * length)
        pixels = x.reshape(*x.shape[:axis], count, length, *x.shape[axis + 1 :])
    x = pixels.transpose(1, 5, 0, 3, 2, 4)
    return x.reshape(*x.shape[:4], -1)


def _along_rows(places: Places, columns: Size, expand) -> Places:
    """Of the rows of a block of so many columns, at all its members."""

    def repeat(a):
        a = jnp.broadcast_to(a[..., None], (*a.shape, columns))
        return expand(a.reshape(*a.shape[:-2], -1))

    return Places(*map(repeat, places))


def _along_columns(places: Places, rows: Size, expand) -> Places:
    """Of the columns of a block of so many rows, likewise."""

    def repeat(a):
        a = jnp.broadcast_to(a[..., None, :], (*a.shape[:-1], rows, a.shape[-1]))
        return expand(a.reshape(*a.shape[:-2], -1))

    return Places(*map(repeat, places))


@jax.custom_vjp
def _log_weights(forms, i_q, i_p, rows, columns) -> Float[Array, "b n k x"]:
    return _gaussians.log_weights(forms, i_q, i_p, rows, columns)


def _log_weights_bwd(arrays, g):
    # Multiplied out, log w is a sum of what cells have times what pixels have, a product of two
    # matrices; so are its gradients. They are more precise around a place and a colour amid all.
    forms, i_q, i_p, rows, columns = arrays
    middle = i_p.mean(axis=4, keepdims=True)
    (v, y), (u, x) = (
        (of_cells.place - of_pixels.place.mean(), of_pixels.place - of_pixels.place.mean())
        for of_cells, of_pixels in (rows, columns)
    )

    def multiplied_out(forms, i_q, i_p):
        xx, xy, yy, e = forms
        of_cells = [
            xx * u * u + xy * u * v + yy * v * v + e * jnp.square(i_q).sum(axis=0),
            -2 * xx * u - xy * v,
            -2 * yy * v - xy * u,
            xx,
            xy,
            yy,
            e,
            *(-2 * e * a for a in i_q),
        ]
        square = jnp.square(i_p).sum(axis=0)
        of_pixels = [jnp.ones_like(square), x, y, x * x, x * y, y * y, square, *i_p]
        of_cells = jnp.stack([jnp.broadcast_to(a, xx.shape)[..., 0] for a in of_cells])
        of_pixels = jnp.stack([jnp.broadcast_to(a, square.shape)[..., 0, :] for a in of_pixels])
        precision = jax.lax.Precision.HIGHEST
        return -jnp.einsum("fbnk,fbnx->bnkx", of_cells, of_pixels, precision=precision)

    _, vjp = jax.vjp(multiplied_out, forms, i_q - middle, i_p - middle)
    return *vjp(g), None, None


_log_weights.defvjp(lambda *arrays: (_log_weights(*arrays), arrays), _log_weights_bwd)
