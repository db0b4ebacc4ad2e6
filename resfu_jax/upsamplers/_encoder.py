"""The image encoder that JAFAR, AnyUp, NAF and RaysUp have in common.

    encode(I) = block_n(... block_1(Conv(I)))
    block(x)  = Conv(SiLU(GN8(Conv(SiLU(GN8(x))))) [+ skip(x)]

GN8 is a GroupNorm of 8 groups. The skip is the identity, or a 1x1 convolution where the width
changes. Borders are reflected.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from resfu_jax import ops
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
        y = _convolved(_convolved(x, self.conv1, self.norm1), self.conv2, self.norm2)
        if not self.skip:
            return y
        return y + (x if self.shortcut is None else _convolved(x, self.shortcut))


def _convolved(
    x: Float[Array, "b h w c"], conv: Conv, norm: GroupNorm | None = None
) -> Float[Array, "b h w d"]:
    """The convolution, of the normalised and activated map if there is a norm."""
    bias = None if conv.bias is None else conv.bias[...]
    options: dict[str, Any] = dict(dilation=conv.dilation)
    if norm is not None:
        options |= dict(scale=norm.scale[...], norm_bias=norm.bias[...])
        options |= dict(groups=norm.num_groups, eps=norm.epsilon)
    return ops.reflect_conv(x, conv.kernel[...], bias, **options)


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
        x = _convolved(x, self.conv)
        for block in self.blocks:
            x = block(x)
        return x


def encode_in_turn(
    encoders: Iterable[Callable[[Array], Array]], x: Float[Array, "b h w c"]
) -> list[Float[Array, "b h w _d"]]:
    """What each encoder makes of x, when the one before it is done.

    Side by side, as XLA would run them on a CPU, they hold all of their maps at once. So each is
    given x with nothing added, of which XLA cannot know that it is nothing.
    """
    made: list[Array] = []
    for encode in encoders:
        made.append(encode(x))
        x = x + jax.lax.stop_gradient(0 * made[-1][:, :1, :1, :1])
    return made
