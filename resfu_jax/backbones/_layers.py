"""Layers that the transformers share."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from resfu_jax.ops.checks import check_not_empty
from resfu_jax.ops.dtypes import at_least_float32


def check_images(images: Array, channels: int) -> None:
    """A `ValueError` unless these are normalised images, any number of them."""
    if images.ndim != 4 or images.shape[3] != channels:
        raise ValueError(f"images must be (batch, height, width, {channels}), got {images.shape}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be normalised floating point, got {images.dtype}")
    check_not_empty("images", images)


class PatchConv(nnx.Module):
    """Convolution whose stride is its kernel's side; border pixels that fill no patch are unused.

    It is a matrix product of the patches, and computed so: on a CPU, the input gradient of XLA's
    convolution takes many times longer.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        size: int,
        *,
        kernel_init: Initializer,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        shape = (size, size, in_features, features)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b hr wr d"]:
        """One output pixel per patch."""
        r, _, c, d = self.kernel.shape
        b, h, w, _ = x.shape
        h, w = h // r, w // r
        patches = x[:, : h * r, : w * r].reshape(b, h, r, w, r, c).swapaxes(2, 3)
        kernel = self.kernel[...].astype(x.dtype).reshape(r * r * c, d)
        y = patches.reshape(b, h, w, r * r * c) @ kernel
        return y + jnp.expand_dims(self.bias[...].astype(x.dtype), (0, 1, 2))


class LayerNorm(nnx.Module):
    """LayerNorm over channels, in float32 at least whatever the compute type."""

    def __init__(
        self,
        features: int,
        *,
        epsilon: float,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))

    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        """(x - mean) / sqrt(variance + epsilon) * scale + bias."""
        wide = at_least_float32(x.dtype)
        y = x.astype(wide)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        scale, bias = (
            jnp.expand_dims(p[...].astype(wide), tuple(range(x.ndim - 1)))
            for p in (self.scale, self.bias)
        )
        return (y * scale + bias).astype(x.dtype)
