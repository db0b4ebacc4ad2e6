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

from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from resfu_jax._checks import (
    check_choice,
    check_count,
    check_flag,
    check_not_negative,
    check_odd,
    check_positive,
    check_whole,
    need,
)
from resfu_jax._layers import GroupNorm, Linear, normalised
from resfu_jax.ops import Implementation
from resfu_jax.ops.checks import check_floating
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.filters import (
    check_gf_scale,
    gaussian_blur,
    guided_filter_subsampled,
    subsample,
)
from resfu_jax.ops.fns_attention import fns_attention
from resfu_jax.ops.gradient import scale_gradient
from resfu_jax.ops.pcdc import PCDCParameters, pcdc
from resfu_jax.ops.resize import resize
from resfu_jax.ops.sizes import Size
from resfu_jax.upsamplers._inputs import (
    check_features,
    check_guide,
    compute_dtype,
    need_guide,
    reassembled,
)
from resfu_jax.upsamplers._registry import register
from resfu_jax.upsamplers._upsampler import Upsampler

_HIDDEN = 128  # channels of the score branches, fixed in the official module
_WEIGHT_INIT = nnx.initializers.normal(0.02)
_OUTSIDE = -1e7


# Segmenter x4 and SegFormer x2, x4, x8 were trained with the score branches' gradients multiplied.
# (The released SegFormer configuration runs `dilation=2` at all three ratios: an option here.)
@register("resfu")
@register("resfu_segmenter", lr_mult=500.0)
@register("resfu_segformer", lr_mult=500.0)
class ReSFU(Upsampler):
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
      eps: regulariser of the guided filter, positive.
      lr_mult: multiplies the gradients of the score branches' parameters, 0 or more (500 in the
        released configurations; nearly without effect under Adam).
      gf_scale: subsampling of the guided filter.
      implementation: of `ops.pcdc` and `ops.fns_attention`; `None` takes the best of the platform
        that the program is for.
      tile: most rows of the output that are computed at a time on a CPU, for large outputs: the
        same values and gradients from less temporary memory and more time. (Steps that need the
        whole image, such as norms, come first.)
      dtype: of the computation; the inputs' promoted dtype if not given. Statistics and the softmax
        are float32 or better.
      param_dtype: of the parameters.
      rngs: source of the initial weights.

    Raises:
      ValueError: an argument out of range, widths that groups do not divide, a missing guide.
    """

    guide = "features"
    weights_are_convex = True
    # The norm of a score branch has both arguments, whose difference its bias cancels in.
    without_gradient = (("semantic_scores", "norm", "bias"), ("detail_scores", "norm", "bias"))

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
            scale=scale,
            dilation=dilation,
            groups=groups,
            embedding_dim=embedding_dim,
            gn_dim=gn_dim,
            gf_scale=gf_scale,
        )
        check_odd(kernel_size=kernel_size)
        check_count(radius=radius)
        check_positive(eps=eps)
        check_not_negative(lr_mult=lr_mult)
        check_flag(y_conv=y_conv, qkv_bias=qkv_bias, normx=normx, normy=normy)
        check_choice((*get_args(Implementation), None), implementation=implementation)
        for name, n in (("groups", groups), ("gn_dim", gn_dim)):
            if embedding_dim % n or _HIDDEN % n:
                raise ValueError(
                    f"{name} must divide embedding_dim ({embedding_dim}) and {_HIDDEN}, got {n}"
                )
        if not y_conv and guide_features != embedding_dim:
            raise ValueError(
                "with y_conv=False the guide is the query: guide_features must equal embedding_dim "
                f"({embedding_dim}), got {guide_features}"
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
            return GroupNorm(width, groups, param_dtype=param_dtype)

        def projection(width):
            return Linear(
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
        branch: dict[str, Any] = dict(
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
        v = reassembled(features.astype(dtype), values)
        return fns_attention(attn, v, implementation=self.implementation, tile=self.tile)

    def attention(
        self, features: Float[Array, "b h w c"], guide: Float[Array, "b H W cg"]
    ) -> Float[Array, "b H W taps"]:
        """Weights of the K*K neighbours of every output pixel, row-major, summing to 1."""
        self._check(features, guide)
        dtype = compute_dtype(self.dtype, features, guide)
        q, k = self.query(guide.astype(dtype)), self.key(features.astype(dtype))
        scores = self.detail_scores(self.query_blurred(q), q, **self._form())
        scores = self.semantic_scores(k, self.query_filtered(q, k), **self._form()) + scores
        scores = scores.astype(at_least_float32(dtype))
        mask = neighbours_inside(guide.shape[1:3], self.kernel_size, self.dilation)
        return jax.nn.softmax(jnp.where(mask[None], scores, scores + _OUTSIDE))

    def query(self, y: Array) -> Array:
        """Queries q, `(B, H, W, E)`."""
        return normalised(y, self.norm_y) if self.q is None else self.q(y, norm=self.norm_y)

    def key(self, x: Array) -> Array:
        """Keys k, `(B, h, w, E)`."""
        return self.k(x, norm=self.norm_x)

    def query_blurred(self, q: Array) -> Array:
        """Partner of q in the detail branch: its own blur."""
        return gaussian_blur(q, kernel_size=3, sigma=1.0)

    def query_filtered(self, q: Array, k: Array) -> Array:
        """Partner of the upsampled key in the semantic branch: q filtered towards it."""
        small_q, small_k_up = (subsample(a, self.gf_scale) for a in (q, resize(k, q.shape[1:3])))
        radius = self.radius // self.gf_scale
        return guided_filter_subsampled(q, small_q, small_k_up, radius=radius, eps=self.eps)

    def _form(self) -> dict[str, Any]:
        return dict(implementation=self.implementation, tile=self.tile)

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
        self.norm = GroupNorm(width, gn_dim, param_dtype=param_dtype)
        self.mix_kernel = nnx.Param(
            _WEIGHT_INIT(rngs.params(), (hidden // groups, hidden), param_dtype)
        )
        self.mix_bias = nnx.Param(jnp.zeros((hidden,), param_dtype))
        self.hidden_norm = GroupNorm(hidden, gn_dim, param_dtype=param_dtype)
        self.project = Linear(
            hidden, k * k, kernel_init=_WEIGHT_INIT, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(
        self,
        k: Float[Array, "b h w c"],
        q: Float[Array, "b H W c"],
        *,
        implementation: Implementation | None = None,
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
            eps=self.norm.epsilon,
            implementation=implementation,
            tile=tile,
        )

    def _parameters(self, dtype: DTypeLike) -> PCDCParameters:
        """In the compute dtype, their gradients times `lr_mult`."""

        def read(variable: nnx.Param | None) -> Array:
            assert variable is not None  # all layers here have biases
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
    size: tuple[Size, ...], kernel_size: int, dilation: int
) -> Bool[Array, "h w taps"]:
    """Whether neighbour p + dilation (j - r) of pixel p lies in an image of this size."""

    def axis(n):
        p = jnp.arange(n)[:, None] + dilation * (jnp.arange(kernel_size) - kernel_size // 2)[None]
        return (p >= 0) & (p < n)

    rows, cols = (axis(n) for n in size)
    inside = rows[:, None, :, None] & cols[None, :, None, :]
    return inside.reshape(*size, kernel_size * kernel_size)
