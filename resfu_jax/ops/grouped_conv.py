"""Grouped convolutions whose weight gradient avoids XLA's slow path on a CPU."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops._checks import takes_maps
from resfu_jax.ops._dtypes import at_least_float32

Implementation = Literal["reference", "dense_gradient"]


@takes_maps("x", others=("kernel",))
def grouped_conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c_group o"],
    *,
    groups: int,
    dilation: int = 1,
    implementation: Implementation | None = None,
) -> Float[Array, "b h2 w2 o"]:
    """Grouped, dilated convolution without padding, stride 1.

    Output channels [i o/groups, (i+1) o/groups) see input channels [i c/groups, (i+1) c/groups).

    Args:
      x: features; pad them as the layer at hand asks.
      kernel: weights, HWIO, with I = c / groups.
      groups: number of groups.
      dilation: distance of the taps, pixels.
      implementation: `"reference"` is XLA's convolution and its gradients; `"dense_gradient"`
        computes the gradient to the kernel as one matrix product a tap over all groups, of which
        the diagonal blocks are kept: XLA's own is 20 times slower on a CPU. `None` chooses.

    Raises:
      ValueError: channels that the groups do not divide, or a kernel that does not fit x.
    """
    c, o = x.shape[-1], kernel.shape[-1]
    if groups < 1 or c % groups or o % groups or kernel.shape[2] * groups != c:
        raise ValueError(
            f"groups={groups} must divide the channels of x ({c}) and of the output ({o}), and the "
            f"kernel must be (kh, kw, {c}/groups, {o}); got kernel {kernel.shape}"
        )
    _check_dtype(x, kernel)
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1, got {dilation}")
    if implementation is None:
        implementation = "dense_gradient" if jax.default_backend() == "cpu" else "reference"
    if implementation not in ("reference", "dense_gradient"):
        raise ValueError(
            f"implementation must be 'reference', 'dense_gradient' or None, got {implementation!r}"
        )
    f = _conv if implementation == "reference" else _dense_gradient
    return f(x, kernel, groups, dilation)


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


def _conv(x, kernel, groups, dilation):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1),
        padding="VALID",
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dense_gradient(x, kernel, groups, dilation):
    return _conv(x, kernel, groups, dilation)


def _dense_gradient_fwd(x, kernel, groups, dilation):
    return _conv(x, kernel, groups, dilation), (x, kernel)


def _dense_gradient_bwd(groups, dilation, residuals, g):
    x, kernel = residuals
    (d_x,) = jax.vjp(lambda a: _conv(a, kernel, groups, dilation), x)[1](g)
    kh, kw, i, o = kernel.shape
    h, w = g.shape[1:3]
    taps = []
    for t in range(kh):
        for s in range(kw):
            top, left = t * dilation, s * dilation
            shifted = x[:, top : top + h, left : left + w]
            # (c, o) over all pixels; of its groups x groups blocks only the diagonal is wanted.
            full = jnp.einsum(
                "bhwc,bhwo->co",
                shifted,
                g,
                preferred_element_type=at_least_float32(g.dtype),
            )
            blocks = full.reshape(groups, i, groups, o // groups)
            taps.append(jnp.diagonal(blocks, axis1=0, axis2=2))  # i, o / groups, groups
    d_kernel = jnp.stack(taps).swapaxes(-1, -2).reshape(kh, kw, i, o)
    return d_x, d_kernel.astype(kernel.dtype)


_dense_gradient.defvjp(_dense_gradient_fwd, _dense_gradient_bwd)
