"""How kernels of windows divide their work: a strip of rows times a tile of columns a program.

A program makes the output pixels of a few rows of cells, 16 rows or one cell's, and of all columns
or, of a map wider than 256 pixels, of a tile whose pixels fill whole registers (multiples of 128).
It sees the keys of its cells and of `border` cells around them, in copies that overlap: little, as
keys are at low resolution. So what a program holds in VMEM does not grow with the map.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from resfu_jax.ops._forms import Refusal
from resfu_jax.ops._xla import windows
from resfu_jax.ops.sizes import Size, whole_ratio

VMEM = 40 * 2**20  # bytes that a kernel may plan with; the smallest TPU of today has 64 MiB
_ROWS, _PIXELS, _CHANNELS = 16, 256, 64
_DTYPES = ("float32", "bfloat16")


class Tiles(NamedTuple):
    """Rows and columns of output pixels, in the parts that programs make."""

    rows: windows._Axis
    cols: windows._Axis
    ratio: tuple[int, int]

    @property
    def columns(self) -> int:
        """Of keys that a program sees, in whole registers."""
        return -(-(self.cols.cells + 2 * self.cols.border) // 16) * 16

    def keys(self, x: Array) -> Float[Array, "b s n t v c"]:
        """What each program sees of a map that is extended by the border."""
        x = jnp.moveaxis(self.cols.windows(self.rows.windows(x, 1), 3), 3, 2)
        return windows._lengthen(x, 4, self.columns)

    def column_weights(self, kernel_size: int) -> Float[Array, "k v x"]:
        """`_Axis.weights` of the taps of columns."""
        taps = [self.cols.weights(tap, jnp.float32)[:, 0] for tap in range(kernel_size)]
        return windows._lengthen(jnp.stack(taps), 1, self.columns)


def tiles(
    size: tuple[int, int],
    out: tuple[int, int],
    border: int,
    position: windows.Position | None = None,
) -> Tiles:
    """For a map of this size and so many output pixels, a whole multiple.

    Without positions of pixels there are sizes only, and no arrays.
    """
    (h, w), ratio = size, whole_ratio(size, out)
    rows = min(h, max(1, _ROWS // ratio[0]))
    unit = math.lcm(ratio[1], 128)
    columns = w if out[1] <= max(unit, _PIXELS) else unit // ratio[1]
    axes = []
    for n, m, cells, reach in ((h, out[0], rows, border), (w, out[1], columns, border)):
        pixels = cells * m // n
        index, fraction = (None, None) if position is None else position(cells, pixels)
        index, fraction = (None if a is None else a[None] for a in (index, fraction))
        axes.append(windows._Axis(-(-n // cells), pixels, cells, reach, m, None, index, fraction))
    return Tiles(*axes, ratio)


def padded_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Of an array in VMEM, whose last two axes fill whole tiles."""
    rows = 32 // dtype.itemsize
    *major, a, b = shape
    return math.prod(major) * -(-a // rows) * rows * -(-b // 128) * 128 * dtype.itemsize


def refusal(x: Array, out: tuple[Size, Size], *others: Array, needs: Callable[[], int]) -> Refusal:
    """Why a kernel does not apply to a map, output pixels and other arrays.

    Args:
      x: the map.
      out: rows and columns of output pixels.
      others: other arrays.
      needs: bytes of VMEM; asked for when all else is well.
    """
    if not all(isinstance(n, int) for a in (x, *others) for n in a.shape):
        return "its sizes must be known"
    if whole_ratio(x.shape[1:3], out) is None:
        return f"it needs whole ratios, got {x.shape[1:3]} to {out}"
    if math.prod(x.shape[3:]) < _CHANNELS:
        return f"of less than {_CHANNELS} channels more than half would be padding"
    for a in (x, *others):
        if a.dtype.name not in _DTYPES:
            return f"it needs {' or '.join(_DTYPES)}, got {a.dtype}"
    if needs() > VMEM:
        return f"a program would need {needs() / 2**20:.0f} MiB of VMEM, of {VMEM // 2**20}"
    return None


def each_row(row: Callable[[Array, Array], None], cells: int, ratio: int) -> None:
    """Calls `row(cell, phase)` for each row of pixels, `cell * ratio + phase`."""

    def phases(cell, _):
        return jax.lax.fori_loop(0, ratio, lambda phase, _: row(cell, phase), None)

    jax.lax.fori_loop(0, cells, phases, None)


def product(a: Array, b: Array, axes: tuple[int, int]) -> Float[Array, "x y"]:
    """Sums over an axis of each, in float32; of bfloat16 Mosaic has no other precision."""
    precision = jax.lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else None
    over = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, over, precision, preferred_element_type=jnp.float32)


def result(shape: tuple[int, ...], x: Array) -> jax.ShapeDtypeStruct:
    """Of x's dtype, and in `jax.shard_map` as different between devices as x."""
    axes = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(shape, x.dtype, manual_axis_type=axes)


def compiler_params() -> object:
    """No two programs depend on each other."""
    from jax.experimental.pallas import tpu as pltpu

    parallel = ("parallel",) * 3
    return pltpu.CompilerParams(dimension_semantics=parallel, vmem_limit_bytes=VMEM * 3 // 2)
