"""Group normalisation (Wu and He, ECCV 2018)."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops.checks import takes_maps
from resfu_jax.ops.dtypes import at_least_float32


@takes_maps("x", others=("scale", "bias"))
def group_norm(
    x: Float[Array, "b h w c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    *,
    groups: int,
    eps: float = 1e-5,
) -> Float[Array, "b h w c"]:
    """Normalise contiguous groups of channels over space; statistics in float32 or better.

    Raises:
      ValueError: groups that do not divide the channels, or not one scale and bias a channel.
    """
    if x.ndim != 4 or scale.shape != x.shape[3:] or bias.shape != x.shape[3:]:
        raise ValueError(
            "scale and bias must be (channels,) for x (batch, height, width, channels), "
            f"got scale {scale.shape}, bias {bias.shape} and x {x.shape}"
        )
    mean, factor = group_moments(x, groups=groups, eps=eps)
    factor = factor * scale.astype(factor.dtype)[None]
    y = (x.astype(mean.dtype) - mean[:, None, None]) * factor[:, None, None]
    return (y + bias.astype(mean.dtype)[None, None, None]).astype(x.dtype)


def group_moments(
    x: Float[Array, "b h w c"], *, groups: int, eps: float = 1e-5
) -> tuple[Float[Array, "b c"], Float[Array, "b c"]]:
    """Mean and 1 / sqrt(variance + eps) of every channel's group."""
    means, variances = _channel_moments(x)
    mean = group_mean(means, groups)
    variance = group_mean(variances + jnp.square(means - mean), groups)
    return mean, jax.lax.rsqrt(variance + eps)


# For the gradient the centred map is made again, not kept. Barriers against merging it with the
# first one (`prevent_cse`) would cost a TPU traffic.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _channel_moments(x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b c"], Float[Array, "b c"]]:
    """Mean and variance over space, in float32 or better."""
    x = x.astype(at_least_float32(x.dtype))
    mean = jnp.mean(x, axis=(1, 2))
    return mean, jnp.mean(jnp.square(x - mean[:, None, None]), axis=(1, 2))


def group_mean(x: Float[Array, "b c"], groups: int) -> Float[Array, "b c"]:
    """Every channel replaced by the mean of its group."""
    b, c = x.shape
    if groups < 1 or c % groups:
        raise ValueError(f"groups must divide the {c} channels, got {groups}")
    mean = jnp.mean(x.reshape(b, groups, c // groups), axis=-1, keepdims=True)
    return jnp.broadcast_to(mean, (b, groups, c // groups)).reshape(b, c)
