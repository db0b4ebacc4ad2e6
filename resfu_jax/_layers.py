"""Layers that compute in the dtype of their input, whatever that of their parameters.

Flax's own compute in the dtype that holds both: bfloat16 features and float32 parameters would be
float32. Parameters have Flax's names.

The calls leave out Flax's arguments for sharding and masks, hence `type: ignore[override]`.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from resfu_jax import ops
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.pad import Mode

XAVIER_UNIFORM = nnx.initializers.xavier_uniform()
# PyTorch's default: uniform within 1 / sqrt(fan in). `Conv` and `Linear` draw their bias likewise.
PYTORCH_UNIFORM = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# With the fans that PyTorch counts for a depthwise kernel (kh, kw, C): kh kw in, kh kw C out.
DEPTHWISE_XAVIER_UNIFORM = nnx.initializers.variance_scaling(
    1.0, "fan_avg", "uniform", in_axis=(), out_axis=-1
)


class LayerNorm(nnx.LayerNorm):
    """Every pixel over its channels; epsilon is PyTorch's, statistics are float32 or better."""

    scale: nnx.Param
    bias: nnx.Param

    def __init__(self, features: int, *, epsilon: float = 1e-5, param_dtype: Dtype):
        super().__init__(features, epsilon=epsilon, param_dtype=param_dtype, rngs=nnx.Rngs(0))

    def __call__(  # type: ignore[override]
        self, x: Float[Array, "b h w c"]
    ) -> Float[Array, "b h w c"]:
        """The normalised map, of the input's dtype."""
        return ops.layer_norm(x, self.scale[...], self.bias[...], eps=self.epsilon)


class GroupNorm(nnx.GroupNorm):
    """Groups of channels over space; epsilon is PyTorch's, statistics are float32 or better."""

    scale: nnx.Param
    bias: nnx.Param

    def __init__(self, features: int, groups: int, *, epsilon: float = 1e-5, param_dtype: Dtype):
        super().__init__(
            features, groups, epsilon=epsilon, param_dtype=param_dtype, rngs=nnx.Rngs(0)
        )

    def __call__(  # type: ignore[override]
        self, x: Float[Array, "b h w c"]
    ) -> Float[Array, "b h w c"]:
        """The normalised map, of the input's dtype."""
        return ops.group_norm(
            x, self.scale[...], self.bias[...], groups=self.num_groups, eps=self.epsilon
        )


Norm = LayerNorm | GroupNorm


def normalised(x: Float[Array, "b h w c"], norm: Norm | None) -> Float[Array, "b h w c"]:
    """`norm(x)`; x itself without a norm."""
    return x if norm is None else norm(x)


class Linear(nnx.Linear):
    """A linear map of the channels, and of the norm before it."""

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        use_bias: bool = True,
        kernel_init: Initializer,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            in_features,
            features,
            use_bias=use_bias,
            kernel_init=kernel_init,
            bias_init=_bias_init(kernel_init, in_features),
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(  # type: ignore[override]
        self, x: Float[Array, "b h w c"], *, norm: Norm | None = None
    ) -> Float[Array, "b h w d"]:
        """The map of x, or of `norm(x)`, which `ops.norm_linear` need not write."""
        if norm is not None:
            return ops.norm_linear(
                x,
                norm.scale[...],
                norm.bias[...],
                self.kernel[...],
                None if self.bias is None else self.bias[...],
                norm="group" if isinstance(norm, GroupNorm) else "layer",
                groups=norm.num_groups if isinstance(norm, GroupNorm) else 1,
                eps=norm.epsilon,
            )
        return _biased(x @ self.kernel[...].astype(x.dtype), self.bias)


class Conv(nnx.Conv):
    """A convolution of stride 1 that keeps the size, with zeros or the map's own border around it.

    An axis with K taps, D apart, gets a border of D (K - 1) / 2 pixels on both sides, which must be
    whole: by `border`, `"constant"` (zeros), `"edge"` (the border repeated) or `"reflect"` (the map
    reflected in its border pixels, of which there must be enough).
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        kernel_size: int | tuple[int, int],
        *,
        dilation: int = 1,
        border: Mode = "constant",
        use_bias: bool = True,
        kernel_init: Initializer = XAVIER_UNIFORM,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        kernel = (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size
        self.dilation, self.border = dilation, border
        super().__init__(
            in_features,
            features,
            kernel,
            kernel_dilation=dilation,
            use_bias=use_bias,
            kernel_init=kernel_init,
            bias_init=_bias_init(kernel_init, math.prod(kernel) * in_features),
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(  # type: ignore[override]
        self, x: Float[Array, "b h w c"]
    ) -> Float[Array, "b h w d"]:
        """The convolved map."""
        kernel = self.kernel[...].astype(x.dtype)
        rows, columns = (self.dilation * (n - 1) // 2 for n in kernel.shape[:2])
        padding = ((rows, rows), (columns, columns))
        if self.border != "constant" and (rows or columns):
            x, padding = ops.pad(x, (rows, columns), self.border), ((0, 0), (0, 0))
        return _biased(ops.conv(x, kernel, padding=padding, dilation=self.dilation), self.bias)


class DepthwiseConv(nnx.Module):
    """A 3x3 convolution of every channel with a kernel of its own, zero padding."""

    def __init__(
        self,
        features: int,
        *,
        use_bias: bool = True,
        kernel_init: Initializer = DEPTHWISE_XAVIER_UNIFORM,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (3, 3, features), param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype)) if use_bias else None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The filtered map."""
        return _biased(ops.depthwise_conv(x, self.kernel[...].astype(x.dtype)), self.bias)


def _bias_init(kernel_init: Initializer, fan_in: int) -> Initializer:
    """Zeros, or PyTorch's default if that is the kernel's."""
    if kernel_init is not PYTORCH_UNIFORM:
        return nnx.initializers.zeros_init()
    bound = fan_in**-0.5
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def _biased(y: Float[Array, "b h w d"], bias: nnx.Param | None) -> Float[Array, "b h w d"]:
    return y if bias is None else y + bias[...].astype(y.dtype)[None, None, None]


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
                batch = jax.lax.stop_gradient(batch).astype(running[...].dtype)
                running.set_value(0.9 * running[...] + 0.1 * batch)
        gain = jax.lax.rsqrt(var + 1e-5) * self.scale[...].astype(wide)
        mean, gain, bias = (
            jnp.expand_dims(v, (0, 1, 2)) for v in (mean, gain, self.bias[...].astype(wide))
        )
        return ((y - mean) * gain + bias).astype(x.dtype)
