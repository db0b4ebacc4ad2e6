"""PyTorch's own upsampling layers."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from resfu_jax.convert._state import StateDict, store, unfilled
from resfu_jax.upsamplers.classic import Deconvolution, PixelShuffle


def conv_transpose(
    state: Mapping[str, Any],
    *,
    in_channels: int,
    out_channels: int,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    output_padding: int | tuple[int, int] = 0,
    groups: int = 1,
    bias: bool = True,
    dilation: int | tuple[int, int] = 1,
    padding_mode: str = "zeros",
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
) -> Deconvolution:
    """`torch.nn.ConvTranspose2d` whose output is exactly `stride` times the input.

    Without `bias` ours is zero.
    """
    _only("ConvTranspose2d", groups=(groups, 1), dilation=(_side("dilation", dilation), 1))
    _only("ConvTranspose2d", padding_mode=(padding_mode, "zeros"))
    up = unfilled(
        Deconvolution,
        in_channels,
        scale=_side("stride", stride),
        out_features=out_channels,
        kernel_size=_side("kernel_size", kernel_size),
        padding=_side("padding", padding),
        output_padding=_side("output_padding", output_padding),
        dtype=dtype,
        param_dtype=param_dtype,
    )
    return _convolution(StateDict(state, "ConvTranspose2d"), up, "", "IOHW", bias)


def conv_pixel_shuffle(
    state: Mapping[str, Any],
    *,
    in_channels: int,
    out_channels_conv: int,
    kernel_size: int | tuple[int, int],
    upscale_factor: int,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    bias: bool = True,
    padding_mode: str = "zeros",
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
) -> PixelShuffle:
    """`torch.nn.Sequential(Conv2d, PixelShuffle)` that keeps the number of channels.

    The arguments are those of both; `out_channels_conv` is the convolution's. Without `bias` ours
    is zero.
    """
    _only("Conv2d", groups=(groups, 1), dilation=(_side("dilation", dilation), 1))
    _only("Conv2d", stride=(_side("stride", stride), 1), padding_mode=(padding_mode, "zeros"))
    side = _side("kernel_size", kernel_size)
    if out_channels_conv != in_channels * upscale_factor**2:
        raise ValueError(
            f"out_channels_conv must be in_channels * upscale_factor**2 = "
            f"{in_channels * upscale_factor**2}, got {out_channels_conv}"
        )
    if padding != "same" and _side("padding", padding) != side // 2:
        raise ValueError(
            f"padding must be kernel_size // 2 = {side // 2}, got {padding} (the default is 0)"
        )
    up = unfilled(
        PixelShuffle,
        in_channels,
        scale=upscale_factor,
        kernel_size=side,
        dtype=dtype,
        param_dtype=param_dtype,
    )
    s = StateDict(state, "Sequential(Conv2d, PixelShuffle)")
    return _convolution(s, up, "0.", "OIHW", bias)


def _convolution(s: StateDict, up: Any, prefix: str, layout: str, bias: bool) -> Any:
    s.set(up.kernel, f"{prefix}weight", layout=layout)
    if bias:
        s.set(up.bias, f"{prefix}bias")
    else:
        store(up.bias, np.zeros(up.bias.shape, np.float32))
    s.done()
    return up


def _side(name: str, value: Any) -> Any:
    """A number, or the one of a pair of equal ones."""
    if isinstance(value, list | tuple):
        if len(set(value)) != 1:
            raise ValueError(f"{name} must be the same for rows and columns, got {value}")
        return value[0]
    return value


def _only(owner: str, **arguments: tuple[Any, Any]) -> None:
    """Refuses what our layers do not have."""
    for name, (value, only) in arguments.items():
        if value != only:
            raise ValueError(f"{owner} is read with {name}={only!r} only, got {value!r}")
