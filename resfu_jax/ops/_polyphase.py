"""Bilinear upsampling by a whole ratio, phase by phase.

At a whole ratio s, output pixel a s + p (phase p) reads only the low-resolution pixels around cell
a, with weights that depend on p alone. Maps are "extended": replicated by a border beyond the
image, so that the clamped positions at the borders need no special case.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from resfu_jax.ops._interp import Size


def whole_ratio(size: tuple[Size, Size], out_size: tuple[Size, Size]) -> tuple[int, int] | None:
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
    return extend_axis(extend_axis(x, border, 1), border, 2)


def extend_axis(x: Array, border: int, axis: int) -> Array:
    """Replicate the first and the last slice along one axis `border` times."""
    # Concatenated rather than padded, whose gradient takes several times longer on a CPU.
    n = x.shape[axis]
    first, last = (
        jnp.broadcast_to(
            jax.lax.slice_in_dim(x, i, i + 1, axis=axis),
            (*x.shape[:axis], border, *x.shape[axis + 1 :]),
        )
        for i in (0, n - 1)
    )
    return jnp.concatenate([first, x, last], axis)


def upsample_extended(
    x: Float[Array, "b h2 w2 c"], ratio: tuple[int, int], step: int = 1
) -> Float[Array, "b H W c"]:
    """Upsample the inside of a map that is extended by one pixel; every `step`-th output pixel.

    `step` must divide the ratios.
    """
    for axis, r in zip((1, 2), ratio, strict=True):
        x = upsample_extended_axis(x, r, axis, step)
    return x


def upsample_extended_axis(x: Array, ratio: int, axis: int, step: int = 1) -> Array:
    """`upsample_extended` along one axis of any array."""
    return _combine(x, phase_weights(ratio)[::step, 0], axis)


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
    n = x.shape[axis] - 2
    shifted = [jax.lax.slice_in_dim(x, t, t + n, axis=axis) for t in range(3)]
    # Stacked phases, not a broadcast product: its gradient would be a reduction over a short axis,
    # which XLA does slowly on a CPU.
    phases = [
        sum(w * s for w, s in zip(row.tolist(), shifted, strict=True) if w) for row in weights
    ]
    shape = (*x.shape[:axis], n * len(phases), *x.shape[axis + 1 :])
    return jnp.stack([jnp.broadcast_to(p, shifted[0].shape) for p in phases], axis + 1).reshape(
        shape
    )
