"""Depthwise convolution: every channel is filtered by its own small kernel."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops._cpu.depthwise_conv import depthwise_conv as cpu
from resfu_jax.ops._forms import Forms, Implementation
from resfu_jax.ops.checks import takes_maps


@takes_maps("x", others=("kernel",))
def depthwise_conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "b h w c"]:
    """Convolve every channel with its own kernel; zero padding, stride 1, output of x's size.

    With r = (kh - 1) / 2 and s = (kw - 1) / 2 (both whole, so that the output has x's size),

        out[i, j, c] = sum_uv kernel[u, v, c] x[i + u - r, j + v - s, c]

    Args:
      x: feature maps.
      kernel: one kernel per channel, of the dtype of `x`, with odd sides.
      implementation: `"reference"` is XLA's grouped convolution, `"cpu"` sums kh * kw shifted
        products. `None` takes the best of the platform.

    Raises:
      ValueError: a kernel that does not fit `x`, or an unknown implementation.
    """
    if kernel.ndim != 3 or x.ndim != 4 or kernel.shape[2] != x.shape[3]:
        raise ValueError(
            f"kernel must be (kh, kw, channels) for x (batch, height, width, channels) with the "
            f"same channels, got kernel {kernel.shape} and x {x.shape}"
        )
    if kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
        raise ValueError(f"kernel must have odd sides to keep the size of x, got {kernel.shape}")
    if kernel.dtype != x.dtype:
        raise ValueError(f"kernel must have x's dtype {x.dtype}, got {kernel.dtype}; cast it")
    return _FORMS(implementation, x, kernel)


def _reference(x: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        jnp.expand_dims(kernel, 2),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[3],
    )


_FORMS = Forms("depthwise_conv", _reference, cpu=cpu)
