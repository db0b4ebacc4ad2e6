"""Norms and the linear maps after them on a CPU."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops._cpu.rows import Rows, block_rows, map_row_blocks
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.group_norm import group_moments


def layer_norm(x: Array, scale: Array, bias: Array, *, eps: float) -> Array:
    """Form of `ops.layer_norm`."""
    y = _normalised(x, eps)
    scale, bias = (v.astype(y.dtype)[None, None, None] for v in (scale, bias))
    return (y * scale + bias).astype(x.dtype)


def norm_linear(
    x: Array,
    scale: Array,
    norm_bias: Array,
    kernel: Array,
    bias: Array | None,
    *,
    norm: str,
    groups: int,
    eps: float,
) -> Array:
    """Form of `ops.norm_linear`: the norm's scale and bias become those of the linear map."""
    wide = at_least_float32(x.dtype)
    scale, norm_bias, kernel = (a.astype(wide) for a in (scale, norm_bias, kernel))
    offset = norm_bias @ kernel
    if bias is not None:
        offset = offset + bias.astype(wide)
    b, h, w, c = x.shape
    if norm == "group":
        mean, factor = group_moments(x, groups=groups, eps=eps)
        weight = (factor * scale[None])[:, :, None] * kernel[None]
        params, rows = (
            (weight.astype(x.dtype), offset, mean),
            block_rows(h, b * w * max(kernel.shape)),
        )
    else:
        # Several blocks even where one fits the cache: the memory is that of a block.
        rows = block_rows(h, b * w * c, h // 4 if isinstance(h, int) else None)
        params = scale[:, None] * kernel, offset

    def of_group(params, blocks):
        (weight, offset, mean), (x,) = params, blocks
        # Not as a part of the offset: in a narrow dtype, large products would have to cancel.
        centred = (x.astype(mean.dtype) - mean[:, None, None]).astype(x.dtype)
        product = jnp.einsum("bhwc,bco->bhwo", centred, weight, preferred_element_type=mean.dtype)
        return ((product + offset[None, None, None]).astype(x.dtype),)

    def of_layer(params, blocks):
        kernel, offset = (p.astype(x.dtype) for p in params)
        y = _normalised(*blocks, eps).astype(x.dtype) @ kernel
        return (y + offset[None, None, None],)

    f = of_group if norm == "group" else of_layer
    block = Rows(1, rows, rows)
    (out,) = map_row_blocks(f, h // rows, (block,), (block,), params, (x,))
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _normalised(x: Float[Array, "b h w c"], eps: float) -> Float[Array, "b h w c"]:
    """With mean 0 and variance 1 over the channels, in float32 or better."""
    return _normalised_and_factor(x, eps)[0]


def _normalised_and_factor(x: Array, eps: float) -> tuple[Array, Array]:
    x = x.astype(at_least_float32(x.dtype))
    centred = x - x.mean(axis=-1, keepdims=True)
    factor = jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + eps)
    return centred * factor, factor


def _normalised_bwd(eps, x, g):
    y, factor = _normalised_and_factor(x, eps)
    c = x.shape[-1]
    # Means as products with a vector: several times as fast on a CPU as XLA's sums of products.
    mean = jnp.full((c, 1), 1 / c, y.dtype)
    g_mean, gy_mean = (jnp.matmul(a, mean, precision=jax.lax.Precision.HIGHEST) for a in (g, g * y))
    return (((g - g_mean - y * gy_mean) * factor).astype(x.dtype),)


_normalised.defvjp(lambda x, eps: (_normalised(x, eps), x), _normalised_bwd)
