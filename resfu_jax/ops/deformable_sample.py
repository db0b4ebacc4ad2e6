"""Sampling every output pixel at points of its own, group by group."""

from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops._bilinear import clamp, position_dtype, sample
from resfu_jax.ops._row_blocks import Rows, block_rows, map_row_blocks

PaddingMode = Literal["zeros", "border"]
Implementation = Literal["reference", "blocks"]


def deformable_sample(
    x: Float[Array, "b h w c"],
    points: Float[Array, "b H W g p 2"],
    *,
    padding_mode: PaddingMode = "zeros",
    implementation: Implementation | None = None,
) -> Float[Array, "b H W g p d"]:
    """Bilinear samples of x at P points per output pixel and group of channels.

    With i = floor(u) and t = u - i on both axes, a sample is the sum over the four corners i, i + 1
    of the value there times (1 - t) or t. Differentiable in `x` and `points`; positions and weights
    are computed in float32 or better.

    Source: Dai et al., "Deformable Convolutional Networks", ICCV 2017, equation 4.

    Args:
      x: feature maps; the G groups are contiguous blocks of C / G channels.
      points: (row, column) in pixels of x, whole numbers at pixel centres, any value.
      padding_mode: `"zeros"`: corners outside count as zero; `"border"`: points are clamped to the
        pixel centres at the border, with no gradient to a clamped coordinate.
      implementation: `"reference"` samples the whole map at once, which takes four times the
        memory of the result; `"blocks"` goes through blocks of rows. `None` takes `"blocks"`.

    Returns:
      `(B, H, W, G, P, C / G)`, in the dtype of x.

    Raises:
      ValueError: shapes that do not fit, or an unknown padding mode.
    """
    if x.ndim != 4:
        raise ValueError(f"x must be (batch, height, width, channels), got shape {x.shape}")
    if points.ndim != 6 or points.shape[5] != 2 or points.shape[0] != x.shape[0]:
        raise ValueError(
            f"points must be (batch, H, W, groups, points, 2) with the batch of x, {x.shape[0]}, "
            f"got {points.shape}"
        )
    if padding_mode not in get_args(PaddingMode):
        raise ValueError(
            f"padding_mode must be one of {get_args(PaddingMode)}, got {padding_mode!r}"
        )
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(
            f"implementation must be one of {get_args(Implementation)} or None, "
            f"got {implementation!r}"
        )
    if x.shape[3] % points.shape[3]:
        raise ValueError(
            f"the groups of points, {points.shape[3]}, must divide the {x.shape[3]} channels of x"
        )
    if implementation == "reference":
        return _sample(x, points, padding_mode)

    def f(x, blocks):
        return (_sample(x, blocks[0], padding_mode),)

    b, hh, ww, groups, p, _ = points.shape
    rows = block_rows(hh, 2 * b * ww * groups * p)  # narrow blocks: four corners a sample
    block = Rows(1, rows, rows)
    (out,) = map_row_blocks(f, hh // rows, (block,), (block,), x, (points,))
    return out


def _sample(x: Array, points: Array, padding_mode: PaddingMode) -> Array:
    b, h, w, c = x.shape
    _, hh, ww, g, p, _ = points.shape
    # Groups become images of their own.
    maps = x.reshape(b, h, w, g, c // g).transpose(0, 3, 1, 2, 4).reshape(b * g, h, w, c // g)
    points = points.astype(position_dtype(x, points)).transpose(0, 3, 1, 2, 4, 5)
    points = points.reshape(b * g, hh * ww * p, 2)
    rows, columns = points[..., 0], points[..., 1]
    if padding_mode == "border":
        rows, columns = clamp(rows, h), clamp(columns, w)
    out = sample(maps, rows, columns).reshape(b, g, hh, ww, p, c // g)
    return jnp.moveaxis(out, 1, 3).astype(x.dtype)
