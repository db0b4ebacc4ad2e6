"""Linear smoothing filters and the guided filter (He, Sun, Tang, TPAMI 2013)."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops._checks import takes_maps
from resfu_jax.ops._dtypes import at_least_float32
from resfu_jax.ops._interp import Size
from resfu_jax.ops._order import after
from resfu_jax.ops._polyphase import extend, extend_axis, upsample_extended, whole_ratio
from resfu_jax.ops.resize import resize


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
    for axis in (1, 2):
        y = _correlate(extend_axis(y, r, axis), tuple(taps), axis)
    return y.astype(x.dtype)


@takes_maps("x")
def box_filter(x: Float[Array, "b h w c"], radius: int) -> Float[Array, "b h w c"]:
    """Mean over the (2 radius + 1)^2 window, at borders over the pixels that exist.

    Args:
      x: features.
      radius: half side of the window, pixels.
    """
    if radius < 0:
        raise ValueError(f"radius must not be negative, got {radius}")
    for axis in (1, 2):
        shape = [-1 if i == axis else 1 for i in range(4)]
        x = _window_sums(x, radius, axis) * _one_over_count(x, radius, axis).reshape(shape)
    return x


def _one_over_count(x: Array, radius: int, axis: int) -> Float[Array, " n"]:
    """Of the pixels of an axis that lie in the windows around each of them."""
    n = x.shape[axis]
    i = jnp.arange(n)
    count = jnp.minimum(i + radius, n - 1) - jnp.maximum(i - radius, 0) + 1
    return (1 / count).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _window_sums(x: Array, radius: int, axis: int) -> Array:
    """out[i] = sum_{|j| <= radius} x[i + j] along one axis, zeros beyond the map."""
    n, width = x.shape[axis], 2 * radius + 1
    x = _pad(x, radius, axis)
    # x becomes sums of 1, 2, 4, ... slices. Those of the width's bits, one after the other, make up
    # the window.
    total, start, size = 0, 0, 1
    while True:
        if width & size:
            total = total + jax.lax.slice_in_dim(x, start, start + n, axis=axis)
            start += size
        if 2 * size > width:
            return total
        length = x.shape[axis] - size
        x = sum(jax.lax.slice_in_dim(x, i, i + length, axis=axis) for i in (0, size))
        size *= 2


# The sum is its own transpose.
_window_sums.defvjp(
    lambda *args: (_window_sums(*args), None),
    lambda radius, axis, _, g: (_window_sums(g, radius, axis),),
)


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
    a, b = _models(small_guide, small_x, radius, eps)
    return _linear_model(a, b, guide)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _models(i: Array, p: Array, radius: int, eps: float) -> tuple[Array, Array]:
    """(a, b) of `guided_filter`, averaged over the windows that cover a pixel."""
    return _fit(i, p, radius, eps)


def _fit(i, p, radius, eps):
    mean = functools.partial(box_filter, radius=radius)
    mean_i, mean_p = mean(i), mean(p)
    a = (mean(i * p) - mean_i * mean_p) / (mean(i * i) - mean_i * mean_i + eps)
    return mean(a), mean(mean_p - a * mean_i)


def _models_bwd(radius, eps, saved, g):
    # The means are made again, which takes little time, not kept.
    i, p = (after(x, g[0]) for x in saved)
    _, vjp = jax.vjp(functools.partial(_fit, radius=radius, eps=eps), i, p)
    return vjp(g)


_models.defvjp(lambda *args: (_models(*args), args[:2]), _models_bwd)


def _linear_model(
    a: Float[Array, "b h w c"], b: Float[Array, "b h w c"], guide: Float[Array, "b H W c"]
) -> Array:
    """`a guide + b`, a and b upsampled bilinearly to the guide's size."""
    ratio = whole_ratio(a.shape[1:3], guide.shape[1:3])
    if ratio is None:
        a, b = (resize(x, guide.shape[1:3]) for x in (a, b))
    else:
        a, b = (upsample_extended(extend(x, 1), ratio) for x in (a, b))
    return a * guide + b


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
    return (_correlate(_pad(g, len(taps) - 1, axis), taps[::-1], axis),)


_correlate.defvjp(_correlate_fwd, _correlate_bwd)


def _pad(x: Array, width: int, axis: int) -> Array:
    return jnp.pad(x, [(width, width) if i == axis else (0, 0) for i in range(x.ndim)])
