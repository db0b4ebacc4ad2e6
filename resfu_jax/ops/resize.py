"""Resizing feature maps with PyTorch's interpolation rules, at any ratio up and down."""

import fractions
import functools
import math
import numbers
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from resfu_jax.ops import _interp
from resfu_jax.ops._cpu import resize as cpu
from resfu_jax.ops._forms import Form, Forms, Implementation
from resfu_jax.ops._xla import resample as xla
from resfu_jax.ops.checks import takes_maps
from resfu_jax.ops.sizes import LONGEST, Size, divide_products

Method = Literal["bilinear", "nearest", "nearest-exact", "bicubic"]


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
      implementation: `"reference"` gathers the neighbours of every output pixel; `"xla"` multiplies
        each axis by a matrix, or repeats pixels; `"cpu"`, for upsampling by a whole ratio with
        align_corners=False, interleaves outputs computed from shifted maps. `None` takes the best
        of the platform. Antialiasing has one form only.

    Raises:
      ValueError: contradicting or unsupported arguments.
    """
    size, (n_in, n_out) = _sizes(x, size, scale, method, antialias)
    _check(x, size, method, align_corners, antialias, implementation)
    nearest = method in ("nearest", "nearest-exact")
    values = x if nearest else x.astype(np.promote_types(x.dtype, np.float32))
    if antialias:
        return _antialiased(values, size, n_in, n_out, method).astype(x.dtype)

    options = dict(n_in=n_in, n_out=n_out, method=method, align_corners=align_corners)
    undecided = any(isinstance(n, Array) for n in n_in)  # symbolic sizes: known when it runs
    form = functools.partial(_FORMS, implementation) if not undecided else _reference
    return form(values, size=size, **options).astype(x.dtype)


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
    # Numerator and denominator stay within what `divide_products` takes.
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
    if any(isinstance(n, int) and n > LONGEST for n in (*x.shape[1:3], *size)):
        raise ValueError(f"sizes must be at most 2**29, got {x.shape[1:3]} -> {size}")
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
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


def _reference(x: Array, *, size, n_in, n_out, method: Method, align_corners: bool) -> Array:
    for axis in (2, 1):
        n, n_new, ratio = x.shape[axis], size[axis - 1], (n_in[axis - 1], n_out[axis - 1])
        if method == "nearest":
            index, _ = divide_products(n_new, ratio[0], ratio[1])
            x = _interp.take_clamped(x, index, axis)
        elif method == "nearest-exact":
            index, _ = divide_products(n_new, ratio[0], 2 * ratio[1], step=2, first=1)
            x = _interp.take_clamped(x, index, axis)
        else:
            others = tuple(a for a in range(x.ndim) if a != axis)
            x = sum(
                jnp.expand_dims(weight, others) * _interp.take_clamped(x, index, axis)
                for index, weight in _interp.neighbours(
                    n, n_new, ratio, method, align_corners, x.dtype
                )
            )
    return x


_FORMS = Forms(
    "resize",
    _reference,
    xla=Form(xla.resize, xla.resize_refusal),
    cpu=Form(cpu.resize, cpu.refusal),
    # A matrix of a long axis takes much memory, and a CPU as many products as it has elements.
    preferred={"cpu": ("cpu", "reference")},
)
