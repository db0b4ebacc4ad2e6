"""Bilinear upsampling by a whole ratio, phase by phase.

At a whole ratio s, output pixel a s + p (phase p) reads only the low-resolution pixels around cell
a, with weights that depend on p alone. Maps are "extended": replicated by a border beyond the
image, so that the clamped positions at the borders need no special case.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def extend_axis(x: Array, border: int, axis: int) -> Array:
    """Replicate the first and the last slice along one axis `border` times."""
    first, last = (
        jnp.broadcast_to(
            jax.lax.slice_in_dim(x, i, i + 1, axis=axis),
            (*x.shape[:axis], border, *x.shape[axis + 1 :]),
        )
        for i in (0, x.shape[axis] - 1)
    )
    return jnp.concatenate([first, x, last], axis)


def fold_axis(g: Array, border: int, axis: int) -> Array:
    """The gradient of `extend_axis`: borders are added to the first and the last slice."""
    # In place: differentiated as it stands, it would be a sum of three padded maps.
    n = g.shape[axis] - 2 * border
    x = jax.lax.slice_in_dim(g, border, border + n, axis=axis)
    for at, start in ((0, 0), (n - 1, border + n)) if border else ():
        edge = jax.lax.slice_in_dim(g, start, start + border, axis=axis).sum(axis, keepdims=True)
        edge = edge + jax.lax.slice_in_dim(x, at, at + 1, axis=axis)
        x = jax.lax.dynamic_update_slice_in_dim(x, edge, at, axis)
    return x


extend_axis.defvjp(
    lambda *args: (extend_axis(*args), None),
    lambda border, axis, _, g: (fold_axis(g, border, axis),),
)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def upsampled_mean_square(
    x: Float[Array, "b h w c"], ratio: tuple[int, int]
) -> Float[Array, "b c"]:
    """Mean over space of the squares of the upsampled map, from the small map x.

    With U the upsampling, |U x|^2 = x . (U^T U) x, and U^T U is a filter of three taps along each
    axis of the extended map. (The upsampled map's mean needs nothing: it is that of x.)
    """
    return _mean_square_fwd(x, ratio)[0]


def _mean_square_fwd(x, ratio):
    filtered = extend(x, 1)
    for axis, r in zip((1, 2), ratio, strict=True):
        m = phase_weights(r)[:, 0]
        gram = m.T @ m / r  # of a cell's three pixels, each of which is in three cells
        side = 2 * gram[0, 1]
        filtered = _combine(filtered, np.array([[side, np.trace(gram), side]]), axis)
    filtered = filtered / jnp.asarray(x.shape[1] * x.shape[2], x.dtype)  # sizes may be symbolic
    return (x * filtered).sum(axis=(1, 2)), filtered


def _mean_square_bwd(ratio, filtered, g):
    return (2 * g[:, None, None] * filtered,)


upsampled_mean_square.defvjp(_mean_square_fwd, _mean_square_bwd)


def upsample_shifted_axis(shifted: Sequence[Array], ratio: int, axis: int) -> Array:
    """`upsample_extended_axis` of the map whose slices from 0, 1 and 2 on are given.

    For rows of a loop's block: XLA's CPU compiler does not vectorise slices of a dynamic slice.
    """
    return _combine_shifted(tuple(shifted), phase_weights(ratio)[:, 0], axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _combine(x: Array, weights: np.ndarray, axis: int) -> Array:
    """out[a * P + p] = sum_t weights[p, t] x[a + t] along `axis`, P phases and 3 taps."""
    n = x.shape[axis] - 2
    shifted = [jax.lax.slice_in_dim(x, t, t + n, axis=axis) for t in range(3)]
    return _combine_shifted(tuple(shifted), weights, axis)


def _combine_bwd(weights, axis, _, g):
    # The inside, and two slices at each end, which not all taps reach. Else it would be a sum of a
    # padded map a tap, several times slower on a CPU.
    phases = g.reshape(*g.shape[:axis], -1, len(weights), *g.shape[axis + 1 :])
    n = phases.shape[axis]

    def exists(i):
        return not isinstance(i, int) or i >= 0  # a symbolic size is large enough

    def slices(start, length):
        """Of the gradient, from `start` on."""
        total = jnp.zeros((*g.shape[:axis], length, *g.shape[axis + 1 :]), g.dtype)
        for p, t in np.argwhere(weights).tolist():
            first = start - t
            if exists(first) and exists(n - length - first):
                x = jax.lax.slice_in_dim(phases, first, first + length, axis=axis)
                total += weights[p, t].item() * jax.lax.index_in_dim(x, p, axis + 1, False)
        return total

    pieces = [slices(0, 1), slices(1, 1)]
    if not isinstance(n, int) or n > 2:
        pieces.append(slices(2, n - 2))
    last = range(max(2, n), n + 2) if isinstance(n, int) else (n, n + 1)
    return (jnp.concatenate([*pieces, *(slices(i, 1) for i in last)], axis),)


_combine.defvjp(lambda *args: (_combine(*args), None), _combine_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _combine_shifted(shifted: tuple[Array, ...], weights: np.ndarray, axis: int) -> Array:
    """`_combine` of the three shifted maps x[t :]."""
    # Broadcast products over the phases. Stacked phases would be a choice for every number.
    shape = shifted[0].shape
    over_phases = [1] * (axis + 1) + [-1] + [1] * (len(shape) - 1 - axis)
    out = sum(
        of_tap.astype(x.dtype).reshape(over_phases) * jnp.expand_dims(x, axis + 1)
        for of_tap, x in zip(weights.T, shifted, strict=True)
        if of_tap.any()
    )
    return out.reshape(*shape[:axis], shape[axis] * len(weights), *shape[axis + 1 :])


def _combine_shifted_bwd(weights, axis, _, g):
    # Sums of slices: differentiated as it stands, each product would be reduced over a short axis.
    phases = g.reshape(*g.shape[:axis], -1, len(weights), *g.shape[axis + 1 :])
    phases = [
        jax.lax.index_in_dim(phases, p, axis + 1, keepdims=False) for p in range(len(weights))
    ]
    zero = jnp.zeros_like(phases[0])
    return (
        tuple(
            sum((w * phase for w, phase in zip(of_tap, phases, strict=True) if w), start=zero)
            for of_tap in weights.T.tolist()
        ),
    )


_combine_shifted.defvjp(lambda *args: (_combine_shifted(*args), None), _combine_shifted_bwd)
