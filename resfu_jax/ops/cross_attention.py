"""Cross-attention: the pixels of a large map attend to those of a small one.

With scores s_gj = scale <q_g, k_gj> of head g, every pixel of the large map gets

    out = sum_j p_j v_j,    p = mean_g softmax_j(s_gj + log n_j):

the weights are averaged over the heads before they are applied to the values, which are the same
for all heads. n_j is how often the pixel sees pixel j of the small map: always once or, with
windows, a factor of the rows times one of the columns, rows[y, y_j] columns[x, x_j], mostly 0.

Sources: the attention of JAFAR (Couairon et al., 2025) and AnyUp (Wimmer et al., 2025).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from resfu_jax.ops._forms import Forms, Implementation
from resfu_jax.ops._rows import Rows, block_rows, map_row_blocks
from resfu_jax.ops._windows import repeated_members
from resfu_jax.ops.checks import takes_maps
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.sizes import Size

Table = np.ndarray | Array

_FEWEST, _PIXELS = 16, 64  # of a tile of columns
_LARGER = 4  # than the usual blocks: accelerators have more work in each, CPUs do not mind


@takes_maps("q", "k", "v")
def cross_attention(
    q: Float[Array, "b H W c"],
    k: Float[Array, "b h w c"],
    v: Float[Array, "b h w d"],
    *,
    heads: int,
    rows: Shaped[Table, "H h"] | None = None,
    columns: Shaped[Table, "W w"] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "b H W d"]:
    """Attention of all pixels of q to those of k and v; see the module's docstring.

    Args:
      q: queries, of a large map; the channels of a head are neighbours.
      k: keys, of a small map, in q's dtype.
      v: values.
      heads: of q and k; it divides their channels.
      rows: (H, h), how often a pixel in row y of q sees one in each row of k: not negative, and not
        0 for all. All rows are seen once if it is not given. Of a NumPy array it is known what is
        never seen, and nothing computed for that; of a JAX array, which may depend on symbolic
        sizes, it is not.
      columns: (W, w), likewise.
      scale: factor of the scores, (channels of a head) ** -0.5 if not given.
      implementation: `"reference"` has the scores of all pixels; `"xla"` those of a few rows at a
        time, forward and backward. `None` takes `"xla"`.

    Returns:
      The attended values, in v's dtype. Scores and softmax are in float32 or better.

    Raises:
      ValueError: shapes or dtypes do not match, or a row or column sees nothing.
    """
    if q.ndim != 4 or k.ndim != 4 or (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]):
        raise ValueError(
            "q must be (batch, H, W, channels) and k (batch, h, w, channels), "
            f"got q {q.shape} and k {k.shape}"
        )
    if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must be k's shape {k.shape} up to the last axis, got {v.shape}")
    if k.dtype != q.dtype:
        raise ValueError(f"k must have q's dtype {q.dtype}, got {k.dtype}; cast it")
    if heads < 1 or q.shape[3] % heads:
        raise ValueError(f"heads must divide the {q.shape[3]} channels of q, got {heads}")
    for name, table, shape in (
        ("rows", rows, (q.shape[1], k.shape[1])),
        ("columns", columns, (q.shape[2], k.shape[2])),
    ):
        if table is None:
            continue
        if table.shape != shape:
            raise ValueError(f"{name} must be {shape}, got shape {table.shape}")
        if isinstance(table, np.ndarray) and not ((table >= 0).all() and (table > 0).any(1).all()):
            raise ValueError(f"{name} must not be negative, nor 0 for all that a pixel could see")
    scale = (q.shape[3] // heads) ** -0.5 if scale is None else float(scale)
    return _FORMS(implementation, q, k, v, rows, columns, heads=heads, scale=scale)


def repeated_windows(n: int, size: int, kernel_size: int) -> Shaped[np.ndarray, "size n"]:
    """How often each of `size` pixels sees each of n in `ops.cross_scale_attention`.

    A table for `ops.cross_attention`, of windows of `kernel_size` members.
    """
    with jax.ensure_compile_time_eval():
        members = np.asarray(repeated_members(n, size, kernel_size))
    return (members[:, :, None] == np.arange(n)).sum(axis=1)


def _heads(x: Array, heads: int) -> Array:
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def _reference(
    q: Array,
    k: Array,
    v: Array,
    rows: Table | None,
    columns: Table | None,
    *,
    heads: int,
    scale: float,
) -> Array:
    dtype = at_least_float32(q.dtype)
    q, k = _heads(q, heads), _heads(k, heads)
    s = scale * jnp.einsum("bijgd,bhwgd->bgijhw", q, k, preferred_element_type=dtype)
    if rows is not None:
        s = s + _log(rows, dtype)[None, None, :, None, :, None]
    if columns is not None:
        s = s + _log(columns, dtype)[None, None, None, :, None, :]
    p = jax.nn.softmax(s, axis=(-2, -1)).mean(axis=1).astype(v.dtype)
    out = jnp.einsum("bijhw,bhwd->bijd", p, v, preferred_element_type=at_least_float32(v.dtype))
    return out.astype(v.dtype)


def _log(table: Table, dtype: np.dtype) -> Float[Array, "n m"]:
    """Logarithms of counts, -inf for none."""
    if isinstance(table, np.ndarray):
        with np.errstate(divide="ignore"):
            return jnp.asarray(np.log(table.astype(np.float64)), dtype)
    return jnp.log(table.astype(dtype))


def _in_blocks(
    q: Array,
    k: Array,
    v: Array,
    rows: Table | None,
    columns: Table | None,
    *,
    heads: int,
    scale: float,
) -> Array:
    """A block of r rows of queries at a time, in n tiles of x columns.

    A block attends to the t rows of keys, and a tile to the m columns, in which the windows of all
    its pixels lie. For letters of axes, b are images, g heads, i the r x queries of a tile.
    """
    dtype = at_least_float32(q.dtype)
    (batch, height, width), (h, w) = q.shape[:3], k.shape[1:3]
    n = width // _tile(width) if isinstance(columns, np.ndarray) else 1
    first_columns, m = _reach(columns, n, w)
    _, t = _reach(rows, height, h)
    r = block_rows(height, batch * heads * width * t * m // _LARGER)
    first_rows, t = _reach(rows, height // r, h)

    def block(q, k, v, row_counts, column_counts):
        q = q.reshape(batch, r, n, width // n, -1).swapaxes(1, 2).reshape(batch, n, -1, q.shape[3])
        q, k, v = _heads(q, heads), *(a.swapaxes(1, 2).reshape(batch, n, t * m, -1) for a in (k, v))
        k = _heads(k, heads)
        of_rows, of_columns = map(jax.lax.stop_gradient, (row_counts[0].T, column_counts))
        counts = of_rows[None, :, None, :, None] + of_columns.swapaxes(1, 2)[:, None, :, None, :]
        counts = jnp.broadcast_to(counts, (n, t, m, r, width // n)).reshape(1, n, t * m, -1)

        def weights(g):  # by itself: XLA for CPUs is slow in sums of all heads' softmax
            s = jnp.einsum(
                "bnic,bnjc->bnji", q[:, :, :, g], k[:, :, :, g], preferred_element_type=dtype
            )
            return jax.nn.softmax(scale * s + counts, axis=2)

        p = (sum(map(weights, range(heads))) / heads).astype(v.dtype)
        out = jnp.einsum("bnji,bnjd->bnid", p, v, preferred_element_type=at_least_float32(v.dtype))
        out = out.reshape(batch, n, r, width // n, -1).swapaxes(1, 2)
        return (out.reshape(batch, r, width, -1).astype(v.dtype),)

    of_own = Rows(1, r, r)
    around = None if first_rows is None else Rows(1, t, t, first_rows)
    (out,) = map_row_blocks(
        block,
        height // r,
        (of_own, around, around, Rows(0, 1, 1), None),
        (of_own,),
        q,
        _windows(k, first_columns, m),
        _windows(v, first_columns, m),
        _counts(rows, first_rows, t, height // r, dtype),
        _counts(columns, first_columns, m, n, dtype),
    )
    return out


def _tile(width: int) -> int:
    """Pixels of a tile of columns, of which all have as many."""
    sizes = [x for x in range(_FEWEST, _PIXELS + 1) if width % x == 0]
    return max(sizes, default=width)


def _reach(table: Table | None, parts: Size, n: Size) -> tuple[tuple[int, ...] | None, Size]:
    """Where what each part of an axis sees begins, and its length; None and n if that is all."""
    if not isinstance(table, np.ndarray) or parts == 1:
        return None, n
    seen = (table > 0).reshape(parts, -1, n).any(axis=1)
    first, last = seen.argmax(axis=1), n - seen[:, ::-1].argmax(axis=1)
    length = (last - first).max()
    return tuple(np.minimum(first, n - length).tolist()), int(length)


def _windows(
    x: Float[Array, "b h w c"], first: tuple[int, ...] | None, m: Size
) -> Float[Array, "b h n m c"]:
    """The columns that each tile sees."""
    return jnp.stack([x[:, :, i : i + m] for i in first or (0,)], axis=2)


def _counts(
    table: Table | None, first: tuple[int, ...] | None, length: Size, parts: Size, dtype: np.dtype
) -> Float[Array, "parts pixels keys"]:
    """Logarithms of how often each part's pixels see what is cut for the part."""
    if table is None:
        return jnp.zeros((parts, 1, 1), dtype)
    log = _log(table, dtype).reshape(parts, -1, table.shape[1])
    if first is None:
        return log
    return jnp.stack([log[i, :, s : s + length] for i, s in enumerate(first)])


_FORMS = Forms("cross_attention", _reference, xla=_in_blocks)
