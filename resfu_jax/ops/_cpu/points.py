"""Samples at points on a CPU, block of rows by block of rows."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from resfu_jax.ops import _bilinear as bilinear
from resfu_jax.ops._rows import Rows, add, block_rows, cut, loop, map_row_blocks
from resfu_jax.ops.sizes import Size, to_int32


def sample(x: Array, points: Array, *, padding_mode: str) -> Array:
    """Form of `ops.deformable_sample`."""
    return _sample(x, points, padding_mode)


def attention(
    attend: Callable[..., Array],
    q: Array,
    k: Array,
    v: Array,
    points: Array,
    bias: Array | None,
    heads: int,
) -> Array:
    """Form of `ops.deformable_attention`, of whose softmax and sums `attend` is the formula."""

    def block(q, points, k, v, bias):
        keys, values = (bilinear.sample_at(a, points, "zeros") for a in (k, v))
        return (attend(q, keys, values, bias, heads),)

    count, rows = _blocks(points, 4 * (k.shape[3] + v.shape[3]))
    inputs = rows, rows, None, None, None
    (out,) = map_row_blocks(block, count, inputs, (rows,), q, points, k, v, bias)
    return out


def _blocks(points: Array, values: Size) -> tuple[Size, Rows]:
    """Of rows of points, each of which has so many values in all groups."""
    b, hh, ww, _, p, _ = points.shape
    rows = block_rows(hh, b * ww * p * values)
    return hh // rows, Rows(1, rows, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _sample(x: Array, points: Array, padding_mode: str) -> Array:
    count, rows = _blocks(points, 4 * x.shape[3])

    def block(points, x):
        return (bilinear.sample_at(x, points, padding_mode),)

    # Not for memory: over the whole map, one slow loop would gather and sum up.
    (out,) = map_row_blocks(block, count, (rows, None), (rows,), points, x)
    return out


def _sample_bwd(padding_mode, saved, g):
    # Written out, so that what each block adds to x is scattered into one map.
    x, points = saved
    maps = bilinear.by_group(x, points.shape[3])
    border = bilinear.zero_border(maps, padding_mode == "border")
    padded = bilinear.pad(maps, border)
    dtype = bilinear.position_dtype(x, points)
    count, rows = _blocks(points, 16 * x.shape[3])  # values, their gradient, what makes them
    flat = g.reshape(*g.shape[:3], -1)  # as callers have it: XLA would copy it to other axes

    def body(i, state):
        d_padded, d_points, points = state
        d_out = cut(flat, i, rows).astype(dtype)
        d_out = d_out.reshape(*d_out.shape[:3], *g.shape[3:])

        def corners(points):
            at = bilinear.positions(x, points, padding_mode)
            index, weights = bilinear.corners(x.shape[1:3], *at, border)
            return weights, index

        weights, vjp, index = jax.vjp(corners, points, has_aux=True)
        values = bilinear.gather(padded, index, dtype)
        d_weights = jnp.einsum("...kd,...d->...k", values, d_out, precision="highest")
        d_values = weights[..., None] * d_out[..., None, :]
        d_padded = bilinear.scatter_add(d_padded, index, d_values)
        d_points = add(d_points, *vjp(d_weights), i, rows)
        return d_padded, d_points, cut(d_points, jnp.minimum(i + 1, to_int32(count) - 1), rows)

    # The points give way to their gradient, block by block, as in `map_row_blocks`.
    begun = jnp.zeros(padded.shape, dtype), points, cut(points, 0, rows)
    d_padded, d_points, _ = loop(count, body, begun)
    return bilinear.unpad(d_padded, border).reshape(x.shape).astype(x.dtype), d_points


_sample.defvjp(lambda x, points, mode: (_sample(x, points, mode), (x, points)), _sample_bwd)
