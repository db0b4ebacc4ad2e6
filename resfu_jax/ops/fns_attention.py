"""Fine-grained neighbour selection of ReSFU: attention over sub-pixel shifted neighbours.

Tap (u, v) of output pixel p samples the low-resolution map bilinearly at p's own exact position,
moved by whole low-resolution pixels:

    s(p) = (p + 1/2) n_in / n_out - 1/2,      out[p] = sum_uv attn[p, uv] x[s(p) + (u, v) - r],

r = (K - 1) / 2, positions clamped to the map. Neighbouring output pixels thus read slightly
different neighbours, without the mosaic that a shared window leaves at high ratios.

Source: "A Refreshed Similarity-based Upsampler for Direct High-Ratio Feature Upsampling", the
`fns_attn` operator. The gradient to x is the true one; the official CUDA backward loses the
contributions of positions that lie exactly on the last row or column.
"""

import math

from jaxtyping import Array, Float

from resfu_jax.ops._cpu import fns_attention as cpu
from resfu_jax.ops._forms import Form, Forms, Implementation, needs_whole_ratio
from resfu_jax.ops._interp import half_pixel_taps, take_clamped
from resfu_jax.ops._pallas import windows as pallas
from resfu_jax.ops._xla import windows as xla
from resfu_jax.ops.checks import takes_maps
from resfu_jax.ops.dtypes import at_least_float32


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
      implementation: `"reference"` samples the neighbours one after the other; `"xla"` spreads the
        weights of a strip of pixels over all of x around it, for one matrix product; `"cpu"`, for
        whole ratios, goes phase by phase; `"pallas"`, for whole ratios on a TPU, is `"xla"` without
        the spread weights ever leaving the chip. `None` takes the best of the platform.
      tile: most rows of the output that the CPU's form computes at a time; forward, all at once if
        not given. The results are the same, from less temporary memory.

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
    return _FORMS(implementation, attn, x, tile=tile)


def _reference(attn: Array, x: Array, *, tile: int | None = None) -> Array:
    k, dtype = math.isqrt(attn.shape[3]), at_least_float32(x.dtype)
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


_FORMS = Forms(
    "fns_attention",
    _reference,
    xla=xla.fns_attention,
    cpu=Form(cpu.fns_attention, needs_whole_ratio),
    pallas=pallas.fns_attention,
)
