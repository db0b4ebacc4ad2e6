"""Windows on a CPU: broadcast sums forward, products per patch of cells backward.

Both at whole ratios only. Blocks of rows keep what is made of a block in the cache.
"""

import math

import jax
from jaxtyping import Array

from resfu_jax.ops._cpu import cells
from resfu_jax.ops._rows import map_row_blocks
from resfu_jax.ops.dtypes import at_least_float32, promote
from resfu_jax.ops.pad import Mode, pad


def similarity(q: Array, k: Array, *, kernel_size: int) -> Array:
    """Form of `ops.local_similarity`."""
    padded = pad(k.astype(at_least_float32(q.dtype)), (kernel_size // 2,) * 2)
    count, windows, pixels = cells.blocks(q.shape, padded.shape, kernel_size)

    def block(q, padded):
        out = cells.correlate(q.astype(padded.dtype), padded, kernel_size)
        return (out[..., 0, :].astype(q.dtype),)

    (out,) = map_row_blocks(block, count, (pixels, windows), (pixels,), q, padded)
    return out


def attention(
    scores: Array, scale: Array | None, v: Array, *, groups: int, softmax: bool, border: Mode
) -> Array:
    """Form of `ops.local_attention` and, without the softmax, of `ops.local_reassembly`."""
    dtype, taps = at_least_float32(v.dtype), scores.shape[3] // groups
    kernel_size = math.isqrt(taps)

    def block(scores, scale, padded):
        weights = scores.astype(promote(scores.dtype, dtype))
        weights = weights.reshape(*scores.shape[:3], groups, taps)
        weights = (jax.nn.softmax(weights) if softmax else weights).astype(dtype)
        if scale is not None:
            weights = weights * scale.astype(dtype)[..., None]
        return (cells.reassemble(weights, padded).astype(v.dtype),)

    padded = pad(v.astype(dtype), (kernel_size // 2,) * 2, border)
    out_shape = (*scores.shape[:3], v.shape[3])
    count, windows, pixels = cells.blocks(out_shape, padded.shape, kernel_size)
    inputs = pixels, None if scale is None else pixels, windows
    (out,) = map_row_blocks(
        block, count, inputs, (pixels,), scores, scale, padded, whole_forward=True
    )
    return out
