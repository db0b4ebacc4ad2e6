"""Sampling every output pixel at points of its own, group by group."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops import _bilinear
from resfu_jax.ops._checks import takes_maps
from resfu_jax.ops._dtypes import cast
from resfu_jax.ops._interp import Size
from resfu_jax.ops._order import zeros_after
from resfu_jax.ops._row_blocks import (
    Rows,
    add,
    add_to_sums,
    block_rows,
    cut,
    cut_parts,
    loop,
    map_row_blocks,
    may_be_small,
    put,
    zero_sums,
)

PaddingMode = Literal["zeros", "border"]
Implementation = Literal["reference", "blocks"]

# Blocks of points are a fraction of other blocks, as much is made of them on the way to and fro.
# So, less, are those of their source, but of so many pixels that its products are efficient.
_POINTS_FRACTION, _SOURCE_FRACTION, _SOURCE_PIXELS = 32, 8, 32


@takes_maps("x", "points")
def deformable_sample(
    x: Float[Array, "b h w c"],
    points: Float[Array, "b H W g p 2"],
    *,
    padding_mode: PaddingMode = "zeros",
    implementation: Implementation | None = None,
) -> Float[Array, "b H W g p d"]:
    """Bilinear samples of x at P points per output pixel and group of channels.

    With i = floor(u) and t = u - i on both axes, a sample is the sum over the four corners i, i + 1
    of the value there times (1 - t) or t. Differentiable in `x` and `points`; positions and weights
    are computed in float32 or better.

    Source: Dai et al., "Deformable Convolutional Networks", ICCV 2017, equation 4.

    Args:
      x: feature maps; the G groups are contiguous blocks of C / G channels.
      points: (row, column) in pixels of x, whole numbers at pixel centres, any value.
      padding_mode: `"zeros"`: corners outside count as zero; `"border"`: points are clamped to the
        pixel centres at the border, with no gradient to a clamped coordinate.
      implementation: `"reference"` samples the whole map at once, which takes four times the
        memory of the result for the gradient; `"blocks"` takes it in blocks of rows. `None` takes
        `"blocks"`.

    Returns:
      `(B, H, W, G, P, C / G)`, in the dtype of x.

    Raises:
      ValueError: shapes that do not fit, or an unknown padding mode.
    """
    if x.ndim != 4:
        raise ValueError(f"x must be (batch, height, width, channels), got shape {x.shape}")
    if points.ndim != 6 or points.shape[5] != 2 or points.shape[0] != x.shape[0]:
        raise ValueError(
            f"points must be (batch, H, W, groups, points, 2) with the batch of x, {x.shape[0]}, "
            f"got {points.shape}"
        )
    if padding_mode not in get_args(PaddingMode):
        raise ValueError(
            f"padding_mode must be one of {get_args(PaddingMode)}, got {padding_mode!r}"
        )
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(
            f"implementation must be one of {get_args(Implementation)} or None, "
            f"got {implementation!r}"
        )
    if x.shape[3] % points.shape[3]:
        raise ValueError(
            f"the groups of points, {points.shape[3]}, must divide the {x.shape[3]} channels of x"
        )
    if implementation == "reference":
        return _sample(x, points, padding_mode)

    return _in_blocks(x, points, padding_mode)


def _sample(x: Array, points: Array, padding_mode: PaddingMode) -> Array:
    inside = padding_mode == "border"
    x, positions = by_group(x, points.shape[3]), _positions(x, points, padding_mode)
    return cast(_bilinear.sample(x, *positions, inside=inside), x.dtype)


def by_group(x: Float[Array, "b h w c"], groups: int) -> _bilinear.Maps:
    """Groups of channels apart."""
    return x.reshape(*x.shape[:3], groups, x.shape[3] // groups)


def _positions(x: Array, points: Array, padding_mode: PaddingMode) -> tuple[Array, Array]:
    """Rows and columns."""
    points = points.astype(_bilinear.position_dtype(x, points))
    rows, columns = points[..., 0], points[..., 1]
    if padding_mode == "border":
        rows = _bilinear.clamp(rows, x.shape[1])
        columns = _bilinear.clamp(columns, x.shape[2])
    return rows, columns


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _in_blocks(x: Array, points: Array, padding_mode: PaddingMode) -> Array:
    count, block = _blocks(x, points.shape)

    def f(x, blocks):
        return (_sample(x, blocks[0], padding_mode),)

    # Not for memory: over the whole map, one slow loop would gather and sum up.
    (out,) = map_row_blocks(f, count, (block,), (block,), x, (points,), early=True)
    return out


MakePoints = Callable[[Any, Array, Array], Float[Array, "b H W g p 2"]]


def sample_at_made_points(
    make_points: MakePoints,
    params: Any,
    x: Float[Array, "b h w c"],
    source: Float[Array, "b hs ws e"] | None = None,
    *,
    padding_mode: PaddingMode = "zeros",
) -> Float[Array, "b H W d"]:
    """`deformable_sample` at points of which only a block exists at a time.

    Args:
      make_points: `(params, rows, first)`, some rows of the source and the number of the first of
        them, to the points of the output pixels that they make.
      params: pytree of arrays.
      x: feature maps.
      source: what the points are made of, x itself if not given.
      padding_mode: as in `deformable_sample`.

    Returns:
      Samples with all groups and points in one axis, in the dtype of x.
    """
    return _at_made_points(make_points, padding_mode, params, x, source)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _at_made_points(make_points, padding_mode, params, x, source):
    source = x if source is None else source
    count, rows, shape = _source_blocks(make_points, params, x, source)
    inner, block = _blocks(x, shape)

    def body(i, out):
        points = make_points(params, *cut((source,), i, (rows,)), _first(i, rows))

        def sample(j, out):
            samples = _sample(x, *cut((points,), j, (block,)), padding_mode)
            return put(out, samples, i * inner + j, block)

        return loop(inner, sample, out)

    b, height, width, groups, p, _ = shape
    out = jnp.zeros((b, count * height, width, groups, p, x.shape[3] // groups), x.dtype)
    return loop(count, body, out).reshape(b, count * height, width, -1)


def _at_made_points_bwd(make_points, padding_mode, saved, g):
    # As `_in_blocks_bwd`, with the gradient to what makes a block of points next.
    params, x, source = saved
    own = source is None
    source = x if own else source
    count, rows, shape = _source_blocks(make_points, params, x, source)
    inner, block = _gradient_blocks(x, shape)
    border, padded, d_padded = _padded(x, g, shape[3], padding_mode)
    apart = not own or border > 0

    def body(i, state):
        d_padded, d_source, d_params = state

        def made(params, source_rows):
            return make_points(params, source_rows, _first(i, rows))

        points, vjp_points = jax.vjp(made, params, *cut((source,), i, (rows,)))

        def sample(j, state):
            d_padded, d_points = state
            (p,) = cut((points,), j, (block,))
            d_out = _cut_samples(g, i * inner + j, block, p)
            d_padded, d_p = _sample_bwd(d_padded, x, padded, p, d_out, padding_mode, border)
            return d_padded, put(d_points, d_p, j, block)

        zeros = jnp.zeros(points.shape, points.dtype)
        d_padded, d_points = loop(inner, sample, (d_padded, zeros))
        parts, d_rows = vjp_points(d_points)
        if apart:
            d_source = put(d_source, d_rows, i, rows)
        else:
            added = rows._replace(offsets=(0,))
            d_padded = add(d_padded, (by_group(d_rows, shape[3]),), i, added)
        return d_padded, d_source, add_to_sums(d_params, parts)

    zeros = (
        d_padded,
        zeros_after(g, source.shape, source.dtype) if apart else (),
        zero_sums(params),
    )
    d_padded, d_source, d_params = loop(count, body, zeros)
    d_params = jax.tree.map(lambda d, a: d.astype(a.dtype), d_params, params)
    d_x = _bilinear.unpad(d_padded, border).reshape(x.shape).astype(x.dtype)
    if own:
        return d_params, d_x + d_source if apart else d_x, None
    return d_params, d_x, d_source


_at_made_points.defvjp(
    lambda *args: (_at_made_points(*args), args[2:]),
    _at_made_points_bwd,
)


def _source_blocks(
    make_points: MakePoints, params: Any, x: Array, source: Array
) -> tuple[Size, Rows, tuple[Size, ...]]:
    """Number of blocks of the source, their rows, and the shape of the points that one makes."""

    def points_shape(rows):
        block = jax.eval_shape(lambda source: cut((source,), 0, (rows,))[0], source)
        return jax.eval_shape(make_points, params, block, jnp.int32(0)).shape

    b, h, w, e = source.shape
    b_, hh, ww, groups, p, _ = points_shape(Rows(1, 1, 1))
    n = 1
    if all(isinstance(size, int) for size in (b, h, w)):
        values = max(_POINTS_FRACTION * b_ * hh * ww * groups * p * 2, _SOURCE_FRACTION * b * w * e)
        n = block_rows(h, values, at_least=values * (_SOURCE_PIXELS // (b * w)))
    rows = Rows(1, n, n)
    return h // n, rows, points_shape(rows)


def _first(i, rows: Rows) -> Array:
    return jnp.asarray(i, jnp.int32) * rows.step


def _blocks(x: Array, points_shape: tuple[Size, ...]) -> tuple[Size, Rows]:
    b, hh, ww, _, p, _ = points_shape
    rows = block_rows(hh, b * ww * p * 4 * x.shape[3])  # four corners a sample
    return hh // rows, Rows(1, rows, rows)


def _gradient_blocks(x: Array, points_shape: tuple[Size, ...]) -> tuple[Size, Rows]:
    b, hh, ww, _, p, _ = points_shape
    values, most = b * ww * p * 2 * x.shape[3], None  # two corners a sample
    if may_be_small() and all(isinstance(n, int) for n in (*x.shape, values)):
        # Of a small map, too, many blocks: beside it, one block is most of the memory.
        most = math.prod(x.shape) // values
    # Products with the corners and the gradient to them, and what both are made of.
    rows = block_rows(hh, 4 * values, most)
    return hh // rows, Rows(1, rows, rows)


def _in_blocks_bwd(padding_mode, saved, g):
    # Written out, so that what each block adds to x is scattered into one map.
    x, points = saved
    border, padded, d_padded = _padded(x, points, points.shape[3], padding_mode)
    count, block = _gradient_blocks(x, points.shape)

    def body(i, state):
        d_padded, d_points = state
        (p,) = cut((points,), i, (block,))
        d_out = _cut_samples(g, i, block, p)
        d_padded, d_p = _sample_bwd(d_padded, x, padded, p, d_out, padding_mode, border)
        return d_padded, add(d_points, d_p, i, block)

    d_points = zeros_after(g, points.shape, points.dtype)
    d_padded, d_points = loop(count, body, (d_padded, d_points))
    return _bilinear.unpad(d_padded, border).reshape(x.shape).astype(x.dtype), d_points


def _padded(x: Array, positions: Array, groups: int, padding_mode: PaddingMode):
    """The border that x needs, x with it, and the gradient to that to begin with."""
    maps = by_group(x, groups)
    border = _bilinear.zero_border(maps, padding_mode == "border")
    padded = _bilinear.pad(maps, border)
    dtype = _bilinear.position_dtype(x, positions)
    return border, padded, jnp.zeros(padded.shape, dtype)


def _cut_samples(g: Array, i, block: Rows, points: Array) -> tuple[Array, list[Array]]:
    """Block i of the gradient to samples, as a whole and in parts, for `_bilinear.sample_bwd`."""
    groups, p = points.shape[3:5]
    d = math.prod(g.shape[3:]) // (groups * p)
    n = _bilinear.count_parts(d)
    (whole,) = cut((g,), i, (block,))
    parts = cut_parts(g, i, block, (*g.shape[:3], groups, p, n, d // n))
    return whole.reshape(*points.shape[:5], d), parts


def _sample_bwd(d_padded, x, padded, points, d_out, padding_mode, border):
    """The gradient to x with what samples at some points add to it, and that to the points."""
    index, weights, vjp = corners(x, points, padding_mode, border)
    d_out, parts = jax.tree.map(lambda a: a.astype(d_padded.dtype), d_out)
    d_padded, d_weights = _bilinear.sample_bwd(d_padded, padded, index, weights, d_out, parts)
    return d_padded, *vjp(d_weights)


def corners(x: Array, points: Array, padding_mode: PaddingMode, border: int):
    """`_bilinear.corners` of the points, and the function from their gradient to the points'."""

    def weights_of(points):
        positions = _positions(x, points, padding_mode)
        index, weights = _bilinear.corners(x.shape[1:3], *positions, border)
        return weights, index

    weights, vjp, index = jax.vjp(weights_of, points, has_aux=True)
    return index, weights, vjp


_in_blocks.defvjp(
    lambda x, points, padding_mode: (_in_blocks(x, points, padding_mode), (x, points)),
    _in_blocks_bwd,
)
