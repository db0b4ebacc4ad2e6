"""The image encoder that JAFAR, AnyUp, NAF and RaysUp have in common.

    encode(I) = block_n(... block_1(Conv(I)))
    block(x)  = Conv(SiLU(GN8(Conv(SiLU(GN8(x))))) [+ skip(x)]

GN8 is a GroupNorm of 8 groups. The skip is the identity, or a 1x1 convolution where the width
changes. Borders are reflected.
"""

from typing import Any

import jax
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from resfu_jax._checks import need
from resfu_jax._layers import PYTORCH_UNIFORM, Conv, GroupNorm

_GROUPS = 8

Kernel = int | tuple[int, int]


class Block(nnx.Module):
    """Norm, SiLU and convolution, twice.

    Args:
      in_features: channels of the map, a multiple of 8.
      features: those of the result, likewise.
      kernel_size: of both convolutions.
      dilation: likewise.
      use_bias: likewise.
      skip: whether the map is added.
      param_dtype: of the parameters.
      rngs: source of the initial weights, PyTorch's default.

    Raises:
      ValueError: channels that the norms cannot group.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        kernel_size: Kernel = 1,
        *,
        dilation: int = 1,
        use_bias: bool = False,
        skip: bool = True,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        for width in (in_features, features):
            need(
                width % _GROUPS == 0,
                f"the encoder's width must be a multiple of {_GROUPS}, got {width}",
            )
        types: dict[str, Any] = dict(param_dtype=param_dtype)
        layer: dict[str, Any] = dict(
            border="reflect",
            dilation=dilation,
            use_bias=use_bias,
            kernel_init=PYTORCH_UNIFORM,
            rngs=rngs,
            **types,
        )
        self.norm1 = GroupNorm(in_features, _GROUPS, **types)
        self.conv1 = Conv(in_features, features, kernel_size, **layer)
        self.norm2 = GroupNorm(features, _GROUPS, **types)
        self.conv2 = Conv(features, features, kernel_size, **layer)
        self.skip = skip
        self.shortcut = (
            Conv(in_features, features, 1, **layer | dict(dilation=1, use_bias=False))
            if skip and in_features != features
            else None
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """The map of `features` channels."""
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        if not self.skip:
            return y
        return y + (x if self.shortcut is None else self.shortcut(x))


class Encoder(nnx.Module):
    """A convolution and some blocks.

    Args:
      in_features: channels of the image or map.
      features: channels of the result, a multiple of 8.
      kernel_size: of the first convolution.
      block_kernel: of those of the blocks.
      blocks: how many.
      dilation: of all convolutions.
      use_bias: of all convolutions.
      skip: whether blocks add what they are given.
      param_dtype: of the parameters.
      rngs: source of the initial weights, PyTorch's default.

    Raises:
      ValueError: a width that is no multiple of 8.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        kernel_size: Kernel = 1,
        *,
        block_kernel: Kernel = 1,
        blocks: int = 2,
        dilation: int = 1,
        use_bias: bool = False,
        skip: bool = True,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        layer: dict[str, Any] = dict(
            dilation=dilation, use_bias=use_bias, param_dtype=param_dtype, rngs=rngs
        )
        self.conv = Conv(
            in_features,
            features,
            kernel_size,
            border="reflect",
            kernel_init=PYTORCH_UNIFORM,
            **layer,
        )
        self.blocks = nnx.List(
            [Block(features, features, block_kernel, skip=skip, **layer) for _ in range(blocks)]
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """The encoded map, of x's size and dtype."""
        x = self.conv(x)
        for block in self.blocks:
            x = block(x)
        return x
