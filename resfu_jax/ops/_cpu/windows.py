"""Windows on a CPU: broadcast sums forward, products per patch of cells backward.

Both at whole ratios only. Blocks of rows keep what is made of a block in the cache.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array

from resfu_jax.ops._cpu import cells
from resfu_jax.ops._cpu.cast import cast
from resfu_jax.ops._cpu.rows import Bordered, Rows, map_row_blocks
from resfu_jax.ops._cpu.softmax import softmax as over_taps
from resfu_jax.ops.dtypes import at_least_float32, promote
from resfu_jax.ops.sizes import Size


def similarity(q: Array, k: Array, *, kernel_size: int) -> Array:
    """Form of `ops.local_similarity`."""
    padded = _pad(k.astype(at_least_float32(q.dtype)), kernel_size)
    return cells.correlate(q, padded, kernel_size)[..., 0, :]


def attention(scores: Array, scale: Array | None, v: Array, *, groups: int, softmax: bool) -> Array:
    """Form of `ops.local_attention` and, without the softmax, of `ops.local_reassembly`."""
    dtype, taps = at_least_float32(v.dtype), scores.shape[3] // groups
    kernel_size = math.isqrt(taps)
    narrow = (scores,) if scale is None else (scores, scale)

    def weights_of(scores, *scale):
        scores = scores.astype(promote(scores.dtype, dtype))
        weights = scores.reshape(*scores.shape[:3], groups, taps)
        weights = (over_taps(weights) if softmax else weights).astype(dtype)
        for factor in scale:
            weights = weights * factor.astype(dtype)[..., None]
        return weights

    def block(_, arrays):
        *narrow, padded = arrays
        out = cells.reassemble(weights_of(*narrow), padded.astype(dtype))
        return (out.astype(v.dtype),)

    def whole(_, arrays):
        *narrow, v = arrays
        weights, padded = weights_of(*narrow), _pad(v, kernel_size)
        return (cast(cells.reassemble(weights, padded.astype(dtype)), v.dtype),)

    count, windows, pixels = _blocks(v, scores.shape[1:3], kernel_size)
    inputs = (*[pixels] * len(narrow), windows)
    (out,) = map_row_blocks(
        block, count, inputs, (pixels,), (), (*narrow, v), forward=whole, in_place=True
    )
    return out


def _pad(x: Array, kernel_size: int) -> Array:
    r = kernel_size // 2
    return jnp.pad(x, ((0, 0), (r, r), (r, r), (0, 0)))


def _blocks(v: Array, size: tuple[Size, Size], kernel_size: int) -> tuple[Size, Bordered, Rows]:
    """Number of blocks of rows; the windows in v, with a border, and the output pixels of each."""
    b, h, w, c = v.shape
    border = kernel_size // 2
    padded_shape = (b, h + 2 * border, w + 2 * border, c)
    count, windows, pixels = cells.blocks((b, *size, c), padded_shape, kernel_size)
    return count, Bordered(windows.step, windows.length, border), pixels
