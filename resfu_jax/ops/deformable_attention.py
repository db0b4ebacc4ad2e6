"""Local deformable attention: every output pixel attends to points of its own.

With q at output size, k and v at low resolution, u_j the P points of an output pixel (those of the
group that a channel belongs to), and heads as contiguous blocks of channels:

    attn = softmax_j(<q_h, k_h(u_j) + B_hj>),    out_h = sum_j attn_j v_h(u_j)

k(u) and v(u) are bilinear samples with zeros beyond the map (`deformable_sample`); a point outside
keeps its share of the softmax.

Sources: Liu et al., "On Point Affiliation in Feature Upsampling", 2023 (a head is a group, no B);
Du et al., "LDA-AQU", ACM Multimedia 2024.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops._cpu import points as cpu
from resfu_jax.ops._forms import Forms, Implementation
from resfu_jax.ops._xla import points as xla
from resfu_jax.ops.checks import takes_maps
from resfu_jax.ops.deformable_sample import deformable_sample
from resfu_jax.ops.dtypes import at_least_float32


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
        `"xla"` multiplies whole maps by hat functions, strip by strip, as TPUs are slow to gather
        and scatter; `"cpu"` samples in blocks of rows and again backward. `None` takes the best of
        the platform, on a GPU `"reference"`.

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

    # Groups of samples that belong to one head each.
    groups = points.shape[3]
    points = jnp.repeat(points, math.lcm(heads, groups) // groups, axis=3)
    return _FORMS(implementation, q, k, v, points, bias, heads=heads)


def _reference(
    q: Array, k: Array, v: Array, points: Array, bias: Array | None, *, heads: int
) -> Array:
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
    attn = jnp.repeat(jax.nn.softmax(scores), groups // heads, axis=3)
    out = jnp.einsum("bhwgp,bhwgpc->bhwgc", attn, values.astype(attn.dtype))
    return out.reshape(b, hh, ww, -1).astype(values.dtype)


def _cpu(q: Array, k: Array, v: Array, points: Array, bias: Array | None, *, heads: int) -> Array:
    return cpu.attention(_attend, q, k, v, points, bias, heads)


_FORMS = Forms(
    "deformable_attention",
    _reference,
    xla=xla.attention,
    cpu=_cpu,
    preferred={"gpu": ("reference",)},  # gathers are fast there
)
