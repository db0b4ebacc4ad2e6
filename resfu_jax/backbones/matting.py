"""The encoder of A2U matting: a ResNet without its last stage, that keeps what it pools.

Dai et al., "Learning Affinity-Aware Upsampling for Deep Image Matting", CVPR 2021, section 4 and
its released code, whose network FADE and SAPA take over. For an input of H x W, four channels:

    stem    7x7 convolution, stride 1     (B, H,    W,    64)   is max-pooled 2x2 twice
    stage 1 blocks                        (B, H/4,  W/4,  64)
    stage 2 pooling block, then blocks    (B, H/8,  W/8,  128)
    stage 3 pooling block, then blocks    (B, H/16, W/16, 256)

A pooling block is a block of `ResNet` in which a 2x2 max-pooling after the first convolution takes
the place of its stride, so that there is a map of the full size in front of each of the four
poolings: the guides of the decoder's upsamplers. Names and shapes of the parameters are those of
`ResNet`, but for the fourth channel of the stem, so that weights of a ResNet-34 serve; of the last
stage the released network has four blocks of its six.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from resfu_jax._checks import check_choice, check_flag, check_whole, need
from resfu_jax.backbones._layers import check_images
from resfu_jax.backbones.resnet import VARIANTS, Block, ConvNorm
from resfu_jax.ops.checks import check_floating

DEPTHS = {"18": (2, 2, 2), "34": (3, 4, 4)}


class Pyramid(NamedTuple):
    """What the decoder is made from; the number is the stride.

    Attributes:
      guides: in front of the poolings from stride 1, 2, 4 and 8.
      maps: what is added in the decoder at strides 2, 4 and 8, and the encoder's end at 16.
    """

    guides: tuple[
        Float[Array, "b h1 w1 c1"],
        Float[Array, "b h2 w2 c2"],
        Float[Array, "b h4 w4 c4"],
        Float[Array, "b h8 w8 c8"],
    ]
    maps: tuple[
        Float[Array, "b h2 w2 d2"],
        Float[Array, "b h4 w4 d4"],
        Float[Array, "b h8 w8 d8"],
        Float[Array, "b h16 w16 d16"],
    ]


class MattingEncoder(nnx.Module):
    """Images and trimaps to maps at strides 1 to 16.

    Attributes:
      guide_features: channels of the four guides.
      features: channels of the four maps.

    Args:
      variant: `"18"` or `"34"`, the ResNets of basic blocks; widths and depths override it.
      widths: channels of the stages; of four, as a `ResNet` has, the first three count.
      depths: number of blocks of the stages, likewise.
      stem_width: channels of the stem.
      freeze_norm: BatchNorm normalises by its running statistics in training, too, and keeps them.
      in_channels: colours and the trimap.
      dtype: compute type; that of the input by default. BatchNorm is float32 at least.
      param_dtype: type of the parameters.
      remat: recompute every block's activations in the backward pass instead of keeping them.
      rngs: source of the initial weights.

    Raises:
      ValueError: an unknown variant, or sizes that are not positive.
    """

    def __init__(
        self,
        variant: str = "34",
        *,
        widths: Sequence[int] | None = None,
        depths: Sequence[int] | None = None,
        stem_width: int = 64,
        freeze_norm: bool = False,
        in_channels: int = 4,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        check_floating(dtype=dtype, param_dtype=param_dtype)
        check_choice(tuple(DEPTHS), variant=variant)
        check_whole(stem_width=stem_width, in_channels=in_channels)
        check_flag(freeze_norm=freeze_norm, remat=remat)
        widths = _first_three("widths", VARIANTS[variant].widths if widths is None else widths)
        depths = _first_three("depths", DEPTHS[variant] if depths is None else depths)
        options: dict[str, Any] = dict(
            frozen=freeze_norm, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.in_channels, self.dtype, self.remat = in_channels, dtype, remat
        self.guide_features = stem_width, stem_width, widths[1], widths[2]
        self.features = stem_width, *widths
        self.stem = nnx.List([ConvNorm(in_channels, stem_width, 7, **options)])
        stages, before = [], stem_width
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks: list[nnx.Module] = []
            for j in range(depth):
                if i and not j:
                    blocks.append(PoolingBlock(before, width, **options))
                else:
                    sizes: dict[str, Any] = dict(bottleneck=False, stride=1, dilations=(1, 1))
                    blocks.append(Block(before, width, **sizes, **options))
                before = width
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)

    def __call__(self, images: Float[Array, "b h w c"]) -> Pyramid:
        """The maps of normalised images, whose sides are multiples of 16.

        Raises:
          ValueError: images of other sizes, or not with `in_channels` channels.
        """
        check_images(images, self.in_channels)
        sides = [n for n in images.shape[1:3] if isinstance(n, int)]
        need(
            all(n % 16 == 0 for n in sides),
            f"images must have sides that are multiples of 16, got {images.shape[1:3]}",
        )
        x = images if self.dtype is None else images.astype(self.dtype)
        full = jax.nn.relu(self.stem[0](x))
        half = max_pool(full)
        guides, maps = [full, half], [half]
        x = max_pool(half)
        for blocks in self.stages:
            for block in blocks:
                call = nnx.remat(type(block).__call__) if self.remat else type(block).__call__
                x = call(block, x)
                if isinstance(block, PoolingBlock):
                    x, guide = x
                    guides.append(guide)
            maps.append(x)
        return Pyramid(tuple(guides), tuple(maps))


class PoolingBlock(nnx.Module):
    """relu(shortcut(x) + f(x)) at half the size, and what f pools."""

    def __init__(self, in_features: int, features: int, **options: Any):
        layers = [ConvNorm(n, features, 3, **options) for n in (in_features, features)]
        self.layers = nnx.List(layers)
        self.shortcut = ConvNorm(in_features, features, 1, stride=2, **options)

    def __call__(
        self, x: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b h/2 w/2 d"], Float[Array, "b h w d"]]:
        """The block's output, and the map in front of its pooling."""
        guide = jax.nn.relu(self.layers[0](x))
        return jax.nn.relu(self.layers[1](max_pool(guide)) + self.shortcut(x)), guide


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h/2 w/2 c"]:
    """The largest value of every 2 x 2 pixels."""
    return nnx.max_pool(x, (2, 2), strides=(2, 2))


def _first_three(name: str, value: Sequence[int]) -> tuple[int, int, int]:
    need(len(value) in (3, 4), f"{name} must be three or four positive integers, got {value!r}")
    for size in value:
        check_whole(**{name: size})
    first, second, third = value[:3]
    return first, second, third
