"""Bilinear sampling at pixel positions: the core of `grid_sample` and `deformable_sample`."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from resfu_jax.ops._interp import Size


def position_dtype(x: Array, positions: Array) -> DTypeLike:
    """Type of positions and weights: float32 or better."""
    return np.promote_types(np.promote_types(x.dtype, np.float32), positions.dtype)


def clamp(u: Float[Array, "..."], n: Size) -> Float[Array, "..."]:
    """Positions within the pixel centres 0 .. n - 1; no gradient to a clamped one."""
    last = jnp.asarray(n, u.dtype) - 1
    return jnp.where((u > 0) & (u < last), u, jax.lax.stop_gradient(jnp.clip(u, 0, last)))


def sample(
    x: Float[Array, "n h w c"], rows: Float[Array, "n m"], columns: Float[Array, "n m"]
) -> Float[Array, "n m c"]:
    """Maps at m positions each, in pixels; corners outside count as zero.

    The result has the dtype of the positions.
    """
    n, h, w, c = x.shape
    row, down = _corner(rows, h)
    column, right = _corner(columns, w)
    # A map padded by two zeros answers every position: indices stop at -2 and n, where all four
    # corners are zero. Corners are gathered, and their gradients scattered, as one 2 x 2 window.
    padded = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    index = jnp.stack([row + 2, column + 2], axis=-1)
    corners = jax.vmap(_windows)(padded, index).reshape(n, -1, 4, c)
    weights = jnp.stack(
        [(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right], axis=-1
    )
    return _weighted_sum(weights, corners.astype(weights.dtype))


def _windows(x: Float[Array, "h w c"], index: Int[Array, "m 2"]) -> Float[Array, "m 2 2 c"]:
    axes = jax.lax.GatherDimensionNumbers(
        offset_dims=(1, 2, 3), collapsed_slice_dims=(), start_index_map=(0, 1)
    )
    return jax.lax.gather(x, index, axes, (2, 2, x.shape[2]), mode="clip")


@jax.custom_jvp
def _weighted_sum(
    weights: Float[Array, "n m 4"], values: Float[Array, "n m 4 c"]
) -> Float[Array, "n m c"]:
    """Sum over the corners. Written out, it fuses with the gather."""
    return sum(weights[..., k, None] * values[..., k, :] for k in range(4))


@_weighted_sum.defjvp
def _(primals, tangents):
    # The gradient to the weights sums over channels. As the transpose of a matrix product it is
    # several times faster on CPU than as the fused reductions that the sum above would give.
    weights, values = primals
    d_weights, d_values = tangents
    by_weights = jnp.einsum("nmk,nmkc->nmc", d_weights, values, precision=jax.lax.Precision.HIGHEST)
    return _weighted_sum(weights, values), by_weights + _weighted_sum(weights, d_values)


def _corner(u: Array, n: Size):
    """Index, within -2 .. n, of the pixel at or before position `u`, and the distance to it."""
    lower = jnp.floor(u)
    index = jnp.clip(lower, -2, jnp.asarray(n, u.dtype)).astype(jnp.int32)
    return index, u - lower
