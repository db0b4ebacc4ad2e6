"""ResNet, the residual convolutional network.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 3.3 and table 1. A
stem at stride 4, then four stages of blocks

    y = relu(shortcut(x) + f(x))

where f is two 3x3 convolutions (18 and 34 layers) or 1x1, 3x3, 1x1 with a quarter of the channels
inside (50 and 101: bottlenecks), each convolution followed by BatchNorm and all but the last by
ReLU, and the shortcut is the identity, or a 1x1 convolution with BatchNorm where the shape changes.

Details that the paper leaves open or that have changed since are as torchvision and timm have them:
the stride of a bottleneck is in its 3x3 convolution ("v1.5"). Where strides are exchanged for
dilation, the first block of a stage has the dilation of the stage before it (1 in the first stage),
and all convolutions after that of the stage itself. For bottlenecks with `dilations=(1, 1, 2, 4)`
this also is what MMSegmentation's models have, by its `contract_dilation=True`.

The deep stem has three 3x3 convolutions in place of the 7x7 one: He et al., "Bag of Tricks for
Image Classification with Convolutional Neural Networks", CVPR 2019, section 4.2, model C.
MMSegmentation calls ResNet-50 with it R50-V1c, timm `resnet50c`.
"""

import dataclasses
import itertools
import operator
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from resfu_jax._checks import check_choice, check_flag, check_sizes, check_whole
from resfu_jax._layers import BatchNorm
from resfu_jax.backbones._layers import check_images
from resfu_jax.ops.checks import check_floating

Stem = Literal["standard", "deep"]


@dataclasses.dataclass(frozen=True)
class Variant:
    """Kind of the blocks and sizes of the four stages."""

    bottleneck: bool
    depths: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 256, 512)


VARIANTS = {
    "18": Variant(False, (2, 2, 2, 2)),
    "34": Variant(False, (3, 4, 6, 3)),
    "50": Variant(True, (3, 4, 6, 3)),
    "101": Variant(True, (3, 4, 23, 3)),
}

_conv_init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class ResNet(nnx.Module):
    """ResNet: images to a pyramid of four feature maps, at strides 4, 8, 16 and 32 by default.

    BatchNorm normalises by the batch in training, and by its running statistics in the evaluation
    view (`nnx.view(model, use_running_average=True)`).

    Attributes:
      features: channels of the four maps: `widths`, times 4 with bottlenecks.
      strides: distance of their pixels in pixels of the image.

    Args:
      variant: published size, `"18"`, `"34"`, `"50"` or `"101"`; widths and depths override it.
      widths: channels of the 3x3 convolutions of the four stages.
      depths: number of blocks of the four stages.
      stem: `"standard"`, a 7x7 convolution, or `"deep"`, three 3x3 ones; with max-pooling after it.
      stem_width: channels of the stem's output; the deep stem has half as many inside.
      strides: what each of the four stages strides by. The usual networks for segmentation have
        `strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)` for stride 8, or `(1, 2, 2, 1)` and
        `(1, 1, 1, 2)` for stride 16.
      dilations: distance of the taps of the 3x3 convolutions of the four stages.
      freeze_norm: normalise by the running statistics in training, too, and keep them. Scale and
        bias stay parameters like all others.
      in_channels: channels of the images.
      dtype: compute type; that of the input by default. BatchNorm is float32 at least.
      param_dtype: type of the parameters.
      remat: recompute every block's activations in the backward pass instead of keeping them.
      rngs: source of the initial weights.

    Raises:
      ValueError: an unknown variant or stem, or sizes that are not positive.
    """

    def __init__(
        self,
        variant: str = "50",
        *,
        widths: Sequence[int] | None = None,
        depths: Sequence[int] | None = None,
        stem: Stem = "standard",
        stem_width: int = 64,
        strides: Sequence[int] = (1, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 1, 1),
        freeze_norm: bool = False,
        in_channels: int = 3,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        check_floating(dtype=dtype, param_dtype=param_dtype)
        if variant not in tuple(VARIANTS):
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        sizes = VARIANTS[variant]
        widths, depths, strides, dilations = (
            _four_positive(name, value)
            for name, value in (
                ("widths", sizes.widths if widths is None else widths),
                ("depths", sizes.depths if depths is None else depths),
                ("strides", strides),
                ("dilations", dilations),
            )
        )
        check_choice(get_args(Stem), stem=stem)
        check_whole(stem_width=stem_width, in_channels=in_channels)
        if stem_width % 2:
            raise ValueError(f"stem_width must be even and positive, got {stem_width}")
        check_flag(freeze_norm=freeze_norm, remat=remat)

        options: dict[str, Any] = dict(
            frozen=freeze_norm, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.features = tuple(width * (4 if sizes.bottleneck else 1) for width in widths)
        self.in_channels = in_channels
        self.dtype = dtype
        self.remat = remat
        if stem == "standard":
            layers = [ConvNorm(in_channels, stem_width, 7, stride=2, **options)]
        else:
            half = stem_width // 2
            layers = [
                ConvNorm(in_channels, half, 3, stride=2, **options),
                ConvNorm(half, half, 3, **options),
                ConvNorm(half, stem_width, 3, **options),
            ]
        self.stem = nnx.List(layers)

        stages, in_features, before = [], stem_width, 1
        for i, features in enumerate(self.features):
            blocks = []
            for j in range(depths[i]):
                blocks.append(
                    Block(
                        in_features,
                        features,
                        bottleneck=sizes.bottleneck,
                        stride=strides[i] if j == 0 else 1,
                        dilations=(before, dilations[i]),
                        **options,
                    )
                )
                in_features, before = features, dilations[i]
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        self.strides = self.strides_of(strides=strides)

    @staticmethod
    def strides_of(
        variant: str = "50", *, strides: Sequence[int] = (1, 2, 2, 2), **_: Any
    ) -> tuple[int, ...]:
        """The strides of the maps of one built with these arguments."""
        steps = itertools.accumulate(_four_positive("strides", strides), operator.mul)
        return tuple(4 * step for step in steps)

    def __call__(
        self, images: Float[Array, "b h w c"]
    ) -> tuple[
        Float[Array, "b h1 w1 c1"],
        Float[Array, "b h2 w2 c2"],
        Float[Array, "b h3 w3 c3"],
        Float[Array, "b h4 w4 c4"],
    ]:
        """Feature maps of normalised images; sides are divided by the strides rounding up.

        Raises:
          ValueError: images that are not `(B, H, W, in_channels)`.
        """
        check_images(images, self.in_channels)
        x = images if self.dtype is None else images.astype(self.dtype)
        for layer in self.stem:
            x = jax.nn.relu(layer(x))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        pyramid = []
        for blocks in self.stages:
            for block in blocks:
                x = nnx.remat(Block.__call__)(block, x) if self.remat else block(x)
            pyramid.append(x)
        c1, c2, c3, c4 = pyramid
        return c1, c2, c3, c4


class Block(nnx.Module):
    """relu(shortcut(x) + f(x)).

    `dilations` are those of the first 3x3 convolution, which also has the stride, and of the second
    one, which bottlenecks do not have.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        bottleneck: bool,
        stride: int,
        dilations: tuple[int, int],
        **options: Any,
    ):
        first: dict[str, Any] = dict(stride=stride, dilation=dilations[0])
        if bottleneck:
            inside = features // 4
            layers = [
                ConvNorm(in_features, inside, 1, **options),
                ConvNorm(inside, inside, 3, **first, **options),
                ConvNorm(inside, features, 1, **options),
            ]
        else:
            layers = [
                ConvNorm(in_features, features, 3, **first, **options),
                ConvNorm(features, features, 3, dilation=dilations[1], **options),
            ]
        self.layers = nnx.List(layers)
        self.projects = stride != 1 or in_features != features
        if self.projects:
            self.shortcut = ConvNorm(in_features, features, 1, stride=stride, **options)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W d"]:
        """The block's output, of the compute type."""
        y = x
        for layer in self.layers[:-1]:
            y = jax.nn.relu(layer(y))
        y = self.layers[-1](y)
        return jax.nn.relu(y + (self.shortcut(x) if self.projects else x))


class ConvNorm(nnx.Module):
    """Convolution without bias, zero padding on all sides alike, as PyTorch pads; BatchNorm."""

    def __init__(
        self,
        in_features: int,
        features: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        frozen: bool,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.stride = stride
        self.pointwise = kernel_size == 1
        self.conv: nnx.Linear | nnx.Conv
        if self.pointwise:
            self.conv = nnx.Linear(
                in_features, features, use_bias=False, kernel_init=_conv_init, **types
            )
        else:
            self.conv = nnx.Conv(
                in_features,
                features,
                (kernel_size, kernel_size),
                strides=stride,
                kernel_dilation=dilation,
                padding=dilation * (kernel_size // 2),
                use_bias=False,
                kernel_init=_conv_init,
                **types,
            )
        self.norm = BatchNorm(features, frozen=frozen, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W d"]:
        """The normalised map, of the compute type."""
        if self.pointwise and self.stride > 1:
            # Before a matrix product: the gradient of XLA's strided convolution is slow on a CPU.
            # Indexing would do the same, but its symbolic sizes do not match those of the others.
            x = jax.lax.slice(x, (0, 0, 0, 0), x.shape, (1, self.stride, self.stride, 1))
        return self.norm(self.conv(x))


def _four_positive(name: str, value: Sequence[int]) -> tuple[int, ...]:
    check_sizes(4, **{name: value})
    return tuple(value)
