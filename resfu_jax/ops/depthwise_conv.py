"""Depthwise convolution: every channel is filtered by its own small kernel."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops._checks import takes_maps
from resfu_jax.ops._dtypes import at_least_float32

Implementation = Literal["reference", "shifts"]


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
      implementation: `"reference"` is XLA's grouped convolution. `"shifts"` sums kh * kw shifted
        products, forward and backward: on a CPU several times faster than the grouped
        convolution, whose gradients XLA does not compile well. `None` takes `"shifts"` on a CPU and
        the convolution elsewhere.

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
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(
            f"implementation must be one of {get_args(Implementation)} or None, "
            f"got {implementation!r}"
        )
    if implementation is None:
        implementation = "shifts" if jax.default_backend() == "cpu" else "reference"
    if implementation == "shifts":
        return _shifts(x, kernel)
    return jax.lax.conv_general_dilated(
        x,
        jnp.expand_dims(kernel, 2),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[3],
    )


def _pad(x: Array, kernel: Array) -> Array:
    r, s = kernel.shape[0] // 2, kernel.shape[1] // 2
    return jnp.pad(x, ((0, 0), (r, r), (s, s), (0, 0)))


@jax.custom_vjp
def _shifts(x: Array, kernel: Array) -> Array:
    kh, kw, _ = kernel.shape
    _, h, w, _ = x.shape
    padded = _pad(x, kernel)
    taps = jnp.expand_dims(kernel, (2, 3, 4))
    return sum(padded[:, u : u + h, v : v + w] * taps[u, v] for u in range(kh) for v in range(kw))


def _shifts_fwd(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _shifts(x, kernel), (x, kernel)


def _shifts_bwd(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    kw = kernel.shape[1]
    padded = _pad(x, kernel)
    wide = at_least_float32(x.dtype)

    # One tap after the other: all at once, XLA writes a shifted copy of x for each of them, and
    # computes g anew in each sum.
    def tap(k: Array) -> Array:
        zero = jnp.zeros_like(k)
        window = jax.lax.dynamic_slice(padded, (zero, k // kw, k % kw, zero), x.shape)
        return jnp.sum(window * g, axis=(0, 1, 2), dtype=wide)

    taps = jax.lax.map(tap, jnp.arange(kernel.shape[0] * kw, dtype=jnp.int32))
    # The adjoint of a correlation is the correlation with the kernel turned by half a turn.
    return _shifts(g, kernel[::-1, ::-1]), taps.reshape(kernel.shape).astype(kernel.dtype)


_shifts.defvjp(_shifts_fwd, _shifts_bwd)
