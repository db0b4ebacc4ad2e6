"""Local windows: every output pixel sees the K x K low-resolution pixels around its own cell.

Output pixel p of an axis lies in cell floor(p n_in / n_out), as in nearest-neighbour resizing. The
two halves of local-window attention, both with zeros beyond the image:

    similarity[p, uv] = <q[p], k[cell(p) + (u, v) - r]>
    out[p] = sum_uv weights[p, uv] v[cell(p) + (u, v) - r],         r = (K - 1) / 2

Out-of-range keys have similarity 0 and out-of-range values add nothing: a softmax over the window
keeps their share, and borders come out weaker. So do the published operators.

Sources: CARAFE (Wang et al., ICCV 2019) for the reassembly; SAPA (Lu et al., NeurIPS 2022) for the
similarity.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from resfu_jax.ops import _cells
from resfu_jax.ops._checks import takes_maps
from resfu_jax.ops._dtypes import at_least_float32, cast, promote
from resfu_jax.ops._interp import Size, divide_products
from resfu_jax.ops._order import later, zeros_after, zeros_once
from resfu_jax.ops._polyphase import whole_ratio
from resfu_jax.ops._row_blocks import (
    Bordered,
    Rows,
    add,
    cut,
    loop,
    map_row_blocks,
    put,
)
from resfu_jax.ops._softmax import softmax, softmax_gradient
from resfu_jax.ops.pixel_shuffle import pixel_shuffle, pixel_unshuffle
from resfu_jax.ops.unfold import unfold

Implementation = Literal["reference", "polyphase"]

_GRADIENT_BLOCKS = 32  # at least, in `shuffled_attention`


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
      implementation: `"reference"` gathers every query's window, at any pair of sizes;
        `"polyphase"` makes one matrix product per cell and needs H and W to be whole multiples of
        h and w. `None` chooses.

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
    dtype = at_least_float32(q.dtype)
    if _polyphase(implementation, k.shape[1:3], q.shape[1:3]):
        padded = _pad(k.astype(dtype), kernel_size)
        return _cells.correlate(q, padded, kernel_size)[..., 0, :]
    windows = _gather(k, q.shape[1:3], kernel_size).astype(dtype)
    return jnp.einsum("bhwd,bhwtd->bhwt", q.astype(dtype), windows).astype(q.dtype)


@takes_maps("weights", "v")
def local_reassembly(
    weights: Float[Array, "b H W taps"],
    v: Float[Array, "b h w c"],
    *,
    groups: int = 1,
    implementation: Implementation | None = None,
) -> Float[Array, "b H W c"]:
    """Weighted sum of the K x K values around every output pixel's cell.

    `local_attention` with the weights as they are: arguments, result and errors are its.
    """
    return local_attention(
        weights, v, weigh=lambda weights: weights, groups=groups, implementation=implementation
    )


@takes_maps("scores", "v", "scale")
def local_attention(
    scores: Float[Array, "b H W taps"],
    v: Float[Array, "b h w c"],
    *,
    scale: Float[Array, "b H W groups"] | None = None,
    weigh: Callable[[Array], Array] = softmax,
    groups: int = 1,
    implementation: Implementation | None = None,
) -> Float[Array, "b H W c"]:
    """`local_reassembly` with weights made of scores, which are not kept for the gradient.

    Args:
      scores: K*K of every output pixel, row-major; with groups, those of group g are
        [g K*K, (g + 1) K*K) and apply to the g-th contiguous block of channels.
      v: values at low resolution.
      scale: factor of all weights of an output pixel and group, 1 if not given.
      weigh: makes weights of scores `(B, H, W, groups, K*K)` in float32 or better, every pixel and
        group by itself: the softmax over the K*K if not given.
      groups: groups of channels with weights of their own.
      implementation: as in `local_similarity`.

    Returns:
      Values at (H, W), in the dtype of v; sums are in float32 or better.

    Raises:
      ValueError: shapes that do not fit, an even K, or an `implementation` that does not apply.
    """
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
    dtype = at_least_float32(v.dtype)
    narrow = (scores,) if scale is None else (scores, scale)

    def weights_of(scores, *scale):
        scores = scores.astype(promote(scores.dtype, dtype))
        weights = weigh(scores.reshape(*scores.shape[:3], groups, taps)).astype(dtype)
        for factor in scale:
            weights = weights * factor.astype(dtype)[..., None]
        return weights

    if not _polyphase(implementation, v.shape[1:3], scores.shape[1:3]):
        windows = _gather(v, scores.shape[1:3], kernel_size).astype(dtype)
        windows = windows.reshape(*windows.shape[:4], groups, -1)
        out = jnp.einsum("bhwgt,bhwtgc->bhwgc", weights_of(*narrow), windows)
        return out.reshape(*out.shape[:3], -1).astype(v.dtype)

    def block(_, arrays):
        *narrow, padded = arrays
        out = _cells.reassemble(weights_of(*narrow), padded.astype(dtype))
        return (out.astype(v.dtype),)

    def whole(_, arrays):
        *narrow, v = arrays
        return (_reassemble_whole(weights_of(*narrow), v),)

    count, windows, pixels = _blocks(v, scores.shape[1:3], kernel_size)
    inputs = (*[pixels] * len(narrow), windows)
    (out,) = map_row_blocks(block, count, inputs, (pixels,), (), (*narrow, v), forward=whole)
    return out


@takes_maps("scores", "v")
def shuffled_attention(
    scores: Float[Array, "b h w d"],
    v: Float[Array, "b h w c"],
    *,
    kernel_size: int,
    groups: int = 1,
    implementation: Implementation | None = None,
) -> Float[Array, "b H W c"]:
    """`local_attention` with scores that still are at low resolution, before a pixel shuffle.

    Args:
      scores: `(B, h, w, groups*K*K * s*s)` for an output of s times the size of v; `pixel_shuffle`
        gives those that `local_attention` takes.
      v: values at low resolution.
      kernel_size: K, odd.
      groups: groups of channels with weights of their own.
      implementation: `"reference"` shuffles the scores and gathers every pixel's window;
        `"polyphase"` never has the shuffled ones. `None` takes `"polyphase"`.

    Returns:
      Values at (s h, s w), in the dtype of v; sums are in float32 or better.

    Raises:
      ValueError: shapes that do not fit, an even K, or an unknown `implementation`.
    """
    if scores.ndim != 4 or v.ndim != 4 or scores.shape[:3] != v.shape[:3]:
        raise ValueError(
            "scores (B, h, w, channels) and v (B, h, w, C) must have 4 axes and the same batch and "
            f"size, got {scores.shape} and {v.shape}"
        )
    _check_odd(kernel_size)
    if groups < 1 or v.shape[3] % groups:
        raise ValueError(f"groups must divide the channels of v ({v.shape[3]}), got {groups}")
    taps = kernel_size**2
    ratio = math.isqrt(scores.shape[3] // (groups * taps))
    if ratio < 1 or groups * taps * ratio**2 != scores.shape[3]:
        raise ValueError(
            f"scores must have groups * K*K * s*s = {groups * taps} s*s channels, "
            f"got {scores.shape[3]}"
        )
    out_size = tuple(n * ratio for n in v.shape[1:3])
    if not _polyphase(implementation, v.shape[1:3], out_size):
        scores = pixel_shuffle(scores, ratio)
        return local_attention(scores, v, groups=groups, implementation="reference")
    scores = scores.astype(promote(scores.dtype, at_least_float32(v.dtype)))
    return _shuffled_attention(scores, v, groups, taps, ratio)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _shuffled_attention(scores: Array, v: Array, groups: int, taps: int, ratio: int) -> Array:
    return _reassemble_whole(_shuffled_softmax(scores, groups, taps, ratio), v)


def _shuffled_attention_fwd(scores, v, groups, taps, ratio):
    b, h, w, _ = v.shape
    count, windows, _ = _blocks(v, (ratio * h, ratio * w), math.isqrt(taps))
    rows = Rows(1, windows.step, windows.step)

    def body(i, flat):
        (block,) = cut((flat,), i, (rows,))
        weights = _shuffled_softmax(block.reshape(b, -1, w, scores.shape[3]), groups, taps, ratio)
        return put(flat, weights.reshape(block.shape), i, rows)

    # The weights take the place of the scores, of which each row has as many.
    weights = loop(count, body, scores.reshape(b, h, -1))
    weights = weights.reshape(b, ratio * h, ratio * w, groups, taps)
    out = _reassemble_whole(weights, v)
    weights = weights.reshape(b, h, -1)
    # The branch would read a whole copy of a narrow result, in float32.
    once = zeros_once(out) if v.dtype == weights.dtype else jnp.zeros(b, weights.dtype)
    return out, (weights, v, once)


def _shuffled_attention_bwd(groups, taps, ratio, saved, g):
    weights, v, once = saved
    (b, h, w, c), kernel_size = v.shape, math.isqrt(taps)
    # Of a small map, too, many blocks: beside the weights, one block is most of the memory.
    size = ratio * h, ratio * w
    count, windows, pixels = _blocks(v, size, kernel_size, at_least=_GRADIENT_BLOCKS)
    rows = Rows(1, windows.step, windows.step)
    window_shape = (b, windows.length, w + kernel_size - 1, c)

    def by_pixel(block):
        return block.reshape(b, -1, ratio * w, groups, taps)

    def by_tap(x):
        x = pixel_unshuffle(x.reshape(b, -1, ratio * w, groups * taps), ratio)
        return x.reshape(b, -1, w, groups, taps, ratio**2)

    def body(i, state):
        weights, d_v = state
        # In this order: of a small map one block's arrays, all at once, are most of the memory. And
        # all that reads the block comes before it is replaced, or XLA copies the weights.
        block, d_out = cut((weights, g), i, (rows, pixels))
        d_out = d_out.astype(weights.dtype)
        products = _cells.patch_products(by_pixel(block), d_out, window_shape)
        d_window = _cells.overlap_add(products, window_shape, kernel_size, (ratio, ratio))
        d_v = add(d_v, d_window, later(i, products), windows)
        (window,) = cut((v,), later(i, d_v), (windows,))
        d_weights = _cells.correlate(d_out, window.astype(d_out.dtype), kernel_size, groups)
        i = later(i, d_weights)
        (block,) = cut((weights,), i, (rows,))
        d_scores = softmax_gradient(by_tap(by_pixel(block)), by_tap(d_weights), axis=4)
        return put(weights, d_scores.reshape(block.shape), i, rows), d_v

    # The gradient to the scores takes the place of the weights, once the output is made of them.
    d_v = zeros_after(g, v.shape, once.dtype) + once[:, None, None, None]
    d_scores, d_v = loop(count, body, (weights, d_v))
    return d_scores.reshape(b, h, w, -1), d_v.astype(v.dtype)


_shuffled_attention.defvjp(_shuffled_attention_fwd, _shuffled_attention_bwd)


def _shuffled_softmax(scores: Array, groups: int, taps: int, ratio: int) -> _cells.Weights:
    scores = pixel_shuffle(scores, ratio)
    return softmax(scores.reshape(*scores.shape[:3], groups, taps))


def cell_index(n_in: Size, n_out: Size) -> Int[Array, " n"]:
    """The cell floor(p n_in / n_out) of every output pixel p of an axis."""
    return divide_products(n_out, n_in, n_out)[0]


def _gather(x: Array, size: tuple[Size, Size], kernel_size: int) -> Float[Array, "b H W taps c"]:
    windows = unfold(x, kernel_size, padding=kernel_size // 2)
    for axis in (1, 2):
        index = cell_index(x.shape[axis], size[axis - 1])
        windows = jnp.take(windows, index, axis=axis, mode="clip")
    return windows


def _pad(x: Array, kernel_size: int) -> Array:
    r = kernel_size // 2
    return jnp.pad(x, ((0, 0), (r, r), (r, r), (0, 0)))


def _blocks(
    v: Array, size: tuple[Size, Size], kernel_size: int, *, at_least: int = 1
) -> tuple[Size, Bordered, Rows]:
    """Number of blocks of rows; the windows in v, with a border, and the output pixels of each."""
    b, h, w, c = v.shape
    border = kernel_size // 2
    padded_shape = (b, h + 2 * border, w + 2 * border, c)
    count, windows, pixels = _cells.blocks(
        (b, *size, c), padded_shape, kernel_size, at_least=at_least
    )
    return count, Bordered(windows.step, windows.length, border), pixels


def _reassemble_whole(weights: _cells.Weights, v: Array) -> Array:
    """Sums of all windows in the dtype of v."""
    # Padded, and widened, once the weights are computed, not beside what they are made of.
    zero = zeros_after(weights, (v.shape[0], 1, 1, 1), v.dtype)
    padded = _pad(jnp.where(zero > 0, zero, v), math.isqrt(weights.shape[4]))
    return cast(_cells.reassemble(weights, padded.astype(weights.dtype)), v.dtype)


def _polyphase(implementation: str | None, size, out_size) -> bool:
    """Whether to take the polyphase form."""
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(
            f"implementation must be one of {get_args(Implementation)} or None, "
            f"got {implementation!r}"
        )
    whole = whole_ratio(size, out_size) is not None
    if implementation == "polyphase" and not whole:
        raise ValueError(
            f"implementation='polyphase' needs whole ratios, got {size} to {out_size}; "
            "use 'reference' or None"
        )
    return whole and implementation != "reference"


def _check_odd(kernel_size: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
