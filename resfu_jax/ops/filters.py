"""Linear smoothing filters and the guided filter (He, Sun, Tang, TPAMI 2013)."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resfu_jax.ops._interp import Size
from resfu_jax.ops._polyphase import extend, extend_axis, upsample_extended, whole_ratio
from resfu_jax.ops._row_blocks import Rows, block_rows, map_row_blocks
from resfu_jax.ops.resize import resize


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

    def f(_, blocks):
        rows = extend_axis(_correlate(*blocks, tuple(taps), 1), r, 2)
        return (_correlate(rows, tuple(taps), 2),)

    b, h, w, c = x.shape
    rows = block_rows(h, b * w * c)
    block, wider = Rows(1, rows, rows), Rows(1, rows, rows + 2 * r)
    (out,) = map_row_blocks(f, h // rows, (wider,), (block,), (), (extend_axis(x, r, 1),))
    return out


def box_filter(x: Float[Array, "b h w c"], radius: int) -> Float[Array, "b h w c"]:
    """Mean over the (2 radius + 1)^2 window, at borders over the pixels that exist.

    Args:
      x: features.
      radius: half side of the window, pixels.
    """
    if radius < 0:
        raise ValueError(f"radius must not be negative, got {radius}")
    return _map_windows(lambda x, means: means(x), radius, x)


def _map_windows(f, radius: int, *maps: Array) -> Array:
    """`f(*rows, means)` over blocks of rows of maps of one size.

    f gets `radius` more rows, zeros, at both ends, and gives what `means`, the means over windows,
    makes of any such map.
    """
    b, h, w, c = maps[0].shape
    one_over_rows = jnp.broadcast_to(_one_over_count(h, radius, maps[0].dtype), (b, h, 1, 1))

    def g(_, blocks):
        *rows, one_over_rows = blocks
        means = functools.partial(_window_means, radius=radius, one_over_rows=one_over_rows)
        return (f(*rows, means),)

    rows = block_rows(h, b * w * 4 * c)
    block, wider = Rows(1, rows, rows), Rows(1, rows, rows + 2 * radius)
    arrays = (*(_pad(a, radius, 1) for a in maps), one_over_rows)
    (out,) = map_row_blocks(g, h // rows, (*[wider] * len(maps), block), (block,), (), arrays)
    return out


def _one_over_count(n: Size, radius: int, dtype: DTypeLike) -> Float[Array, "1 n 1 1"]:
    """Of the pixels of an axis of length n that lie in the windows around each of them."""
    i = jnp.arange(n)
    count = jnp.minimum(i + radius, n - 1) - jnp.maximum(i - radius, 0) + 1
    return (1 / count).astype(dtype)[None, :, None, None]


def _window_means(x: Array, radius: int, one_over_rows: Float[Array, "b h 1 1"]) -> Array:
    """Means over windows of a map that has `radius` more rows, zeros, at both ends."""
    taps = (1.0,) * (2 * radius + 1)
    one_over_columns = _one_over_count(x.shape[2], radius, x.dtype).swapaxes(1, 2)
    x = _correlate(x, taps, 1) * one_over_rows
    return _correlate(_pad(x, radius, 2), taps, 2) * one_over_columns


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
    ab = box_filter(_fit(small_guide, small_x, radius, eps), radius)
    return _linear_model(ab, guide)


def _fit(i: Array, p: Array, radius: int, eps: float) -> Float[Array, "b h w c2"]:
    """The models (a, b) of all windows."""

    def f(i, p, means):
        # One box filter for the four means.
        four = means(jnp.concatenate([i, p, i * p, i * i], axis=-1))
        mean_i, mean_p, mean_ip, mean_ii = jnp.split(four, 4, axis=-1)
        a = (mean_ip - mean_i * mean_p) / (mean_ii - mean_i * mean_i + eps)
        return jnp.concatenate([a, mean_p - a * mean_i], axis=-1)

    return _map_windows(f, radius, i, p)


def _linear_model(ab: Float[Array, "b h w c2"], guide: Float[Array, "b H W c"]) -> Array:
    """`a guide + b`, a and b upsampled bilinearly to the guide's size."""
    ratio = whole_ratio(ab.shape[1:3], guide.shape[1:3])
    if ratio is None:
        a, b = jnp.split(resize(ab, guide.shape[1:3]), 2, axis=-1)
        return a * guide + b

    def f(_, blocks):
        ab, guide = blocks
        a, b = jnp.split(upsample_extended(ab, ratio), 2, axis=-1)
        return (a * guide + b,)

    # In blocks of rows: the gradient would keep both at full size.
    n, h, w, c = guide.shape
    rows = block_rows(h // ratio[0], n * w * ratio[0] * 2 * c)
    inputs = (Rows(1, rows, rows + 2), Rows(1, rows * ratio[0], rows * ratio[0]))
    count = h // ratio[0] // rows
    (out,) = map_row_blocks(f, count, inputs, inputs[1:], (), (extend(ab, 1), guide))
    return out


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
