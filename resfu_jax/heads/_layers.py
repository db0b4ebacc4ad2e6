"""What the heads share: layers, checks, and upsamplers that they call alike."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from resfu_jax.ops._dtypes import at_least_float32
from resfu_jax.upsamplers import create_upsampler, upsampler_entry

_conv_init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
classifier_init = nnx.initializers.normal(0.01)


def check_arguments(num_classes: int, width: int, dropout: float) -> None:
    """Raises a `ValueError` for what no head can be built with."""
    if num_classes < 1 or width < 1:
        raise ValueError(f"num_classes and width must be positive, got {num_classes} and {width}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and less than 1, got {dropout}")


def check_maps(features: Sequence[Array], in_features: tuple[int, ...]) -> None:
    """Raises a `ValueError` unless there is a map with each of these numbers of channels."""
    if tuple(x.shape[-1] for x in features) != in_features:
        raise ValueError(
            f"features must be {len(in_features)} maps with {in_features} channels, "
            f"got shapes {[x.shape for x in features]}"
        )


def create_head_upsampler(
    name: str,
    width: int,
    scale: int,
    options: dict[str, Any] | None,
    *,
    guide_features: int | None = None,
    **types: Any,
) -> nnx.Module:
    """An upsampler of maps with `width` channels whose guide, if it takes one, has as many.

    `guide_features` is the guide's number of channels where it differs.

    Raises:
      ValueError: an unknown upsampler or option, or one that is guided by something else.
    """
    guide = upsampler_entry(name).cls.guide
    if guide not in ("none", "features"):
        raise ValueError(f"upsampler {name!r} needs a guide of kind {guide!r}, not a feature map")
    return create_upsampler(
        name,
        features=width,
        guide_features=guide_features or width,
        scale=scale,
        **types,
        **(options or {}),
    )


def apply_upsampler(
    upsampler: nnx.Module, x: Float[Array, "b _h _w c"], guide: Float[Array, "b h w _g"]
) -> Float[Array, "b h w c"]:
    """`x` at the size of `guide`, and guided by it if the upsampler takes a guide."""
    if upsampler.guide == "none":
        return upsampler(x, output_size=guide.shape[1:3])
    return upsampler(x, guide)


class ConvBNReLU(nnx.Module):
    """Convolution without bias, zero padding keeping the size; BatchNorm; ReLU."""

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        kernel_size: int = 1,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        options = dict(
            use_bias=False, kernel_init=_conv_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        if kernel_size == 1:
            self.conv = nnx.Linear(in_features, features, **options)
        else:
            size, padding = (kernel_size,) * 2, kernel_size // 2
            self.conv = nnx.Conv(in_features, features, size, padding=padding, **options)
        self.norm = BatchNorm(features, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """The layer's output, of the compute type."""
        return jax.nn.relu(self.norm(self.conv(x)))


class BatchNorm(nnx.Module):
    """BatchNorm as PyTorch has it, in float32 at least whatever the compute type.

    On a mesh with the batch sharded, the statistics are those of the whole batch.
    """

    def __init__(self, features: int, *, param_dtype: Dtype, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))
        self.mean = nnx.BatchStat(jnp.zeros((features,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((features,), jnp.float32))
        self.use_running_average = False

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What `nnx.view` sets: normalise by the running statistics, as in evaluation."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """(x - mean) / sqrt(variance + 1e-5) * scale + bias, and an update of the running ones."""
        wide = at_least_float32(x.dtype)
        y = x.astype(wide)
        if self.use_running_average:
            mean, var = self.mean[...].astype(wide), self.var[...].astype(wide)
        else:
            mean = jnp.mean(y, axis=(0, 1, 2))
            var = jnp.mean(jnp.square(y - jnp.expand_dims(mean, (0, 1, 2))), axis=(0, 1, 2))
            n = y.size // y.shape[-1]
            unbiased = var * (n / max(n - 1, 1))
            for running, batch in ((self.mean, mean), (self.var, unbiased)):
                batch = jax.lax.stop_gradient(batch).astype(jnp.float32)
                running.set_value(0.9 * running[...] + 0.1 * batch)
        gain = jax.lax.rsqrt(var + 1e-5) * self.scale[...].astype(wide)
        mean, gain, bias = (
            jnp.expand_dims(v, (0, 1, 2)) for v in (mean, gain, self.bias[...].astype(wide))
        )
        return ((y - mean) * gain + bias).astype(x.dtype)
