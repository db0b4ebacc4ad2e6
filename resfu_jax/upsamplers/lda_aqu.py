"""LDA-AQU: adaptive query-guided upsampling via local deformable attention.

With x the features, of size n_in on an axis, and n_out the output's size:

    q = bilinear(Linear(LN(x))),  k = Linear(LN(x)),  v = x         q at output size, align_corners
    O = range_factor tanh(Conv(GELU(LN(Depthwise3x3(q)))))          a point per tap, group by group
    u = (p + (tap - r) + O) (n_in - 1) / (n_out - 1)                position in x
    attn = softmax over k_u^2 (<q[p], k(u) + B_tap> / sqrt(d))      head by head
    out[p] = sum attn v(u)                                          `ops.deformable_attention`

The query of an output pixel looks at the points around it, one *output* pixel apart before the
offsets move them by up to `range_factor` output pixels; B is a table of relative positions. Points
beyond the image see zeros and keep their share of the softmax.

Source: Du et al., "LDA-AQU: Adaptive Query-guided Upsampling via Local Deformable Attention", ACM
Multimedia 2024; the semantics are those of the authors' released module.
"""

import math
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resfu_jax._checks import (
    check_choice,
    check_flag,
    check_not_negative,
    check_odd,
    check_positive,
    check_whole,
    need,
)
from resfu_jax._layers import XAVIER_UNIFORM, Conv, DepthwiseConv, LayerNorm, Linear
from resfu_jax.ops import Implementation
from resfu_jax.ops.checks import check_floating
from resfu_jax.ops.deformable_attention import deformable_attention
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.resize import resize
from resfu_jax.ops.sizes import Size
from resfu_jax.upsamplers._inputs import (
    check_features,
    compute_dtype,
    reassembled,
)
from resfu_jax.upsamplers._registry import register
from resfu_jax.upsamplers._upsampler import Upsampler

_WEIGHT_INIT = nnx.initializers.normal(0.02)


@register("lda_aqu")
class LDAAQU(Upsampler):
    """Upsamples features by local attention to deformable points, queried by the features.

    Args:
      features: channels C, kept; a multiple of `reduction_factor * nh` and of
        `reduction_factor * n_groups`.
      guide_features: ignored.
      scale: output size as a multiple of the input size (rounded down), where the call does not
        give one; any positive number.
      reduction_factor: C over the channels of queries and keys; 4 in the published module, 16 in
        its light variant.
      nh: heads, contiguous blocks of channels.
      k_e: side of the last convolution of the offsets, odd.
      k_u: side of the neighbourhood, odd; k_u^2 points a pixel.
      n_groups: groups of channels with offsets of their own.
      range_factor: largest offset, output pixels.
      rpb: add a learned table of relative positions to the keys.
      implementation: as in `ops.deformable_attention`.
      dtype: of the computation; the features' dtype if not given. Statistics, positions and the
        softmax are float32 or better.
      param_dtype: of the parameters.
      rngs: source of the initial weights: Xavier uniform, biases zero, offsets zero, the table
        normal of standard deviation 0.02.

    Raises:
      ValueError: an argument out of range.
    """

    guide = "none"
    weights_are_convex = True

    def __init__(
        self,
        features: int,
        guide_features: int | None = None,
        *,
        scale: int | float = 2,
        reduction_factor: int = 4,
        nh: int = 1,
        k_e: int = 3,
        k_u: int = 3,
        n_groups: int = 2,
        range_factor: float = 11,
        rpb: bool = True,
        implementation: Implementation | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_floating(dtype=dtype, param_dtype=param_dtype)
        check_whole(features=features, reduction_factor=reduction_factor, nh=nh, n_groups=n_groups)
        check_odd(k_e=k_e, k_u=k_u)
        check_positive(scale=scale)
        check_not_negative(range_factor=range_factor)
        check_flag(rpb=rpb)
        check_choice((*get_args(Implementation), None), implementation=implementation)
        for name, n in (("nh", nh), ("n_groups", n_groups)):
            need(
                features % (reduction_factor * n) == 0,
                f"features must be a multiple of reduction_factor * {name} = "
                f"{reduction_factor * n}, got {features}",
            )
        self.features, self.scale = features, scale
        self.nh, self.k_u, self.n_groups = nh, k_u, n_groups
        self.value_groups = math.lcm(nh, n_groups)
        self.range_factor = range_factor
        self.implementation, self.dtype = implementation, dtype
        width = features // reduction_factor
        types: dict[str, Any] = dict(param_dtype=param_dtype, rngs=rngs)
        linear: dict[str, Any] = dict(use_bias=False, kernel_init=XAVIER_UNIFORM, **types)
        self.norm = LayerNorm(features, param_dtype=param_dtype)
        self.q = Linear(features, width, **linear)
        self.k = Linear(features, width, **linear)
        self.offset = Offset(width // n_groups, 2 * k_u**2, k_e, **types)
        table = (nh, k_u**2, width // nh)
        self.table = nnx.Param(_WEIGHT_INIT(rngs.params(), table, param_dtype)) if rpb else None

    def __call__(
        self,
        features: Float[Array, "b h w c"],
        output_size: tuple[Size, Size] | None = None,
        *,
        values: Float[Array, "b h w d"] | None = None,
    ) -> Float[Array, "b H W d"]:
        """Features `(B, h, w, C)`, or `values`, at `output_size`, or at `scale` times their size.

        Raises:
          ValueError: a wrong number of channels.
        """
        check_features(features, self.features)
        x = features.astype(compute_dtype(self.dtype, features, values))
        normed = self.norm(x)
        if output_size is None:
            output_size = tuple(_times(n, self.scale) for n in x.shape[1:3])
        q = resize(self.q(normed), output_size, align_corners=True)
        points = self.points(q, x.shape[1:3])
        return deformable_attention(
            q * (q.shape[-1] // self.nh) ** -0.5,
            self.k(normed),
            reassembled(x, values, groups=self.value_groups),
            points,
            heads=self.nh,
            bias=None if self.table is None else self.table[...].astype(x.dtype),
            implementation=self.implementation,
        )

    def points(
        self, q: Float[Array, "b H W d"], size: tuple[Size, ...]
    ) -> Float[Array, "b H W g taps 2"]:
        """Where every output pixel looks: (row, column) in pixels of the features."""
        b, hh, ww, _ = q.shape
        # Groups share the weights of the offsets: they become images of their own.
        q = q.reshape(b, hh, ww, self.n_groups, -1)
        offset = self.offset(jnp.moveaxis(q, 3, 1).reshape(b * self.n_groups, hh, ww, -1))
        offset = jnp.tanh(offset.astype(at_least_float32(offset.dtype))) * self.range_factor
        offset = offset.reshape(b, self.n_groups, hh, ww, self.k_u**2, 2)
        tap = jnp.arange(self.k_u, dtype=offset.dtype) - self.k_u // 2
        taps = jnp.stack(jnp.meshgrid(tap, tap, indexing="ij"), axis=-1).reshape(-1, 2)
        own = [jnp.arange(n, dtype=jnp.int32).astype(offset.dtype) for n in (hh, ww)]
        own = jnp.stack(jnp.meshgrid(*own, indexing="ij"), axis=-1)
        points = jnp.moveaxis(offset, 1, 3) + taps[None, None, None, None]
        points = points + own[None, :, :, None, None]
        # Output pixels to pixels of x; a single output pixel lies on the first one.
        steps = [
            jnp.asarray(n - 1, offset.dtype) / jnp.maximum(jnp.asarray(m - 1, offset.dtype), 1)
            for n, m in zip(size, (hh, ww), strict=True)
        ]
        return points * jnp.stack(steps).reshape(1, 1, 1, 1, 1, 2)


class Offset(DepthwiseConv):
    """Predicts the offsets from the queries: depthwise 3x3, LayerNorm, GELU, convolution."""

    def __init__(
        self,
        features: int,
        out_features: int,
        kernel_size: int,
        *,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        super().__init__(features, use_bias=False, param_dtype=param_dtype, rngs=rngs)
        self.norm = LayerNorm(features, param_dtype=param_dtype)
        self.conv = Conv(
            features,
            out_features,
            kernel_size,
            kernel_init=nnx.initializers.zeros,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, q: Float[Array, "n H W d"]) -> Float[Array, "n H W o"]:
        """Offsets before the hyperbolic tangent, (row, column) per tap."""
        q = self.norm(super().__call__(q))
        return self.conv(jax.nn.gelu(q, approximate=False))


def _times(n: Size, scale: int | float) -> Size:
    if float(scale).is_integer():
        return n * int(scale)
    need(
        isinstance(n, int),
        f"with symbolic sizes and scale={scale}, give output_size: the size is not known",
    )
    return int(n * scale)
