"""Neighbourhood attention: every pixel attends to the window of pixels around it.

Along an axis of n pixels with dilation d, pixel i sees pixels of its own residue class i mod d
only. The class of residue r has L = ceil((n - r) / d) members. The window of K of them is centred
on i and shifted inwards at the ends, never padded:

    start = clamp(floor(i / d) - floor(K / 2), 0, L - K),    members r + d (start + 0 .. K - 1).

In two dimensions the window is the product of a row window and a column window, and for each head

    out = sum_j p_j v_j,    p = softmax_j(scale q . k_j)    over its members j.

**Tiles.** The windows that are shifted inwards equal centred windows of a periodically extended map
(`_windows.extend`). So no pixel is special. The map is cut into tiles of
at most `TILE` x `TILE` members of one residue class; a tile attends to itself and the K - 1 members
around it in dense matrix products under one constant mask. Rows of tiles are computed one after the
other, forward and backward, and the gradient recomputes the probabilities instead of keeping them.

Sources: Hassani et al., "Neighborhood Attention Transformer", CVPR 2023; Hassani and Shi, "Dilated
Neighborhood Attention Transformer", 2022; the window rule is that of their library NATTEN.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from resfu_jax.ops._forms import Forms, Implementation
from resfu_jax.ops._rows import Rows, map_row_blocks
from resfu_jax.ops._windows import check_pair, extend, window_members
from resfu_jax.ops.checks import takes_maps
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.sizes import Size

# The most members of a tile along an axis: larger ones waste more products beyond the windows,
# smaller ones have less efficient products.
TILE = 8


@takes_maps("q", "k", "v")
def neighborhood_attention(
    q: Float[Array, "b H W heads d"],
    k: Float[Array, "b H W heads d"],
    v: Float[Array, "b H W heads dv"],
    *,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "b H W heads dv"]:
    """Attention of every pixel to the K x K window around it; see the module's docstring.

    Args:
      q: queries.
      k: keys, of q's shape and dtype.
      v: values; their width may differ.
      kernel_size: K, or (rows, columns). An even window has one member more before the pixel than
        after it.
      dilation: distance in pixels between neighbouring members, or (rows, columns).
      scale: factor of the scores, `d ** -0.5` if not given. (For a learned one, multiply q.)
      implementation: `"reference"` gathers the window of every pixel, K * K copies of k and v;
        `"xla"`, the tiles, is several times faster and needs little memory. `None` takes `"xla"`.

    Returns:
      The attended values, in v's dtype. Scores and softmax are in float32 or better.

    Raises:
      ValueError: shapes or dtypes do not match, or `kernel_size * dilation` exceeds the map. Of
        symbolic sizes (`jax.export`) the latter is not known: give a constraint (`"h >= 7"`).
    """
    if q.ndim != 5 or k.shape != q.shape or v.ndim != 5 or v.shape[:4] != q.shape[:4]:
        raise ValueError(
            "q and k must be (batch, height, width, heads, d) and v the same up to the last axis, "
            f"got q {q.shape}, k {k.shape}, v {v.shape}"
        )
    if k.dtype != q.dtype:
        raise ValueError(f"k must have q's dtype {q.dtype}, got {k.dtype}; cast it")
    kernel = check_pair("kernel_size", kernel_size)
    dilations = check_pair("dilation", dilation)
    for name, n, size, step in zip(
        ("height", "width"), q.shape[1:3], kernel, dilations, strict=True
    ):
        if isinstance(n, int) and size * step > n:
            raise ValueError(
                f"kernel_size * dilation must not exceed the {name} of q, got {size} * {step} = "
                f"{size * step} > {n}; every residue class needs kernel_size members"
            )
    scale = q.shape[4] ** -0.5 if scale is None else float(scale)
    return _FORMS(implementation, q, k, v, kernel=kernel, dilation=dilations, scale=scale)


def _reference(
    q: Array,
    k: Array,
    v: Array,
    *,
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> Array:
    dtype = at_least_float32(q.dtype)
    rows = window_members(q.shape[1], kernel[0], dilation[0])
    columns = window_members(q.shape[2], kernel[1], dilation[1])

    def windows(x):  # b H u W v heads d
        return jnp.take(jnp.take(x, rows, axis=1), columns, axis=3)

    scores = scale * jnp.einsum(
        "bijhd,biujvhd->bijhuv", q, windows(k), preferred_element_type=dtype
    )
    p = jax.nn.softmax(scores, axis=(-2, -1)).astype(v.dtype)
    out = jnp.einsum("bijhuv,biujvhd->bijhd", p, windows(v), preferred_element_type=dtype)
    return out.astype(v.dtype)


class _Axis(NamedTuple):
    """An axis of `dilation` residue classes, each cut into `count` tiles of `tile` members.

    A tile sees `window` members, its own and those around them, which lie in `blocks` consecutive
    tiles of the extended axis. For the queries themselves the kernel is 1.
    """

    kernel: int
    dilation: int
    tile: int
    count: Size

    @property
    def window(self) -> int:
        return self.tile + self.kernel - 1

    @property
    def blocks(self) -> int:
        return -(-self.window // self.tile)


_Axes = tuple[_Axis, _Axis]  # rows, columns


def _axes(
    sizes: tuple[Size, Size], kernel: tuple[int, int], dilation: tuple[int, int]
) -> tuple[_Axes, _Axes]:
    """The axes of the queries, and those of the keys and values."""
    axes = []
    for n, k, d in zip(sizes, kernel, dilation, strict=True):
        members = -(-n // d)
        count = -(-members // TILE)
        tile = -(-members // count) if isinstance(n, int) else TILE
        axes.append(_Axis(k, d, tile, count))
    return tuple(a._replace(kernel=1) for a in axes), tuple(axes)


def _tiles(
    q: Array,
    k: Array,
    v: Array,
    *,
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> Array:
    own, around = _axes(q.shape[1:3], kernel, dilation)

    def block(q, k, v):
        """Of one row of tiles in each residue class of the rows."""
        p = _probabilities(_cut(q, own[1]), _cut(k, around[1]), around, scale)
        tiles = _product("xij,xjc->xic", p, _cut(v, around[1])).astype(v.dtype)
        out = jax.ShapeDtypeStruct((*q.shape[:-1], v.shape[-1]), v.dtype)
        return jax.linear_transpose(lambda x: _cut(x, own[1]), out)(tiles)  # back to their places

    of_own, of_around = (Rows(1, rows.tile, rows.window) for rows, _ in (own, around))
    grids = _grid(q, own), _grid(k, around), _grid(v, around)
    inputs = of_own, of_around, of_around
    (out,) = map_row_blocks(block, own[0].count, inputs, (of_own,), *grids)
    return _ungrid(out, q.shape[1])


def _product(subscripts: str, a: Array, b: Array) -> Array:
    """Matrix products in b's dtype, summed in float32 or better."""
    return jnp.einsum(
        subscripts, a.astype(b.dtype), b, preferred_element_type=at_least_float32(b.dtype)
    )


def _probabilities(q: Array, k: Array, around: _Axes, scale: float) -> Array:
    """Attention of a tile's members to all that the tile sees, (x, tile^2, window^2)."""

    def inside(a: _Axis) -> np.ndarray:
        offset = np.arange(a.window)[None, :] - np.arange(a.tile)[:, None]
        return (offset >= 0) & (offset < a.kernel)

    mask = np.kron(inside(around[0]), inside(around[1]))
    scores = scale * _product("xic,xjc->xij", q, k)
    return jax.nn.softmax(jnp.where(mask[None], scores, -jnp.inf), axis=-1)


def _grid(x: Array, axes: _Axes) -> Array:
    """(b, H, W, heads, c) to (b, member of the row's class, row's residue, W, heads, c)."""
    rows, _ = axes
    x = _extend(x, rows, axis=1, members=rows.count * rows.tile + rows.kernel - 1)
    return x.reshape(x.shape[0], -1, rows.dilation, *x.shape[2:])


def _ungrid(x: Array, height: Size) -> Array:
    """The inverse of `_grid` for queries."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :height]


def _extend(x: Array, a: _Axis, axis: int, members: Size) -> Array:
    """Extend an axis by half a window to each side, and by zeros to `members` of each class."""
    x = extend(x, axis, a.kernel, a.dilation)
    zeros = (*x.shape[:axis], members * a.dilation - x.shape[axis], *x.shape[axis + 1 :])
    return jnp.concatenate([x, jnp.zeros(zeros, x.dtype)], axis)


def _cut(band: Array, columns: _Axis) -> Array:
    """(b, window, residue, W, heads, c) to overlapping tiles (x, window^2, c).

    x over images, residues of the rows, tiles, residues of the columns and heads.
    """
    band = jnp.moveaxis(band, 2, 1).reshape(-1, band.shape[1], *band.shape[3:])
    count, tile, blocks = columns.count, columns.tile, columns.blocks
    x = _extend(band, columns, axis=2, members=(count - 1 + blocks) * tile)
    x = x.reshape(*x.shape[:2], count - 1 + blocks, tile, columns.dilation, *x.shape[3:])
    last = columns.window - (blocks - 1) * tile
    x = [x[:, :, s : s + count, : tile if s + 1 < blocks else last] for s in range(blocks)]
    # To (b, count, residue, heads, window, window, c).
    x = jnp.concatenate(x, axis=3).transpose(0, 2, 4, 5, 1, 3, 6)
    return x.reshape(-1, x.shape[4] * x.shape[5], x.shape[6])


_FORMS = Forms("neighborhood_attention", _reference, xla=_tiles)
