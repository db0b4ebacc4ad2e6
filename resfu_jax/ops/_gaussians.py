"""Means of the low-resolution cells around every output pixel, weighted by Gaussians of the cells.

With x the values of the cells q, I a guide at the output's size and (dx, dy) the offset from the
centre of q to output pixel p,

    out[p] = sum_q w x[q] / sum_q w,
    log w = -(xx dx^2 + xy dx dy + yy dy^2) - e |I(p) - I(q)|^2,

where every cell has its own form, xx, xy, yy and e. Pixel p of an axis lies at
(p + 1/2) n / size - 1/2 among its n cells; its centre is that position, rounded to a cell. The
window is around the centre:

* a square: the cells at most `reach` steps away along both axes, as far as they exist;
* a disc: those at most R(p) <= `reach` steps away. A step that leads beyond the map ends at the
  last cell of its row or column, which counts once more for each.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from resfu_jax.ops._interp import half_pixel_taps
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.sizes import Size, divide_products, to_int32

Centre = Literal["nearest", "floor"]


class Places(NamedTuple):
    """Pixels or cells of an axis.

    Attributes:
      step: a pixel's centre; a cell, as if there were others beyond the map (infinite for the
        square, to which those do not belong).
      place: where it is; beyond the map, where the last cell is.
    """

    step: Array
    place: Array


class Axis(NamedTuple):
    """An axis of output pixels and cells.

    Attributes:
      cells: how many.
      unit: length of a cell, in which offsets count.
      endless: whether there are steps beyond the map.
      centre: of every pixel.
      lower, fraction: position of every pixel.
    """

    cells: Size
    unit: Float[Array, ""]
    endless: bool
    centre: Int[Array, " n"]
    lower: Int[Array, " n"]
    fraction: Float[Array, " n"]

    def places_of_pixels(self, pixel: Int[Array, "..."], origin: Int[Array, "..."]) -> Places:
        """Of some pixels, relative to a cell, the origin."""
        centre, lower, fraction = (
            jnp.take(a, pixel, mode="clip") for a in (self.centre, self.lower, self.fraction)
        )
        step, whole = ((i - origin).astype(fraction.dtype) for i in (centre, lower))
        return Places(step, (whole + fraction) * self.unit)

    def places_of_cells(self, cell: Int[Array, "..."], origin: Int[Array, "..."]) -> Places:
        """Of some cells, likewise."""
        last = jnp.clip(cell, 0, self.cells - 1)
        step, place = ((i - origin).astype(self.fraction.dtype) for i in (cell, last))
        step = step if self.endless else jnp.where(cell == last, step, jnp.inf)
        return Places(step, place * self.unit)


def axes(
    size: tuple[Size, Size],
    out_size: tuple[Size, Size],
    *,
    centre: Centre,
    disc: bool,
    dtype: DTypeLike,
) -> list[Axis]:
    """Rows and columns. Offsets count in output pixels for the disc, in cells for the square."""
    both = []
    for n, m in zip(size, out_size, strict=True):
        lower, fraction = half_pixel_taps(n, m, dtype=dtype)
        nearest, _ = divide_products(m, n, 2 * m, step=2, first=1)
        unit = to_int32(m).astype(dtype) / to_int32(n).astype(dtype) if disc else 1
        middle = nearest if centre == "nearest" else jnp.maximum(lower, 0)
        both.append(Axis(n, jnp.asarray(unit, dtype), disc, middle, lower, fraction))
    return both


def log_weights(
    forms: Float[Array, "4 ..."],
    i_q: Float[Array, "g ..."],
    i_p: Float[Array, "g ..."],
    rows: tuple[Places, Places],
    columns: tuple[Places, Places],
) -> Float[Array, "..."]:
    """Of cells and pixels, of which `rows` and `columns` hold the places, in this order."""
    xx, xy, yy, e = forms
    dy, dx = (p.place - q.place for q, p in (rows, columns))
    # One by one: a sum over an axis is several times slower on a CPU.
    colour = sum(jnp.square(p - q) for q, p in zip(i_q, i_p, strict=True))
    return -(xx * jnp.square(dx) + (xy * dx + yy * dy) * dy) - e * colour


def inside(
    rows: tuple[Places, Places],
    columns: tuple[Places, Places],
    radius: Float[Array, "..."] | None,
    reach: int,
) -> Array:
    """Which cells lie in the windows of which pixels."""
    dy, dx = (p.step - q.step for q, p in (rows, columns))
    if radius is None:
        return (jnp.abs(dy) <= reach) & (jnp.abs(dx) <= reach)
    return jnp.square(dy) + jnp.square(dx) <= jnp.square(radius)


def reference(
    values: Float[Array, "b h w c"],
    forms: Float[Array, "b h w 4"],
    low_guide: Float[Array, "b h w g"],
    guide: Float[Array, "b H W g"],
    radius: Float[Array, "b H W 1"] | None,
    *,
    reach: int,
    centre: Centre,
) -> Float[Array, "b H W c"]:
    """The formula as it stands: every pixel's window is gathered.

    Args:
      values: x.
      forms: xx, xy, yy and e.
      low_guide: I(q).
      guide: I(p).
      radius: R; None for the square.
      reach: steps of the window, at most.
      centre: how positions are rounded: to the `"nearest"` cell, or to the one below, `"floor"`.
    """
    rows, columns = axes(
        values.shape[1:3],
        guide.shape[1:3],
        centre=centre,
        disc=radius is not None,
        dtype=guide.dtype,
    )
    step = jnp.arange(-reach, reach + 1, dtype=jnp.int32)
    row, column = (a.centre[:, None] + step[None] for a in (rows, columns))

    def windows(x):  # b H u W v g
        return jnp.take(jnp.take(x, row, axis=1, mode="clip"), column, axis=3, mode="clip")

    def places(a, cell, expand):
        pixel = jnp.arange(a.centre.shape[0], dtype=jnp.int32)[:, None]
        origin = a.centre[:, None]
        both = a.places_of_cells(cell, origin), a.places_of_pixels(pixel, origin)
        return jax.tree.map(expand, both)

    rows = places(rows, row, lambda a: a[None, :, :, None, None])
    columns = places(columns, column, lambda a: a[None, None, None])
    i_p = jnp.moveaxis(guide, 3, 0)[:, :, :, None, :, None]
    forms, i_q = (jnp.moveaxis(windows(x), 5, 0) for x in (forms, low_guide))
    radius = None if radius is None else radius[:, :, None]
    scores = log_weights(forms, i_q, i_p, rows, columns)
    scores = jnp.where(inside(rows, columns, radius, reach), scores, -jnp.inf)
    p = jax.nn.softmax(scores, axis=(2, 4)).astype(values.dtype)
    dtype = at_least_float32(values.dtype)
    out = jnp.einsum("bHuWv,bHuWvc->bHWc", p, windows(values), preferred_element_type=dtype)
    return out.astype(values.dtype)


def check_maps(values: Array, guide: Array) -> None:
    """Both are batches of maps, of as many images."""
    if values.ndim != 4 or guide.ndim != 4 or values.shape[0] != guide.shape[0]:
        raise ValueError(
            "values (B, h, w, C) and guide (B, H, W, G) must have 4 axes and the same batch size, "
            f"got {values.shape} and {guide.shape}"
        )
