"""Bilinear upsampling by a whole ratio, phase by phase.

At a whole ratio s, output pixel a s + p (phase p) reads only the low-resolution pixels around cell
a, with weights that depend on p alone. Maps are "extended": replicated by a border beyond the
image, so that the clamped positions at the borders need no special case.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def whole_ratio(size: tuple[int, int], out_size: tuple[int, int]) -> tuple[int, int] | None:
    """`out_size / size` if both quotients are whole, else `None`. Sizes may be symbolic."""
    if any(isinstance(n, int) and n < 1 for n in size):
        return None
    if any(o % n != 0 for n, o in zip(size, out_size, strict=True)):
        return None
    ratio = tuple(o // n for n, o in zip(size, out_size, strict=True))
    # The quotient of unrelated symbolic sizes is symbolic, and has no phases to enumerate.
    return ratio if all(isinstance(r, int) and r >= 1 for r in ratio) else None


def phase_weights(ratio: int, kernel_size: int = 1) -> np.ndarray:
    """M[p, u, t]: weight of tap u at phase p on the low-resolution pixel t - r - 1 of its cell.

    Shape (ratio, K, K + 2) with r = (K - 1) / 2; two non-zeros at most in a row, which sums to 1.
    """
    m = np.zeros((ratio, kernel_size, kernel_size + 2))
    for p in range(ratio):
        lower, remainder = divmod(2 * p + 1 - ratio, 2 * ratio)  # p's offset from the cell's centre
        fraction = remainder / (2 * ratio)
        for u in range(kernel_size):
            m[p, u, u + 1 + lower] = 1 - fraction
            m[p, u, u + 2 + lower] += fraction
    return m


def extend(x: Float[Array, "b h w c"], border: int) -> Float[Array, "b h2 w2 c"]:
    """Replicate the border pixels outwards."""
    return jnp.pad(x, ((0, 0), (border, border), (border, border), (0, 0)), mode="edge")


def upsample_extended(
    x: Float[Array, "b h2 w2 c"], ratio: tuple[int, int]
) -> Float[Array, "b H W c"]:
    """Upsample the inside of a map that is extended by one pixel."""
    for axis, r in zip((1, 2), ratio, strict=True):
        x = _combine(x, phase_weights(r)[:, 0], axis)
    return x


def upsampled_moments(
    x: Float[Array, "b h w c"], ratio: tuple[int, int], center: Float[Array, "b c"]
) -> tuple[Float[Array, "b c"], Float[Array, "b c"]]:
    """Mean of the upsampled map, and mean of its squares about `center`, from the small map.

    Over the phases p of a cell, sum_p (M_p x)^2 = x^T M^T M x = |R x|^2 with M = Q R: at most three
    combinations of the three low-resolution pixels stand for all phases.
    """
    extended = extend(x - center[:, None, None, :], 1)
    mean = square = extended
    for axis, r in zip((1, 2), ratio, strict=True):
        m = phase_weights(r)[:, 0]
        mean = _combine(mean, m.mean(axis=0, keepdims=True), axis)
        square = _combine(square, np.linalg.qr(m, mode="r") / np.sqrt(r), axis)
    cells = x.shape[1] * x.shape[2]
    cells = cells if isinstance(cells, int) else jnp.asarray(cells, x.dtype)
    return center + mean.mean(axis=(1, 2)), jnp.square(square).sum(axis=(1, 2)) / cells


def _combine(x: Array, weights: np.ndarray, axis: int) -> Array:
    """out[a * P + p] = sum_t weights[p, t] x[a + t] along `axis`, P phases and 3 taps."""
    phases, taps = weights.shape
    n = x.shape[axis] - (taps - 1)
    out = 0
    for t in range(taps):
        if not weights[:, t].any():
            continue
        shifted = x[:, t : t + n] if axis == 1 else x[:, :, t : t + n]
        w = jnp.asarray(weights[:, t], x.dtype)
        w = w.reshape([-1 if i == axis + 1 else 1 for i in range(x.ndim + 1)])
        out = out + w * jnp.expand_dims(shifted, axis + 1)
    shape = list(x.shape)
    shape[axis] = n * phases
    return out.reshape(shape)
