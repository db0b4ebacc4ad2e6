"""Sampling feature maps at arbitrary positions."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from resfu_jax.ops._interp import Size

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
    column, right = _corner(grid[..., 0], w, padding_mode, align_corners)
    row, down = _corner(grid[..., 1], h, padding_mode, align_corners)
    # A map padded by two zeros answers every position: indices stop at -2 and n, where all four
    # corners are zero.
    padded = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0))).reshape(b, (h + 4) * (w + 4), c)
    width = jnp.asarray(w + 4, jnp.int32)
    first = (row + 2) * width + column + 2
    index = jnp.stack([first, first + 1, first + width, first + width + 1], axis=-1)
    corners = jax.vmap(lambda p, i: jnp.take(p, i, axis=0, mode="clip"))(padded, index)
    weights = jnp.stack(
        [(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right], axis=-1
    )
    return _weighted_sum(weights, corners.astype(dtype)).astype(x.dtype)


@jax.custom_jvp
def _weighted_sum(
    weights: Float[Array, "b H W 4"], values: Float[Array, "b H W 4 c"]
) -> Float[Array, "b H W c"]:
    """Sum over the corners. Written out, it fuses with the gather."""
    return sum(weights[..., k, None] * values[..., k, :] for k in range(4))


@_weighted_sum.defjvp
def _(primals, tangents):
    # The gradient to the weights sums over channels. As the transpose of a matrix product it is
    # several times faster on CPU than as the fused reductions that the sum above would give.
    weights, values = primals
    d_weights, d_values = tangents
    by_weights = jnp.einsum(
        "bhwk,bhwkc->bhwc", d_weights, values, precision=jax.lax.Precision.HIGHEST
    )
    return _weighted_sum(weights, values), by_weights + _weighted_sum(weights, d_values)


def _corner(g, n: Size, padding_mode: PaddingMode, align_corners: bool):
    """Index, within -2 .. n, of the pixel at or before coordinate `g`, and the distance to it."""
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
