"""Resizing feature maps with PyTorch's interpolation rules, at any ratio up and down."""

import fractions
import math
import numbers
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from resfu_jax.ops import _interp
from resfu_jax.ops._checks import takes_maps
from resfu_jax.ops._interp import Size
from resfu_jax.ops._polyphase import whole_ratio

Method = Literal["bilinear", "nearest", "nearest-exact", "bicubic"]
Implementation = Literal["reference", "polyphase"]


@takes_maps("x", real=False)
def resize(
    x: Shaped[Array, "b h w c"],
    size: tuple[Size, Size] | None = None,
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

    computed in exact integer arithmetic for axes of up to 2**29 pixels, with i = floor(s) and
    t = s - i (antialias: in float32 or better):

    * bilinear: (1 - t) x[i] + t x[i+1];
    * bicubic: the four pixels i-1 .. i+2 weighted by Keys' kernel with a = -3/4;
    * nearest: x[floor(p * n_in / n_out)]; nearest-exact: x[floor((p + 1/2) * n_in / n_out)].

    Pixels beyond the border repeat the edge. With `scale`, `n_in / n_out` in these formulas is
    `1 / scale`, which differs from the ratio of the sizes if that ratio was rounded. Two cases keep
    the ratio of the sizes, as PyTorch's do on a CPU: an axis whose size does not change is copied
    (but not by bicubic without antialias or nearest-exact), and nearest reads x[p // 2] where the
    size doubles. (PyTorch's own positions are in float32: on long axes they are off, and where a
    nearest one lies exactly between two pixels, it may take the other.)

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
        for upsampling by a whole ratio with align_corners=False, interleaves outputs computed
        from shifted maps, so that the gradient needs no scatter. `None` chooses.

    Raises:
      ValueError: contradicting or unsupported arguments.
    """
    size, (n_in, n_out) = _sizes(x, size, scale, method, antialias)
    _check(x, size, method, align_corners, antialias, implementation)
    nearest = method in ("nearest", "nearest-exact")
    values = x if nearest else x.astype(np.promote_types(x.dtype, np.float32))
    if antialias:
        return _antialiased(values, size, n_in, n_out, method).astype(x.dtype)

    undecided = any(isinstance(n, Array) for n in n_in)
    whole = None if align_corners or undecided else whole_ratio(n_in, n_out)
    if implementation == "polyphase" and whole is None:
        raise ValueError(
            "implementation='polyphase' needs a whole upsampling ratio and align_corners=False, "
            f"got {x.shape[1:3]} -> {size}, align_corners={align_corners}"
        )
    # Every phase is an operand of the compiled program; beyond some, gathering is cheaper.
    if implementation == "reference" or (implementation is None and whole and max(whole) > 16):
        whole = None
    for axis in (2, 1):
        if whole is not None:
            values = _polyphase(values, whole[axis - 1], axis, method)
        else:
            ratio = n_in[axis - 1], n_out[axis - 1]
            values = _gather(values, size[axis - 1], ratio, axis, method, align_corners)
    return values.astype(x.dtype)


def _sizes(x, size, scale, method, antialias):
    """Output size, and (n_in, n_out) whose quotients are the ratios of the two axes."""
    if (size is None) == (scale is None):
        raise ValueError(f"give either size or scale, got size={size}, scale={scale}")
    if size is not None:
        if len(size) != 2:
            raise ValueError(f"size must be (height, width), got {size}")
        return tuple(size), (x.shape[1:3], tuple(size))
    if not isinstance(scale, numbers.Real) or not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive, finite and one number, got {scale!r}")
    size = tuple(_scaled_size(n, scale) for n in x.shape[1:3])
    # Numerator and denominator stay within what `_interp.divide_products` takes.
    up = fractions.Fraction(scale).limit_denominator(max(1, int(2**28 / max(scale, 1))))
    # As ATen's UpSample.h: the multiples of its size at which an axis keeps the ratio of the sizes.
    multiples = {"nearest": (1, 2), "bilinear": (1,), "bicubic": (1,) * antialias}.get(method, ())
    ratios = [_scale_ratio(n, m, up, multiples) for n, m in zip(x.shape[1:3], size, strict=True)]
    return size, tuple(zip(*ratios, strict=True))


def _scaled_size(n: Size, scale: float) -> Size:
    """floor(n scale)"""
    if isinstance(n, int):
        return math.floor(n * scale)  # the product in floating point, as PyTorch's
    # Products of symbolic sizes are computed in int32, too.
    up = fractions.Fraction(scale).limit_denominator(2**15)
    if up.denominator < 2**7:
        return n * up.numerator // up.denominator
    whole, part = divmod(up.numerator, up.denominator)
    cells, rest = divmod(n, up.denominator)
    return n * whole + cells * part + rest * part // up.denominator


def _scale_ratio(
    n: Size, m: Size, up: fractions.Fraction, multiples: tuple[int, ...]
) -> tuple[Any, Any]:
    """The ratio of an axis of n pixels that `scale` makes m: n / m at these multiples, else 1 / up.

    In symbolic sizes, which decides itself when the program runs.
    """
    ratio = up.denominator, up.numerator
    for k in multiples:
        if up == k or not k <= up < k + 1:
            continue  # either makes no difference, or m never is k n
        if isinstance(n, int):
            return (1, k) if m == k * n else ratio
        equal = jnp.asarray(m - k * n, jnp.int32) == 0
        return tuple(jnp.where(equal, a, jnp.int32(b)) for a, b in zip((1, k), ratio, strict=True))
    return ratio


def _check(x, size, method, align_corners, antialias, implementation) -> None:
    if x.ndim != 4:
        raise ValueError(f"x must be (batch, height, width, channels), got shape {x.shape}")
    if any(isinstance(n, int) and n < 1 for n in (*x.shape[1:3], *size)):
        raise ValueError(f"sizes must be at least 1, got {x.shape[1:3]} -> {size}")
    if any(isinstance(n, int) and n > _interp.LONGEST for n in (*x.shape[1:3], *size)):
        raise ValueError(f"sizes must be at most 2**29, got {x.shape[1:3]} -> {size}")
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
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


def _antialiased(values, size, n_in, n_out, method) -> Array:
    dtype = values.dtype
    scale = [
        jnp.asarray(n, dtype) / jnp.asarray(m, dtype) for m, n in zip(n_in, n_out, strict=True)
    ]
    return jax.image.scale_and_translate(
        values,
        (values.shape[0], *size, values.shape[3]),
        (1, 2),
        jnp.stack(scale),
        jnp.zeros(2, dtype),
        method={"bilinear": "linear", "bicubic": "cubic"}[method],
        antialias=True,
    )


def _weights(method: Method, t) -> dict[int, Any]:
    """Weights of the pixels around a position, by their offset from the pixel below it.

    `t`, a number or an array, is the distance to that pixel, in [0, 1).
    """
    if method == "bilinear":
        return {0: 1 - t, 1: t}
    a = -0.75  # Keys, "Cubic convolution interpolation for digital image processing", 1981, eq. 4

    def near(d):
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d):
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    return {-1: far(1 + t), 0: near(t), 1: near(1 - t), 2: far(2 - t)}


def _gather(values, n_out, ratio, axis, method, align_corners) -> Array:
    """Resize `axis` by gathering the neighbours of every output pixel."""
    if method in ("nearest", "nearest-exact"):
        n_in, n = ratio
        if method == "nearest":
            index, _ = _interp.divide_products(n_out, n_in, n)
        else:
            index, _ = _interp.divide_products(n_out, n_in, 2 * n, step=2, first=1)
        return _interp.take_clamped(values, index, axis)
    if align_corners:
        lower, t = _interp.align_corners_taps(values.shape[axis], n_out, dtype=values.dtype)
    else:
        lower, t = _interp.half_pixel_taps(*ratio, count=n_out, dtype=values.dtype)
    t = jnp.expand_dims(t, tuple(a for a in range(values.ndim) if a != axis))
    return sum(
        weight * _interp.take_clamped(values, lower + offset, axis)
        for offset, weight in _weights(method, t).items()
    )


def _polyphase(values: Array, r: int, axis: int, method: Method) -> Array:
    """Upsample `axis` by the whole ratio r.

    Output pixel `q r + p` combines the pixels around q with weights that depend on the phase p
    only. Stacking the r phases keeps the gradient a sum of slices; XLA's reductions and scatters
    over short axes are several times slower.
    """
    if method in ("nearest", "nearest-exact"):
        phases = [values] * r
    else:
        shifted = {0: values}
        for offset in (1, 2):
            shifted[offset] = _next(shifted[offset - 1], axis)
            shifted[-offset] = _previous(shifted[1 - offset], axis)
        phases = []
        for p in range(r):
            lower, remainder = divmod(2 * p + 1 - r, 2 * r)  # position (p + 1/2) / r - 1/2
            weights = _weights(method, remainder / (2 * r))
            phases.append(sum(w * shifted[lower + i] for i, w in weights.items() if w != 0))
    shape = (*values.shape[:axis], -1, *values.shape[axis + 1 :])
    return jnp.stack(phases, axis=axis + 1).reshape(shape)


def _next(values: Array, axis: int) -> Array:
    """The pixel after every pixel along `axis`, the last edge repeated."""
    n = values.shape[axis]
    rest = jax.lax.slice_in_dim(values, 1, n, axis=axis)
    return jnp.concatenate([rest, jax.lax.slice_in_dim(values, n - 1, n, axis=axis)], axis=axis)


def _previous(values: Array, axis: int) -> Array:
    """The pixel before every pixel along `axis`, the first edge repeated."""
    n = values.shape[axis]
    rest = jax.lax.slice_in_dim(values, 0, n - 1, axis=axis)
    return jnp.concatenate([jax.lax.slice_in_dim(values, 0, 1, axis=axis), rest], axis=axis)
