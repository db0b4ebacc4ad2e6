"""Weighted means of the low-resolution cells around every output pixel, by weights of any formula.

Output pixel p of an axis lies at (p + 1/2) n / size - 1/2 on an axis of n cells. Its window are the
cells at most `reach` steps from its centre, which is that position rounded. A window that hangs
over an end of the map shows the last cell there once more for every step: whether such steps count
is for the weights to say.

    out[p] = sum_q softmax_q(log_weights(p, q)) values[q]
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from resfu_jax.ops._interp import half_pixel_taps
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.sizes import Size, divide_products

Centre = Literal["nearest", "floor"]


class Steps(NamedTuple):
    """Between pixels and cells of an axis.

    Attributes:
      count: steps from the pixel's centre to the cell, as if there were cells beyond the map.
      distance: from the cell to the pixel's position, in cells.
      inside: whether there is such a cell; else the last one stands in.
    """

    count: Array
    distance: Array
    inside: Array


# Of pixels, (f, ...), of cells, (g, ...), and of the steps between their rows and columns: weights,
# in float32 or better, -inf for none. Shapes broadcast.
LogWeights = Callable[[Array, Array, Steps, Steps], Array]


class Axis(NamedTuple):
    """Pixels of an axis: their centres, and their positions in two parts."""

    cells: Size
    centre: Int[Array, " n"]
    lower: Int[Array, " n"]
    fraction: Float[Array, " n"]

    def steps(self, pixel: Int[Array, " ..."], cell: Int[Array, " ..."]) -> Steps:
        """Between pixels and cells, which may lie beyond the map."""
        existing = jnp.clip(cell, 0, self.cells - 1)
        centre, lower, fraction = (jnp.take(a, pixel, mode="clip") for a in self[1:])
        distance = (lower - existing).astype(fraction.dtype) + fraction
        return Steps((cell - centre).astype(fraction.dtype), distance, cell == existing)


def axis(n: Size, size: Size, centre: Centre, dtype: DTypeLike) -> Axis:
    """An axis of n cells and `size` output pixels."""
    lower, fraction = half_pixel_taps(n, size, dtype=dtype)
    nearest, _ = divide_products(size, n, 2 * size, step=2, first=1)
    return Axis(n, nearest if centre == "nearest" else jnp.maximum(lower, 0), lower, fraction)


def check(values: Array, guide: Array) -> None:
    """Both are batches of maps, of as many images."""
    if values.ndim != 4 or guide.ndim != 4 or values.shape[0] != guide.shape[0]:
        raise ValueError(
            "values (B, h, w, C) and guide (B, H, W, G) must have 4 axes and the same batch size, "
            f"got {values.shape} and {guide.shape}"
        )


def reference(
    log_weights: LogWeights,
    pixels: Float[Array, "b H W f"],
    cells: Float[Array, "b h w g"],
    values: Float[Array, "b h w c"],
    *,
    reach: int,
    centre: Centre,
) -> Float[Array, "b H W c"]:
    """The formula as it stands: every pixel's window is gathered."""
    rows, columns = (
        axis(n, size, centre, pixels.dtype)
        for n, size in zip(values.shape[1:3], pixels.shape[1:3], strict=True)
    )
    step = jnp.arange(-reach, reach + 1, dtype=jnp.int32)
    i, j = (jnp.arange(size, dtype=jnp.int32)[:, None] for size in pixels.shape[1:3])
    row, column = rows.centre[:, None] + step[None], columns.centre[:, None] + step[None]

    def windows(x):  # b H u W v g
        return jnp.take(jnp.take(x, row, axis=1, mode="clip"), column, axis=3, mode="clip")

    scores = log_weights(
        jnp.moveaxis(pixels, 3, 0)[:, :, :, None, :, None],
        jnp.moveaxis(windows(cells), 5, 0),
        Steps(*(a[None, :, :, None, None] for a in rows.steps(i, row))),
        Steps(*(a[None, None, None] for a in columns.steps(j, column))),
    )
    p = jax.nn.softmax(scores, axis=(2, 4)).astype(values.dtype)
    dtype = at_least_float32(values.dtype)
    out = jnp.einsum("bHuWv,bHuWvc->bHWc", p, windows(values), preferred_element_type=dtype)
    return out.astype(values.dtype)
