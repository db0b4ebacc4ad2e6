"""Fine-grained neighbours on a CPU, at whole ratios: phase by phase of a low-resolution cell.

The pixels of one phase (p mod s) share their fractions. With M[p, u, t] the weight of tap u on
low-resolution pixel t, the attention is composed to weights on the (K + 2)^2 pixels around the
cell,

    weight[p, q, t, s] = sum_uv attn[u, v] M[p, u, t] M[q, v, s]
    out[a s + p, b s + q] = sum_ts weight[p, q, t, s] x[a + t, b + s],

with x extended by replication: no upsampled copy of x and no gather. Forward, the sum is a chain of
broadcast products, which XLA fuses into the pass that writes the output. At even ratios above 2
it is made for the halves of a cell along each axis, which see (K + 1)^2 pixels only. Backward, both
gradients are matrix products per cell.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from resfu_jax.ops._cpu import cells
from resfu_jax.ops._cpu.rows import map_row_blocks
from resfu_jax.ops._polyphase import extend, phase_weights
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.sizes import whole_ratio


def fns_attention(attn: Array, x: Array, *, tile: int | None) -> Array:
    """Form of `ops.fns_attention`."""
    k, ratio = math.isqrt(attn.shape[3]), whole_ratio(x.shape[1:3], attn.shape[1:3])
    dtype = at_least_float32(x.dtype)
    padded = extend(x, k // 2 + 1).astype(dtype)

    def f(_, blocks):
        attn, padded = blocks
        weights = _compose(attn.astype(at_least_float32(attn.dtype)), k, ratio)
        return (cells.reassemble(weights.astype(dtype), padded).astype(x.dtype),)

    def whole(_, arrays):
        attn, padded = arrays
        if not halves:
            return f(None, arrays)
        return (_reassemble_half_cells(attn.astype(dtype), padded, k, ratio).astype(x.dtype),)

    halves = all(r > 2 and r % 2 == 0 for r in ratio)
    forward = None if tile is not None else whole
    # The composed weights are larger than the attention: backward, they are made block by block.
    out_shape = (*attn.shape[:3], x.shape[3])
    count, windows, pixels = cells.blocks(out_shape, padded.shape, k + 2, tile)
    (out,) = map_row_blocks(
        f, count, (pixels, windows), (pixels,), (), (attn, padded), forward=forward
    )
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _compose(attn: Array, k: int, ratio: tuple[int, int]) -> Array:
    """Attention (b, H, W, K*K) to weights (b, H, W, 1, (K + 2)**2) on the pixels of the cell."""
    b, hh, ww, _ = attn.shape
    attn = attn.reshape(b, hh // ratio[0], ratio[0], ww // ratio[1], ratio[1], k, k)
    weights = _on_pixels(attn, *(phase_weights(r, k) for r in ratio))
    return weights.reshape(b, hh, ww, 1, -1)


def _on_pixels(
    attn: Float[Array, "b h p w q u v"], rows: np.ndarray, cols: np.ndarray
) -> Float[Array, "b h p w q t s"]:
    """Composes the taps' attention with `phase_weights` of rows (p u t) and columns (q v s)."""
    rows, cols = (jnp.asarray(m, attn.dtype) for m in (rows, cols))
    rows = rows[None, None, :, None, None, :, :, None]  # b h p w q u t v
    cols = cols[None, None, None, None, :, None, :, :]  # b h p w q t v s
    # Broadcast sums over the two short axes of taps: as matrix products they would be transposed.
    attn = sum(attn[..., u, None, :] * rows[..., u, :, :] for u in range(attn.shape[5]))
    return sum(attn[..., v, None] * cols[..., v, :] for v in range(attn.shape[6]))


def _compose_bwd(k, ratio, _, g):
    b, hh, ww, *_ = g.shape
    g = g.reshape(b, hh // ratio[0], ratio[0], ww // ratio[1], ratio[1], k + 2, k + 2)
    rows, cols = (jnp.asarray(phase_weights(r, k), g.dtype) for r in ratio)
    g = jnp.einsum("bhpwqts,put,qvs->bhpwquv", g, rows, cols, optimize=True)
    return (g.reshape(b, hh, ww, k * k),)


_compose.defvjp(lambda attn, k, ratio: (_compose(attn, k, ratio), None), _compose_bwd)


def _reassemble_half_cells(attn: Array, padded: Array, k: int, ratio: tuple[int, int]) -> Array:
    """`cells.reassemble` of the composed attention, for even ratios, with fewer products.

    Along an axis, the phases of a cell's first half do not reach the last of its K + 2 pixels, and
    those of its second half not the first one. So each half sees K + 1.
    """
    b, hh, ww, _ = attn.shape
    (h, w), (p, q) = (hh // ratio[0], ww // ratio[1]), (r // 2 for r in ratio)
    rows, cols = (_half_phase_weights(r, k) for r in ratio)
    attn = attn.reshape(b, h, ratio[0], w, ratio[1], k, k)
    weights = _on_pixels(attn, rows, cols).reshape(b, h, 2, p, w, 2, q, k + 1, k + 1)
    # doubled[:, a, half] is the first row that half of cell a sees; its t-th one is at a + t.
    doubled = jnp.stack([padded[:, :-1], padded[:, 1:]], axis=2)
    doubled = jnp.stack([doubled[:, :, :, :-1], doubled[:, :, :, 1:]], axis=4)
    out = 0
    for t in range(k + 1):
        for s in range(k + 1):
            shifted = doubled[:, t : t + h, :, None, s : s + w, :, None]
            out = out + weights[..., t, s, None] * shifted
    return out.reshape(b, hh, ww, -1)


def _half_phase_weights(ratio: int, k: int) -> np.ndarray:
    """`phase_weights` on the K + 1 pixels that a phase's half of the cell sees."""
    first, second = np.split(phase_weights(ratio, k), 2)
    return np.concatenate([first[..., :-1], second[..., 1:]])
