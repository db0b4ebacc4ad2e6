"""What JAFAR and AnyUp have in common: image encoders with positions, and how pixels attend.

    E = RoPE(encode(image)),  Q = pool(encode_q(E)) at the output's size,  K' = pool(encode_k(E))
    q = Linear(RMS(Conv(Q))),  k = Linear(RMS(K))
    out = sum_j mean over heads (softmax_j(<q, k_j> / sqrt(d))) v_j    `ops.cross_attention`

What makes the keys K of K' and the features is each paper's own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from resfu_jax import ops
from resfu_jax._checks import need
from resfu_jax._layers import PYTORCH_UNIFORM, Conv, Linear
from resfu_jax.ops import Implementation
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.sizes import Size
from resfu_jax.upsamplers._encoder import Encoder, encode_in_turn

# The official attention draws queries' and keys' weights as one matrix, with the values' that it
# does not use: Xavier's uniform distribution for three times as many outputs.
FUSED_XAVIER_UNIFORM = nnx.initializers.variance_scaling(0.5, "fan_avg", "uniform")


def check_heads(qk_dim: int, num_heads: int) -> None:
    """Norms need groups of channels, and heads as many each."""
    need(
        qk_dim % 8 == 0 and qk_dim % num_heads == 0,
        f"qk_dim must be a multiple of {8} and of num_heads={num_heads}, got {qk_dim}",
    )


def unit(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Every pixel's x / max(|x|, 1e-12)."""
    wide = x.astype(at_least_float32(x.dtype))
    square = jnp.square(wide).sum(axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.maximum(square, 1e-24))).astype(x.dtype)


class RoPE(nnx.Module):
    """Positions by which the channels are turned, with learned frequencies; see `ops.rotate`.

    Coordinates are 0 to 1 from the first to the last row and column. At first, one half of the
    channels has frequencies of the rows and the other of the columns.
    """

    def __init__(self, features: int, *, param_dtype: Dtype):
        once = 2 * np.pi * 100.0 ** np.linspace(0, -1, features // 4)
        half = np.concatenate([once, once])
        none = np.zeros_like(half)
        freqs = np.stack([np.concatenate([half, none]), np.concatenate([none, half])])
        self.freqs = nnx.Param(jnp.asarray(freqs, param_dtype))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The turned map."""
        dtype = at_least_float32(x.dtype)
        rows, columns = (
            _coordinates(n, dtype)[:, None] * freqs.astype(dtype)[None]
            for n, freqs in zip(x.shape[1:3], self.freqs[...], strict=True)
        )
        return ops.map_rows(
            ops.rotate, x, rows[None, :, None], shared=columns[None, None], values=x.shape[3]
        )


def _coordinates(n: Size, dtype: np.dtype) -> Float[Array, " n"]:
    last = jnp.maximum(jnp.asarray(n - 1, dtype), 1)
    return jnp.arange(n, dtype=dtype) / last


class RMSLinear(nnx.Module):
    """A linear map of pixels of mean square 1; epsilon is PyTorch's for float32."""

    def __init__(
        self,
        features: int,
        *,
        use_bias: bool,
        kernel_init: Initializer,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.linear = Linear(
            features,
            features,
            use_bias=use_bias,
            kernel_init=kernel_init,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The map, of x's dtype."""
        bias = None if self.linear.bias is None else self.linear.bias[...]
        shared = self.scale[...], self.linear.kernel[...], bias
        return ops.map_rows(_rms_linear, x, shared=shared, values=x.shape[3])


def _rms_linear(x: Float[Array, "b h w c"], shared: tuple) -> Float[Array, "b h w c"]:
    scale, kernel, bias = shared
    wide = x.astype(at_least_float32(x.dtype))
    square = jnp.square(wide).mean(axis=-1, keepdims=True)
    y = wide * jax.lax.rsqrt(square + 2.0**-23) * scale.astype(wide.dtype)[None, None, None]
    y = y.astype(x.dtype) @ kernel.astype(x.dtype)
    return y if bias is None else y + bias.astype(y.dtype)[None, None, None]


class ImageEncoder(nnx.Module):
    """The image with positions, encoded for queries and for keys."""

    def __init__(
        self,
        in_features: int,
        features: int,
        kernel_size: int,
        *,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = dict(param_dtype=param_dtype, rngs=rngs)
        self.image = Encoder(in_features, features, kernel_size, **types)
        self.rope = RoPE(features, param_dtype=param_dtype)
        self.query = Encoder(features, features, **types)
        self.key = Encoder(features, features, **types)

    def __call__(
        self,
        image: Float[Array, "b hi wi c"],
        output_size: tuple[Size, Size],
        size: tuple[Size, ...],
    ) -> tuple[Float[Array, "b H W d"], Float[Array, "b h w d"]]:
        """Q at the output's size, and K' at that of the features."""
        x = self.rope(self.image(image))
        keys, queries = encode_in_turn([self.key, self.query], x)
        return ops.adaptive_avg_pool(queries, output_size), ops.adaptive_avg_pool(keys, size)


class Windows(NamedTuple):
    """The tables of `ops.cross_attention`."""

    rows: np.ndarray | Array | None = None
    columns: np.ndarray | Array | None = None


class CrossAttention(nnx.Module):
    """Pixels of a large map attend to those of a small one; weights are averaged over the heads.

    The keys' bias, which the official layers have, would add the same to all scores of a query:
    a softmax does not see it.

    Args:
      features: channels of queries and keys.
      heads: that divide them.
      kernel_init: of both linear maps; with PyTorch's default, the queries' bias has it too.
      param_dtype: of the parameters.
      rngs: source of the initial weights.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        kernel_init: Initializer,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = dict(param_dtype=param_dtype, rngs=rngs)
        self.heads = heads
        self.conv = Conv(
            features, features, 3, use_bias=False, kernel_init=PYTORCH_UNIFORM, **types
        )
        self.q = RMSLinear(features, use_bias=True, kernel_init=kernel_init, **types)
        self.k = RMSLinear(features, use_bias=False, kernel_init=kernel_init, **types)

    def __call__(
        self,
        queries: Float[Array, "b H W c"],
        keys: Float[Array, "b h w c"],
        values: Float[Array, "b h w d"],
        *,
        implementation: Implementation | None = None,
    ) -> Float[Array, "b H W d"]:
        """The attended values."""
        windows = self.windows(keys.shape[1:3], queries.shape[1:3])
        return ops.cross_attention(
            self.q(self.conv(queries)),
            self.k(keys),
            values,
            heads=self.heads,
            rows=windows.rows,
            columns=windows.columns,
            implementation=implementation,
        )

    def windows(self, size: tuple[Size, ...], output_size: tuple[Size, ...]) -> Windows:
        """What each pixel of the output sees: here, everything."""
        return Windows()
