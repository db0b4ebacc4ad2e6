"""PyTorch's own upsampling layers."""

from collections.abc import Mapping
from typing import Any

from resfu_jax.convert._state import StateDict, unfilled
from resfu_jax.upsamplers.classic import Deconvolution, PixelShuffle


def conv_transpose(
    state: Mapping[str, Any],
    *,
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int,
    padding: int = 0,
    output_padding: int = 0,
) -> Deconvolution:
    """`torch.nn.ConvTranspose2d` whose output is exactly `stride` times the input."""
    up = unfilled(
        Deconvolution,
        in_channels,
        scale=stride,
        out_features=out_channels,
        kernel_size=kernel_size,
        padding=padding,
        output_padding=output_padding,
    )
    s = StateDict(state, "ConvTranspose2d")
    s.set(up.kernel, "weight", layout="IOHW")
    s.set(up.bias, "bias")
    s.done()
    return up


def conv_pixel_shuffle(
    state: Mapping[str, Any],
    *,
    in_channels: int,
    out_channels_conv: int,
    upscale_factor: int,
    kernel_size: int = 3,
    padding: int = 1,
) -> PixelShuffle:
    """`torch.nn.Sequential(Conv2d, PixelShuffle)` that keeps the number of channels."""
    if out_channels_conv != in_channels * upscale_factor**2:
        raise ValueError(
            f"out_channels_conv must be in_channels * upscale_factor**2 = "
            f"{in_channels * upscale_factor**2}, got {out_channels_conv}"
        )
    if padding != kernel_size // 2:
        raise ValueError(f"padding must be kernel_size // 2 = {kernel_size // 2}, got {padding}")
    up = unfilled(PixelShuffle, in_channels, scale=upscale_factor, kernel_size=kernel_size)
    s = StateDict(state, "Sequential(Conv2d, PixelShuffle)")
    s.set_layer(up, "0", layout="OIHW")
    s.done()
    return up
