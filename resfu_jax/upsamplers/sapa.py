"""SAPA: similarity-aware point affiliation, and its extension with deformable points.

With x the features (low resolution) and y the guide (high resolution):

    q = Linear(N(y)),  k = Linear(N(x))                             queries and keys
    attn = softmax over K*K (<q[p], k[cell(p) + (u, v) - r]>)       `ops.local_similarity`
    out[p] = sum_uv attn[p, uv] x[cell(p) + (u, v) - r]             `ops.local_attention`

A point of the guide joins the low-resolution points that it resembles. Scores are plain inner
products. A key beyond the image has similarity 0 and keeps its share of the softmax, so that
borders come out weaker, as in the official operators. The queries may see x too:

    "encoder_only"   q = Linear(N(y))                                                SAPA-B
    "cat"            q = Linear([N(y), nearest(x)])
    "gate"           q = g Linear(N(y)) + (1 - g) Linear'(nearest(x)),               SAPA-G
                     g = sigmoid(nearest(Linear''(N(x))))

SAPA-I compares N(y) with N(x) directly. `SAPADeform` (SAPA-D) replaces the window by P points per
output pixel and group, at offsets from the cell's centre that a linear map of x predicts.

The official operators know whole scales; here the guide may be of any size that is not smaller, the
cell of pixel p being floor(p n_in / n_out).

Sources: Lu et al., "SAPA: Similarity-Aware Point Affiliation for Feature Upsampling", NeurIPS 2022,
sections 3.2 to 3.4; Liu et al., "On Point Affiliation in Feature Upsampling", 2023, for
`norm="group"` and SAPA-D.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resfu_jax._checks import check_choice, check_flag, check_odd, check_whole, need
from resfu_jax._layers import GroupNorm, LayerNorm, Linear, normalised
from resfu_jax.ops import Implementation
from resfu_jax.ops.checks import check_floating
from resfu_jax.ops.deformable_attention import deformable_attention
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.local_window import (
    local_attention,
    local_similarity,
)
from resfu_jax.ops.pixel_shuffle import pixel_shuffle
from resfu_jax.ops.resize import resize
from resfu_jax.ops.sizes import cell_index, whole_ratio
from resfu_jax.upsamplers._inputs import (
    check_features,
    check_guide,
    compute_dtype,
    need_guide,
    reassembled,
)
from resfu_jax.upsamplers._registry import register
from resfu_jax.upsamplers._upsampler import Upsampler

Query = Literal["encoder_only", "cat", "gate"]
Norm = Literal["layer", "group"]

_WEIGHT_INIT = nnx.initializers.normal(0.02)


@register("sapa")
@register("sapa_g", q_mode="gate")
@register("sapa_i", embedding_dim=None)
class SAPA(Upsampler):
    """Upsamples features to the size of a guide by local similarity.

    Args:
      features: channels C of the features; with `norm="group"`, a multiple of 32.
      guide_features: channels Cg of the guide; with `norm="group"`, a multiple of 32.
      scale: nominal ratio; the guide decides the size.
      q_mode: what the queries are made of, as in the module's docstring.
      v_embed: reassemble a linear map of N(x) instead of x.
      out_dim: channels of the output, C if not given; another number needs that linear map.
      up_kernel_size: K, side of the window, odd.
      embedding_dim: channels of queries and keys, 32 in the published experiments (the official
        files default to 64 and 32); None is SAPA-I, without embedding, for which Cg = C.
      qkv_bias: biases of the linear maps.
      norm: N: `"layer"` as in the NeurIPS module, `"group"` (32 groups) as in the extended one, or
        None.
      implementation: as in `ops.local_similarity`.
      dtype: of the computation; the inputs' promoted dtype if not given. Statistics and the softmax
        are float32 or better.
      param_dtype: of the parameters.
      rngs: source of the initial weights: normal of standard deviation 0.02, biases zero.

    Raises:
      ValueError: an argument out of range, a missing guide, or widths that do not fit together.
    """

    guide = "features"
    weights_are_convex = True

    def __init__(
        self,
        features: int,
        guide_features: int | None,
        *,
        scale: int = 2,
        q_mode: Query = "encoder_only",
        v_embed: bool = False,
        out_dim: int | None = None,
        up_kernel_size: int = 5,
        embedding_dim: int | None = 32,
        qkv_bias: bool = True,
        norm: Norm | None = "layer",
        implementation: Implementation | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_floating(dtype=dtype, param_dtype=param_dtype)
        guide_features = need_guide("sapa", guide_features)
        out_dim = features if out_dim is None else out_dim
        check_whole(features=features, scale=scale, out_dim=out_dim)
        check_odd(up_kernel_size=up_kernel_size)
        check_choice(get_args(Query), q_mode=q_mode)
        check_flag(v_embed=v_embed, qkv_bias=qkv_bias)
        check_choice((*get_args(Implementation), None), implementation=implementation)
        if embedding_dim is None:
            need(
                q_mode == "encoder_only" and guide_features == features,
                "embedding_dim=None compares guide and features directly: it needs "
                f"q_mode='encoder_only' and guide_features=features={features}, got "
                f"q_mode={q_mode!r} and guide_features={guide_features}",
            )
        else:
            check_whole(embedding_dim=embedding_dim)
        self.features, self.guide_features = features, guide_features
        self.q_mode, self.up_kernel_size = q_mode, up_kernel_size
        self.implementation, self.dtype = implementation, dtype

        def linear(n: int, m: int) -> Linear:
            return _linear(n, m, qkv_bias, param_dtype, rngs)

        self.norm_y = _norm("guide_features", guide_features, norm, param_dtype)
        self.norm_x = _norm("features", features, norm, param_dtype)
        width, gated = embedding_dim, q_mode == "gate"
        query_width = guide_features + (features if q_mode == "cat" else 0)
        self.q = None if width is None else linear(query_width, width)
        self.k = None if width is None else linear(features, width)
        self.qx = None if width is None or not gated else linear(features, width)
        self.gate = linear(features, 1) if gated else None
        self.same_width = width is None
        self.mixes = v_embed or out_dim != features
        self.v = linear(features, out_dim) if self.mixes else None

    def __call__(
        self,
        features: Float[Array, "b h w {self.features}"],
        guide: Float[Array, "b H W cg"],
        *,
        values: Float[Array, "b h w d"] | None = None,
    ) -> Float[Array, "b H W d"]:
        """Features `(B, h, w, C)` at the guide's size `(B, H, W, Cg)`, any H >= h and W >= w.

        With `values`, these are reassembled as they are, instead of the features or their linear
        map.
        """
        check_features(features, self.features)
        check_guide(features, guide, self.guide_features)
        dtype = compute_dtype(self.dtype, features, guide, values)
        x, y = features.astype(dtype), guide.astype(dtype)
        scores = self._scores(x, y)
        if values is None and self.v is not None:
            v = self.v(x, norm=self.norm_x)
        else:
            v = reassembled(x, values)
        return local_attention(scores, v, implementation=self.implementation)

    def attention(
        self, x: Float[Array, "b h w c"], y: Float[Array, "b H W cg"]
    ) -> Float[Array, "b H W taps"]:
        """Weights of the K*K low-resolution pixels of every output pixel, which sum to 1."""
        return jax.nn.softmax(self._scores(x, y))

    def _scores(
        self, x: Float[Array, "b h w c"], y: Float[Array, "b H W cg"]
    ) -> Float[Array, "b H W taps"]:
        """Similarities to the K*K pixels around every output pixel."""
        if self.q is None or self.k is None:
            q, k = normalised(y, self.norm_y), normalised(x, self.norm_x)
        else:
            q = self._query(self.q, x, y)
            k = self.k(x, norm=self.norm_x)
        return local_similarity(
            q, k, kernel_size=self.up_kernel_size, implementation=self.implementation
        )

    def _query(
        self, project: Linear, x: Float[Array, "b h w c"], y: Array
    ) -> Float[Array, "b H W d"]:
        """The queries."""

        def up(a):
            return resize(a, y.shape[1:3], method="nearest")

        if self.q_mode == "cat":
            return project(jnp.concatenate([normalised(y, self.norm_y), up(x)], axis=-1))
        q = project(y, norm=self.norm_y)
        if self.gate is None or self.qx is None:
            return q
        gate = up(jax.nn.sigmoid(self.gate(x, norm=self.norm_x)))
        # A linear map and nearest-neighbour upsampling commute.
        return gate * q + (1 - gate) * up(self.qx(x))


@register("sapa_deform")
class SAPADeform(Upsampler):
    """SAPA-D: similarity with P sampled points per output pixel and group, instead of a window.

        u = cell(p) + Linear(N(x)),   attn = softmax over P (<q[p], k(u)>),   out = sum attn x(u)

    Args:
      features: channels C of the features, a multiple of `groups`.
      guide_features: channels Cg of the guide.
      scale: nominal ratio; with `high_offset`, the guide must be exactly that much larger.
      num_point: P.
      groups: contiguous groups of channels with points and attention of their own.
      embedding_dim: channels of queries and keys in a group.
      qkv_bias: biases of the linear maps.
      high_offset: offsets of every output pixel (a pixel shuffle), or of every cell.
      norm: N: `"group"` (32 groups, widths multiples of 32) or `"layer"`; off (None) as published.
      implementation: as in `ops.deformable_attention`.
      dtype: of the computation; the inputs' promoted dtype if not given. Statistics, positions and
        the softmax are float32 or better.
      param_dtype: of the parameters.
      rngs: source of the initial weights: normal of standard deviation 0.02, biases zero.

    Raises:
      ValueError: an argument out of range, a missing guide, or widths that do not fit together.
    """

    guide = "features"
    weights_are_convex = True

    def __init__(
        self,
        features: int,
        guide_features: int | None,
        *,
        scale: int = 2,
        num_point: int = 9,
        groups: int = 4,
        embedding_dim: int = 32,
        qkv_bias: bool = True,
        high_offset: bool = True,
        norm: Norm | None = None,
        implementation: Implementation | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_floating(dtype=dtype, param_dtype=param_dtype)
        guide_features = need_guide("sapa_deform", guide_features)
        check_whole(
            features=features,
            scale=scale,
            num_point=num_point,
            groups=groups,
            embedding_dim=embedding_dim,
        )
        check_flag(qkv_bias=qkv_bias, high_offset=high_offset)
        check_choice((*get_args(Implementation), None), implementation=implementation)
        need(features % groups == 0, f"groups must divide features={features}, got {groups}")
        self.features, self.guide_features = features, guide_features
        self.scale, self.num_point, self.value_groups = scale, num_point, groups
        self.high_offset = self.needs_whole_scale = high_offset
        self.implementation, self.dtype = implementation, dtype

        def linear(n, m):
            return _linear(n, m, qkv_bias, param_dtype, rngs)

        self.norm_y = _norm("guide_features", guide_features, norm, param_dtype)
        self.norm_x = _norm("features", features, norm, param_dtype)
        self.q = linear(guide_features, groups * embedding_dim)
        self.k = linear(features, groups * embedding_dim)
        phases = scale**2 if high_offset else 1
        self.offset = linear(features, 2 * groups * num_point * phases)

    def __call__(
        self,
        features: Float[Array, "b h w {self.features}"],
        guide: Float[Array, "b H W cg"],
        *,
        values: Float[Array, "b h w d"] | None = None,
    ) -> Float[Array, "b H W d"]:
        """Features `(B, h, w, C)`, or `values`, at the guide's size `(B, H, W, Cg)`.

        Raises:
          ValueError: wrong shapes; with `high_offset`, a guide not exactly `scale` times as large.
        """
        check_features(features, self.features)
        check_guide(features, guide, self.guide_features)
        dtype = compute_dtype(self.dtype, features, guide, values)
        x, y = features.astype(dtype), guide.astype(dtype)
        normed = normalised(x, self.norm_x)
        q, k = self.q(y, norm=self.norm_y), self.k(normed)
        points = self.points(normed, y.shape[1:3])
        v = reassembled(x, values, groups=self.value_groups)
        return deformable_attention(
            q, k, v, points, heads=self.value_groups, implementation=self.implementation
        )

    def points(self, normed_x: Float[Array, "b h w c"], size: tuple) -> Float[Array, "b H W g p 2"]:
        """Where every output pixel looks: (row, column) in pixels of the features."""
        ratio = whole_ratio(normed_x.shape[1:3], size)
        offset = self.offset(normed_x)
        if not self.high_offset:
            offset = resize(offset, size, method="nearest")
        else:
            need(
                ratio == (self.scale, self.scale),
                f"sapa_deform of scale {self.scale} needs a guide exactly that much larger, got "
                f"{normed_x.shape[1:3]} to {size}; use high_offset=False",
            )
            offset = pixel_shuffle(offset, self.scale)
        offset = offset.astype(at_least_float32(offset.dtype))
        # As planes, which accelerators like better than pairs of points of groups.
        b, hh, ww, _ = offset.shape
        offset = jnp.moveaxis(offset, 3, 1).reshape(b, self.value_groups, self.num_point, 2, hh, ww)
        rows, cols = (
            cell_index(n, m).astype(offset.dtype)
            for n, m in zip(normed_x.shape[1:3], size, strict=True)
        )
        cells = jnp.stack(jnp.meshgrid(rows, cols, indexing="ij"))
        # The channels are (column, row).
        points = cells[None, None, None] + offset[:, :, :, ::-1]
        return jnp.moveaxis(points, (4, 5), (1, 2))


def _linear(n: int, m: int, use_bias: bool, param_dtype: DTypeLike, rngs: nnx.Rngs) -> Linear:
    return Linear(
        n, m, use_bias=use_bias, kernel_init=_WEIGHT_INIT, param_dtype=param_dtype, rngs=rngs
    )


def _norm(
    name: str, width: int, kind: Norm | None, param_dtype: DTypeLike
) -> GroupNorm | LayerNorm | None:
    check_choice((*get_args(Norm), None), norm=kind)
    if kind is None:
        return None
    if kind == "layer":
        return LayerNorm(width, param_dtype=param_dtype)
    need(width % 32 == 0, f"norm='group' needs {name} to be a multiple of 32, got {width}")
    return GroupNorm(width, 32, param_dtype=param_dtype)
