"""Norms and what follows them on a CPU: the normalised map is never whole."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from resfu_jax.ops._cpu.conv import conv
from resfu_jax.ops._rows import Rows, block_rows, map_row_blocks
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.group_norm import group_moments
from resfu_jax.ops.layer_norm import layer_norm
from resfu_jax.ops.pad import pad_axis
from resfu_jax.ops.sizes import to_int32


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
    """Form of `ops.norm_linear`."""
    b, h, w, c = x.shape
    rows = block_rows(h, b * w * max(c, kernel.shape[1]))
    own = Rows(1, rows, rows)

    def of_layer(x, scale, kernel, offset):
        y = layer_norm(x, scale, jnp.zeros_like(scale), eps=eps) @ kernel.astype(x.dtype)
        return (y + offset.astype(x.dtype)[None, None, None],)

    def of_group(x, mean, weight, offset):
        # Centred first: in a narrow dtype, large products would have to cancel.
        centred = (x.astype(mean.dtype) - mean[:, None, None]).astype(x.dtype)
        y = jnp.einsum("bhwc,bco->bhwo", centred, weight, preferred_element_type=mean.dtype)
        return ((y + offset[None, None, None]).astype(x.dtype),)

    wide = at_least_float32(x.dtype)
    scale, norm_bias, kernel = (a.astype(wide) for a in (scale, norm_bias, kernel))
    offset = norm_bias @ kernel
    if bias is not None:
        offset = offset + bias.astype(wide)
    if norm == "layer":
        block, params = of_layer, (scale, kernel, offset)
    else:
        # Affine once the moments are known: the weights take over the factor and the scale.
        mean, factor = group_moments(x, groups=groups, eps=eps)
        weight = (factor * scale[None])[:, :, None] * kernel[None]
        block, params = of_group, (mean, weight.astype(x.dtype), offset)
    (out,) = map_row_blocks(block, h // rows, (own, None, None, None), (own,), x, *params)
    return out


def reflect_conv(
    x: Array,
    kernel: Array,
    bias: Array | None,
    scale: Array | None,
    norm_bias: Array | None,
    *,
    dilation: int,
    groups: int,
    eps: float,
) -> Array:
    """Form of `ops.reflect_conv`."""
    b, h, w, c = x.shape
    reach, columns = (dilation * (n - 1) // 2 for n in kernel.shape[:2])
    rows = block_rows(h, b * w * max(c, kernel.shape[3]))
    norm = None
    if scale is not None and norm_bias is not None:
        mean, factor = group_moments(x, groups=groups, eps=eps)
        norm = mean, factor * scale.astype(factor.dtype)[None], norm_bias.astype(factor.dtype)

    def block(x, edges, kernel, bias, norm):
        x = jnp.concatenate([edges[:, :reach], x, edges[:, reach:]], axis=1) if reach else x
        if norm is not None:
            mean, factor, offset = norm
            y = (x.astype(mean.dtype) - mean[:, None, None]) * factor[:, None, None]
            x = jax.nn.silu(y + offset[None, None, None]).astype(x.dtype)
        x = pad_axis(x, columns, 2, "reflect") if columns else x
        y = conv(x, kernel.astype(x.dtype), dilation)
        return (y if bias is None else y + bias.astype(y.dtype)[None, None, None],)

    own, edge = Rows(1, rows, rows), Rows(1, 2 * reach, 2 * reach)
    edges = _edges(x, rows, reach) if reach else None
    inputs = own, edge if reach else None, None, None, None
    (out,) = map_row_blocks(block, h // rows, inputs, (own,), x, edges, kernel, bias, norm)
    return out


def _edges(x: Array, rows: int, reach: int) -> Array:
    """The rows above and below each block of rows, as many on either side."""
    first = rows * jnp.arange(x.shape[1] // rows, dtype=jnp.int32)[:, None]
    away = jnp.arange(reach, dtype=jnp.int32)[None]
    index = jnp.concatenate([first - reach + away, first + rows + away], axis=1).reshape(-1)
    last = to_int32(x.shape[1]) - 1
    index = last - jnp.abs(last - jnp.abs(index))  # reflected
    return jax.vmap(lambda image: image[index])(x)
