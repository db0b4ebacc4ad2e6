"""Losses of matting, over the unknown pixels of the trimap."""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from resfu_jax._trimap import UNKNOWN

_EPSILON = 1e-6


def matting_losses(
    prediction: Float[Array, "b h w"],
    alpha: UInt8[Array, "b h w"],
    trimap: UInt8[Array, "b h w"],
    foreground: UInt8[Array, "b h w 3"],
    background: UInt8[Array, "b h w 3"],
    *,
    composition_weight: float = 0.5,
) -> Float[Array, "b"]:
    """Alpha and composition loss of each image (Xu et al., "Deep Image Matting", CVPR 2017, 4.1).

    With F, B the colours of foreground and background in 0 .. 1, a the alpha, p the predicted one
    and rho(d) = sqrt(d^2 + 1e-12), over the n unknown pixels of an image, of which each gives

        alpha        rho(p - a) / (n + 1)
        composition  sum_c rho(p F_c + (1 - p) B_c - a F_c - (1 - a) B_c) / (n + 1)

    The colours are summed, as in the released code of IndexNet and A2U.

    Args:
      prediction: alpha, not bounded.
      alpha: the true one, 0 .. 255.
      trimap: 128 where alpha is unknown.
      foreground: its colours.
      background: likewise.
      composition_weight: share of the composition loss; the other one has the rest.
    """
    unknown = (trimap == UNKNOWN).astype(jnp.float32)
    error = unknown * (prediction - alpha.astype(jnp.float32) / 255)
    contrast = (foreground.astype(jnp.float32) - background.astype(jnp.float32)) / 255
    of_alpha = _charbonnier(error)
    of_colours = _charbonnier(error[..., None] * contrast).sum(-1)
    total = (1 - composition_weight) * of_alpha + composition_weight * of_colours
    return (unknown * total).sum((1, 2)) / (unknown.sum((1, 2)) + 1)


def _charbonnier(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    return jnp.sqrt(jnp.square(x) + _EPSILON**2)
