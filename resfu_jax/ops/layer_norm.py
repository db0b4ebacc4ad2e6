"""Layer normalisation over the channels (Ba, Kiros and Hinton, 2016)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops.checks import takes_maps
from resfu_jax.ops.dtypes import at_least_float32


@takes_maps("x", others=("scale", "bias"))
def layer_norm(
    x: Float[Array, "b h w c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    *,
    eps: float = 1e-5,
) -> Float[Array, "b h w c"]:
    """Every pixel with mean 0 and variance 1 over its channels, times scale, plus bias.

    Statistics are in float32 or better, the result in the dtype of x.
    """
    wide = x.astype(at_least_float32(x.dtype))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    scale, bias = (a.astype(wide.dtype)[None, None, None] for a in (scale, bias))
    return (centred * jax.lax.rsqrt(variance + eps) * scale + bias).astype(x.dtype)
