"""Norms and the linear maps after them on a CPU: the normalised map is never whole."""

import jax.numpy as jnp
from jaxtyping import Array

from resfu_jax.ops._rows import Rows, block_rows, map_row_blocks
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.group_norm import group_moments
from resfu_jax.ops.layer_norm import layer_norm


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
