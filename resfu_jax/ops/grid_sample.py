"""Sampling feature maps at arbitrary positions."""

from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops._bilinear import clamp, position_dtype, sample
from resfu_jax.ops.checks import takes_maps
from resfu_jax.ops.sizes import Size

PaddingMode = Literal["zeros", "border", "reflection"]


@takes_maps("x", "grid")
def grid_sample(
    x: Float[Array, "b h w c"],
    grid: Float[Array, "b H W 2"],
    *,
    padding_mode: PaddingMode = "zeros",
    align_corners: bool = False,
) -> Float[Array, "b H W c"]:
    """Bilinear sampling at given positions, as `torch.nn.functional.grid_sample`.

    Along an axis of n pixels, the coordinate g in [-1, 1] is the pixel position
    u = ((g + 1) n - 1) / 2, or u = (g + 1) / 2 (n - 1) with `align_corners`. With i = floor(u) and
    t = u - i on both axes, the output is the sum over the four corners i, i + 1 of the value there
    times (1 - t) or t.

    Differentiable in `x` and `grid`. Positions and weights are computed in float32 or better; the
    result has the dtype of `x`.

    Args:
      x: feature maps.
      grid: positions, the column coordinate first.
      padding_mode: what lies outside. `"zeros"`: corners outside count as zero; `"border"`:
        positions are clamped to the pixel centres at the border, with no gradient to a clamped
        coordinate; `"reflection"`: positions are reflected at the border (at the border pixels'
        centres with `align_corners`, else at their outer edges), then clamped.
      align_corners: -1 and 1 are the centres of the corner pixels rather than their outer edges.

    Raises:
      ValueError: shapes that do not fit or an unknown padding mode.
    """
    if x.ndim != 4:
        raise ValueError(f"x must be (batch, height, width, channels), got shape {x.shape}")
    if grid.ndim != 4 or grid.shape[3] != 2 or grid.shape[0] != x.shape[0]:
        raise ValueError(
            f"grid must be (batch, H, W, 2) with the batch of x, {x.shape[0]}, got {grid.shape}"
        )
    if padding_mode not in get_args(PaddingMode):
        raise ValueError(
            f"padding_mode must be one of {get_args(PaddingMode)}, got {padding_mode!r}"
        )
    grid = grid.astype(position_dtype(x, grid))[..., None, None, :]
    columns = _pixel(grid[..., 0], x.shape[2], padding_mode, align_corners)
    rows = _pixel(grid[..., 1], x.shape[1], padding_mode, align_corners)
    samples = sample(x[..., None, :], rows, columns, inside=padding_mode != "zeros")
    return samples[..., 0, 0, :].astype(x.dtype)


def _pixel(g: Array, n: Size, padding_mode: PaddingMode, align_corners: bool) -> Array:
    """Position in pixels of coordinate `g`."""
    size = jnp.asarray(n, g.dtype)
    last = size - 1
    u = (g + 1) / 2 * last if align_corners else ((g + 1) * size - 1) / 2
    if padding_mode == "reflection":
        low, span = (0.0, last) if align_corners else (-0.5, size)
        distance = jnp.where(u < low, low - u, u - low)
        period = jnp.maximum(span, 1)  # a single pixel with align_corners; the clamp does the rest
        turns = jnp.floor(distance / period)
        rest = distance - turns * period
        u = jnp.where(turns % 2 == 0, rest, period - rest) + low
    return u if padding_mode == "zeros" else clamp(u, n)
