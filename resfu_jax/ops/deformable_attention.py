"""Local deformable attention: every output pixel attends to points of its own.

With q at output size, k and v at low resolution, u_j the P points of an output pixel (those of the
group that a channel belongs to), and heads as contiguous blocks of channels:

    attn = softmax_j(<q_h, k_h(u_j) + B_hj>),    out_h = sum_j attn_j v_h(u_j)

k(u) and v(u) are bilinear samples with zeros beyond the map (`deformable_sample`); a point outside
keeps its share of the softmax.

Sources: Liu et al., "On Point Affiliation in Feature Upsampling", 2023 (a head is a group, no B);
Du et al., "LDA-AQU", ACM Multimedia 2024.
"""

import functools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops import _bilinear
from resfu_jax.ops._checks import takes_maps
from resfu_jax.ops._dtypes import at_least_float32
from resfu_jax.ops._interp import Size
from resfu_jax.ops._order import zeros_after
from resfu_jax.ops._row_blocks import (
    Rows,
    add,
    add_to_sums,
    block_rows,
    cut,
    loop,
    map_row_blocks,
    zero_sums,
)
from resfu_jax.ops._softmax import softmax
from resfu_jax.ops.deformable_sample import by_group, corners, deformable_sample

Implementation = Literal["reference", "blocks"]


@takes_maps("q", "k", "v", "points", others=("bias",))
def deformable_attention(
    q: Float[Array, "b H W d"],
    k: Float[Array, "b h w d"],
    v: Float[Array, "b h w c"],
    points: Float[Array, "b H W g p 2"],
    *,
    heads: int = 1,
    bias: Float[Array, "heads p e"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "b H W c"]:
    """Attention to sampled points; see the module's docstring.

    Args:
      q: queries, with their scale applied.
      k: keys.
      v: values.
      points: (row, column) in pixels of k and v, for every output pixel, group of channels (of k
        and of v, contiguous) and point.
      heads: number of heads.
      bias: B, added to the sampled keys, of q's dtype; e = d / heads.
      implementation: `"reference"` samples all points at once, P copies of k and v at output size;
        `"blocks"` goes through blocks of rows and recomputes them backward. `None` takes
        `"blocks"`.

    Returns:
      The attended values, in v's dtype; the softmax and sums are in float32 or better.

    Raises:
      ValueError: shapes that do not fit together, or an unknown implementation.
    """
    if any(a.ndim != 4 for a in (q, k, v)) or points.ndim != 6 or points.shape[5] != 2:
        raise ValueError(
            "q, k and v must have 4 axes and points must be (B, H, W, groups, P, 2), "
            f"got {q.shape}, {k.shape}, {v.shape} and {points.shape}"
        )
    for name, a in (("d, the channels of q and k", q), ("the channels of v", v)):
        if heads < 1 or a.shape[3] % heads:
            raise ValueError(f"heads must divide {name} ({a.shape[3]}), got {heads}")
    if q.shape[3] != k.shape[3] or q.shape[:3] != points.shape[:3] or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            "q (B, H, W, d), k (B, h, w, d), v (B, h, w, C) and points (B, H, W, groups, P, 2) do "
            f"not fit together, got {q.shape}, {k.shape}, {v.shape} and {points.shape}"
        )
    if bias is not None:
        shape = heads, points.shape[4], q.shape[3] // heads
        if bias.shape != shape or bias.dtype != q.dtype:
            raise ValueError(
                f"bias must be (heads, P, d / heads) = {shape} and have q's dtype {q.dtype}, "
                f"got {bias.shape} and {bias.dtype}"
            )
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(
            f"implementation must be one of {get_args(Implementation)} or None, "
            f"got {implementation!r}"
        )

    # Groups of samples that belong to one head each.
    groups = points.shape[3]
    points = jnp.repeat(points, math.lcm(heads, groups) // groups, axis=3)
    if implementation == "reference":
        return _attend_at((k, v, bias), (q, points), heads)
    return _in_blocks(q, k, v, points, bias, heads)


def _attend_at(params, blocks, heads: int) -> Array:
    (k, v, bias), (q, points) = params, blocks
    keys, values = (deformable_sample(a, points, implementation="reference") for a in (k, v))
    return _attend(q, keys, values, bias, heads)


def _attend(
    q: Float[Array, "b H W d"],
    keys: Float[Array, "b H W g p dk"],
    values: Float[Array, "b H W g p dv"],
    bias: Float[Array, "heads p e"] | None,
    heads: int,
) -> Float[Array, "b H W c"]:
    # Group by group: to bring those of a head together, samples would be transposed.
    b, hh, ww, groups, p, dk = keys.shape
    dtype = at_least_float32(q.dtype)
    q = q.reshape(b, hh, ww, groups, dk)
    scores = jnp.einsum("bhwgd,bhwgpd->bhwgp", q, keys, preferred_element_type=dtype)
    if bias is not None:
        bias = bias.reshape(heads, p, groups // heads, dk)
        bias = jnp.moveaxis(bias, 2, 1).reshape(groups, p, dk)
        scores = scores + jnp.einsum("bhwgd,gpd->bhwgp", q, bias, preferred_element_type=dtype)
    scores = scores.reshape(b, hh, ww, heads, groups // heads, p).sum(axis=4)
    attn = jnp.repeat(softmax(scores), groups // heads, axis=3)
    out = jnp.einsum("bhwgp,bhwgpc->bhwgc", attn, values.astype(attn.dtype))
    return out.reshape(b, hh, ww, -1).astype(values.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _in_blocks(q, k, v, points, bias, heads):
    count, block = _blocks(k, v, points)

    def attend(params, blocks):
        return (_attend_at(params, blocks, heads),)

    (out,) = map_row_blocks(attend, count, (block, block), (block,), (k, v, bias), (q, points))
    return out


def _in_blocks_bwd(heads, saved, g):
    # Written out, so that what each block adds to k and v is scattered into one map.
    q, k, v, points, bias = saved
    dtype = _bilinear.position_dtype(k, points)
    maps = [by_group(a, points.shape[3]) for a in (k, v)]
    border = _bilinear.zero_border(maps[0], inside=False)
    padded = tuple(_bilinear.pad(a, border) for a in maps)
    count, block = _blocks(k, v, points)

    def body(i, state):
        d_q, d_points, d_padded, d_bias = state
        rows, p, d_out = cut((q, points, g), i, (block, block, block))
        index, weights, vjp_weights = corners(k, p, "zeros", border)
        samples = [
            _bilinear.weighted_sum(weights, _bilinear.gather(a, index, dtype)) for a in padded
        ]

        def attend(q, samples, bias):
            keys, values = (s.astype(a.dtype) for s, a in zip(samples, (k, v), strict=True))
            return _attend(q, keys, values, bias, heads)

        _, vjp = jax.vjp(attend, rows, samples, bias)
        d_rows, d_samples, d_bias_here = vjp(d_out)
        d_q = add(d_q, d_rows, i, block)
        d_padded, d_weights = zip(
            *[
                _bilinear.sample_bwd(total, a, index, weights, d, _bilinear.split(d))
                for total, a, d in zip(d_padded, padded, d_samples, strict=True)
            ],
            strict=True,
        )
        d_points = add(d_points, *vjp_weights(sum(d_weights)), i, block)
        return d_q, d_points, d_padded, add_to_sums(d_bias, d_bias_here)

    zeros = (
        zeros_after(g, q.shape, q.dtype),
        zeros_after(g, points.shape, points.dtype),
        tuple(jnp.zeros(a.shape, dtype) for a in padded),
        zero_sums(bias),
    )
    d_q, d_points, d_padded, d_bias = loop(count, body, zeros)
    d_k, d_v = (
        _bilinear.unpad(d, border).reshape(a.shape).astype(a.dtype)
        for d, a in zip(d_padded, (k, v), strict=True)
    )
    d_bias = jax.tree.map(lambda a, b: a.astype(b.dtype), d_bias, bias)
    return d_q, d_k, d_v, d_points, d_bias


_in_blocks.defvjp(
    lambda q, k, v, points, bias, heads: (
        _in_blocks(q, k, v, points, bias, heads),
        (q, k, v, points, bias),
    ),
    _in_blocks_bwd,
)


def _blocks(k: Array, v: Array, points: Array) -> tuple[Size, Rows]:
    b, hh, ww, _, p, _ = points.shape
    # The samples of a pixel are P times its channels.
    rows = block_rows(hh, b * ww * p * max(k.shape[3], v.shape[3]))
    return hh // rows, Rows(1, rows, rows)
