"""Fine-grained neighbour selection of ReSFU: attention over sub-pixel shifted neighbours.

Tap (u, v) of output pixel p samples the low-resolution map bilinearly at p's own exact position,
moved by whole low-resolution pixels:

    s(p) = (p + 1/2) n_in / n_out - 1/2,      out[p] = sum_uv attn[p, uv] x[s(p) + (u, v) - r],

r = (K - 1) / 2, positions clamped to the map. Neighbouring output pixels thus read slightly
different neighbours, without the mosaic that a shared window leaves at high ratios.

**Polyphase form.** At a whole ratio s the pixels of one phase (p mod s) share their fractions. With
M[p, u, t] the weight of tap u on low-resolution pixel t, the attention is composed to weights on
the (K + 2)^2 pixels around the low-resolution cell,

    weight[p, q, t, s] = sum_uv attn[u, v] M[p, u, t] M[q, v, s]
    out[a s + p, b s + q] = sum_ts weight[p, q, t, s] x[a + t, b + s],

with x extended by replication: no upsampled copy of x and no gather. Forward, the sum is a chain of
broadcast products, which XLA fuses into the pass that writes the output. At even ratios above 2
it is made for the halves of a cell along each axis, which see (K + 1)^2 pixels only. Backward, both
gradients are matrix products per cell.

Source: "A Refreshed Similarity-based Upsampler for Direct High-Ratio Feature Upsampling", the
`fns_attn` operator. The gradient to x is the true one; the official CUDA backward loses the
contributions of positions that lie exactly on the last row or column.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from resfu_jax.ops import _cells
from resfu_jax.ops._checks import takes_maps
from resfu_jax.ops._dtypes import at_least_float32
from resfu_jax.ops._interp import half_pixel_taps, take_clamped
from resfu_jax.ops._order import after
from resfu_jax.ops._polyphase import extend, phase_weights, whole_ratio
from resfu_jax.ops._row_blocks import map_row_blocks

Implementation = Literal["reference", "polyphase"]


@takes_maps("attn", "x")
def fns_attention(
    attn: Float[Array, "b H W taps"],
    x: Float[Array, "b h w c"],
    *,
    implementation: Implementation | None = None,
    tile: int | None = None,
) -> Float[Array, "b H W c"]:
    """Sum of fine-grained neighbours weighted by `attn`; see the module's docstring.

    Args:
      attn: one weight per output pixel and neighbour, K*K of them in row-major order, K odd. Any
        values; convex ones (a softmax) give convex combinations of x.
      x: low-resolution features.
      implementation: `"reference"` samples the neighbours one after the other, at any pair of
        sizes; `"polyphase"` needs H and W to be whole multiples of h and w. `None` chooses.
      tile: most rows of the output that the polyphase form computes at a time; forward, all at once
        if not given. The results are the same, from less temporary memory.

    Returns:
      The features at (H, W), in x's dtype; sums are in float32 or better.

    Raises:
      ValueError: batch sizes differ, K*K is not an odd square, or `implementation` does not apply.
    """
    if attn.ndim != 4 or x.ndim != 4 or attn.shape[0] != x.shape[0]:
        raise ValueError(
            "attn (B, H, W, K*K) and x (B, h, w, C) must have 4 axes and the same batch size, "
            f"got {attn.shape} and {x.shape}"
        )
    k = math.isqrt(attn.shape[3])
    if k * k != attn.shape[3] or k % 2 == 0:
        raise ValueError(f"attn's last axis must be K*K with odd K, got {attn.shape[3]}")
    ratio = whole_ratio(x.shape[1:3], attn.shape[1:3])
    if implementation is None:
        implementation = "reference" if ratio is None else "polyphase"
    if implementation == "reference":
        return _reference(attn, x, k)
    if implementation != "polyphase":
        raise ValueError(
            f"implementation must be 'reference', 'polyphase' or None, got {implementation!r}"
        )
    if ratio is None:
        raise ValueError(
            "implementation 'polyphase' needs whole ratios, got "
            f"{x.shape[1:3]} -> {attn.shape[1:3]}; use 'reference' or None"
        )
    return _polyphase(attn, x, k, ratio, tile)


def _reference(attn: Array, x: Array, k: int) -> Array:
    dtype = at_least_float32(x.dtype)
    values, attn = x.astype(dtype), attn.astype(dtype)
    rows, row_fraction = half_pixel_taps(x.shape[1], attn.shape[1], dtype=dtype)
    cols, col_fraction = half_pixel_taps(x.shape[2], attn.shape[2], dtype=dtype)
    row_fraction = row_fraction[None, :, None, None]
    col_fraction = col_fraction[None, None, :, None]

    def sample(a, lower, fraction, axis):
        below, above = take_clamped(a, lower, axis), take_clamped(a, lower + 1, axis)
        return (1 - fraction) * below + fraction * above

    out = 0
    for u in range(k):
        row = sample(values, rows + (u - k // 2), row_fraction, axis=1)
        for v in range(k):
            neighbour = sample(row, cols + (v - k // 2), col_fraction, axis=2)
            out = out + attn[..., u * k + v, None] * neighbour
    return out.astype(x.dtype)


def _polyphase(attn: Array, x: Array, k: int, ratio: tuple[int, int], tile: int | None) -> Array:
    dtype = at_least_float32(x.dtype)
    x = after(x, attn)  # so that its copies do not exist beside what the attention is made of
    padded = extend(x, k // 2 + 1).astype(dtype)

    def f(_, blocks):
        attn, padded = blocks
        weights = _compose(attn.astype(at_least_float32(attn.dtype)), k, ratio)
        return (_cells.reassemble(weights.astype(dtype), padded).astype(x.dtype),)

    def whole(_, arrays):
        attn, padded = arrays
        if halves:
            out = _reassemble_half_cells(attn.astype(dtype), padded, k, ratio)
            return (out.astype(x.dtype),)
        return f(None, arrays)

    halves = all(r > 2 and r % 2 == 0 for r in ratio)
    forward = None if tile is not None else whole
    # The composed weights are larger than the attention: backward, they are made block by block.
    out_shape = (*attn.shape[:3], x.shape[3])
    count, windows, pixels = _cells.blocks(out_shape, padded.shape, k + 2, tile)
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
    """`_cells.reassemble` of the composed attention, for even ratios, with fewer products.

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
