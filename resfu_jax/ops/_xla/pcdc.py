"""Paired central difference convolution from dense products."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from resfu_jax.ops._xla.resample import along, upsample, upsampling
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.group_norm import group_mean, group_norm
from resfu_jax.ops.grouped_conv import block_diagonal, grouped_linear
from resfu_jax.ops.pad import pad
from resfu_jax.ops.sizes import Size, whole_ratio


def pcdc(k, q, p, *, dilation: int, groups: int, norm_groups: int, eps: float, tile: int | None):
    """Form of `ops.pcdc`. Where the ratio of the maps is the dilation, a small k stays small:

    the dilated convolution of an upsampled map is the upsampling of the plain convolution of the
    small one, as the taps of an output pixel share its fractions.
    """
    side, size = p.kernel.shape[0], q.shape[1:3]
    p = p._replace(norm_bias=jnp.zeros_like(p.norm_bias))  # it cancels in the difference
    q = group_norm(q, p.scale, p.norm_bias, groups=norm_groups, eps=eps)
    central = grouped_linear(q, p.kernel.sum(axis=(0, 1)), groups=groups)
    if whole_ratio(k.shape[1:3], size) == (dilation, dilation) and dilation > 1:
        k = normalised_as_upsampled(k, p, size, norm_groups, eps)
        # One ring of responses beyond the image, for the interpolation at its border.
        t = upsample(_convolution(k, p.kernel, groups, 1, side // 2 + 1), size, border=1)
    else:
        if k.shape[1:3] != size:
            k = upsample(k, size)
        k = group_norm(k, p.scale, p.norm_bias, groups=norm_groups, eps=eps)
        t = _convolution(k, p.kernel, groups, dilation, dilation * (side // 2))
    t = jax.nn.relu(t - central + p.bias[None, None, None])
    u = jax.nn.relu(grouped_linear(t, p.mix, groups=groups) + p.mix_bias[None, None, None])
    u = group_norm(u, p.hidden_scale, p.hidden_bias, groups=norm_groups, eps=eps)
    return u @ p.project + p.project_bias[None, None, None]


def _convolution(x: Array, kernel: Array, groups: int, dilation: int, border: int) -> Array:
    """Of the map with its edges repeated, as one product: taps and groups in one axis."""
    x = pad(x, (border, border), "edge")
    side = kernel.shape[0]
    h, w = (n - dilation * (side - 1) for n in x.shape[1:3])
    taps = [(dilation * v, dilation * u) for v in range(side) for u in range(side)]
    windows = jnp.concatenate([x[:, v : v + h, u : u + w] for v, u in taps], axis=3)
    dense = jax.vmap(lambda tap: block_diagonal(tap, groups))(
        kernel.reshape(side**2, *kernel.shape[2:])
    )
    return windows @ dense.reshape(-1, kernel.shape[3])


def normalised_as_upsampled(k: Array, p, size: tuple[Size, Size], groups: int, eps: float):
    """The small map, normalised with the statistics that it has once it is upsampled to `size`.

    Its mean is that of k, at whole ratios; with U the upsampling, |U k|^2 = k . (U^T U) k.
    """
    wide = k.astype(at_least_float32(k.dtype))
    centred = filtered = wide - group_mean(wide.mean(axis=(1, 2)), groups)[:, None, None]
    for axis, m in ((1, size[0]), (2, size[1])):
        u = upsampling(k.shape[axis], m, 0, wide.dtype)
        square = jnp.matmul(u.T, u, precision="highest") / jnp.asarray(m, u.dtype)
        filtered = along(filtered, square, axis)
    variance = group_mean((centred * filtered).sum(axis=(1, 2)), groups)
    factor = jax.lax.rsqrt(variance + eps) * p.scale.astype(wide.dtype)[None]
    return (
        centred * factor[:, None, None] + p.norm_bias.astype(wide.dtype)[None, None, None]
    ).astype(k.dtype)
