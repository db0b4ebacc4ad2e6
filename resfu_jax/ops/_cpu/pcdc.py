"""Paired central difference convolution on a CPU, block of rows by block of rows.

The queries are one more tap of the convolution, with the weights -sum_j W_j, so that t is one
matrix product per group. The last norm, GN(u) = factor (u - mean), is known once all blocks are
done. Until then each norm group's share of the scores waits, K*K numbers of a group, with the sums
that make the statistics. So the hidden maps, of four times the query's size each, are never whole.

Channels come first here: long rows are what all steps then go along.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops._rows import Rows, block_rows, map_row_blocks
from resfu_jax.ops._xla.pcdc import normalised_as_upsampled
from resfu_jax.ops._xla.resample import upsampling
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.group_norm import group_mean, group_norm
from resfu_jax.ops.pad import pad
from resfu_jax.ops.resize import resize
from resfu_jax.ops.sizes import whole_ratio


def pcdc(
    k: Array,
    q: Array,
    p: tuple,
    *,
    dilation: int,
    groups: int,
    norm_groups: int,
    eps: float,
    tile: int | None,
) -> Array:
    """Form of `ops.pcdc`."""
    (b, hh, ww, _), dtype, wide = q.shape, q.dtype, at_least_float32(q.dtype)
    side, hidden, taps = p.kernel.shape[0], p.kernel.shape[3], p.project.shape[1]
    units = math.lcm(groups, norm_groups)  # of hidden channels that share a group of both kinds

    def by_group(x: Float[Array, "b h w c"]) -> Float[Array, "b g d h w"]:
        return jnp.moveaxis(x, 3, 1).reshape(b, groups, -1, *x.shape[1:3])

    def matrices(a: Array) -> Float[Array, "g o i"]:
        """Of each group, from weights (..., i, g o) of which the first axes are taps."""
        a = a.reshape(-1, a.shape[-2], groups, a.shape[-1] // groups)
        return a.transpose(2, 3, 0, 1).reshape(groups, a.shape[3], -1)

    weights, central, mix = matrices(p.kernel), -matrices(p.kernel.sum((0, 1))), matrices(p.mix)
    # Each unit's own scores: what the others' channels give to them is zero.
    project = (p.hidden_scale[:, None] * p.project).reshape(groups, units // groups, -1, taps)
    eye = jnp.eye(units // groups, dtype=dtype)
    project = jnp.einsum("guct,uv->gvtuc", project, eye).reshape(groups, -1, hidden // groups)
    bias, mix_bias = (a.reshape(1, groups, -1, 1) for a in (p.bias, p.mix_bias))
    # u where q and k agree. Its deviations from this are what is summed up, squared and projected:
    # of u itself, small differences between large numbers would be lost.
    agreed = jax.nn.relu(_per_group(mix, jax.nn.relu(bias)) + mix_bias)
    agreed = jax.lax.stop_gradient(agreed.astype(wide))

    def scores_and_sums(params, t, rows):
        bias, mix, mix_bias, project = params
        t = jax.nn.relu(t + bias)
        u = jax.nn.relu(_per_group(mix, t) + mix_bias).astype(wide) - agreed
        scores = _per_group(project, u.astype(dtype)).reshape(b, units, taps, rows, ww)
        return scores, u.sum(axis=3), jnp.square(u).sum(axis=3)

    p = p._replace(norm_bias=jnp.zeros_like(p.norm_bias))  # it cancels in the difference
    q = group_norm(q, p.scale, p.norm_bias, groups=norm_groups, eps=eps)
    if whole_ratio(k.shape[1:3], q.shape[1:3]) == (dilation, dilation) and dilation > 1:
        # The taps of an output pixel share its fractions: so the dilated convolution of an
        # upsampled map is the upsampling of the plain convolution of the small one, here with one
        # ring of responses beyond the image, for the interpolation at its border.
        h, w = k.shape[1:3]
        k = normalised_as_upsampled(k, p, (hh, ww), norm_groups, eps)
        windows = _windows(by_group(pad(k, (side // 2 + 1,) * 2, "edge")), side, 1, (h + 2, w + 2))
        k = _per_group(weights, windows).reshape(b, hidden, h + 2, w + 2)
        # Columns: each of a cell's output pixels from the cell and those beside it.
        cell = upsampling(1, dilation, 1, dtype)
        beside = jnp.stack([k[..., t : t + w] for t in range(3)], axis=4)
        k = (beside @ cell.T).reshape(b, hidden, h + 2, ww)
        rows = block_rows(h, b * ww * hidden * dilation, tile and tile // dilation)
        of_k, count, rows = Rows(2, rows, rows + 2), h // rows, rows * dilation
        of_pixel = central

        def block(params, of_pixel, k, q):
            t = _per_group(of_pixel, q.reshape(b, groups, -1, rows * ww))
            m = upsampling(rows // dilation, rows, 1, dtype)
            return scores_and_sums(params, t + (m[None, None] @ k).reshape(t.shape), rows)

    else:
        if k.shape[1:3] != (hh, ww):
            k = resize(k, (hh, ww))
        border = dilation * (side // 2)
        k = group_norm(k, p.scale, p.norm_bias, groups=norm_groups, eps=eps)
        k = by_group(pad(k, (border, border), "edge"))
        rows = block_rows(hh, b * ww * hidden, tile)
        of_k, count = Rows(3, rows, rows + 2 * border), hh // rows
        of_pixel = jnp.concatenate([weights, central], axis=2)

        def block(params, of_pixel, k, q):
            windows = _windows(k, side, dilation, (rows, ww), q)
            return scores_and_sums(params, _per_group(of_pixel, windows), rows)

    def statistics(deviation, square):
        """What makes the variance of u 1, unit by unit, and the bias of the scores."""
        pixels = jnp.asarray(hh * ww, wide)  # sizes may be symbolic
        deviation, square = (a.reshape(b, hidden) / pixels for a in (deviation, square))
        means = agreed.reshape(1, hidden) + deviation
        mean = group_mean(means, norm_groups)
        variance = jnp.maximum(square - jnp.square(deviation), 0) + jnp.square(means - mean)
        factor = jax.lax.rsqrt(group_mean(variance, norm_groups) + eps)
        scale, shift, project, bias = (
            a.astype(wide) for a in (p.hidden_scale, p.hidden_bias, p.project, p.project_bias)
        )
        shift = shift[None] - (mean - agreed.reshape(1, hidden)) * factor * scale[None]
        return factor.reshape(b, units, -1)[..., 0], shift @ project + bias[None]

    def normalised(scores, factor, bias):
        out = jnp.einsum("buthw,bu->bhwt", scores, factor.astype(dtype))
        return out + bias.astype(dtype)[:, None, None]

    own = Rows(3, rows, rows)
    inputs = None, None, of_k, own
    arrays = (bias, mix, mix_bias, project), of_pixel, k, by_group(q)
    if tile is None:
        scores, *sums = map_row_blocks(block, count, inputs, (own, None, None), *arrays)
        return normalised(scores, *statistics(*sums))
    # The units' scores, too, for a block at a time, computed once more.
    sums = map_row_blocks(lambda *a: block(*a)[1:], count, inputs, (None, None), *arrays)
    (out,) = map_row_blocks(
        lambda known, *a: (normalised(block(*a)[0], *known),),
        count,
        (None, *inputs),
        (Rows(1, rows, rows),),
        statistics(*sums),
        *arrays,
    )
    return out


def _per_group(weights: Float[Array, "g o i"], x: Float[Array, "b g i n"]) -> Array:
    """Each group's matrix times its pixels."""
    return jnp.broadcast_to(weights[None], (x.shape[0], *weights.shape)) @ x


def _windows(x: Array, side: int, dilation: int, size: tuple, *others: Array) -> Array:
    """What the taps of a convolution see of the maps (b, g, d, h, w), and other maps of `size`."""
    steps, (h, w) = range(0, dilation * side, dilation), size
    taps = [x[..., row : row + h, column : column + w] for row in steps for column in steps]
    x = jnp.concatenate([*taps, *others], axis=2)
    return x.reshape(*x.shape[:3], -1)
