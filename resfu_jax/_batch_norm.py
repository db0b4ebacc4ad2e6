"""BatchNorm, which backbones and heads share."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from resfu_jax.ops.dtypes import at_least_float32


class BatchNorm(nnx.Module):
    """BatchNorm as PyTorch has it, in float32 at least whatever the compute type.

    On a mesh with the batch sharded, the statistics are those of the whole batch. With `frozen`,
    training, too, normalises by the running statistics, and leaves them as they are.
    """

    def __init__(self, features: int, *, frozen: bool = False, param_dtype: Dtype, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))
        self.mean = nnx.BatchStat(jnp.zeros((features,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((features,), jnp.float32))
        self.frozen = frozen
        self.use_running_average = False

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What `nnx.view` sets: normalise by the running statistics, as in evaluation."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """(x - mean) / sqrt(variance + 1e-5) * scale + bias, and an update of the running ones."""
        wide = at_least_float32(x.dtype)
        y = x.astype(wide)
        if self.use_running_average or self.frozen or y.shape[0] == 0:  # no image, no statistics
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
