"""CARAFE: content-aware reassembly of features.

With x the features, s the scale, K = `up_kernel` and G = `up_group`:

    mask = softmax over K*K (PixelShuffle_s(Conv(Linear(x))))       one kernel a pixel and group
    out[p] = sum_uv mask[p, uv] x[floor(p / s) + (u, v) - r]        `ops.local_attention`

The kernels come from the features alone. Beyond the image x counts as zero, and the kernel is not
renormalised: borders come out weaker, as in the official operator.

Source: Wang et al., "CARAFE: Content-Aware ReAssembly of FEatures", ICCV 2019, equations 1 and 2,
and section 3.2; the semantics are those of mmcv's `CARAFEPack`.
"""

from typing import Any, get_args

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resfu_jax._checks import check_choice, check_odd, check_whole, need
from resfu_jax._layers import XAVIER_UNIFORM, Conv, Linear
from resfu_jax.ops import Implementation
from resfu_jax.ops.checks import check_floating
from resfu_jax.ops.local_window import local_attention
from resfu_jax.ops.pixel_shuffle import pixel_shuffle
from resfu_jax.ops.sizes import Size
from resfu_jax.upsamplers._inputs import (
    check_features,
    check_output_size,
    compute_dtype,
    reassembled,
)
from resfu_jax.upsamplers._registry import register
from resfu_jax.upsamplers._upsampler import Upsampler


@register("carafe")
class CARAFE(Upsampler):
    """Upsamples features by a whole scale with kernels predicted from the features.

    Args:
      features: channels C, kept.
      guide_features: ignored.
      scale: whole upsampling ratio.
      up_kernel: K, side of the reassembly kernel, odd.
      up_group: G, groups of channels with kernels of their own; it divides C.
      encoder_kernel: side of the convolution that predicts the kernels, odd.
      encoder_dilation: its dilation.
      compressed_channels: channels between the two layers.
      implementation: as in `ops.local_attention`.
      dtype: of the computation; the features' dtype if not given. The softmax is float32 or better.
      param_dtype: of the parameters.
      rngs: source of the initial weights: Xavier uniform for the compressor, normal of standard
        deviation 0.001 for the encoder, biases zero.

    Raises:
      ValueError: an argument out of range.
    """

    guide = "none"
    needs_whole_scale = True
    weights_are_convex = True

    def __init__(
        self,
        features: int,
        guide_features: int | None = None,
        *,
        scale: int = 2,
        up_kernel: int = 5,
        up_group: int = 1,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
        compressed_channels: int = 64,
        implementation: Implementation | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_floating(dtype=dtype, param_dtype=param_dtype)
        check_whole(
            features=features,
            scale=scale,
            up_group=up_group,
            encoder_dilation=encoder_dilation,
            compressed_channels=compressed_channels,
        )
        check_odd(up_kernel=up_kernel, encoder_kernel=encoder_kernel)
        check_choice((*get_args(Implementation), None), implementation=implementation)
        need(features % up_group == 0, f"up_group must divide features={features}, got {up_group}")
        self.features, self.scale = features, scale
        self.up_kernel, self.value_groups = up_kernel, up_group
        self.implementation, self.dtype = implementation, dtype
        types: dict[str, Any] = dict(param_dtype=param_dtype, rngs=rngs)
        self.compress = Linear(features, compressed_channels, kernel_init=XAVIER_UNIFORM, **types)
        self.encode = Conv(
            compressed_channels,
            up_kernel**2 * up_group * scale**2,
            encoder_kernel,
            dilation=encoder_dilation,
            kernel_init=nnx.initializers.normal(0.001),
            **types,
        )

    def __call__(
        self,
        features: Float[Array, "b h w c"],
        output_size: tuple[Size, Size] | None = None,
        *,
        values: Float[Array, "b h w d"] | None = None,
    ) -> Float[Array, "b H W d"]:
        """Features `(B, h, w, C)`, or `values`, at `scale` times their size.

        Raises:
          ValueError: a wrong number of channels, or an `output_size` other than that.
        """
        check_features(features, self.features)
        check_output_size("carafe", features, output_size, self.scale)
        x = features.astype(compute_dtype(self.dtype, features, values))
        v = reassembled(x, values, groups=self.value_groups)
        return local_attention(
            self.scores(x), v, groups=self.value_groups, implementation=self.implementation
        )

    def scores(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W d"]:
        """What a softmax over K*K makes the kernels of."""
        return pixel_shuffle(self.encode(self.compress(x)), self.scale)
