"""Sampling every output pixel at points of its own, group by group."""

from typing import Literal, get_args

from jaxtyping import Array, Float

from resfu_jax.ops import _bilinear
from resfu_jax.ops._cpu import points as cpu
from resfu_jax.ops._forms import Forms, Implementation
from resfu_jax.ops._xla import points as xla
from resfu_jax.ops.checks import takes_maps

PaddingMode = Literal["zeros", "border"]


@takes_maps("x", "points")
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
      implementation: `"reference"` gathers the corners of all samples at once; `"xla"` multiplies
        the whole map by hat functions, as TPUs are slow to gather and scatter; `"cpu"` gathers in
        blocks of rows. `None` takes the best of the platform, on a GPU `"reference"`.

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
    if x.shape[3] % points.shape[3]:
        raise ValueError(
            f"the groups of points, {points.shape[3]}, must divide the {x.shape[3]} channels of x"
        )
    return _FORMS(implementation, x, points, padding_mode=padding_mode)


def _reference(x: Array, points: Array, *, padding_mode: PaddingMode) -> Array:
    return _bilinear.sample_at(x, points, padding_mode)


_FORMS = Forms(
    "deformable_sample",
    _reference,
    xla=xla.sample,
    cpu=cpu.sample,
    preferred={"gpu": ("reference",)},  # gathers are fast there
)
