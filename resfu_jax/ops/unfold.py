"""Sliding windows."""

from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from resfu_jax.ops.checks import takes_maps
from resfu_jax.ops.pad import pad

PadMode = Literal["constant", "edge", "reflect"]


@takes_maps("x", real=False)
def unfold(
    x: Shaped[Array, "b h w c"],
    kernel_size: int,
    *,
    dilation: int = 1,
    padding: int = 0,
    pad_mode: PadMode = "constant",
) -> Shaped[Array, "b H W k c"]:
    """Windows of K x K pixels around every pixel, stride 1.

    `torch.nn.functional.unfold` lists the same values with the channel as the slower index,
    c K^2 + tap.

    Args:
      x: feature maps.
      kernel_size: K.
      dilation: distance between neighbouring taps.
      padding: pixels added at every border first; `dilation * (K - 1) // 2` keeps the size for
        odd K.
      pad_mode: how the border is made, as in `jnp.pad`; `"constant"` is zero.

    Returns:
      `(B, h + 2 padding - dilation (K - 1), w + ..., K^2, C)`, taps row by row.

    Raises:
      ValueError: an argument out of range, or a window that does not fit.
    """
    if x.ndim != 4:
        raise ValueError(f"x must be (batch, height, width, channels), got shape {x.shape}")
    if kernel_size < 1 or dilation < 1 or padding < 0:
        raise ValueError(
            "kernel_size and dilation must be at least 1 and padding at least 0, got "
            f"kernel_size={kernel_size}, dilation={dilation}, padding={padding}"
        )
    if pad_mode not in get_args(PadMode):
        raise ValueError(f"pad_mode must be one of {get_args(PadMode)}, got {pad_mode!r}")
    h, w = x.shape[1:3]
    reach = dilation * (kernel_size - 1)
    for name, n in (("height", h), ("width", w)):
        if not isinstance(n, int):
            continue
        if n + 2 * padding <= reach:
            raise ValueError(
                f"a window of {reach + 1} pixels does not fit into {name} {n} padded by {padding}"
            )
        if pad_mode == "reflect" and padding >= n:
            raise ValueError(
                f"pad_mode='reflect' needs padding < {name}, got padding={padding}, {name}={n}"
            )
    height, width = h + 2 * padding - reach, w + 2 * padding - reach
    if padding:
        x = pad(x, (padding, padding), pad_mode)
    offsets = range(0, reach + 1, dilation)
    taps = [x[:, i : i + height, j : j + width] for i in offsets for j in offsets]
    return jnp.stack(taps, axis=3)
