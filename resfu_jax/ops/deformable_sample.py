"""Sampling every output pixel at points of its own, group by group."""

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops import _bilinear
from resfu_jax.ops._interp import Size
from resfu_jax.ops._large_pages import empty
from resfu_jax.ops._order import zeros_after
from resfu_jax.ops._row_blocks import Rows, add, block_rows, cut, loop, map_row_blocks, put

PaddingMode = Literal["zeros", "border"]
Implementation = Literal["reference", "blocks"]

# Blocks of what points are made of, at most: narrower ones have less efficient products.
_SOURCE_BLOCKS = 16


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
    return _bilinear.sample(x, *positions, inside=inside).astype(x.dtype)


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


def sample_at_made_points(
    make_points: Callable[[Array, Array], Float[Array, "b H W g p 2"]],
    x: Float[Array, "b h w c"],
    source: Float[Array, "b hs ws e"],
    *,
    padding_mode: PaddingMode = "zeros",
) -> Float[Array, "b H W g p d"]:
    """`deformable_sample` at points of which only a block exists at a time; not differentiable.

    Args:
      make_points: `(rows, first)`, some rows of the source and the number of the first of them, to
        the points of the output pixels that they make.
      x: feature maps.
      source: what the points are made of.
      padding_mode: as in `deformable_sample`.
    """
    h, whole = source.shape[1], jax.eval_shape(make_points, source, jnp.int32(0)).shape
    if isinstance(h, int):
        most = 1 if _blocks(x, whole)[0] == 1 else _SOURCE_BLOCKS
        count = max(n for n in range(1, most + 1) if h % n == 0)
    else:
        count = h
    rows = Rows(1, h // count, h // count)

    def points_of(i, source):
        first = jnp.asarray(i, jnp.int32) * rows.step
        return make_points(*cut((source,), i, (rows,)), first)

    shape = jax.eval_shape(lambda source: points_of(0, source), source).shape
    inner, block = _blocks(x, shape)

    def body(i, out):
        points = points_of(i, source)

        def sample(j, out):
            samples = _sample(x, *cut((points,), j, (block,)), padding_mode)
            return put(out, samples, i * inner + j, block)

        return loop(inner, sample, out)

    groups = whole[3]
    return loop(count, body, empty((*whole[:5], x.shape[3] // groups), x.dtype))


def _blocks(x: Array, points_shape: tuple[Size, ...]) -> tuple[Size, Rows]:
    b, hh, ww, _, p, _ = points_shape
    rows = block_rows(hh, b * ww * p * 4 * x.shape[3])  # four corners a sample
    return hh // rows, Rows(1, rows, rows)


def _in_blocks_bwd(padding_mode, saved, g):
    # Written out, so that what each block adds to x is scattered into one map.
    x, points = saved
    dtype = _bilinear.position_dtype(x, points)
    maps = by_group(x, points.shape[3])
    border = _bilinear.zero_border(maps, padding_mode == "border")
    padded = _bilinear.pad(maps.astype(dtype), border)
    count, block = _blocks(x, points.shape)

    def body(i, state):
        d_padded, d_points = state
        p, d_out = cut((points, g), i, (block, block))
        index, weights, vjp = corners(x, p, padding_mode, border)
        values = _bilinear.gather(padded, index)
        _, vjp_sum = jax.vjp(_bilinear.weighted_sum, weights, values)
        d_weights, d_values = vjp_sum(d_out.astype(dtype))
        d_padded = _bilinear.scatter_add(d_padded, index, d_values)
        return d_padded, add(d_points, *vjp(d_weights), i, block)

    zeros = jnp.zeros(padded.shape, dtype), zeros_after(g, points.shape, points.dtype)
    d_padded, d_points = loop(count, body, zeros)
    return _bilinear.unpad(d_padded, border).reshape(x.shape).astype(x.dtype), d_points


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
