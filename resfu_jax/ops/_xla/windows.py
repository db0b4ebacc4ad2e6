"""Windows of low-resolution pixels as products with a band matrix.

The window of an output pixel lies in a few rows of the low-resolution map, the keys. For a strip of
output pixels the weights are spread over all columns of these rows,

    band[t, v, x] = weight of pixel x on the key in row t, column v; zero outside of its window,

and one matrix product makes the strip: out[x] = sum_tv band[t, v, x] keys[t, v]. Scores are the
same product with queries, of which every pixel keeps its window. Most of the band is zero: that
costs operations, which matrix units have to spare, and saves all rearranging.

At whole ratios the rows of output pixels of one cell are a strip, else each row is one. Wide maps
are cut into tiles of columns, so that the band grows with the tile and not with the map.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from resfu_jax.ops._interp import half_pixel_taps
from resfu_jax.ops.dtypes import at_least_float32, promote
from resfu_jax.ops.pad import Mode, pad
from resfu_jax.ops.sizes import Size, cell_index, whole_ratio

_TILE = 32  # cells of a tile of columns, at most

# Letters of axes: b images; s strips of p rows, n tiles of x columns, of output pixels; t rows and
# v columns of keys; i rows and j columns of windows; g groups of c channels.


def similarity(q: Array, k: Array, *, kernel_size: int) -> Array:
    """Form of `ops.local_similarity`."""
    rows, cols = _axes(k, q.shape[1:3], kernel_size // 2, _in_cells)
    scores = jnp.einsum(
        "bspnxc,bsntvc->btvspnx",
        cols.split(rows.split(q, 1), 3),
        _keys(k.astype(q.dtype), rows, cols, "constant"),
        preferred_element_type=at_least_float32(q.dtype),
    )
    windows = [
        (scores * cols.weights(j, scores.dtype)[None, None, :, None, None]).sum(axis=2)
        for j in range(kernel_size)
    ]
    windows = rows.join(cols.join(jnp.stack(windows, axis=2), 5), 3)
    planes = windows.reshape(q.shape[0], kernel_size**2, *q.shape[1:3])
    return jnp.moveaxis(planes, 1, 3).astype(q.dtype)


def attention(
    scores: Array, scale: Array | None, v: Array, *, groups: int, softmax: bool, border: Mode
) -> Array:
    """Form of `ops.local_attention` and, without the softmax, of `ops.local_reassembly`."""
    b, height, width, channels = scores.shape
    kernel_size = math.isqrt(channels // groups)
    planes = jnp.moveaxis(scores, 3, 1).reshape(b, groups, channels // groups, height, width)
    weights = planes.astype(promote(scores.dtype, at_least_float32(v.dtype)))
    if softmax:
        weights = jax.nn.softmax(weights, axis=2)
    if scale is not None:
        weights = weights * jnp.moveaxis(scale, 3, 1)[:, :, None].astype(weights.dtype)
    rows, cols = _axes(v, (height, width), kernel_size // 2, _in_cells)
    weights = weights.reshape(b, groups, kernel_size, kernel_size, height, width)
    return _reassemble(cols.split(rows.split(weights, 4), 6), v, rows, cols, border)


def fns_attention(attn: Array, x: Array, *, tile: int | None = None) -> Array:
    """Form of `ops.fns_attention`."""
    b, height, width, taps = attn.shape
    k = math.isqrt(taps)
    planes = jnp.moveaxis(attn, 3, 1).astype(promote(attn.dtype, at_least_float32(x.dtype)))
    position = functools.partial(half_pixel_taps, dtype=planes.dtype)
    rows, cols = _axes(x, (height, width), k // 2, position)
    planes = cols.split(rows.split(planes.reshape(b, 1, k, k, height, width), 4), 6)
    # Of the weights of taps, those of the rows of keys between which their samples lie.
    of_rows = [
        rows.weights(i, planes.dtype)[None, None, :, None, :, :, None, None] for i in range(k)
    ]
    planes = sum(planes[:, :, i, None] * of_rows[i] for i in range(k))
    return _reassemble(planes, x, rows, cols, "edge")


def _reassemble(
    weights: Float[Array, "b g t j s p n x"],
    values: Array,
    rows: "_Axis",
    cols: "_Axis",
    mode: Mode,
) -> Array:
    b, groups, _, taps, *_ = weights.shape
    band = sum(
        weights[:, :, :, j, None] * cols.weights(j, weights.dtype)[None, None, None, :, None, None]
        for j in range(taps)
    ).astype(values.dtype)
    keys = _keys(values, rows, cols, mode)
    channels = values.shape[3]
    keys = keys.reshape(*keys.shape[:5], groups, channels // groups)
    out = jnp.einsum(
        "bsntvgc,bgtvspnx->bspnxgc",
        keys,
        band,
        preferred_element_type=at_least_float32(values.dtype),
    )
    out = out.astype(values.dtype).reshape(*out.shape[:5], channels)
    return rows.join(cols.join(out, 3), 1)


def _keys(x: Array, rows: "_Axis", cols: "_Axis", mode: Mode) -> Float[Array, "b s n t v c"]:
    """What each strip and tile sees of the map, extended beyond its border."""
    x = pad(x, (rows.border, cols.border), mode)
    return jnp.moveaxis(cols.windows(rows.windows(x, 1), 3), 3, 2)


class _Axis(NamedTuple):
    """An axis of output pixels, in parts that see `border` keys around their own cells.

    Attributes:
      parts: how many; the last one may hang over the end.
      pixels: output pixels of a part.
      cells: low-resolution pixels that it covers.
      border: keys before and after these.
      size: of the whole axis, output pixels.
      first: first cell of each part; None where they follow each other.
      index, fraction: position of each pixel's first tap among the keys; of each part, or of all.
    """

    parts: Size
    pixels: Size
    cells: Size
    border: int
    size: Size
    first: Int[Array, " parts"] | None
    index: Int[Array, "parts pixels"]
    fraction: Float[Array, "parts pixels"] | None

    def split(self, x: Array, axis: int) -> Array:
        """Output pixels as (parts, pixels), with zeros over the end."""
        x = _lengthen(x, axis, self.parts * self.pixels)
        return x.reshape(*x.shape[:axis], self.parts, self.pixels, *x.shape[axis + 1 :])

    def join(self, x: Array, axis: int) -> Array:
        """The inverse of `split`."""
        shape = (*x.shape[:axis], self.parts * self.pixels, *x.shape[axis + 2 :])
        return jax.lax.slice_in_dim(x.reshape(shape), 0, self.size, axis=axis)

    def windows(self, x: Array, axis: int) -> Array:
        """The extended low-resolution axis as (parts, keys)."""
        keys = self.cells + 2 * self.border
        if self.first is not None:
            index = self.first[:, None] + jnp.arange(keys, dtype=jnp.int32)[None]
            return jnp.take(x, index, axis=axis, mode="clip")
        if self.cells == 1:
            shifted = [jax.lax.slice_in_dim(x, t, t + self.parts, axis=axis) for t in range(keys)]
            return jnp.stack(shifted, axis=axis + 1)
        x = _lengthen(x, axis, self.parts * self.cells + 2 * self.border)
        starts = [i * self.cells for i in range(self.parts)]
        parts = [jax.lax.slice_in_dim(x, i, i + keys, axis=axis) for i in starts]
        return jnp.stack(parts, axis=axis)

    def weights(self, tap: int, dtype: DTypeLike) -> Float[Array, "keys parts pixels"]:
        """Of each key in this tap of each pixel: a hat function of its distance."""
        keys = jnp.arange(self.cells + 2 * self.border, dtype=jnp.int32)[:, None, None]
        distance = keys - (self.index + tap)[None]
        if self.fraction is None:
            return (distance == 0).astype(dtype)
        distance = distance.astype(dtype) - self.fraction.astype(dtype)[None]
        return jnp.maximum(1 - jnp.abs(distance), 0)


def _lengthen(x: Array, axis: int, length: Size) -> Array:
    """With zeros behind."""
    over = [(0, 0)] * x.ndim
    over[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, over) if length != x.shape[axis] else x


# Of an axis of n cells and some output pixels: the cell of each pixel, and how far it is beyond it.
Position = Callable[[Size, Size], tuple[Array, Array | None]]


def _in_cells(n: Size, size: Size) -> tuple[Array, None]:
    return cell_index(n, size), None


def _axes(
    x: Array, size: tuple[Size, Size], reach: int, position: Position
) -> tuple["_Axis", "_Axis"]:
    """Rows and columns of output pixels that see `reach` cells to each side of their position."""
    (_, h, w, _), (height, width) = x.shape, size
    return _axis(h, height, reach, position, 1), _axis(w, width, reach, position, _TILE)


def _axis(n: Size, size: Size, reach: int, position: Position, most: int) -> _Axis:
    """In parts of at most so many cells."""
    border = reach if position is _in_cells else reach + 1
    ratio = whole_ratio((n,), (size,))
    if ratio is not None and most == 1:
        parts, cells = n, 1
    elif ratio is not None and isinstance(n, int):
        parts = -(-n // most)
        cells = -(-n // parts)
    elif most > 1:
        parts, cells = 1, n
    else:  # each row of output pixels by itself, as the cells of others lie differently
        first, fraction = position(n, size)
        index = jnp.full((size, 1), border - reach, jnp.int32)
        fraction = None if fraction is None else fraction[:, None]
        return _Axis(size, 1, 1, border, size, first, index, fraction)
    pixels = size if ratio is None else cells * ratio[0]
    index, fraction = position(cells, pixels)
    index = (index + (border - reach))[None]
    fraction = None if fraction is None else fraction[None]
    return _Axis(parts, pixels, cells, border, size, None, index, fraction)
