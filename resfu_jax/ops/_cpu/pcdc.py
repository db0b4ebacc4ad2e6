"""Paired central difference convolution on a CPU, block of rows by block of rows.

The queries are one more tap of the convolution, with the weights -sum_j W_j, so that t
is one matrix product per group. A normalisation is affine once its statistics are known: u is
projected before it is normalised, norm group by norm group, and only K*K numbers per norm group,
with the sums that the statistics need, leave a block of rows (`rows`). Backward, where the
statistics are known, norm and projection are one product. The hidden maps, of four times the
query's size each, are never written.

A dilated convolution of a bilinearly upsampled map, where the dilation is the ratio, is the
upsampling of the plain convolution of the small map: the taps of an output pixel share its
fractions. So a small k is convolved as it is.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops._cpu.rows import (
    Normalised,
    Rows,
    Taps,
    block_rows,
    cut,
    loop,
    map_row_blocks_normalised,
    put,
)
from resfu_jax.ops._polyphase import (
    extend,
    extend_axis,
    fold_axis,
    upsample_extended_axis,
    upsample_shifted_axis,
    upsampled_mean_square,
)
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.group_norm import group_mean, group_moments
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
    b, hh, ww, _ = q.shape
    side, hidden = p.kernel.shape[0], p.kernel.shape[3]
    o, dtype = hidden // groups, q.dtype
    weights = p.kernel * p.scale.reshape(groups, -1).T[None, None].repeat(o, 3)
    weights = weights.reshape(side**2, -1, groups, o).transpose(2, 3, 0, 1)  # group out tap in
    central = -weights.sum(axis=2)
    weights = weights.reshape(groups, o, -1)

    # Units of hidden channels that share a group of both kinds. What is kept of u are K*K numbers a
    # unit, each projected by itself.
    units = math.lcm(groups, norm_groups)
    inner = units // groups  # units of a convolution group
    apart = (p.hidden_scale[:, None] * p.project).T.reshape(-1, groups, inner, hidden // units)
    apart = apart.transpose(1, 0, 2, 3)[:, None]  # group . tap unit channel
    taps = apart.shape[2]
    apart = apart * jnp.eye(inner, dtype=dtype)[None, :, None, :, None]
    apart = jax.lax.stop_gradient(apart.reshape(groups, inner * taps, o))
    mix = p.mix.reshape(o, groups, o).transpose(1, 2, 0)
    bias, mix_bias = (a.reshape(groups, o) for a in (p.bias, p.mix_bias))
    # u where q and k agree. Its deviations from this are what is summed up, squared and projected:
    # of u itself, small differences between large numbers would be lost.
    agreed = jnp.einsum("goi,gi->go", mix, jax.nn.relu(bias), precision="highest")
    agreed = jax.lax.stop_gradient(jax.nn.relu(agreed + mix_bias))
    agreed = agreed.astype(at_least_float32(dtype))

    def compress(t, bias, mix, mix_bias, agreed):
        """The deviations of u, and the sums that its statistics need."""
        t = jax.nn.relu(t + bias[None, :, :, None])
        u = jax.nn.relu(_per_group(mix, t) + mix_bias[None, :, :, None])
        deviation = u.astype(agreed.dtype) - agreed[None, :, :, None]
        return deviation.astype(dtype), (deviation.sum(axis=3), jnp.square(deviation).sum(axis=3))

    ratio = whole_ratio(k.shape[1:3], q.shape[1:3])
    if ratio == (dilation, dilation) and dilation > 1:
        h, w = k.shape[1:3]
        wide = k.astype(at_least_float32(k.dtype))
        mean = group_mean(wide.mean(axis=(1, 2)), norm_groups)  # of the upsampled map as well
        centred = wide - mean[:, None, None]
        variance = group_mean(upsampled_mean_square(centred, ratio), norm_groups)
        k = (centred * jax.lax.rsqrt(variance + eps)[:, None, None]).astype(k.dtype)
        # One ring of responses beyond the image, for the interpolation at its border.
        k = jnp.moveaxis(extend(k, side // 2 + 1), 3, 1)
        k = k.reshape(b, groups, -1, *k.shape[2:])
        h, w = h + 2, w + 2
        windows = [k[..., v : v + h, u : u + w] for v, u in _offsets(side, 1)]
        windows = jnp.concatenate(windows, axis=2).reshape(b, groups, -1, h * w)
        response = _per_group(weights, windows).reshape(b, groups, o, h, w)
        k = upsample_extended_axis(response, dilation, 4)
        rows = block_rows(h - 2, b * ww * hidden * dilation, tile and tile // dilation)
        of_k = Rows(3, rows, rows, (0, 1, 2))
        rows, count = rows * dilation, (h - 2) // rows
        first = central

        def convolution(weights, k, q):
            t = _per_group(weights, q.reshape(b, groups, -1, rows * ww))
            return t + upsample_shifted_axis(k, dilation, 3).reshape(t.shape)

    else:
        if k.shape[1:3] != (hh, ww):
            k = resize(k, (hh, ww))
        k = _normalised(k, groups, norm_groups, dilation * (side // 2), eps)
        rows = block_rows(hh, b * ww * hidden, tile)
        of_k = Taps(rows, rows, ww, _offsets(side, dilation))
        count = hh // rows
        first = jnp.concatenate([weights, central], axis=2)

        def convolution(weights, k, q):
            windows = jnp.concatenate([k.reshape(b, groups, -1, rows, ww), q], axis=2)
            return _per_group(weights, windows.reshape(b, groups, -1, rows * ww))

    def hidden_of(params, blocks):
        weights, *others, _ = params
        return compress(convolution(weights, *blocks), *others)

    def narrow(params, u):
        return _per_group(params[-1], u).reshape(b, groups, inner, taps, rows, ww)

    def factor_and_bias(last, sums):
        """What makes the variance of u 1, channel by channel, and the bias of the scores."""
        project, project_bias, scale, shift, agreed = (a.astype(sums[0].dtype) for a in last)
        agreed = agreed.reshape(1, hidden)
        deviation, square = (a.reshape(b, hidden) / jnp.asarray(hh * ww, a.dtype) for a in sums)
        variance = jnp.maximum(square - jnp.square(deviation), 0)  # of a channel
        means = agreed + deviation
        mean = group_mean(means, norm_groups)
        variance = group_mean(variance + jnp.square(means - mean), norm_groups)
        factor = jax.lax.rsqrt(variance + eps)
        shift = shift[None] - (mean - agreed) * factor * scale[None]
        return factor, shift @ project + project_bias[None]

    def finish(last, sums, scores):
        factor, bias = factor_and_bias(last, sums)
        out = _sum_of_units(scores, factor.reshape(b, groups, inner, -1)[..., 0])
        return (out + bias[:, :, None, None]).astype(dtype)

    def fold(last, sums):
        factor, bias = factor_and_bias(last, sums)
        project, _, scale, *_ = (a.astype(factor.dtype) for a in last)
        project = project.T[None] * (factor * scale[None])[:, None]
        return project.astype(dtype), bias

    def apply(folded, u):
        project, bias = folded
        out = (project @ u.reshape(b, hidden, -1)).astype(bias.dtype) + bias[:, :, None]
        return out.astype(dtype).reshape(b, taps, rows, ww)

    out = map_row_blocks_normalised(
        Normalised(hidden_of, narrow, finish, fold, apply),
        count,
        inputs=(of_k, Rows(3, rows, rows)),
        narrow=Rows(4, rows, rows),
        output=Rows(2, rows, rows),
        params=(first, bias, mix, mix_bias, agreed, apart),
        last=(p.project, p.project_bias, p.hidden_scale, p.hidden_bias, agreed),
        arrays=(k, _normalised(q, groups, norm_groups, 0, eps)),
        keep=tile is None,
    )
    return jnp.moveaxis(out, 1, 3)


@jax.custom_vjp
def _sum_of_units(
    scores: Float[Array, "b g i taps h w"], factor: Float[Array, "b g i"]
) -> Float[Array, "b taps h w"]:
    _, groups, inner, *_ = scores.shape
    return sum(
        scores[:, g, i].astype(factor.dtype) * factor[:, g, i][:, None, None, None]
        for g in range(groups)
        for i in range(inner)
    )


def _sum_of_units_bwd(saved, d_out):
    # As broadcast products: differentiated as it stands, the sum would be a padded map a unit.
    scores, factor = saved
    d_out = d_out[:, None, None]
    d_scores = d_out * factor[..., None, None, None]
    d_factor = (scores.astype(factor.dtype) * d_out).sum(axis=(3, 4, 5))
    return d_scores.astype(scores.dtype), d_factor


_sum_of_units.defvjp(lambda s, f: (_sum_of_units(s, f), (s, f)), _sum_of_units_bwd)


def _offsets(side: int, dilation: int) -> tuple[tuple[int, int], ...]:
    """Row and column of the taps of a convolution, from the first one on."""
    steps = range(0, dilation * side, dilation)
    return tuple((row, column) for row in steps for column in steps)


def _per_group(weights: Float[Array, "g o i"], x: Float[Array, "b g i n"]) -> Array:
    """Each group's matrix times its pixels."""
    return jnp.broadcast_to(weights[None], (x.shape[0], *weights.shape)) @ x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _normalised(
    x: Array, groups: int, norm_groups: int, border: int, eps: float
) -> Float[Array, "b g d h2 w2"]:
    """The normalised map, without the norm's scale and bias.

    Its borders are replicated, and channels come first: long rows are what all steps then go along.
    """
    return _normalised_fwd(x, groups, norm_groups, border, eps)[0]


def _normalised_fwd(x, groups, norm_groups, border, eps):
    b, h, w, c = x.shape
    mean, factor = group_moments(x, groups=norm_groups, eps=eps)

    def block(rows):
        rows = (rows.astype(factor.dtype) - mean[:, None, None]) * factor[:, None, None]
        return extend_axis(jnp.moveaxis(rows.astype(x.dtype), 3, 1), border, 3)

    # Row by row into one map: extended as a whole, it would be written several times.
    y = jnp.zeros((b, c, h + 2 * border, w + 2 * border), x.dtype)
    for row, at in ((0, 0), (h - 1, border + h)):
        edge = block(jax.lax.slice_in_dim(x, row, row + 1, axis=1))
        edges = jnp.broadcast_to(edge, (b, c, border, w + 2 * border))
        y = jax.lax.dynamic_update_slice_in_dim(y, edges, at, 2)
    n = block_rows(h, 4 * b * w * c)  # both orders of the axes stay in the cache

    def body(i, y):
        (rows,) = cut((x,), i, (Rows(1, n, n),))
        return put(y, block(rows), i, Rows(2, n, n), border)

    y = loop(h // n, body, y).reshape(b, groups, c // groups, *y.shape[2:])
    return y, (y, factor, x[..., :0])  # of x, only the shape and the dtype


def _normalised_bwd(groups, norm_groups, border, eps, saved, g):
    # From the result, so that x need not be kept: with <> the mean over a group,
    # dx = factor (g - <g> - y <y g>). As y repeats pixels in the border, means are sums of it all.
    y, factor, empty = saved
    b, h, w, _ = empty.shape
    c = factor.shape[1]
    y, g = (a.reshape(b, c, *a.shape[3:]) for a in (y, g))
    pixels = jnp.asarray(h * w, factor.dtype)
    of_g, of_yg = (
        group_mean(a.astype(factor.dtype).sum(axis=(2, 3)) / pixels, norm_groups)
        for a in (g, y * g)
    )
    for axis, n in ((3, w), (2, h)):
        y = jax.lax.slice_in_dim(y, border, border + n, axis=axis)
        g = fold_axis(g, border, axis)
    of_g, of_yg, factor = (a[:, :, None, None] for a in (of_g, of_yg, factor))
    dx = g.astype(factor.dtype) - of_g - y.astype(factor.dtype) * of_yg
    # As a product, which XLA writes once: else it turns the map again for all that reads it.
    factor = factor[..., 0] * jnp.eye(c, dtype=factor.dtype)[None]
    dx = jnp.einsum("bchw,bcd->bhwd", dx, factor, precision="highest")
    return (dx.astype(empty.dtype),)


_normalised.defvjp(_normalised_fwd, _normalised_bwd)
