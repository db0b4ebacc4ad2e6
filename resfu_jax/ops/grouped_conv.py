"""Grouped convolutions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops.checks import takes_maps


@takes_maps("x", others=("kernel",))
def grouped_conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c_group o"],
    *,
    groups: int,
    dilation: int = 1,
) -> Float[Array, "b h2 w2 o"]:
    """Grouped, dilated convolution without padding, stride 1.

    Output channels [i o/groups, (i+1) o/groups) see input channels [i c/groups, (i+1) c/groups).

    Args:
      x: features; pad them as the layer at hand asks.
      kernel: weights, HWIO, with I = c / groups.
      groups: number of groups.
      dilation: distance of the taps, pixels.

    Raises:
      ValueError: channels that the groups do not divide, or a kernel that does not fit x.
    """
    c, o = x.shape[-1], kernel.shape[-1]
    if groups < 1 or c % groups or o % groups or kernel.shape[2] * groups != c:
        raise ValueError(
            f"groups={groups} must divide the channels of x ({c}) and of the output ({o}), and the "
            f"kernel must be (kh, kw, {c}/groups, {o}); got kernel {kernel.shape}"
        )
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1, got {dilation}")
    _check_dtype(x, kernel)
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1),
        padding="VALID",
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@takes_maps(others=("x", "kernel"))
def grouped_linear(
    x: Float[Array, "*b c"], kernel: Float[Array, "c_group o"], *, groups: int
) -> Float[Array, "*b o"]:
    """Grouped 1x1 convolution, as one product with the block-diagonal matrix.

    Raises:
      ValueError: channels that the groups do not divide, or a kernel that does not fit x.
    """
    c, o = x.shape[-1], kernel.shape[-1]
    if groups < 1 or o % groups or kernel.shape != (c // groups, o) or c % groups:
        raise ValueError(
            f"groups={groups} must divide the channels of x ({c}) and of the output ({o}), and the "
            f"kernel must be ({c}/groups, {o}); got kernel {kernel.shape}"
        )
    _check_dtype(x, kernel)
    return x @ block_diagonal(kernel, groups)


def _check_dtype(x: Array, kernel: Array) -> None:
    if kernel.dtype != x.dtype:
        raise ValueError(f"kernel must have x's dtype {x.dtype}, got {kernel.dtype}; cast it")


def block_diagonal(kernel: Float[Array, "i o"], groups: int) -> Float[Array, "c o"]:
    """Grouped weights (c / groups, o) as a dense (c, o) matrix, zero between the groups."""
    i, o = kernel.shape
    blocks = kernel.reshape(1, i, groups, o // groups)
    eye = jnp.eye(groups, dtype=kernel.dtype)[:, None, :, None]
    return (blocks * eye).reshape(groups * i, o)
