"""Attention across scales as products of strips of queries with all keys around them.

The windows of a strip of queries, those of one cell's rows or else one row, lie in K rows of keys.
The strip attends to all columns of these rows, its tile's,

    out[x] = sum_tv p[t, v, x] v[t, v],    p = softmax_tv(scale q . k + log n),

where n[t, v, x], the product of a factor of the row and one of the column, is how many members of
the window of pixel x are the key in row t and column v: mostly none, a score of minus infinity.
That costs operations, which matrix units have to spare, and saves all rearranging. Where the scores
of all strips would be many, a few strips come at a time, and backward they are computed again.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops._rows import Rows, block_rows, map_row_blocks
from resfu_jax.ops._windows import extend, is_at_least, repeated_members
from resfu_jax.ops._xla import windows
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.sizes import Size, whole_ratio

_SCORES = 2**24  # at a time, at most
_PIXELS = 128  # of a tile of columns

# Letters of axes: b images; s strips of p rows, n tiles of x columns, of queries; t rows and v
# columns of keys; g heads of d or e channels.


def attention(q: Array, k: Array, v: Array, *, kernel: tuple[int, int], scale: float) -> Array:
    """Form of `ops.cross_scale_attention`."""
    heads, size = q.shape[3], q.shape[1:3]
    rows, row_counts = _axis(k.shape[1], size[0], kernel[0], 1)
    cols, column_counts = _axis(k.shape[2], size[1], kernel[1], _PIXELS)

    def strip(q, k, v, row_counts, column_counts):
        scores = scale * jnp.einsum(
            "bpnxgd,bntvgd->bgtvpnx", q, k, preferred_element_type=at_least_float32(q.dtype)
        )
        counts = row_counts[:, None, :, None, None] * column_counts[None, :, None]
        counts = jax.lax.stop_gradient(jnp.log(counts.astype(scores.dtype)))[None, None]
        p = jax.nn.softmax(scores + counts, axis=(2, 3)).astype(v.dtype)
        out = jnp.einsum(
            "bgtvpnx,bntvge->bpnxge", p, v, preferred_element_type=at_least_float32(v.dtype)
        )
        return out.astype(v.dtype)

    strips = (
        cols.split(rows.split(q, 1), 3),
        _keys(k, (rows, cols), kernel),
        _keys(v, (rows, cols), kernel),
        jnp.broadcast_to(row_counts, (row_counts.shape[0], rows.parts, rows.pixels)),
    )
    scores = (*strips[1].shape[3:5], rows.pixels, cols.parts, cols.pixels, q.shape[0], heads)
    at_a_time = _SCORES // math.prod(scores) if all(isinstance(n, int) for n in scores) else 1
    together = block_rows(rows.parts, 1, at_a_time)
    own = Rows(1, together, together)
    (out,) = map_row_blocks(
        lambda *strips: (jax.vmap(strip, (1, 1, 1, 1, None), 1)(*strips),),
        rows.parts // together,
        (own, own, own, own, None),
        (own,),
        *strips,
        column_counts,
    )
    return rows.join(cols.join(out, 3), 1)


def refusal(q: Array, k: Array, v: Array, **options) -> str | None:
    """Why `attention` does not apply."""
    for name, n, size in zip(("rows", "columns"), k.shape[1:3], q.shape[1:3], strict=True):
        if isinstance(n, int) and isinstance(size, int) and size < n:
            return f"it needs as many {name} of q as of k, got {size} and {n}"
    return None


def _axis(
    n: Size, size: Size, kernel_size: int, most: int
) -> tuple[windows._Axis, Float[Array, "keys parts pixels"]]:
    """In parts of at most so many pixels, and how often each pixel's window shows a part's keys."""
    ratio = whole_ratio((n,), (size,))
    if ratio and is_at_least(n, kernel_size):
        cells = max(1, most // ratio[0])
        axis = windows._axis(n, size, kernel_size // 2, windows._in_cells, cells)
        return axis, sum(axis.weights(tap, jnp.float32) for tap in range(kernel_size))
    members = repeated_members(n, size, kernel_size)
    pixels = min(most, size) if isinstance(size, int) or most == 1 else size
    parts = -(-size // pixels)
    index = jnp.arange(parts * pixels, dtype=jnp.int32)
    members = jnp.take(members, index, axis=0, mode="clip").reshape(parts, pixels, kernel_size)
    if isinstance(parts, int) and parts == 1:
        keys, first = n, None
    else:
        # The members of a pixel span kernel_size keys, those of neighbours move on by a pixel,
        # and between residue classes and cells there is one key more each.
        keys = kernel_size if pixels == 1 else pixels * n // size + kernel_size + 2
        first = members.min(axis=(1, 2))
    key = jnp.arange(keys, dtype=jnp.int32)[:, None] + (0 if first is None else first[None])
    counts = (key[:, :, None, None] == members[None]).sum(axis=3, dtype=jnp.float32)
    return windows._Axis(parts, pixels, keys, 0, size, first, index, None), counts


def _keys(
    x: Float[Array, "b h w g c"], axes: tuple[windows._Axis, ...], kernel: tuple[int, int]
) -> Float[Array, "b s n t v g c"]:
    """What each strip and tile sees of the map, extended so that windows are centred."""
    for i, (axis, kernel_size) in enumerate(zip(axes, kernel, strict=True), 1):
        if axis.border:
            length = x.shape[i] + 2 * axis.border
            x = windows._lengthen(extend(x, i, kernel_size), i, length)
    return jnp.moveaxis(axes[1].windows(axes[0].windows(x, 1), 3), 3, 2)
