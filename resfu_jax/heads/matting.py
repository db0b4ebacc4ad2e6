"""The decoder of A2U matting, with a choice of upsampler in its four slots.

Dai et al., "Learning Affinity-Aware Upsampling for Deep Image Matting", CVPR 2021, as FADE (Lu et
al., ECCV 2022) and SAPA (Lu et al., NeurIPS 2022) wire their upsamplers into it. With the maps m
and guides g of `MattingEncoder`, their stride in brackets, and the input x of four channels:

    y = ASPP(m[16])
    y = decode(upsample(y, g[8]) + shortcut(m[8]))
    y = decode(upsample(y, g[4]) + shortcut(m[4]))
    y = decode(upsample(y, g[2]) + shortcut(m[2]))
    y = decode(upsample(y, g[1]) + shortcut(x))
    alpha = predict(y)

Every upsampler doubles the size. One with a guide gets the encoder's map in front of the pooling
that it undoes, which has as many channels as the features; one that the image guides gets the
image; others get the size. `decode` is two residual blocks, `shortcut` a 3x3 convolution with
BatchNorm and ReLU, `predict` two 3x3 convolutions to a channel, BatchNorm and a leaky ReLU between
them. Atrous spatial pyramid pooling (ASPP) is that of DeepLabv3+ with depthwise separable
convolutions. The output is not bounded: `MattingModel` clips it for use.

The released code has leaky ReLUs of slope 0.01 in place of all ReLUs.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from resfu_jax._checks import check_rate
from resfu_jax._layers import BatchNorm
from resfu_jax.backbones.matting import Pyramid
from resfu_jax.backbones.resnet import Block
from resfu_jax.heads._layers import ConvBNReLU, create_head_upsampler, guide_inputs
from resfu_jax.ops.checks import check_floating

_conv_init = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
# The last kernel turns what a leaky ReLU lets through, which is positive, into alpha. One drawn
# with a negative sum has to turn round first: 3 of 10 runs predicted a constant after 300 steps.
_mean_init = nnx.initializers.constant(1 / 9)
_DILATIONS = (6, 12, 18)  # DeepLab's for stride 16


class MattingHead(nnx.Module):
    """Maps and guides of the encoder to alpha at every pixel.

    Args:
      features: channels of the encoder's maps at strides 2, 4, 8 and 16.
      guide_features: channels of its guides at strides 1, 2, 4 and 8, as many as what they guide
        has.
      upsampler: a name of `list_upsamplers()`.
      upsampler_options: options of that upsampler.
      dropout: rate after the ASPP.
      in_channels: channels of the network's input.
      dtype: compute type; that of the features by default. BatchNorm is float32 at least.
      param_dtype: type of the parameters.
      rngs: source of the initial weights and of the dropout.

    Raises:
      ValueError: an unknown upsampler or option, or numbers that are out of range.
    """

    def __init__(
        self,
        features: Sequence[int],
        guide_features: Sequence[int],
        *,
        upsampler: str = "fade",
        upsampler_options: dict[str, Any] | None = None,
        dropout: float = 0.5,
        in_channels: int = 4,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_floating(dtype=dtype, param_dtype=param_dtype)
        check_rate(dropout=dropout)
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        sizes: dict[str, Any] = dict(
            bottleneck=False, stride=1, dilations=(1, 1), frozen=False, **types
        )
        # What the upsamplers at strides 16, 8, 4 and 2 take, and what leaves the last slot.
        widths = *reversed(guide_features), max(guide_features[0] // 2, 1)
        *added, deepest = features
        added = *reversed(added), in_channels
        self.context = ASPP(deepest, _DILATIONS, **types)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.upsample = nnx.List(
            [
                create_head_upsampler(upsampler, width, 2, upsampler_options, **types)
                for width in widths[:-1]
            ]
        )
        self.shortcut = nnx.List(
            [
                ConvBNReLU(n, width, kernel_size=3, **types)
                for n, width in zip(added, widths[:-1], strict=True)
            ]
        )
        self.decode = nnx.List(
            [
                nnx.List([Block(n, width, **sizes), Block(width, width, **sizes)])
                for n, width in zip(widths[:-1], widths[1:], strict=True)
            ]
        )
        self.predict = nnx.List(
            [
                nnx.Conv(n, 1, (3, 3), padding=1, use_bias=False, kernel_init=init, **types)
                for n, init in ((widths[-1], _conv_init), (1, _mean_init))
            ]
        )
        self.norm = BatchNorm(1, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self,
        pyramid: Pyramid,
        inputs: Float[Array, "b h w c"],
        images: Float[Array, "b h w 3"],
    ) -> Float[Array, "b h w"]:
        """Alpha, not bounded, in the compute type.

        Args:
          pyramid: of the encoder.
          inputs: what the encoder saw.
          images: the normalised images, for upsamplers that they guide.

        Raises:
          ValueError: sizes between which the upsampler cannot go.
        """
        *maps, y = pyramid.maps
        y = self.dropout(self.context(y))
        added = *reversed(maps), inputs.astype(y.dtype)
        for up, guide, low, shortcut, decode in zip(
            self.upsample, reversed(pyramid.guides), added, self.shortcut, self.decode, strict=True
        ):
            y = up(y, *guide_inputs(up, guide, images)) + shortcut(low)
            for block in decode:
                y = block(y)
        y = jax.nn.leaky_relu(self.norm(self.predict[0](y)))
        return self.predict[1](y)[..., 0]


class ASPP(nnx.Module):
    """Atrous spatial pyramid pooling: what is around a pixel, near and far.

    Concatenated are a 1x1 convolution, depthwise separable 3x3 ones of several dilations, and the
    mean of the map; a 1x1 convolution merges them. Each is followed by BatchNorm and ReLU.
    """

    def __init__(
        self,
        features: int,
        dilations: Sequence[int],
        *,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.near = ConvBNReLU(features, features, **types)
        self.far = nnx.List([SeparableConv(features, d, **types) for d in dilations])
        self.mean = ConvBNReLU(features, features, **types)
        self.merge = ConvBNReLU((2 + len(dilations)) * features, features, **types)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The merged map, of the compute type."""
        mean = self.mean(jnp.mean(x, axis=(1, 2), keepdims=True))
        maps = [self.near(x), *(far(x) for far in self.far)]
        return self.merge(jnp.concatenate([*maps, jnp.broadcast_to(mean, maps[0].shape)], axis=-1))


class SeparableConv(nnx.Module):
    """A dilated depthwise 3x3 convolution and a 1x1 one, each with BatchNorm and ReLU."""

    def __init__(
        self,
        features: int,
        dilation: int,
        *,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.depthwise = nnx.Conv(
            features,
            features,
            (3, 3),
            feature_group_count=features,
            kernel_dilation=dilation,
            padding=dilation,
            use_bias=False,
            kernel_init=_conv_init,
            **types,
        )
        self.norm = BatchNorm(features, param_dtype=param_dtype, rngs=rngs)
        self.pointwise = ConvBNReLU(features, features, **types)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The layer's output, of the compute type."""
        return self.pointwise(jax.nn.relu(self.norm(self.depthwise(x))))
