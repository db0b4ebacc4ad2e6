"""Sampling feature maps at arbitrary positions."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

PaddingMode = Literal["zeros", "border", "reflection"]


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
    dtype = np.promote_types(np.promote_types(x.dtype, np.float32), grid.dtype)
    b, h, w, c = x.shape
    grid = grid.astype(dtype)
    # A map padded by two zeros answers every position: beyond the pixels next to the border, the
    # index stops at the outer ring, where all four corners are zero.
    column, right = _corner(grid[..., 0], w, padding_mode, align_corners)
    row, down = _corner(grid[..., 1], h, padding_mode, align_corners)
    padded = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    # The four corners lie side by side, so that one gather (one scatter in the gradient) does.
    corners = [padded[:, i : i + h + 3, j : j + w + 3] for i in (0, 1) for j in (0, 1)]
    packed = jnp.concatenate(corners, axis=-1).reshape(b, (h + 3) * (w + 3), 4 * c)
    index = (row + 2) * jnp.asarray(w + 3, jnp.int32) + column + 2
    sampled = jax.vmap(lambda p, i: jnp.take(p, i, axis=0, mode="clip"))(packed, index)
    right, down = right[..., None], down[..., None]
    weights = [(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right]
    values = jnp.split(sampled.astype(dtype), 4, axis=-1)
    return sum(weight * v for weight, v in zip(weights, values, strict=True)).astype(x.dtype)


def _corner(g, n: int, padding_mode: PaddingMode, align_corners: bool):
    """Index of the pixel at or before coordinate `g`, in -2 .. n, and the distance to it."""
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
    if padding_mode != "zeros":
        u = jnp.where((u > 0) & (u < last), u, jax.lax.stop_gradient(jnp.clip(u, 0, last)))
    lower = jnp.floor(u)
    index = jnp.clip(lower, -2, size).astype(jnp.int32)
    return index, u - lower
