"""Fine-grained neighbours on a CPU, at whole ratios: phase by phase of a low-resolution cell.

The pixels of one phase (p mod s) share their fractions. With M[p, u, t] the weight of tap u on
low-resolution pixel t, the attention is composed to weights on the (K + 2)^2 pixels around the
cell,

    weight[p, q, t, s] = sum_uv attn[u, v] M[p, u, t] M[q, v, s]
    out[a s + p, b s + q] = sum_ts weight[p, q, t, s] x[a + t, b + s],

with x extended by replication: no upsampled copy of x and no gather. Forward, the sum is a chain of
broadcast products, which XLA fuses into the pass that writes the output. Backward, both gradients
are matrix products per patch of cells.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from resfu_jax.ops._cpu import cells
from resfu_jax.ops._rows import map_row_blocks
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.pad import pad
from resfu_jax.ops.sizes import whole_ratio


def fns_attention(attn: Array, x: Array, *, tile: int | None) -> Array:
    """Form of `ops.fns_attention`."""
    k, ratio = math.isqrt(attn.shape[3]), whole_ratio(x.shape[1:3], attn.shape[1:3])
    dtype = at_least_float32(x.dtype)
    padded = pad(x.astype(dtype), (k // 2 + 1,) * 2, "edge")

    def block(attn, padded):
        attn = attn.astype(at_least_float32(attn.dtype))
        weights = _compose(attn, k, ratio).astype(dtype)
        return (cells.reassemble(weights, padded).astype(x.dtype),)

    # The composed weights are larger than the attention: backward, they are made block by block.
    out_shape = (*attn.shape[:3], x.shape[3])
    count, windows, pixels = cells.blocks(out_shape, padded.shape, k + 2, tile)
    (out,) = map_row_blocks(
        block, count, (pixels, windows), (pixels,), attn, padded, whole_forward=tile is None
    )
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _compose(attn: Array, k: int, ratio: tuple[int, int]) -> Array:
    """Attention (b, H, W, K*K) to weights (b, H, W, 1, (K + 2)**2) on the pixels of the cell."""
    b, hh, ww, _ = attn.shape
    attn = attn.reshape(b, hh // ratio[0], ratio[0], ww // ratio[1], ratio[1], k, k)
    weights = _on_pixels(attn, *(_phase_weights(r, k) for r in ratio))
    return weights.reshape(b, hh, ww, 1, -1)


def _on_pixels(
    attn: Float[Array, "b h p w q u v"], rows: np.ndarray, cols: np.ndarray
) -> Float[Array, "b h p w q t s"]:
    """Composes the taps' attention with `_phase_weights` of rows (p u t) and columns (q v s)."""
    rows, cols = (jnp.asarray(m, attn.dtype) for m in (rows, cols))
    rows = rows[None, None, :, None, None, :, :, None]  # b h p w q u t v
    cols = cols[None, None, None, None, :, None, :, :]  # b h p w q t v s
    # Broadcast sums over the two short axes of taps: as matrix products they would be transposed.
    attn = sum(attn[..., u, None, :] * rows[..., u, :, :] for u in range(attn.shape[5]))
    return sum(attn[..., v, None] * cols[..., v, :] for v in range(attn.shape[6]))


def _compose_bwd(k, ratio, _, g):
    b, hh, ww, *_ = g.shape
    g = g.reshape(b, hh // ratio[0], ratio[0], ww // ratio[1], ratio[1], k + 2, k + 2)
    rows, cols = (jnp.asarray(_phase_weights(r, k), g.dtype) for r in ratio)
    g = jnp.einsum("bhpwqts,put,qvs->bhpwquv", g, rows, cols, optimize=True)
    return (g.reshape(b, hh, ww, k * k),)


_compose.defvjp(lambda attn, k, ratio: (_compose(attn, k, ratio), None), _compose_bwd)


def _phase_weights(ratio: int, kernel_size: int) -> np.ndarray:
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
