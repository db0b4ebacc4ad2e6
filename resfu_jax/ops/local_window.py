"""Local windows: every output pixel sees the K x K low-resolution pixels around its own cell.

Output pixel p of an axis lies in cell floor(p n_in / n_out), as in nearest-neighbour resizing. The
two halves of local-window attention, with zeros beyond the image:

    similarity[p, uv] = <q[p], k[cell(p) + (u, v) - r]>
    out[p] = sum_uv weights[p, uv] v[cell(p) + (u, v) - r],         r = (K - 1) / 2

Out-of-range keys have similarity 0 and out-of-range values add nothing: a softmax over the window
keeps their share, and borders come out weaker. So do the published operators. The values can also
be continued by those of the border.

Sources: CARAFE (Wang et al., ICCV 2019) for the reassembly; SAPA (Lu et al., NeurIPS 2022) for the
similarity.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops._cpu import windows as cpu
from resfu_jax.ops._forms import Form, Forms, Implementation, needs_whole_ratio
from resfu_jax.ops._pallas import windows as pallas
from resfu_jax.ops._xla import windows as xla
from resfu_jax.ops.checks import takes_maps
from resfu_jax.ops.dtypes import at_least_float32, promote
from resfu_jax.ops.pad import Mode
from resfu_jax.ops.sizes import Size, cell_index
from resfu_jax.ops.unfold import unfold


@takes_maps("q", "k")
def local_similarity(
    q: Float[Array, "b H W d"],
    k: Float[Array, "b h w d"],
    *,
    kernel_size: int,
    implementation: Implementation | None = None,
) -> Float[Array, "b H W taps"]:
    """Inner product of every query with the K x K keys around its cell.

    Args:
      q: queries at high resolution.
      k: keys at low resolution.
      kernel_size: K, odd.
      implementation: `"reference"` gathers every query's window; `"xla"` makes matrix products of
        strips of queries with all keys around them; `"cpu"`, for whole ratios, with those of a few
        cells, block by block. `None` takes the best of the platform.

    Returns:
      K*K similarities, row-major, in the dtype of q; sums are in float32 or better.

    Raises:
      ValueError: shapes that do not fit, an even K, or an `implementation` that does not apply.
    """
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q (B, H, W, d) and k (B, h, w, d) must have 4 axes and the same batch size and "
            f"channels, got {q.shape} and {k.shape}"
        )
    _check_odd(kernel_size)
    return _SIMILARITY(implementation, q, k, kernel_size=kernel_size)


def _similarity(q: Array, k: Array, *, kernel_size: int) -> Array:
    dtype = at_least_float32(q.dtype)
    windows = _gather(k, q.shape[1:3], kernel_size).astype(dtype)
    return jnp.einsum("bhwd,bhwtd->bhwt", q.astype(dtype), windows).astype(q.dtype)


@takes_maps("weights", "v")
def local_reassembly(
    weights: Float[Array, "b H W taps"],
    v: Float[Array, "b h w c"],
    *,
    groups: int = 1,
    border: Mode = "constant",
    implementation: Implementation | None = None,
) -> Float[Array, "b H W c"]:
    """Weighted sum of the K x K values around every output pixel's cell.

    `local_attention` with the weights as they are: arguments, result and errors are its.
    """
    _check(weights, v, None, groups)
    options = dict(groups=groups, softmax=False, border=border)
    return _ATTENTION(implementation, weights, None, v, **options)


@takes_maps("scores", "v", "scale")
def local_attention(
    scores: Float[Array, "b H W taps"],
    v: Float[Array, "b h w c"],
    *,
    scale: Float[Array, "b H W groups"] | None = None,
    groups: int = 1,
    border: Mode = "constant",
    implementation: Implementation | None = None,
) -> Float[Array, "b H W c"]:
    """`local_reassembly` with the softmax of scores, which is not kept for the gradient.

    Args:
      scores: K*K of every output pixel, row-major; with groups, those of group g are
        [g K*K, (g + 1) K*K) and apply to the g-th contiguous block of channels. -inf leaves a tap
        out.
      v: values at low resolution.
      scale: factor of all weights of an output pixel and group, 1 if not given.
      groups: groups of channels with weights of their own.
      border: what lies beyond the image, as in `ops.pad`: `"constant"`, zeros; `"edge"`, the border
        repeated; `"reflect"`, the image reflected.
      implementation: `"reference"` gathers every pixel's window; `"xla"` spreads the weights of a
        strip of pixels over all values around them, for one matrix product; `"cpu"`, for whole
        ratios, sums up shifted maps; `"pallas"`, for whole ratios on a TPU, is `"xla"` without the
        spread weights ever leaving the chip. `None` takes the best of the platform.

    Returns:
      Values at (H, W), in the dtype of v; sums and the softmax are in float32 or better.

    Raises:
      ValueError: shapes that do not fit, an even K, or an `implementation` that does not apply.
    """
    _check(scores, v, scale, groups)
    options = dict(groups=groups, softmax=True, border=border)
    return _ATTENTION(implementation, scores, scale, v, **options)


def _attention(
    scores: Array, scale: Array | None, v: Array, *, groups: int, softmax: bool, border: Mode
) -> Array:
    dtype, taps = at_least_float32(v.dtype), scores.shape[3] // groups
    weights = scores.astype(promote(scores.dtype, dtype))
    weights = weights.reshape(*scores.shape[:3], groups, taps)
    if softmax:
        weights = jax.nn.softmax(weights)
    if scale is not None:
        weights = weights * scale.astype(weights.dtype)[..., None]
    windows = _gather(v, scores.shape[1:3], math.isqrt(taps), border).astype(dtype)
    windows = windows.reshape(*windows.shape[:4], groups, -1)
    out = jnp.einsum("bhwgt,bhwtgc->bhwgc", weights.astype(dtype), windows)
    return out.reshape(*out.shape[:3], -1).astype(v.dtype)


def _gather(
    x: Array, size: tuple[Size, Size], kernel_size: int, border: Mode = "constant"
) -> Float[Array, "b H W taps c"]:
    windows = unfold(x, kernel_size, padding=kernel_size // 2, pad_mode=border)
    for axis in (1, 2):
        index = cell_index(x.shape[axis], size[axis - 1])
        windows = jnp.take(windows, index, axis=axis, mode="clip")
    return windows


_SIMILARITY = Forms(
    "local_similarity",
    _similarity,
    xla=xla.similarity,
    cpu=Form(cpu.similarity, needs_whole_ratio),
)
_ATTENTION = Forms(
    "local_attention",
    _attention,
    xla=xla.attention,
    cpu=Form(cpu.attention, needs_whole_ratio),
    pallas=pallas.attention,
)


def _check(scores: Array, v: Array, scale: Array | None, groups: int) -> None:
    if scores.ndim != 4 or v.ndim != 4 or scores.shape[0] != v.shape[0]:
        raise ValueError(
            "weights (B, H, W, groups*K*K) and v (B, h, w, C) must have 4 axes and the same batch "
            f"size, got {scores.shape} and {v.shape}"
        )
    if groups < 1 or v.shape[3] % groups or scores.shape[3] % groups:
        raise ValueError(
            f"groups must divide the channels of v ({v.shape[3]}) and of the weights "
            f"({scores.shape[3]}), got {groups}"
        )
    taps = scores.shape[3] // groups
    kernel_size = math.isqrt(taps)
    if kernel_size**2 != taps:
        raise ValueError(f"weights must have groups * K*K channels, got {scores.shape[3]}")
    _check_odd(kernel_size)
    if scale is not None and scale.shape != (*scores.shape[:3], groups):
        raise ValueError(
            f"scale must be a factor for every pixel and group, {(*scores.shape[:3], groups)}, "
            f"got shape {scale.shape}"
        )


def _check_odd(kernel_size: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
