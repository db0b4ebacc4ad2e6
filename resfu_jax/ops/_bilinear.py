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
    index, weights = corners(x.shape[1:3], rows, columns)
    # The map is widened, not its samples: gathers of narrow types are slow on a CPU.
    return weighted_sum(weights, gather(pad(x.astype(weights.dtype)), index))


def corners(
    size: tuple[Size, Size], rows: Float[Array, "n m"], columns: Float[Array, "n m"]
) -> tuple[Int[Array, "n m 2"], Float[Array, "n m 4"]]:
    """First of the four corners around every position, as an index into `pad(x)`; their weights."""
    row, down = _corner(rows, size[0])
    column, right = _corner(columns, size[1])
    weights = [(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right]
    return jnp.stack([row + 2, column + 2], axis=-1), jnp.stack(weights, axis=-1)


def pad(x: Float[Array, "n h w c"]) -> Float[Array, "n h4 w4 c"]:
    """A map padded by two zeros answers every position.

    Indices stop at -2 and n, where all four corners are zero.
    """
    return jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))


def unpad(padded: Float[Array, "n h4 w4 c"]) -> Float[Array, "n h w c"]:
    """Inverse of `pad`."""
    return padded[:, 2:-2, 2:-2]


# Corners are gathered and scattered as one 2 x 2 window: a quarter of the slices to look up.


def gather(
    padded: Float[Array, "n h4 w4 c"], index: Int[Array, "n m 2"]
) -> Float[Array, "n m 4 c"]:
    """The four corners."""
    c = padded.shape[3]
    axes = jax.lax.GatherDimensionNumbers(
        offset_dims=(1, 2, 3), collapsed_slice_dims=(), start_index_map=(0, 1)
    )

    def windows(x, index):
        return jax.lax.gather(x, index, axes, (2, 2, c), mode="clip")

    return jax.vmap(windows)(padded, index).reshape(*index.shape[:2], 4, c)


def scatter_add(
    padded: Float[Array, "n h4 w4 c"], index: Int[Array, "n m 2"], values: Float[Array, "n m 4 c"]
) -> Float[Array, "n h4 w4 c"]:
    """Add values to the four corners."""
    axes = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3),
        inserted_window_dims=(),
        scatter_dims_to_operand_dims=(0, 1),
    )

    def windows(x, index, values):
        return jax.lax.scatter_add(x, index, values, axes, mode="clip")

    values = values.reshape(*index.shape[:2], 2, 2, values.shape[3])
    return jax.vmap(windows)(padded, index, values)


@jax.custom_jvp
def weighted_sum(
    weights: Float[Array, "n m 4"], values: Float[Array, "n m 4 c"]
) -> Float[Array, "n m c"]:
    """Sum over the corners. Written out, it fuses with the gather."""
    return sum(weights[..., k, None] * values[..., k, :] for k in range(4))


@weighted_sum.defjvp
def _(primals, tangents):
    # As matrix products, for their transposes. To the weights, a product is several times faster on
    # a CPU than fused reductions; to the values, slices would each become a padded map.
    (weights, values), (d_weights, d_values) = primals, tangents
    return weighted_sum(weights, values), sum(
        jnp.einsum("nmk,nmkc->nmc", w, v, precision=jax.lax.Precision.HIGHEST)
        for w, v in ((d_weights, values), (weights, d_values))
    )


def _corner(u: Array, n: Size):
    """Index, within -2 .. n, of the pixel at or before position `u`, and the distance to it."""
    lower = jnp.floor(u)
    index = jnp.clip(lower, -2, jnp.asarray(n, u.dtype)).astype(jnp.int32)
    return index, u - lower
