"""Bilinear sampling at pixel positions: the core of `grid_sample` and `deformable_sample`."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from resfu_jax.ops.sizes import Size

# G contiguous groups of channels, each with P positions of its own for every output pixel.
Maps = Float[Array, "b h w g d"]
Positions = Float[Array, "b H W g p"]
Samples = Float[Array, "b H W g p d"]
Index = Int[Array, "b H W g p 3"]  # row, column, group


def position_dtype(x: Array, positions: Array) -> DTypeLike:
    """Type of positions and weights: float32 or better."""
    return np.promote_types(np.promote_types(x.dtype, np.float32), positions.dtype)


def clamp(u: Float[Array, "..."], n: Size) -> Float[Array, "..."]:
    """Positions within the pixel centres 0 .. n - 1; no gradient to a clamped one."""
    last = jnp.asarray(n, u.dtype) - 1
    return jnp.where((u > 0) & (u < last), u, jax.lax.stop_gradient(jnp.clip(u, 0, last)))


def sample(x: Maps, rows: Positions, columns: Positions, *, inside: bool) -> Samples:
    """Every group of channels at P positions for each of H x W pixels.

    Positions are in pixels of x. Corners outside count as zero; `inside` says that all positions
    lie within the pixel centres. The result has the dtype of the positions.
    """
    border = zero_border(x, inside)
    index, weights = corners(x.shape[1:3], rows, columns, border)
    return weighted_sum(weights, gather(pad(x, border), index, weights.dtype))


def sample_at(x: Array, points: Array, padding_mode: str) -> Float[Array, "b H W g p d"]:
    """Samples at points (B, H, W, G, P, 2), in the dtype of x."""
    maps = by_group(x, points.shape[3])
    at = positions(x, points, padding_mode)
    return sample(maps, *at, inside=padding_mode == "border").astype(x.dtype)


def by_group(x: Float[Array, "b h w c"], groups: int) -> Maps:
    """Groups of channels apart."""
    return x.reshape(*x.shape[:3], groups, x.shape[3] // groups)


def positions(x: Array, points: Array, padding_mode: str) -> tuple[Array, Array]:
    """Rows and columns."""
    points = points.astype(position_dtype(x, points))
    rows, columns = points[..., 0], points[..., 1]
    if padding_mode == "border":
        rows = clamp(rows, x.shape[1])
        columns = clamp(columns, x.shape[2])
    return rows, columns


def zero_border(x: Maps, inside: bool) -> int:
    """Zeros to `pad` a map with, so that it answers every position.

    First corners stop at -2 and n, where all four corners are zero. Inside, the second corner of
    the last pixel has no weight, and the one before it serves as well.
    """
    several = all(isinstance(n, int) and n > 1 for n in x.shape[1:3])
    return 0 if inside and several else 2


def corners(
    size: tuple[Size, Size], rows: Positions, columns: Positions, border: int
) -> tuple[Index, Float[Array, "b H W g p 4"]]:
    """First of the four corners around every position, as an index into the padded map; weights."""
    row, down = _corner(rows, size[0], border)
    column, right = _corner(columns, size[1], border)
    weights = [(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right]
    group = jax.lax.broadcasted_iota(row.dtype, row.shape, 3)
    return jnp.stack([row, column, group], axis=-1), jnp.stack(weights, axis=-1)


def pad(x: Maps, border: int) -> Float[Array, "b hp wp g d"]:
    """With a border of zeros, to gather from."""
    return jnp.pad(x, ((0, 0), (border, border), (border, border), (0, 0), (0, 0)))


def unpad(padded: Float[Array, "b hp wp g d"], border: int) -> Maps:
    """Inverse of `pad`."""
    h, w = (n - border for n in padded.shape[1:3])
    return padded[:, border:h, border:w]


# Corners are gathered and scattered as one 2 x 2 window: a quarter of the slices to look up. The
# group is one more index: to bring each group into a map of its own takes as long as all the rest.


def gather(padded: Maps, index: Index, dtype: DTypeLike) -> Float[Array, "b H W g p 4 d"]:
    """The four corners, in `dtype`."""
    d = padded.shape[4]
    axes = jax.lax.GatherDimensionNumbers(
        offset_dims=(4, 5, 6), collapsed_slice_dims=(2,), start_index_map=(0, 1, 2)
    )

    def windows(x, index):
        return jax.lax.gather(x, index, axes, (2, 2, 1, d), mode="clip")

    values = jax.vmap(windows)(padded, index).astype(dtype)
    return values.reshape(*index.shape[:5], 4, d)


def scatter_add(padded: Maps, index: Index, values: Float[Array, "b H W g p 4 d"]) -> Maps:
    """Add values to the four corners."""
    axes = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(4, 5, 6),
        inserted_window_dims=(2,),
        scatter_dims_to_operand_dims=(0, 1, 2),
    )

    def windows(x, index, values):
        return jax.lax.scatter_add(x, index, values, axes, mode="clip")

    values = values.reshape(*index.shape[:5], 2, 2, values.shape[6])
    return jax.vmap(windows)(padded, index, values)


@jax.custom_jvp
def weighted_sum(
    weights: Float[Array, "b H W g p 4"], values: Float[Array, "b H W g p 4 d"]
) -> Samples:
    """Sum over the corners. Written out, it fuses with the gather."""
    return sum(weights[..., k, None] * values[..., k, :] for k in range(4))


@weighted_sum.defjvp
def _(primals, tangents):
    # As matrix products, for their transposes. To the weights, a product is several times faster on
    # a CPU than fused reductions; to the values, slices would each become a padded map.
    (weights, values), (d_weights, d_values) = primals, tangents
    return weighted_sum(weights, values), sum(
        jnp.einsum("...k,...kd->...d", w, v, precision=jax.lax.Precision.HIGHEST)
        for w, v in ((d_weights, values), (weights, d_values))
    )


def _corner(u: Array, n: Size, border: int):
    """Index, in the padded axis, of the pixel at or before position `u`, and the distance to it."""
    lower, last = jnp.floor(u), jnp.asarray(n, u.dtype) - 1
    if border == 0:
        lower = jnp.minimum(lower, last - 1)
    index = jnp.clip(lower, -border, last - 1 + border).astype(jnp.int32)
    return index + border, u - lower
