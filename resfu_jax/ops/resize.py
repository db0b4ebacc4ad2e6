"""Resizing feature maps with PyTorch's interpolation rules, at any ratio up and down."""

import fractions
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from resfu_jax.ops import _interp

Method = Literal["bilinear", "nearest", "nearest-exact", "bicubic"]
Implementation = Literal["reference", "polyphase"]


def resize(
    x: Shaped[Array, "b h w c"],
    size: tuple[int, int] | None = None,
    *,
    scale: int | float | None = None,
    method: Method = "bilinear",
    align_corners: bool = False,
    antialias: bool = False,
    implementation: Implementation | None = None,
) -> Shaped[Array, "b H W c"]:
    """Resize a batch of feature maps, with the semantics of `torch.nn.functional.interpolate`.

    Each axis is resampled by itself. An output pixel p reads the source position

        s = (p + 1/2) * n_in / n_out - 1/2          (align_corners=False)
        s = p * (n_in - 1) / (n_out - 1)            (align_corners=True)

    computed in exact integer arithmetic, with i = floor(s) and t = s - i:

    * bilinear: (1 - t) x[i] + t x[i+1];
    * bicubic: the four pixels i-1 .. i+2 weighted by Keys' kernel with a = -3/4;
    * nearest: x[floor(p * n_in / n_out)]; nearest-exact: x[floor((p + 1/2) * n_in / n_out)].

    Pixels beyond the border repeat the edge. With `scale`, `n_in / n_out` in these formulas is
    `1 / scale`, which differs from the ratio of the sizes if that ratio was rounded.

    Weights are computed in float32 or better; the result has the dtype of `x`.

    Args:
      x: feature maps. Nearest methods take any dtype, the others floating point.
      size: output size (H, W). Give either this or `scale`.
      scale: output size as a multiple: `floor(h * scale)`, `floor(w * scale)`.
      method: interpolation rule.
      align_corners: make the centres of the corner pixels coincide; bilinear and bicubic only.
      antialias: when shrinking, widen the kernel to the ratio so that every input pixel counts;
        bilinear and bicubic (a = -1/2, as PyTorch) only.
      implementation: `"reference"` gathers the neighbours of every output pixel; `"polyphase"`,
        for nearest, nearest-exact and bilinear upsampling by a whole ratio, computes all outputs
        between two neighbours at once by broadcasting, without a gather (or, in the gradient, a
        scatter). `None` chooses.

    Raises:
      ValueError: contradicting or unsupported arguments.
    """
    size, ratios = _output_size(x, size, scale)
    _check(x, size, method, align_corners, antialias, implementation)
    if method in ("bilinear", "bicubic"):
        dtype = np.promote_types(x.dtype, np.float32)
        values = x.astype(dtype)
    else:
        values = x
    if antialias:
        kernel = {"bilinear": "linear", "bicubic": "cubic"}[method]
        shape = (x.shape[0], *size, x.shape[3])
        return jax.image.resize(values, shape, kernel, antialias=True).astype(x.dtype)

    polyphase = not align_corners and method != "bicubic" and None not in map(_whole, ratios)
    if implementation == "polyphase" and not polyphase:
        raise ValueError(
            "implementation='polyphase' needs a whole upsampling ratio, align_corners=False and a "
            f"method other than bicubic; got {x.shape[1:3]} -> {size}, "
            f"align_corners={align_corners}, method={method!r}"
        )
    for axis, n_out, ratio in zip((1, 2), size, ratios, strict=True):
        if polyphase and implementation != "reference":
            r = _whole(ratio)
            up = _polyphase_bilinear if method == "bilinear" else _repeat
            values = up(values, r, axis)
        else:
            values = _REFERENCE[method](values, n_out, ratio, axis, align_corners)
    return values.astype(x.dtype)


# Ratio of an axis as (n_in, n_out), sizes or numbers with the same quotient.
_Ratio = tuple[int, int]


def _output_size(x, size, scale) -> tuple[tuple[int, int], tuple[_Ratio, _Ratio]]:
    """Output size, and n_in / n_out of both axes."""
    if (size is None) == (scale is None):
        raise ValueError(f"give either size or scale, got size={size}, scale={scale}")
    if size is not None:
        if len(size) != 2:
            raise ValueError(f"size must be (height, width), got {size}")
        return tuple(size), tuple(zip(x.shape[1:3], size, strict=True))
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    # 65536 keeps the integer arithmetic of the positions within int32 for maps of 8192 pixels.
    up = fractions.Fraction(scale).limit_denominator(65536)
    size = tuple(
        # PyTorch rounds the product in floating point.
        math.floor(n * scale) if isinstance(n, int) else n * up.numerator // up.denominator
        for n in x.shape[1:3]
    )
    return size, ((up.denominator, up.numerator),) * 2


def _check(x, size, method, align_corners, antialias, implementation) -> None:
    if x.ndim != 4:
        raise ValueError(f"x must be (batch, height, width, channels), got shape {x.shape}")
    if any(isinstance(n, int) and n < 1 for n in (*x.shape[1:3], *size)):
        raise ValueError(f"sizes must be at least 1, got {x.shape[1:3]} -> {size}")
    if method not in _REFERENCE:
        raise ValueError(f"method must be one of {', '.join(_REFERENCE)}, got {method!r}")
    if implementation not in (None, "reference", "polyphase"):
        raise ValueError(
            f"implementation must be 'reference', 'polyphase' or None, got {implementation!r}"
        )
    if method in ("nearest", "nearest-exact"):
        if align_corners or antialias:
            raise ValueError(f"align_corners and antialias do not apply to method {method!r}")
    elif not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"method {method!r} needs a floating-point x, got {x.dtype}; cast it")
    if antialias and (align_corners or implementation is not None):
        raise ValueError("antialias needs align_corners=False and implementation=None")


def _whole(ratio: _Ratio) -> int | None:
    """The upsampling ratio if it is a whole number."""
    n_in, n_out = ratio
    return int(n_out // n_in) if n_out % n_in == 0 else None


def _taps(values, n_out, ratio, axis, align_corners):
    """Indices below the source positions, and fractions shaped to broadcast along `axis`."""
    if align_corners:
        lower, t = _interp.align_corners_taps(values.shape[axis], n_out, dtype=values.dtype)
    else:
        lower, t = _interp.half_pixel_taps(*ratio, count=n_out, dtype=values.dtype)
    return lower, jnp.expand_dims(t, tuple(a for a in range(values.ndim) if a != axis))


def _bilinear(values, n_out, ratio, axis, align_corners):
    lower, t = _taps(values, n_out, ratio, axis, align_corners)
    a = _interp.take_clamped(values, lower, axis)
    b = _interp.take_clamped(values, lower + 1, axis)
    return (1 - t) * a + t * b


def _bicubic(values, n_out, ratio, axis, align_corners):
    lower, t = _taps(values, n_out, ratio, axis, align_corners)
    a = -0.75
    total = 0
    for tap in (-1, 0, 1, 2):
        d = jnp.abs(t - tap)  # Keys (1981), equation 4
        if tap in (0, 1):
            weight = ((a + 2) * d - (a + 3)) * d * d + 1
        else:
            weight = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        total = total + weight * _interp.take_clamped(values, lower + tap, axis)
    return total


def _nearest(values, n_out, ratio, axis, align_corners):
    n_in, n = (jnp.asarray(r, jnp.int32) for r in ratio)
    index = jnp.arange(n_out, dtype=jnp.int32) * n_in // n
    return _interp.take_clamped(values, index, axis)


def _nearest_exact(values, n_out, ratio, axis, align_corners):
    n_in, n = (jnp.asarray(r, jnp.int32) for r in ratio)
    index = (2 * jnp.arange(n_out, dtype=jnp.int32) + 1) * n_in // (2 * n)
    return _interp.take_clamped(values, index, axis)


_REFERENCE: dict[str, Callable[..., Array]] = {
    "bilinear": _bilinear,
    "nearest": _nearest,
    "nearest-exact": _nearest_exact,
    "bicubic": _bicubic,
}


def _repeat(values: Array, r: int, axis: int) -> Array:
    """Every pixel r times along `axis`: both nearest rules at a whole ratio."""
    shape = list(values.shape)
    shape.insert(axis + 1, r)
    repeated = jnp.broadcast_to(jnp.expand_dims(values, axis + 1), shape)
    return _merge(repeated, axis)


def _polyphase_bilinear(values: Float[Array, "..."], r: int, axis: int) -> Float[Array, "..."]:
    """Bilinear upsampling of `axis` by the whole ratio `r`.

    Between two neighbouring source pixels lie r output pixels, at the fractions 1/2r, 3/2r, ... if
    r is even and 0, 1/r, ... if it is odd. They are computed for all n + 1 pairs of the
    edge-padded axis; the outputs that belong to it are in the middle.
    """
    n = values.shape[axis]
    padded = jnp.pad(values, [(1, 1) if a == axis else (0, 0) for a in range(4)], mode="edge")
    a, b = (
        jnp.expand_dims(jax.lax.slice_in_dim(padded, i, i + n + 1, axis=axis), axis + 1)
        for i in (0, 1)
    )
    numerators = jnp.arange(r, dtype=values.dtype) * 2 + (1 - r % 2)
    t = jnp.expand_dims(numerators / (2 * r), tuple(i for i in range(5) if i != axis + 1))
    between = _merge((1 - t) * a + t * b, axis)
    start = (r + 1) // 2
    return jax.lax.slice_in_dim(between, start, start + n * r, axis=axis)


def _merge(values: Array, axis: int) -> Array:
    """Merge `axis` with the one after it."""
    s = values.shape
    return values.reshape(*s[:axis], s[axis] * s[axis + 1], *s[axis + 2 :])
