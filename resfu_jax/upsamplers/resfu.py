"""ReSFU: a refreshed similarity-based upsampler for direct high-ratio feature upsampling.

With x the features at low resolution, y the guide at high resolution, s the ratio:

    q = Linear(GN(y)),  k = Linear(GN(x)),  k_up = bilinear(k)                     queries and keys
    q_gs = Gaussian(q),  q_gf = GuidedFilter(guide=q, input=k_up)                  aligned partners
    score = PCDC_semantic(k_up, q_gf) + PCDC_detail(q_gs, q)                       K*K scores
    attn = softmax(score, neighbours outside the image masked)
    out[p] = sum_j attn_j[p] x(neighbour j of p)                                   `fns_attention`

PCDC (paired central difference convolution) compares a key map with a query map by a learned
similarity: sum_j W_j (GN(k)[p + d j] - GN(q)[p]) + b, then a small channel compressor. Semantic
scores compare the upsampled key with the query filtered towards it; detail scores compare the query
with its own blur. Scores pick among the K*K neighbours of `fns_attention`, which lie one
low-resolution pixel apart around p's exact position.

Source: Zhou, Wang, Zheng, Meng, "A Refreshed Similarity-based Upsampler for Direct High-Ratio
Feature Upsampling"; the semantics are those of the authors' released module.
"""

import functools
import math
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from resfu_jax.ops._checks import check_floating
from resfu_jax.ops._dtypes import at_least_float32
from resfu_jax.ops._gradient import scale_gradient
from resfu_jax.ops._interp import Size
from resfu_jax.ops._order import after
from resfu_jax.ops._polyphase import extend, upsample_extended, whole_ratio
from resfu_jax.ops._row_blocks import Rows, block_rows, map_row_blocks
from resfu_jax.ops._softmax import softmax
from resfu_jax.ops.filters import (
    check_gf_scale,
    gaussian_blur,
    guided_filter_subsampled,
    subsample,
)
from resfu_jax.ops.fns_attention import fns_attention
from resfu_jax.ops.group_norm import group_moments
from resfu_jax.ops.pcdc import Implementation as PCDCImplementation
from resfu_jax.ops.pcdc import PCDCParameters, pcdc
from resfu_jax.ops.resize import resize
from resfu_jax.upsamplers._layers import (
    EPS,
    apply_linear,
    apply_norm,
    check_features,
    check_guide,
    check_odd,
    check_whole,
    compute_dtype,
    need,
    need_guide,
    reassembled,
)
from resfu_jax.upsamplers._registry import register

Implementation = Literal["reference", "polyphase"]

_HIDDEN = 128  # channels of the score branches, fixed in the official module
_WEIGHT_INIT = nnx.initializers.normal(0.02)
_OUTSIDE = -1e7


# Segmenter x4 and SegFormer x2, x4, x8 were trained with the score branches' gradients multiplied.
# (The released SegFormer configuration runs `dilation=2` at all three ratios: an option here.)
@register("resfu")
@register("resfu_segmenter", lr_mult=500.0)
@register("resfu_segformer", lr_mult=500.0)
class ReSFU(nnx.Module):
    """Upsamples features to the size of a guide.

    Args:
      features: channels C of the features; with `normx`, below 32 or a multiple of 32.
      guide_features: channels Cg of the guide; with `normy`, below 32 or a multiple of 32.
      scale: nominal ratio of the guide's size to the features', 2 in the released configuration.
        The sampling follows the true ratio; `scale` only sets the default of `dilation`.
      dilation: distance, in guide pixels, of the neighbours that the scores compare and the mask
        covers; `scale` if not given. (The released SegFormer configuration runs 2 at all ratios.)
      groups: groups of the score branches' convolutions.
      kernel_size: K, odd; K*K neighbours.
      embedding_dim: channels E of queries and keys.
      y_conv: project the guide to queries; without, the guide itself is the query and Cg = E.
      qkv_bias: biases of the two projections.
      normx: GroupNorm the features before the key projection.
      normy: GroupNorm the guide before the query projection.
      gn_dim: groups of the score branches' norms.
      radius: half side of the guided filter's window, guide pixels.
      eps: regulariser of the guided filter.
      lr_mult: multiplies the gradients of the score branches' parameters (500 in the released
        configurations; nearly without effect under Adam).
      gf_scale: subsampling of the guided filter.
      implementation: `"reference"` computes as the formulas stand; `"polyphase"` gives the same
        values from less work: norms folded into the projections, and, where the ratio is whole and
        equals the dilation, the semantic key convolution done at low resolution. `None` chooses.
      tile: most rows of the output that are computed at a time, for large outputs: the same values
        and gradients from less temporary memory and more time. (Steps that need the whole image,
        such as norms, come first.)
      dtype: of the computation; the inputs' promoted dtype if not given. Statistics and the softmax
        are float32 or better.
      param_dtype: of the parameters.
      rngs: source of the initial weights.

    Raises:
      ValueError: widths that groups do not divide, an even kernel, a missing guide.
    """

    guide = "features"

    def __init__(
        self,
        features: int,
        guide_features: int | None,
        *,
        scale: int = 2,
        dilation: int | None = None,
        groups: int = 4,
        kernel_size: int = 3,
        embedding_dim: int = 32,
        y_conv: bool = True,
        qkv_bias: bool = True,
        normx: bool = True,
        normy: bool = True,
        gn_dim: int = 8,
        radius: int = 8,
        eps: float = 1e-3,
        lr_mult: float = 1.0,
        gf_scale: int = 2,
        implementation: Implementation | None = None,
        tile: int | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_floating(dtype=dtype, param_dtype=param_dtype)
        guide_features = need_guide("resfu", guide_features)
        dilation = scale if dilation is None else dilation
        check_whole(
            features=features,
            guide_features=guide_features,
            scale=scale,
            dilation=dilation,
            embedding_dim=embedding_dim,
        )
        check_odd(kernel_size=kernel_size)
        for name, n in (("groups", groups), ("gn_dim", gn_dim)):
            if n < 1 or embedding_dim % n or _HIDDEN % n:
                raise ValueError(
                    f"{name} must divide embedding_dim ({embedding_dim}) and {_HIDDEN}, got {n}"
                )
        if not y_conv and guide_features != embedding_dim:
            raise ValueError(
                "with y_conv=False the guide is the query: guide_features must equal embedding_dim "
                f"({embedding_dim}), got {guide_features}"
            )
        if radius < 0 or gf_scale < 1:
            raise ValueError(f"need radius >= 0 and gf_scale >= 1, got {radius} and {gf_scale}")
        if implementation not in (None, "reference", "polyphase"):
            raise ValueError(
                f"implementation must be 'reference', 'polyphase' or None, got {implementation!r}"
            )
        if tile is not None:
            check_whole(tile=tile)
            need(implementation != "reference", "tile does not apply to implementation='reference'")
        self.features, self.guide_features = features, guide_features
        self.dilation, self.kernel_size = dilation, kernel_size
        self.radius, self.eps, self.gf_scale = radius, eps, gf_scale
        self.implementation, self.tile, self.dtype = implementation, tile, dtype

        def norm(name, width):
            if width >= 32 and width % 32:
                raise ValueError(
                    f"{name} must be below 32 or a multiple of 32 (GroupNorm), got {width}; "
                    "or switch that norm off with normx=False / normy=False"
                )
            groups = 32 if width >= 32 else width
            return nnx.GroupNorm(
                width, groups, epsilon=EPS, param_dtype=param_dtype, rngs=nnx.Rngs(0)
            )

        def projection(width):
            return nnx.Linear(
                width,
                embedding_dim,
                use_bias=qkv_bias,
                kernel_init=_WEIGHT_INIT,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.norm_x = norm("features", features) if normx else None
        self.norm_y = norm("guide_features", guide_features) if normy else None
        self.q = projection(guide_features) if y_conv else None
        self.k = projection(features)
        branch = dict(
            width=embedding_dim,
            dilation=dilation,
            kernel_size=kernel_size,
            groups=groups,
            gn_dim=gn_dim,
            lr_mult=lr_mult,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.semantic_scores = PCDC(**branch)
        self.detail_scores = PCDC(**branch)

    def __call__(
        self,
        features: Float[Array, "b h w {self.features}"],
        guide: Float[Array, "b H W cg"],
        *,
        values: Float[Array, "b h w d"] | None = None,
    ) -> Float[Array, "b H W d"]:
        """Features `(B, h, w, C)`, or `values`, at the guide's size `(B, H, W, Cg)`.

        Any H >= h and W >= w.
        """
        attn = self.attention(features, guide)
        dtype = compute_dtype(self.dtype, features, guide, values)
        form = self.implementation if self.implementation == "reference" else None
        v = reassembled(features.astype(dtype), values)
        return fns_attention(attn, v, implementation=form, tile=self.tile)

    def attention(
        self, features: Float[Array, "b h w c"], guide: Float[Array, "b H W cg"]
    ) -> Float[Array, "b H W taps"]:
        """Weights of the K*K neighbours of every output pixel, row-major, summing to 1."""
        self._check(features, guide)
        dtype = compute_dtype(self.dtype, features, guide)
        x, y = features.astype(dtype), guide.astype(dtype)
        if self.implementation == "reference":
            scores = self._scores_reference(x, y)
        else:
            scores = self._scores_polyphase(x, y)
        scores = scores.astype(at_least_float32(dtype))
        mask = neighbours_inside(y.shape[1:3], self.kernel_size, self.dilation)
        return softmax(jnp.where(mask[None], scores, scores + _OUTSIDE))

    def _scores_reference(self, x: Array, y: Array) -> Array:
        q, k = self.query(y), self.key(x)
        k_up = resize(k, q.shape[1:3], implementation="reference")
        q_gs, q_gf = self.query_blurred(q), self.query_filtered(q, k_up)
        semantic = self.semantic_scores(k_up, q_gf, implementation="reference")
        return semantic + self.detail_scores(q_gs, q, implementation="reference")

    def query(self, y: Array) -> Array:
        """Queries q, `(B, H, W, E)`."""
        y = apply_norm(y, self.norm_y)
        return y if self.q is None else apply_linear(y, self.q)

    def key(self, x: Array) -> Array:
        """Keys k, `(B, h, w, E)`."""
        x = apply_norm(x, self.norm_x)
        return apply_linear(x, self.k)

    def query_blurred(self, q: Array) -> Array:
        """Partner of q in the detail branch: its own blur."""
        return gaussian_blur(q, kernel_size=3, sigma=1.0)

    def query_filtered(self, q: Array, k_up: Array) -> Array:
        """Partner of the upsampled key in the semantic branch: q filtered towards it."""
        return self._query_filtered(q, subsample(k_up, self.gf_scale))

    def _query_filtered(self, q: Array, small_k_up: Array) -> Array:
        guided_filter = functools.partial(
            guided_filter_subsampled, radius=self.radius // self.gf_scale, eps=self.eps
        )
        maps = q, subsample(q, self.gf_scale), small_k_up
        if self.tile is None:
            return guided_filter(*maps)
        # Each channel is filtered by itself: a few at a time, as the filter's maps are whole.
        width = math.gcd(q.shape[3], 8)
        block = Rows(3, width, width)
        (filtered,) = map_row_blocks(
            lambda _, maps: (guided_filter(*maps),),
            q.shape[3] // width,
            inputs=(block,) * 3,
            outputs=(block,),
            params=(),
            arrays=maps,
        )
        return filtered

    def _scores_polyphase(self, x: Array, y: Array) -> Array:
        q = _linear_of_norm(y, self.norm_y, self.q)
        k = _linear_of_norm(x, self.norm_x, self.k)
        detail = self.detail_scores(self.query_blurred(q), q, tile=self.tile)
        # One branch after the other: each holds a map of K*K numbers a norm group.
        q, k = after(q, detail), after(k, detail)
        q_gf = self._query_filtered(q, _subsampled_resize(k, q.shape[1:3], self.gf_scale))
        return self.semantic_scores(k, q_gf, tile=self.tile) + detail

    def _check(self, features: Array, guide: Array) -> None:
        check_features(features, self.features)
        check_guide(features, guide, self.guide_features)
        check_gf_scale(self.gf_scale, guide.shape)


class PCDC(nnx.Module):
    """Paired central difference convolution and channel compressor: a learned similarity.

        t = relu(sum_j W_j (GN(k)[p + d j] - GN(q)[p]) + b)       grouped, E -> 128
        u = relu(Linear_grouped(t))                               128 -> 128
        score = Linear(GN(u))                                     128 -> K*K

    Both arguments share the first norm's parameters; its bias cancels in the difference and never
    receives a gradient.

    Args:
      width: channels E of the two maps.
      dilation: d, pixels.
      kernel_size: K.
      groups: of the first two layers.
      gn_dim: groups of the two norms.
      lr_mult: multiplies the gradients of all parameters in here.
      hidden: channels between the layers.
      param_dtype: of the parameters.
      rngs: source of the initial weights.
    """

    def __init__(
        self,
        *,
        width: int,
        dilation: int,
        kernel_size: int,
        groups: int,
        gn_dim: int,
        lr_mult: float = 1.0,
        hidden: int = _HIDDEN,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dilation, self.kernel_size = dilation, kernel_size
        self.groups, self.gn_dim, self.lr_mult = groups, gn_dim, lr_mult
        k = kernel_size
        # Kaiming normal, fan_out, ReLU, of the grouped convolution as PyTorch counts its fans.
        std = (2 / (hidden * k * k)) ** 0.5
        shape = (k, k, width // groups, hidden)
        init = nnx.initializers.normal(std)
        self.kernel = nnx.Param(init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros((hidden,), param_dtype))
        self.norm = nnx.GroupNorm(
            width, gn_dim, epsilon=EPS, param_dtype=param_dtype, rngs=nnx.Rngs(0)
        )
        self.mix_kernel = nnx.Param(
            _WEIGHT_INIT(rngs.params(), (hidden // groups, hidden), param_dtype)
        )
        self.mix_bias = nnx.Param(jnp.zeros((hidden,), param_dtype))
        self.hidden_norm = nnx.GroupNorm(
            hidden, gn_dim, epsilon=EPS, param_dtype=param_dtype, rngs=nnx.Rngs(0)
        )
        self.project = nnx.Linear(
            hidden, k * k, kernel_init=_WEIGHT_INIT, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(
        self,
        k: Float[Array, "b h w c"],
        q: Float[Array, "b H W c"],
        *,
        implementation: PCDCImplementation | None = None,
        tile: int | None = None,
    ) -> Float[Array, "b H W taps"]:
        """Scores of the K*K neighbours; a k smaller than q stands for its upsampling."""
        return pcdc(
            k,
            q,
            self._parameters(q.dtype),
            dilation=self.dilation,
            groups=self.groups,
            norm_groups=self.gn_dim,
            implementation=implementation,
            tile=tile,
        )

    def _parameters(self, dtype: DTypeLike) -> PCDCParameters:
        """In the compute dtype, their gradients times `lr_mult`."""

        def read(variable: nnx.Param) -> Array:
            value = variable[...].astype(dtype)
            return value if self.lr_mult == 1 else scale_gradient(value, self.lr_mult)

        return PCDCParameters(
            kernel=read(self.kernel),
            bias=read(self.bias),
            scale=read(self.norm.scale),
            norm_bias=read(self.norm.bias),
            mix=read(self.mix_kernel),
            mix_bias=read(self.mix_bias),
            hidden_scale=read(self.hidden_norm.scale),
            hidden_bias=read(self.hidden_norm.bias),
            project=read(self.project.kernel),
            project_bias=read(self.project.bias),
        )


def neighbours_inside(
    size: tuple[Size, Size], kernel_size: int, dilation: int
) -> Bool[Array, "h w taps"]:
    """Whether neighbour p + dilation (j - r) of pixel p lies in an image of this size."""

    def axis(n):
        p = jnp.arange(n)[:, None] + dilation * (jnp.arange(kernel_size) - kernel_size // 2)[None]
        return (p >= 0) & (p < n)

    rows, cols = (axis(n) for n in size)
    inside = rows[:, None, :, None] & cols[None, :, None, :]
    return inside.reshape(*size, kernel_size * kernel_size)


def _subsampled_resize(x: Array, size: tuple[Size, Size], step: int) -> Array:
    """`subsample(resize(x, size), step)`."""
    ratio = whole_ratio(x.shape[1:3], size)
    if ratio is None or any(r % step for r in ratio):
        return subsample(resize(x, size), step)
    return upsample_extended(extend(x, 1), ratio, step)


def _linear_of_norm(x: Array, norm: nnx.GroupNorm | None, layer: nnx.Linear | None) -> Array:
    """`layer(norm(x))` without writing the normalised map; either may be absent."""
    if layer is None:
        return apply_norm(x, norm)
    if norm is None:
        return apply_linear(x, layer)
    return _affine_of_norm(
        x,
        norm.scale[...],
        norm.bias[...],
        group_moments(x, groups=norm.num_groups, eps=EPS),
        layer.kernel[...],
        None if layer.bias is None else layer.bias[...],
    )


def _affine_of_norm(
    x: Array,
    scale: Array,
    norm_bias: Array,
    moments: tuple[Array, Array],
    kernel: Array,
    bias: Array | None,
) -> Array:
    """`GN(x) @ kernel + bias` as one product with per-image weights."""
    mean, factor = moments
    scale, norm_bias, kernel = (a.astype(factor.dtype) for a in (scale, norm_bias, kernel))
    factor = factor * scale[None]
    offset = (norm_bias[None] - mean * factor) @ kernel
    if bias is not None:
        offset = offset + bias.astype(offset.dtype)[None]
    weight = (factor[:, :, None] * kernel[None]).astype(x.dtype)

    def affine(params, blocks):
        (weight, offset), (x,) = params, blocks
        product = jnp.einsum("bhwc,bco->bhwo", x, weight, preferred_element_type=factor.dtype)
        return ((product + offset[:, None, None]).astype(x.dtype),)

    b, h, w, _ = x.shape
    rows = block_rows(h, b * w * max(kernel.shape))
    block = Rows(1, rows, rows)
    (out,) = map_row_blocks(affine, h // rows, (block,), (block,), (weight, offset), (x,))
    return out
