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

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from resfu_jax.ops._forms import Forms, Implementation
from resfu_jax.ops._windows import check_pair, extend, window_members
from resfu_jax.ops.checks import takes_maps
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.sizes import Size

T = TypeVar("T")

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _tiles(
    q: Array,
    k: Array,
    v: Array,
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> Array:
    own, around = _axes(q.shape[1:3], kernel, dilation)
    queries, keys, values = _grid(q, own), _grid(k, around), _grid(v, around)

    def band(i, out):
        p = _probabilities(_load(queries, i, own), _load(keys, i, around), around, scale)
        return _add(out, _product("xij,xjc->xic", p, _load(values, i, around)), i, own)

    out = jnp.zeros((*queries.shape[:-1], v.shape[-1]), v.dtype)
    return _ungrid(_for_each_band(own, band, out), q.shape[1])


def _tiles_fwd(q, k, v, kernel, dilation, scale):
    return _tiles(q, k, v, kernel, dilation, scale), (q, k, v)


def _tiles_bwd(kernel, dilation, scale, saved, g):
    q, k, v = saved
    own, around = _axes(q.shape[1:3], kernel, dilation)
    queries, cotangents = _grid(q, own), _grid(g, own)
    keys, ungrid_keys = jax.vjp(lambda x: _grid(x, around), k)
    values, ungrid_values = jax.vjp(lambda x: _grid(x, around), v)

    def band(i, sums):
        d_q, d_k, d_v = sums
        q_i, g_i = _load(queries, i, own), _load(cotangents, i, own)
        k_i, v_i = _load(keys, i, around), _load(values, i, around)
        p = _probabilities(q_i, k_i, around, scale)
        d_p = _product("xic,xjc->xij", g_i, v_i).astype(p.dtype)
        d_scores = scale * p * (d_p - jnp.sum(p * d_p, axis=-1, keepdims=True))
        return (
            _add(d_q, _product("xij,xjc->xic", d_scores, k_i), i, own),
            _add(d_k, _product("xij,xic->xjc", d_scores, q_i), i, around),
            _add(d_v, _product("xij,xic->xjc", p, g_i), i, around),
        )

    # A key or value sums the contributions of several bands, a query belongs to one.
    d_k, d_v = (jnp.zeros(x.shape, at_least_float32(x.dtype)) for x in (keys, values))
    d_q, d_k, d_v = _for_each_band(own, band, (jnp.zeros_like(queries), d_k, d_v))
    (d_k,), (d_v,) = ungrid_keys(d_k.astype(k.dtype)), ungrid_values(d_v.astype(v.dtype))
    return _ungrid(d_q, q.shape[1]), d_k, d_v


_tiles.defvjp(_tiles_fwd, _tiles_bwd)


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


def _for_each_band(own: _Axes, band: Callable[[Array, T], T], state: T) -> T:
    """Run over the rows of tiles: `count` of them in each residue class."""
    bands = own[0].count * own[0].dilation
    if not isinstance(bands, int):
        bands = jnp.asarray(bands, jnp.int32)
    return jax.lax.fori_loop(0, bands, band, state)


def _band(grid: Array, i: Array, rows: _Axis) -> tuple[list[Array], tuple[Size, ...]]:
    """Corner and shape of band i."""
    zero = jnp.zeros_like(i)
    corner = [zero, i // rows.dilation * rows.tile, i % rows.dilation, zero, zero, zero]
    return corner, (grid.shape[0], rows.window, 1, *grid.shape[3:])


def _load(grid: Array, i: Array, axes: _Axes) -> Array:
    """The tiles of band i with what they see: (x, window^2, c), x over images, tiles and heads."""
    rows, columns = axes
    return _cut(jax.lax.dynamic_slice(grid, *_band(grid, i, rows)), columns)


def _add(grid: Array, tiles: Array, i: Array, axes: _Axes) -> Array:
    """Add tiles to band i, the adjoint of `_load`."""
    rows, columns = axes
    corner, shape = _band(grid, i, rows)
    band = jax.ShapeDtypeStruct(shape, tiles.dtype)
    (band,) = jax.linear_transpose(lambda x: _cut(x, columns), band)(tiles)
    band = jax.lax.dynamic_slice(grid, corner, shape) + band.astype(grid.dtype)
    return jax.lax.dynamic_update_slice(grid, band, corner)


def _cut(band: Array, columns: _Axis) -> Array:
    """(b, window, 1, W, heads, c) to overlapping tiles (x, window^2, c)."""
    count, tile, blocks = columns.count, columns.tile, columns.blocks
    x = _extend(band[:, :, 0], columns, axis=2, members=(count - 1 + blocks) * tile)
    x = x.reshape(*x.shape[:2], count - 1 + blocks, tile, columns.dilation, *x.shape[3:])
    last = columns.window - (blocks - 1) * tile
    x = [x[:, :, s : s + count, : tile if s + 1 < blocks else last] for s in range(blocks)]
    # To (b, count, residue, heads, window, window, c).
    x = jnp.concatenate(x, axis=3).transpose(0, 2, 4, 5, 1, 3, 6)
    return x.reshape(-1, x.shape[4] * x.shape[5], x.shape[6])


def _xla(q: Array, k: Array, v: Array, *, kernel, dilation, scale) -> Array:
    return _tiles(q, k, v, kernel, dilation, scale)


_FORMS = Forms("neighborhood_attention", _reference, xla=_xla)
