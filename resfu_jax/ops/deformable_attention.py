"""Local deformable attention: every output pixel attends to points of its own.

With q at output size, k and v at low resolution, u_j the P points of an output pixel (those of the
group that a channel belongs to), and heads as contiguous blocks of channels:

    attn = softmax_j(<q_h, k_h(u_j) + B_hj>),    out_h = sum_j attn_j v_h(u_j)

k(u) and v(u) are bilinear samples with zeros beyond the map (`deformable_sample`); a point outside
keeps its share of the softmax.

Sources: Liu et al., "On Point Affiliation in Feature Upsampling", 2023 (a head is a group, no B);
Du et al., "LDA-AQU", ACM Multimedia 2024.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops._dtypes import at_least_float32
from resfu_jax.ops._row_blocks import Rows, block_rows, map_row_blocks
from resfu_jax.ops.deformable_sample import deformable_sample

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

    def attend(params, blocks):
        (k, v, bias), (q, points) = params, blocks
        keys, values = (
            _by_head(deformable_sample(a, points, implementation="reference"), heads)
            for a in (k, v)
        )
        if bias is not None:
            keys = keys + bias.astype(keys.dtype).swapaxes(0, 1)[None, None, None]
        q = q.reshape(*q.shape[:3], heads, -1)
        dtype = at_least_float32(q.dtype)
        scores = jnp.einsum("bhwnd,bhwpnd->bhwnp", q, keys, preferred_element_type=dtype)
        attn = jax.nn.softmax(scores, axis=-1)
        out = jnp.einsum("bhwnp,bhwpnc->bhwnc", attn, values.astype(attn.dtype))
        return (out.reshape(*out.shape[:3], -1).astype(v.dtype),)

    b, hh, ww, _ = q.shape
    if implementation == "reference":
        return attend((k, v, bias), (q, points))[0]
    # The samples of a pixel are P times its channels.
    rows = block_rows(hh, b * ww * points.shape[4] * max(k.shape[3], v.shape[3]))
    block = Rows(1, rows, rows)
    (out,) = map_row_blocks(attend, hh // rows, (block, block), (block,), (k, v, bias), (q, points))
    return out


def _by_head(samples: Float[Array, "b H W g p d"], heads: int) -> Float[Array, "b H W p n e"]:
    samples = jnp.moveaxis(samples, 3, 4)
    return samples.reshape(*samples.shape[:4], heads, -1)
