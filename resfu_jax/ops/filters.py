"""Linear smoothing filters and the guided filter (He, Sun, Tang, TPAMI 2013)."""

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from resfu_jax.ops.checks import takes_maps
from resfu_jax.ops.dtypes import at_least_float32, promote
from resfu_jax.ops.pad import pad, pad_axis
from resfu_jax.ops.resize import resize
from resfu_jax.ops.sizes import Size

T = TypeVar("T")


@takes_maps("x")
def gaussian_blur(
    x: Float[Array, "b h w c"], *, kernel_size: int = 3, sigma: float = 1.0
) -> Float[Array, "b h w c"]:
    """Gaussian blur with replicated borders.

    The `kernel_size` x `kernel_size` kernel exp(-(u^2 + v^2) / (2 sigma^2)) is normalised to sum 1.

    Args:
      x: features.
      kernel_size: odd side of the kernel, pixels.
      sigma: standard deviation, pixels.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
    if sigma <= 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    r = kernel_size // 2
    taps = [math.exp(-(u**2) / (2 * sigma**2)) for u in range(-r, r + 1)]
    taps = [t / sum(taps) for t in taps]

    y = x.astype(at_least_float32(x.dtype))  # or taps would be rounded, and not sum to 1
    y = pad(y, (r, r), "edge")
    for axis in (1, 2):
        y = _correlate(y, tuple(taps), axis)
    return y.astype(x.dtype)


@takes_maps("x")
def box_filter(x: Float[Array, "b h w c"], radius: int) -> Float[Array, "b h w c"]:
    """Mean over the (2 radius + 1)^2 window, at borders over the pixels that exist.

    Means are computed in float32 or better; the result has the dtype of `x`.

    Args:
      x: features.
      radius: half side of the window, pixels.
    """
    if radius < 0:
        raise ValueError(f"radius must not be negative, got {radius}")
    y = x.astype(at_least_float32(x.dtype))
    for axis in (1, 2):
        y = _window_sums(y, radius, axis) * _one_over_count(y, radius, axis)
    return y.astype(x.dtype)


def _box_filter_transposed(g: Array, radius: int) -> Array:
    """The gradient of `box_filter`."""
    for axis in (1, 2):
        g = _window_sums(g * _one_over_count(g, radius, axis), radius, axis)
    return g


def _one_over_count(x: Array, radius: int, axis: int) -> Float[Array, "1 h w 1"]:
    """Of the pixels of an axis that lie in the windows around each of them."""
    n = x.shape[axis]
    i = jnp.arange(n)
    count = jnp.minimum(i + radius, n - 1) - jnp.maximum(i - radius, 0) + 1
    return _along((1 / count).astype(x.dtype), axis)


def _along(values: Float[Array, " n"], axis: int) -> Float[Array, "1 h w 1"]:
    return values.reshape([-1 if i == axis else 1 for i in range(4)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _window_sums(x: Array, radius: int, axis: int) -> Array:
    """out[i] = sum_{|j| <= radius} x[i + j] along one axis, zeros beyond the map."""
    return _over_windows(x, radius, axis, lambda a, b: a + b)


def _over_windows(x: T, radius: int, axis: int, join: Callable[[T, T], T]) -> T:
    """The elements of the windows of 2 radius + 1 along one axis of all arrays, joined.

    Beyond the map they are zeros. `join` is of two neighbouring windows.
    """
    n, width = jax.tree.leaves(x)[0].shape[axis], 2 * radius + 1
    x = jax.tree.map(lambda a: pad_axis(a, radius, axis), x)

    def cut(x, start, length):
        return jax.tree.map(lambda a: jax.lax.slice_in_dim(a, start, start + length, axis=axis), x)

    # x becomes windows of 1, 2, 4, ... elements. Those of the width's bits, one after the other,
    # make up the window.
    total, start, size = None, 0, 1
    while True:
        if width & size:
            part = cut(x, start, n)
            total = part if total is None else join(total, part)
            start += size
        if 2 * size > width:
            return total
        length = jax.tree.leaves(x)[0].shape[axis] - size
        x = join(cut(x, 0, length), cut(x, size, length))
        size *= 2


# The sum is its own transpose.
_window_sums.defvjp(
    lambda *args: (_window_sums(*args), None),
    lambda radius, axis, _, g: (_window_sums(g, radius, axis),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _window_moments(i: Array, p: Array, radius: int) -> tuple[Array, Array, Array, Array]:
    """mean(i), mean(p), var(i) and cov(i, p) over the windows of `box_filter`.

    Not as means of products minus products of means, whose difference is lost where the map is flat
    and not around zero. With a share w of the pixels of two sets in the second one,

        mean = mean_1 + w d,  var = var_1 + w (var_2 - var_1) + w (1 - w) d^2,  d = mean_2 - mean_1

    and the covariance alike (Chan, Golub and LeVeque, 1979): no large numbers are subtracted.
    """
    zero = jnp.zeros_like(i)
    moments = i, p, zero, zero
    for axis in (1, 2):
        n = i.shape[axis]
        # Of a known size, a constant: what is made of it is computed by the compiler.
        ones = jnp.asarray(np.ones(n, i.dtype)) if isinstance(n, int) else jnp.ones(n, i.dtype)
        pixels = _along(ones, axis)
        *moments, _ = _over_windows((*moments, pixels), radius, axis, _join_moments)
    return tuple(moments)


def _join_moments(one, other):
    *one, pixels = one
    *other, more = other
    share = more / jnp.maximum(pixels + more, 1)  # of pixels beyond the map: none
    d_i, d_p, d_var, d_cov = (b - a for a, b in zip(one, other, strict=True))
    both = share * (1 - share)
    changes = (
        share * d_i,
        share * d_p,
        share * d_var + both * d_i**2,
        share * d_cov + both * d_i * d_p,
    )
    return *(a + d for a, d in zip(one, changes, strict=True)), pixels + more


def _window_moments_fwd(i, p, radius):
    moments = _window_moments(i, p, radius)
    return moments, (i, p, *moments[:2])


def _window_moments_bwd(radius, saved, g):
    # In each window, d var = 2 mean((i - mean_i) d i), d cov = mean((i - mean_i) d p + ...).
    i, p, mean_i, mean_p = saved
    g_i, g_p, g_var, g_cov = g
    spread = functools.partial(_box_filter_transposed, radius=radius)
    of_var, of_cov = spread(g_var), spread(g_cov)
    d_i = 2 * i * of_var + p * of_cov + spread(g_i - 2 * mean_i * g_var - mean_p * g_cov)
    d_p = i * of_cov + spread(g_p - mean_i * g_cov)
    return d_i, d_p


_window_moments.defvjp(_window_moments_fwd, _window_moments_bwd)


@takes_maps("guide", "x")
def guided_filter(
    guide: Float[Array, "b h w c"],
    x: Float[Array, "b h w c"],
    *,
    radius: int,
    eps: float,
    gf_scale: int = 1,
) -> Float[Array, "b h w c"]:
    """Guided filter, channel by channel: a local linear model of x in the guide, `a * guide + b`.

    In every window a = cov(guide, x) / (var(guide) + eps) and b = mean(x) - a mean(guide); both are
    averaged over the windows that cover a pixel. With `gf_scale` s > 1 (fast guided filter) the
    model is fitted on the pixels 0, s, 2s, ... with radius // s, and a and b are resized
    bilinearly to the full size.

    Statistics and model are computed in float32 or better, from centred values, so that a flat
    guide may lie anywhere; the result has the dtype of the maps.

    Args:
      guide: the guide I.
      x: the filter's input p, of the guide's size.
      radius: half side of the window, pixels of the full size.
      eps: regulariser of the guide's variance.
      gf_scale: subsampling s.
    """
    check_gf_scale(gf_scale, guide.shape)
    small_guide, small_x = subsample(guide, gf_scale), subsample(x, gf_scale)
    return guided_filter_subsampled(guide, small_guide, small_x, radius=radius // gf_scale, eps=eps)


def guided_filter_subsampled(
    guide: Float[Array, "b H W c"],
    small_guide: Float[Array, "b h w c"],
    small_x: Float[Array, "b h w c"],
    *,
    radius: int,
    eps: float,
) -> Float[Array, "b H W c"]:
    """`guided_filter` from the subsampled guide and input, whose `radius` is in their pixels."""
    dtype = promote(guide.dtype, small_x.dtype)
    # `a guide + b` is the same with any zero of the guide, and most precise with one amid it.
    zero = small_guide.astype(at_least_float32(dtype)).mean(axis=(1, 2), keepdims=True)
    zero = jax.lax.stop_gradient(zero)
    # The moments are made again for the gradient, which takes little time, not kept.
    models = jax.checkpoint(_models, static_argnums=(3, 4), prevent_cse=False)
    a, b = models(small_guide, small_x, zero, radius, eps)
    a, b = (resize(x, guide.shape[1:3]) for x in (a, b))
    return (a * (guide.astype(zero.dtype) - zero) + b).astype(dtype)


def _models(i: Array, p: Array, zero: Array, radius: int, eps: float) -> tuple[Array, Array]:
    """(a, b) of `guided_filter` of the guide i - zero, averaged over the windows of a pixel."""
    i, p = i.astype(zero.dtype) - zero, p.astype(zero.dtype)
    mean_i, mean_p, var, cov = _window_moments(i, p, radius)
    a = cov / (var + eps)
    return box_filter(a, radius), box_filter(mean_p - a * mean_i, radius)


def subsample(x: Float[Array, "b H W c"], step: int) -> Float[Array, "b h w c"]:
    """Pixels 0, step, 2 step, ...: floor(size / step) of them along each side."""
    if step == 1:
        return x
    h, w = x.shape[1] // step, x.shape[2] // step
    return x[:, : h * step : step, : w * step : step]


def check_gf_scale(gf_scale: int, shape: tuple[Size, ...]) -> None:
    """Raise if a map of this shape has no pixel left after subsampling."""
    sides = [n for n in shape[1:3] if isinstance(n, int)]
    if gf_scale < 1 or any(n < gf_scale for n in sides):
        raise ValueError(f"gf_scale must be in 1..{min(sides, default=1)} (size), got {gf_scale}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _correlate(x: Array, taps: tuple[float, ...], axis: int) -> Array:
    """out[i] = sum_j taps[j] x[i + j] along one axis."""
    n = x.shape[axis] - (len(taps) - 1)
    return sum(tap * jax.lax.slice_in_dim(x, j, j + n, axis=axis) for j, tap in enumerate(taps))


def _correlate_fwd(x, taps, axis):
    return _correlate(x, taps, axis), None


def _correlate_bwd(taps, axis, _, g):
    # Slices of one padded map: differentiated as it stands, the sum would become one padded map a
    # tap, 25 times slower on a CPU.
    return (_correlate(pad_axis(g, len(taps) - 1, axis), taps[::-1], axis),)


_correlate.defvjp(_correlate_fwd, _correlate_bwd)
