"""Layer normalisation over the channels (Ba, Kiros and Hinton, 2016)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops._cpu import norm as cpu
from resfu_jax.ops._forms import Forms, Implementation
from resfu_jax.ops.checks import takes_maps
from resfu_jax.ops.dtypes import at_least_float32


@takes_maps("x", others=("scale", "bias"))
def layer_norm(
    x: Float[Array, "b h w c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    *,
    eps: float = 1e-5,
    implementation: Implementation | None = None,
) -> Float[Array, "b h w c"]:
    """Every pixel with mean 0 and variance 1 over its channels, times scale, plus bias.

    Statistics are in float32 or better, the result in the dtype of x. `implementation`:
    `"reference"`, or `"cpu"` with another gradient; `None` takes the best of the platform.
    """
    return _NORM(implementation, x, scale, bias, eps=eps)


def _reference(x: Array, scale: Array, bias: Array, *, eps: float) -> Array:
    wide = x.astype(at_least_float32(x.dtype))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    scale, bias = (a.astype(wide.dtype)[None, None, None] for a in (scale, bias))
    return (centred * jax.lax.rsqrt(variance + eps) * scale + bias).astype(x.dtype)


_NORM = Forms("layer_norm", _reference, cpu=cpu.layer_norm)
