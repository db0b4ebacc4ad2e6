"""Convolutions with reflected borders, and the norm and activation before them."""

import jax
from jaxtyping import Array, Float

from resfu_jax.ops._cpu import norm as cpu
from resfu_jax.ops._forms import Forms, Implementation
from resfu_jax.ops.checks import takes_maps
from resfu_jax.ops.conv import conv
from resfu_jax.ops.group_norm import group_norm
from resfu_jax.ops.pad import pad


@takes_maps("x", others=("kernel", "bias", "scale", "norm_bias"))
def reflect_conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c d"],
    bias: Float[Array, " d"] | None = None,
    *,
    dilation: int = 1,
    scale: Float[Array, " c"] | None = None,
    norm_bias: Float[Array, " c"] | None = None,
    groups: int = 1,
    eps: float = 1e-5,
    implementation: Implementation | None = None,
) -> Float[Array, "b h w d"]:
    """`conv(x) + bias` of x's size, or `conv(silu(group_norm(x))) + bias`; borders are reflected.

    Args:
      x: features.
      kernel: HWIO; its taps, D apart, span D (n - 1) + 1 pixels, an odd number.
      bias: none if not given.
      dilation: D.
      scale: of the norm; without it, there is no norm and no SiLU.
      norm_bias: of the norm, given with `scale`.
      groups: of the norm.
      eps: of the norm.
      implementation: `"reference"` is one after the other; `"cpu"` makes all in blocks of rows, so
        that nothing but the result is ever whole. `None` takes the best of the platform.

    Returns:
      In the dtype of x; statistics are in float32 or better.

    Raises:
      ValueError: a kernel that does not fit x, a span that is even, a map too small to be reflected
        that far, half a norm, or an unknown form.
    """
    if kernel.ndim != 4 or kernel.shape[2:3] != x.shape[3:]:
        raise ValueError(
            "kernel must be (kh, kw, channels, outputs) for x (batch, height, width, channels) "
            f"with the same channels, got kernel {kernel.shape} and x {x.shape}"
        )
    if any(dilation * (n - 1) % 2 for n in kernel.shape[:2]):
        raise ValueError(
            "kernel must span an odd number of pixels along both axes, got "
            f"{kernel.shape[:2]} with dilation={dilation}"
        )
    if (scale is None) != (norm_bias is None):
        raise ValueError("norm_bias must be given with scale, and not without")
    for n, size in zip(kernel.shape, x.shape[1:3], strict=False):
        if isinstance(size, int) and dilation * (n - 1) // 2 >= size:
            raise ValueError(
                f"x must have more than {dilation * (n - 1) // 2} pixels along an axis to be "
                f"reflected as far as the kernel reaches, got {x.shape[1:3]}"
            )
    arrays = x, kernel, bias, scale, norm_bias
    return _FORMS(implementation, *arrays, dilation=dilation, groups=groups, eps=eps)


def _reference(
    x: Array,
    kernel: Array,
    bias: Array | None,
    scale: Array | None,
    norm_bias: Array | None,
    *,
    dilation: int,
    groups: int,
    eps: float,
) -> Array:
    if scale is not None and norm_bias is not None:
        x = jax.nn.silu(group_norm(x, scale, norm_bias, groups=groups, eps=eps))
    rows, columns = (dilation * (n - 1) // 2 for n in kernel.shape[:2])
    x = pad(x, (rows, columns), "reflect") if rows or columns else x
    y = conv(x, kernel.astype(x.dtype), dilation=dilation)
    return y if bias is None else y + bias.astype(y.dtype)[None, None, None]


_FORMS = Forms("reflect_conv", _reference, cpu=cpu.reflect_conv)
