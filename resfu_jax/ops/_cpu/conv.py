"""Convolutions on a CPU, whose gradients avoid XLA's slow paths."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops._cpu.rows import BLOCK_VALUES, Rows, block_rows, map_row_blocks
from resfu_jax.ops.dtypes import at_least_float32

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
_FEW = 16  # channels, like those of an image, whose windows are short runs of memory


def conv(x: Array, kernel: Array, *, stride, padding, dilation) -> Array:
    """Form of `ops.conv`: products of the kernel, as a matrix, with windows of x.

    Where XLA is slow on a CPU: the gradient to the kernel, with many outputs that to `x` and the
    values, too, and all of a convolution with a stride; block by block, where these would be many.
    """
    if kernel.shape[:2] == stride == (1, 1) and not any(map(any, padding)):
        return _product(x, kernel[0, 0])
    if stride != (1, 1) and x.shape[3] >= _FEW:
        return _blocks(x, kernel, stride, padding, dilation)
    return _by_products(x, kernel, stride, padding, dilation)


def _xla(x, kernel, stride, padding, dilation):
    return jax.lax.conv_general_dilated(
        x, kernel, stride, padding, rhs_dilation=dilation, dimension_numbers=_DIMENSIONS
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _by_products(x, kernel, stride, padding, dilation):
    kh, kw, c, o = kernel.shape
    if 2 * kh * kw * c > o or c < _FEW or x.dtype == jnp.bfloat16:
        return _xla(x, kernel, stride, padding, dilation)
    # Windows are small next to outputs: one product, which XLA divides better among the cores, but
    # has its bfloat16 results in float32 first.
    return _windows(_pad(x, padding), (kh, kw), stride, dilation) @ kernel.reshape(-1, o)


def _by_products_bwd(stride, padding, dilation, saved, g):
    x, kernel = saved
    options = stride, padding, dilation
    kh, kw, c, o = kernel.shape
    if kh * kw * c <= 2 * o:
        if stride == (1, 1) and g.size <= BLOCK_VALUES:  # g stays in the cache
            return _gradients_tap_by_tap(x, kernel, g, padding, dilation)
        return jax.vjp(lambda *args: _blocks(*args, *options), x, kernel)[1](g)
    # The gradient of the windows would be much larger than that of the outputs.
    (d_x,) = jax.vjp(lambda x: _xla(x, kernel, *options), x)[1](g)
    (d_kernel,) = jax.vjp(lambda kernel: _blocks(x, kernel, *options), kernel)[1](g)
    return d_x, d_kernel


_by_products.defvjp(lambda *args: (_by_products(*args), args[:2]), _by_products_bwd)


def _gradients_tap_by_tap(x, kernel, g, padding, dilation):
    # With nothing as large as g beside it: neither the windows of all taps, nor a large kernel's
    # gradient but at its place.
    (b, h, w, o), (kh, kw, c, _), (d, e) = g.shape, kernel.shape, dilation
    wide = at_least_float32(g.dtype)
    padded, unpad = jax.vjp(lambda x: _pad(x, padding), x)
    most = max(1, BLOCK_VALUES // (16 * o))
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

    state = tuple(jnp.zeros(a.shape, wide) for a in (padded, kernel))
    d_padded, d_kernel = jax.lax.fori_loop(0, kh * kw * (c // part), body, state)
    return *unpad(d_padded.astype(x.dtype)), d_kernel.astype(kernel.dtype)


def _blocks(x, kernel, stride, padding, dilation):
    kh, kw, c, o = kernel.shape
    s, d = stride[0], dilation[0]
    x = _pad(x, padding)
    b, h, w = x.shape[0], *_output_size(x, (kh, kw), stride, dilation)
    # Windows and outputs, and the gradients to both, are alive at once. Each block reads the kernel
    # and adds to its gradient: of one that leaves the cache it should not be much smaller.
    least = 0 if 2 * kernel.size <= BLOCK_VALUES else 4 * kernel.size
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
