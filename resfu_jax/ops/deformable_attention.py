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
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops import _bilinear
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
      bias: B, added to the sampled keys; e = d / heads.
      implementation: `"reference"` samples all points at once, P copies of k and v at output size;
        `"blocks"` goes through blocks of rows and recomputes them backward. `None` takes
        `"blocks"`.

    Returns:
      The attended values, in v's dtype; the softmax and sums are in float32 or better.

    Raises:
      ValueError: shapes that do not fit together, or an unknown implementation.
    """
    for name, a in (("d, the channels of q and k", q), ("the channels of v", v)):
        if heads < 1 or a.shape[3] % heads:
            raise ValueError(f"heads must divide {name} ({a.shape[3]}), got {heads}")
    if q.shape[3] != k.shape[3] or q.shape[:3] != points.shape[:3] or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            "q (B, H, W, d), k (B, h, w, d), v (B, h, w, C) and points (B, H, W, groups, P, 2) do "
            f"not fit together, got {q.shape}, {k.shape}, {v.shape} and {points.shape}"
        )
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(
            f"implementation must be one of {get_args(Implementation)} or None, "
            f"got {implementation!r}"
        )

    if implementation == "reference":
        return _attend_in(heads, (k, v, bias), (q, points))[0]
    return _in_blocks(q, k, v, points, bias, heads)


def _attend_in(heads: int, params, blocks) -> tuple[Array]:
    (k, v, bias), (q, points) = params, blocks
    keys, values = (deformable_sample(a, points, implementation="reference") for a in (k, v))
    return (_attend(q, keys, values, bias, heads).astype(v.dtype),)


def _attend(
    q: Float[Array, "b H W d"],
    keys: Float[Array, "b H W g p dk"],
    values: Float[Array, "b H W g p dv"],
    bias: Float[Array, "heads p e"] | None,
    heads: int,
) -> Float[Array, "b H W c"]:
    keys, values = (_by_head(a, heads) for a in (keys, values))
    if bias is not None:
        keys = keys + bias.astype(keys.dtype).swapaxes(0, 1)[None, None, None]
    q = q.reshape(*q.shape[:3], heads, -1)
    dtype = at_least_float32(q.dtype)
    scores = jnp.einsum("bhwnd,bhwpnd->bhwnp", q, keys, preferred_element_type=dtype)
    attn = softmax(scores)
    out = jnp.einsum("bhwnp,bhwpnc->bhwnc", attn, values.astype(attn.dtype))
    return out.reshape(*out.shape[:3], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _in_blocks(q, k, v, points, bias, heads):
    count, block = _blocks(k, v, points)
    attend = functools.partial(_attend_in, heads)
    (out,) = map_row_blocks(attend, count, (block, block), (block,), (k, v, bias), (q, points))
    return out


def _in_blocks_bwd(heads, saved, g):
    # Written out, so that what each block adds to k and v is scattered into one map.
    q, k, v, points, bias = saved
    dtype = _bilinear.position_dtype(k, points)
    maps = [by_group(a, points.shape[3]) for a in (k, v)]
    border = _bilinear.zero_border(maps[0], inside=False)
    padded = tuple(_bilinear.pad(a.astype(dtype), border) for a in maps)
    count, block = _blocks(k, v, points)

    def body(i, state):
        d_q, d_points, d_padded, d_bias = state
        rows, p, d_out = cut((q, points, g), i, (block, block, block))
        index, weights, vjp_weights = corners(k, p, "zeros", border)

        def attend(q, weights, corners, bias):
            keys, values = (
                _bilinear.weighted_sum(weights, c).astype(a.dtype)
                for a, c in zip((k, v), corners, strict=True)
            )
            return _attend(q, keys, values, bias, heads).astype(v.dtype)

        _, vjp = jax.vjp(attend, rows, weights, [_bilinear.gather(a, index) for a in padded], bias)
        d_rows, d_weights, d_corners, d_bias_here = vjp(d_out)
        d_q = add(d_q, d_rows, i, block)
        d_points = add(d_points, *vjp_weights(d_weights), i, block)
        d_padded = tuple(
            _bilinear.scatter_add(total, index, d)
            for total, d in zip(d_padded, d_corners, strict=True)
        )
        return d_q, d_points, d_padded, add_to_sums(d_bias, d_bias_here)

    zeros = (
        zeros_after(g, q.shape, q.dtype),
        zeros_after(g, points.shape, points.dtype),
        tuple(jnp.zeros_like(a) for a in padded),
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


def _by_head(samples: Float[Array, "b H W g p d"], heads: int) -> Float[Array, "b H W p n e"]:
    samples = jnp.moveaxis(samples, 3, 4)
    return samples.reshape(*samples.shape[:4], heads, -1)
