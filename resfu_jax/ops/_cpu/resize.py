"""Upsampling by whole ratios on a CPU: phase by phase, so that the gradient needs no scatter."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from resfu_jax.ops._interp import kernel_weights
from resfu_jax.ops.pad import pad_axis
from resfu_jax.ops.sizes import whole_ratio

_MOST = 16  # phases; each is an operand of the compiled program


def resize(x: Array, *, size, n_in, n_out, method: str, align_corners: bool) -> Array:
    """Form of `ops.resize`."""
    ratio = whole_ratio(n_in, n_out)
    for axis in (2, 1):
        x = _polyphase(x, ratio[axis - 1], axis, method)
    return x


def refusal(x: Array, *, size, n_in, n_out, method: str, align_corners: bool) -> str | None:
    """Why the form does not apply."""
    ratio = None if align_corners else whole_ratio(n_in, n_out)
    if ratio is None or max(ratio) > _MOST:
        return (
            f"it needs a whole upsampling ratio of at most {_MOST} and align_corners=False, got "
            f"{x.shape[1:3]} -> {size}, align_corners={align_corners}"
        )
    return None


def _polyphase(values: Array, r: int, axis: int, method: str) -> Array:
    """Upsample `axis` by the whole ratio r.

    Output pixel `q r + p` combines the pixels around q with weights that depend on the phase p
    only. Stacking the r phases keeps the gradient a sum of slices; XLA's reductions and scatters
    over short axes are several times slower.
    """
    if method in ("nearest", "nearest-exact"):
        phases = [values] * r
    else:
        extended = pad_axis(values, 2, axis, "edge")
        shifted = {
            offset: jax.lax.slice_in_dim(
                extended, 2 + offset, 2 + offset + values.shape[axis], axis=axis
            )
            for offset in range(-2, 3)
        }
        phases = []
        for p in range(r):
            lower, remainder = divmod(2 * p + 1 - r, 2 * r)  # position (p + 1/2) / r - 1/2
            weights = kernel_weights(method, remainder / (2 * r))
            phases.append(sum(w * shifted[lower + i] for i, w in weights.items() if w != 0))
    shape = (*values.shape[:axis], -1, *values.shape[axis + 1 :])
    return jnp.stack(phases, axis=axis + 1).reshape(shape)
