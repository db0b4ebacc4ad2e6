"""Samples at points on a CPU: blocks of rows, each scattered into one map backward."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from resfu_jax.ops import _bilinear as bilinear
from resfu_jax.ops._bilinear import by_group, positions, sample_at
from resfu_jax.ops._cpu.rows import (
    Rows,
    add,
    add_to_sums,
    as_dtype,
    block_rows,
    cut,
    cut_parts,
    loop,
    map_row_blocks,
    zero_sums,
)
from resfu_jax.ops.sizes import Size


def sample(x: Array, points: Array, *, padding_mode: str) -> Array:
    """Form of `ops.deformable_sample`."""
    return _in_blocks(x, points, padding_mode)


def attention(
    attend, q: Array, k: Array, v: Array, points: Array, bias: Array | None, heads: int
) -> Array:
    """Form of `ops.deformable_attention`, of whose softmax and sums `attend` is the formula."""
    return _attend_in_blocks(attend, q, k, v, points, bias, heads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _in_blocks(x: Array, points: Array, padding_mode: str) -> Array:
    count, block = _blocks(x, points.shape)

    def f(x, blocks):
        return (sample_at(x, blocks[0], padding_mode),)

    # Not for memory: over the whole map, one slow loop would gather and sum up.
    (out,) = map_row_blocks(f, count, (block,), (block,), x, (points,))
    return out


def _blocks(x: Array, points_shape: tuple[Size, ...]) -> tuple[Size, Rows]:
    b, hh, ww, _, p, _ = points_shape
    rows = block_rows(hh, b * ww * p * 4 * x.shape[3])  # four corners a sample
    return hh // rows, Rows(1, rows, rows)


def _gradient_blocks(x: Array, points_shape: tuple[Size, ...]) -> tuple[Size, Rows]:
    b, hh, ww, _, p, _ = points_shape
    values, most = b * ww * p * 2 * x.shape[3], None  # two corners a sample
    if all(isinstance(n, int) for n in (*x.shape, values)):
        # Of a small map, too, many blocks: beside it, one block is most of the memory.
        most = math.prod(x.shape) // values
    # Products with the corners and the gradient to them, and what both are made of.
    rows = block_rows(hh, 4 * values, most)
    return hh // rows, Rows(1, rows, rows)


def _in_blocks_bwd(padding_mode, saved, g):
    # Written out, so that what each block adds to x is scattered into one map.
    x, points = saved
    # As callers have it: XLA copies a map to another order of axes of which one has one element.
    g = g.reshape(*g.shape[:3], -1)
    border, padded, d_padded = _padded(x, points, points.shape[3], padding_mode)
    count, block = _gradient_blocks(x, points.shape)

    def body(i, state):
        d_padded, d_points = state
        p = as_dtype(*cut((d_points,), i, (block,)), points.dtype)
        d_out = _cut_samples(g, i, block, p)
        d_padded, d_p = _sample_bwd(d_padded, x, padded, p, d_out, padding_mode, border)
        return d_padded, add(d_points, d_p, i, block)

    # The points give way to their gradient.
    d_padded, d_points = loop(count, body, (d_padded, points))
    return bilinear.unpad(d_padded, border).reshape(x.shape).astype(x.dtype), d_points


def _padded(x: Array, positions: Array, groups: int, padding_mode: str):
    """The border that x needs, x with it, and the gradient to that to begin with."""
    maps = by_group(x, groups)
    border = bilinear.zero_border(maps, padding_mode == "border")
    padded = bilinear.pad(maps, border)
    dtype = bilinear.position_dtype(x, positions)
    return border, padded, jnp.zeros(padded.shape, dtype)


def _cut_samples(g: Array, i, block: Rows, points: Array) -> tuple[Array, list[Array]]:
    """Block i of the gradient to samples, as a whole and in parts, for `bilinear.sample_bwd`."""
    groups, p = points.shape[3:5]
    d = math.prod(g.shape[3:]) // (groups * p)
    n = bilinear.count_parts(d)
    (whole,) = cut((g,), i, (block,))
    parts = cut_parts(g, i, block, (*g.shape[:3], groups, p, n, d // n))
    return whole.reshape(*points.shape[:5], d), parts


def _sample_bwd(d_padded, x, padded, points, d_out, padding_mode, border):
    """The gradient to x with what samples at some points add to it, and that to the points."""
    index, weights, vjp = corners(x, points, padding_mode, border)
    d_out, parts = jax.tree.map(lambda a: a.astype(d_padded.dtype), d_out)
    d_padded, d_weights = bilinear.sample_bwd(d_padded, padded, index, weights, d_out, parts)
    return d_padded, *vjp(d_weights)


def corners(x: Array, points: Array, padding_mode: str, border: int):
    """`bilinear.corners` of the points, and the function from their gradient to the points'."""

    def weights_of(points):
        at = positions(x, points, padding_mode)
        index, weights = bilinear.corners(x.shape[1:3], *at, border)
        return weights, index

    weights, vjp, index = jax.vjp(weights_of, points, has_aux=True)
    return index, weights, vjp


_in_blocks.defvjp(
    lambda x, points, padding_mode: (_in_blocks(x, points, padding_mode), (x, points)),
    _in_blocks_bwd,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 6))
def _attend_in_blocks(attend, q, k, v, points, bias, heads):
    count, block = _attention_blocks(k, v, points)

    def attended(params, blocks):
        (k, v, bias), (q, points) = params, blocks
        keys, values = (sample_at(a, points, "zeros") for a in (k, v))
        return (attend(q, keys, values, bias, heads),)

    (out,) = map_row_blocks(attended, count, (block, block), (block,), (k, v, bias), (q, points))
    return out


def _attend_in_blocks_bwd(attend, heads, saved, g):
    # Written out, so that what each block adds to k and v is scattered into one map.
    q, k, v, points, bias = saved
    dtype = bilinear.position_dtype(k, points)
    maps = [by_group(a, points.shape[3]) for a in (k, v)]
    border = bilinear.zero_border(maps[0], inside=False)
    padded = tuple(bilinear.pad(a, border) for a in maps)
    count, block = _attention_blocks(k, v, points)

    def body(i, state):
        d_q, d_points, d_padded, d_bias = state
        rows, p, d_out = cut((q, points, g), i, (block, block, block))
        index, weights, vjp_weights = corners(k, p, "zeros", border)
        samples = [bilinear.weighted_sum(weights, bilinear.gather(a, index, dtype)) for a in padded]

        def attended(q, samples, bias):
            keys, values = (s.astype(a.dtype) for s, a in zip(samples, (k, v), strict=True))
            return attend(q, keys, values, bias, heads)

        _, vjp = jax.vjp(attended, rows, samples, bias)
        d_rows, d_samples, d_bias_here = vjp(d_out)
        d_q = add(d_q, d_rows, i, block)
        d_padded, d_weights = zip(
            *[
                bilinear.sample_bwd(total, a, index, weights, d, bilinear.split(d))
                for total, a, d in zip(d_padded, padded, d_samples, strict=True)
            ],
            strict=True,
        )
        d_points = add(d_points, *vjp_weights(sum(d_weights)), i, block)
        return d_q, d_points, d_padded, add_to_sums(d_bias, d_bias_here)

    zeros = (
        jnp.zeros_like(q),
        jnp.zeros_like(points),
        tuple(jnp.zeros(a.shape, dtype) for a in padded),
        zero_sums(bias),
    )
    d_q, d_points, d_padded, d_bias = loop(count, body, zeros)
    d_k, d_v = (
        bilinear.unpad(d, border).reshape(a.shape).astype(a.dtype)
        for d, a in zip(d_padded, (k, v), strict=True)
    )
    d_bias = jax.tree.map(lambda a, b: a.astype(b.dtype), d_bias, bias)
    return d_q, d_k, d_v, d_points, d_bias


_attend_in_blocks.defvjp(
    lambda attend, q, k, v, points, bias, heads: (
        _attend_in_blocks(attend, q, k, v, points, bias, heads),
        (q, k, v, points, bias),
    ),
    _attend_in_blocks_bwd,
)


def _attention_blocks(k: Array, v: Array, points: Array) -> tuple[Size, Rows]:
    b, hh, ww, _, p, _ = points.shape
    # The samples of a pixel are P times its channels.
    rows = block_rows(hh, b * ww * p * max(k.shape[3], v.shape[3]))
    return hh // rows, Rows(1, rows, rows)
