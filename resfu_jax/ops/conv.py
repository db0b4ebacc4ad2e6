"""Dense convolution, zeros around the map."""

import jax
from jaxtyping import Array, Float

from resfu_jax.ops._forms import Form, Forms, Implementation
from resfu_jax.ops.checks import takes_maps

Pairs = tuple[tuple[int, int], tuple[int, int]]


@takes_maps("x", others=("kernel",))
def conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c o"],
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | Pairs = 0,
    dilation: int | tuple[int, int] = 1,
    implementation: Implementation | None = None,
) -> Float[Array, "b h2 w2 o"]:
    """Convolution, with zeros around x.

    With stride (s, t), dilation (d, e) and the padded x,

        out[i, j] = sum_uv x[s i + d u, t j + e v] @ kernel[u, v]

    Args:
      x: feature maps.
      kernel: weights, HWIO, of the dtype of `x`.
      stride: step between outputs, pixels; one number or (rows, columns).
      padding: zeros around x, pixels; one number or ((top, bottom), (left, right)).
      dilation: distance of the taps, pixels; one number or (rows, columns).
      implementation: `"reference"` is XLA's convolution; `"cpu"`, for a 1 x 1 kernel alone, a
        product of matrices. `None` takes the best of the platform.

    Raises:
      ValueError: a kernel that does not fit `x`, an unknown implementation, or a stride, dilation
        or padding out of range.
    """
    if x.ndim != 4 or kernel.ndim != 4 or kernel.shape[2] != x.shape[3]:
        raise ValueError(
            "kernel must be (kh, kw, channels, outputs) for x (batch, height, width, channels) "
            f"with the same channels, got kernel {kernel.shape} and x {x.shape}"
        )
    if kernel.dtype != x.dtype:
        raise ValueError(f"kernel must have x's dtype {x.dtype}, got {kernel.dtype}; cast it")
    stride, dilation = _pair("stride", stride), _pair("dilation", dilation)
    padding = ((padding,) * 2,) * 2 if isinstance(padding, int) else padding
    if min(n for pair in padding for n in pair) < 0:
        raise ValueError(f"padding must not be negative, got {padding}")
    for n, m, pair, d in zip(kernel.shape, x.shape[1:], padding, dilation, strict=False):
        if isinstance(m, int) and d * (n - 1) >= m + sum(pair):
            raise ValueError(
                f"kernel must not be larger than the padded x, got kernel {kernel.shape[:2]} with "
                f"dilation {dilation} and x {x.shape[1:3]} with padding {padding}"
            )
    return _FORMS(
        implementation, x, kernel, stride=stride, padding=tuple(padding), dilation=dilation
    )


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else value
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name} must be one or two positive whole numbers, got {value}")
    return pair


def _reference(x: Array, kernel: Array, *, stride, padding, dilation) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        stride,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _product(x: Array, kernel: Array, **options) -> Array:
    return x @ kernel[0, 0]


def _refusal(x: Array, kernel: Array, *, stride, padding, dilation) -> str | None:
    plain = kernel.shape[:2] == stride == (1, 1) and not any(map(any, padding))
    return None if plain else "it needs a 1 x 1 kernel, stride 1 and no padding"


_FORMS = Forms("conv", _reference, cpu=Form(_product, _refusal))
