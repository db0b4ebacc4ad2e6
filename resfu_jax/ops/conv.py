"""Dense convolution whose gradients avoid XLA's slow path on a CPU."""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops._checks import takes_maps
from resfu_jax.ops._dtypes import at_least_float32
from resfu_jax.ops._order import never
from resfu_jax.ops._row_blocks import Rows, block_rows, block_values, map_row_blocks

Implementation = Literal["reference", "blocks"]
Pairs = tuple[tuple[int, int], tuple[int, int]]

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
_FEW = 16  # channels, like those of an image, whose windows are short runs of memory


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
      implementation: `"reference"` is XLA's convolution. `"blocks"` has its values and gradients
        from products of the kernel, as a matrix, with windows of x, where XLA is slow on a CPU: the
        gradient to the kernel, with many outputs that to `x` and the values, too, and all of a
        convolution with a stride; block by block, where these would be many. `None` takes
        `"blocks"` on a CPU where the sizes are known, and `"reference"` elsewhere.

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
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(
            f"implementation must be one of {get_args(Implementation)} or None, "
            f"got {implementation!r}"
        )
    known = all(isinstance(n, int) for n in x.shape)
    if implementation is None:
        implementation = "blocks" if known and jax.default_backend() == "cpu" else "reference"
    if implementation == "reference":
        return _reference(x, kernel, stride, padding, dilation)
    if stride != (1, 1) and x.shape[3] >= _FEW:
        return _blocks(x, kernel, stride, padding, dilation)
    return _by_products(x, kernel, stride, padding, dilation)


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else value
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name} must be one or two positive whole numbers, got {value}")
    return pair


def _reference(x, kernel, stride, padding, dilation):
    return jax.lax.conv_general_dilated(
        x, kernel, stride, padding, rhs_dilation=dilation, dimension_numbers=_DIMENSIONS
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _by_products(x, kernel, stride, padding, dilation):
    kh, kw, c, o = kernel.shape
    if 2 * kh * kw * c > o or c < _FEW or x.dtype == jnp.bfloat16:
        return _reference(x, kernel, stride, padding, dilation)
    # Windows are small next to outputs: one product, which XLA divides better among the cores, but
    # has its bfloat16 results in float32 first.
    return _windows(_pad(x, padding), (kh, kw), stride, dilation) @ kernel.reshape(-1, o)


def _by_products_bwd(stride, padding, dilation, saved, g):
    x, kernel = saved
    options = stride, padding, dilation
    kh, kw, c, o = kernel.shape
    if kh * kw * c <= 2 * o:
        if stride == (1, 1) and g.size <= block_values():  # g stays in the cache
            return _gradients_tap_by_tap(x, kernel, g, padding, dilation)
        return jax.vjp(lambda *args: _blocks(*args, *options), x, kernel)[1](g)
    # The gradient of the windows would be much larger than that of the outputs.
    (d_x,) = jax.vjp(lambda x: _reference(x, kernel, *options), x)[1](g)
    (d_kernel,) = jax.vjp(lambda kernel: _blocks(x, kernel, *options), kernel)[1](g)
    return d_x, d_kernel


_by_products.defvjp(lambda *args: (_by_products(*args), args[:2]), _by_products_bwd)


def _gradients_tap_by_tap(x, kernel, g, padding, dilation):
    # With nothing as large as g beside it: neither the windows of all taps, nor a large kernel's
    # gradient but at its place.
    (b, h, w, o), (kh, kw, c, _), (d, e) = g.shape, kernel.shape, dilation
    wide = at_least_float32(g.dtype)
    zero = never(g).astype(wide)  # what is added to it exists from when g does
    x = x + zero.astype(x.dtype)
    padded, unpad = jax.vjp(lambda x: _pad(x, padding), x)
    most = max(1, block_values() // (16 * o))
    part = max(k for k in range(1, min(c, most) + 1) if c % k == 0)  # of the channels
    g = g.astype(wide)

    def body(i, state):
        d_padded, d_kernel = state
        tap, first = i // (c // part), i % (c // part) * part
        origin, (u, v) = jnp.zeros_like(first), (tap // kw, tap % kw)
        at_window, at_weights = (origin, d * u, e * v, first), (u, v, first, origin)
        window = jax.lax.dynamic_slice(padded, at_window, (b, h, w, part))
        weights = jax.lax.dynamic_slice(kernel, at_weights, (1, 1, part, o))[0, 0].astype(wide)
        d_weights = _over_pixels(window, g)[None, None]
        d_window = g @ weights.T + jax.lax.dynamic_slice(d_padded, at_window, window.shape)
        d_padded = jax.lax.dynamic_update_slice(d_padded, d_window, at_window)
        return d_padded, jax.lax.dynamic_update_slice(d_kernel, d_weights, at_weights)

    state = tuple(jnp.broadcast_to(zero, a.shape) for a in (padded, kernel))
    d_padded, d_kernel = jax.lax.fori_loop(0, kh * kw * (c // part), body, state)
    return *unpad(d_padded.astype(x.dtype)), d_kernel.astype(kernel.dtype)


def _blocks(x, kernel, stride, padding, dilation):
    kh, kw, c, o = kernel.shape
    s, d = stride[0], dilation[0]
    x = _pad(x, padding)
    b, h, w = x.shape[0], *_output_size(x, (kh, kw), stride, dilation)
    # Windows and outputs, and the gradients to both, are alive at once. Each block reads the kernel
    # and adds to its gradient: of one that leaves the cache it should not be much smaller.
    least = 0 if 2 * kernel.size <= block_values() else 4 * kernel.size
    rows = block_rows(h, 2 * b * w * max(kh * kw * c, o), at_least=least)

    def f(kernel, blocks):
        windows = _windows(*blocks, (kh, kw), stride, dilation)
        return (_product(windows, kernel.reshape(-1, o)),)

    inputs = (Rows(1, s * rows, s * (rows - 1) + d * (kh - 1) + 1),)
    (out,) = map_row_blocks(f, h // rows, inputs, (Rows(1, rows, rows),), kernel, (x,))
    return out


def _pad(x, padding):
    return jnp.pad(x, ((0, 0), *padding, (0, 0)))


def _windows(x, kernel_size, stride, dilation) -> Float[Array, "b h w k"]:
    """What each output sees of the padded x."""
    (kh, kw), (s, t), (d, e) = kernel_size, stride, dilation
    h, w = _output_size(x, kernel_size, stride, dilation)
    b, _, _, c = x.shape
    taps = [
        jax.lax.slice(
            x,
            (0, d * u, e * v, 0),
            (b, d * u + s * (h - 1) + 1, e * v + t * (w - 1) + 1, c),
            (1, s, t, 1),
        )
        for u in range(kh)
        for v in range(kw)
    ]
    return jnp.concatenate(taps, axis=3)


def _output_size(x, kernel_size, stride, dilation) -> tuple[int, int]:
    """Of the padded x."""
    axes = zip(x.shape[1:3], kernel_size, stride, dilation, strict=True)
    h, w = ((n - d * (k - 1) - 1) // s + 1 for n, k, s, d in axes)
    return h, w


@jax.custom_vjp
def _product(windows: Float[Array, "b h w k"], kernel: Float[Array, "k o"]) -> Array:
    return windows @ kernel


def _product_bwd(saved, g):
    windows, kernel = saved
    return g @ kernel.T, _over_pixels(windows, g).astype(kernel.dtype)


def _over_pixels(x: Float[Array, "b h w k"], y: Float[Array, "b h w o"]) -> Float[Array, "k o"]:
    # XLA copies the second factor of a product over pixels. In bfloat16 that is slow on a CPU
    # (JAX 0.12); from bfloat16 to float32 it does not always run.
    wide = at_least_float32(y.dtype)
    x, y = x.astype(wide), y.astype(wide)
    if x.shape[3] < y.shape[3]:
        return jnp.einsum("bhwk,bhwo->ko", x, y)
    return jnp.einsum("bhwo,bhwk->ok", y, x).T


_product.defvjp(lambda *args: (_product(*args), args), _product_bwd)
