"""Pixel shuffle: channels to space and back, in PyTorch's channel order.

Shi et al., "Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel
Convolutional Neural Network", CVPR 2016.
"""

from jaxtyping import Array, Shaped

from resfu_jax.ops.checks import takes_maps


@takes_maps("x", real=False)
def pixel_shuffle(x: Shaped[Array, "b h w d"], factor: int) -> Shaped[Array, "b H W c"]:
    """Rearrange `(B, h, w, C r^2)` into `(B, h r, w r, C)`, r = `factor`.

    Input channel `c r^2 + dy r + dx` becomes channel c of the pixel (dy, dx) of each r x r block.

    Raises:
      ValueError: the channels are not a multiple of `factor**2`.
    """
    b, h, w, channels = _check(x, factor)
    if channels % factor**2:
        raise ValueError(
            f"x must have a multiple of factor**2 = {factor**2} channels, got {channels}"
        )
    y = x.reshape(b, h, w, channels // factor**2, factor, factor)
    return y.transpose(0, 1, 4, 2, 5, 3).reshape(b, h * factor, w * factor, -1)


@takes_maps("x", real=False)
def pixel_unshuffle(x: Shaped[Array, "b H W c"], factor: int) -> Shaped[Array, "b h w d"]:
    """The inverse of `pixel_shuffle`: `(B, h r, w r, C)` into `(B, h, w, C r^2)`.

    Raises:
      ValueError: height or width is not a multiple of `factor`.
    """
    b, height, width, channels = _check(x, factor)
    if height % factor or width % factor:
        raise ValueError(
            f"x must have height and width divisible by factor={factor}, got {height}x{width}"
        )
    h, w = height // factor, width // factor
    y = x.reshape(b, h, factor, w, factor, channels)
    return y.transpose(0, 1, 3, 5, 2, 4).reshape(b, h, w, channels * factor**2)


def _check(x, factor: int):
    if x.ndim != 4:
        raise ValueError(f"x must be (batch, height, width, channels), got shape {x.shape}")
    if factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor}")
    return x.shape
