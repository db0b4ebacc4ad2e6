"""Paired central difference convolution, with its compressor: ReSFU's learned similarity.

    t = relu(sum_j W_j (GN(k)[p + d j] - GN(q)[p]) + b)             grouped, E -> hidden
    u = relu(Linear_grouped(t))                                     hidden -> hidden
    score = Linear(GN(u))                                           hidden -> K*K

Both arguments share the first norm's parameters; its bias cancels in the difference.

**Blocks.** The queries are one more tap of the convolution, with the weights -sum_j W_j, so that t
is one matrix product per group. A normalisation is affine once its statistics are known: u is
projected before it is normalised, norm group by norm group, and only K*K numbers per norm group,
with the sums that the statistics need, leave a block of rows (`_row_blocks`). The hidden maps, of
four times the query's size each, are never written.

A dilated convolution of a bilinearly upsampled map, where the dilation is the ratio, is the
upsampling of the plain convolution of the small map: the taps of an output pixel share its
fractions. So a small k is convolved as it is.

Source: "A Refreshed Similarity-based Upsampler for Direct High-Ratio Feature Upsampling".
"""

import functools
import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops._dtypes import at_least_float32
from resfu_jax.ops._order import zeros_after
from resfu_jax.ops._polyphase import (
    extend,
    extend_axis,
    upsample_extended_axis,
    upsample_shifted_axis,
    upsampled_mean_square,
    whole_ratio,
)
from resfu_jax.ops._row_blocks import (
    Rows,
    block_rows,
    loop,
    map_row_blocks,
    map_row_blocks_normalised,
)
from resfu_jax.ops.group_norm import group_mean, group_moments, group_norm
from resfu_jax.ops.grouped_conv import grouped_conv, grouped_linear
from resfu_jax.ops.resize import resize

Implementation = Literal["reference", "blocks"]

EPS = 1e-5


class PCDCParameters(NamedTuple):
    """Parameters, in the compute dtype."""

    kernel: Float[Array, "K K e_group hidden"]
    bias: Float[Array, " hidden"]
    scale: Float[Array, " e"]
    norm_bias: Float[Array, " e"]
    mix: Float[Array, "hidden_group hidden"]
    mix_bias: Float[Array, " hidden"]
    hidden_scale: Float[Array, " hidden"]
    hidden_bias: Float[Array, " hidden"]
    project: Float[Array, "hidden taps"]
    project_bias: Float[Array, " taps"]


def pcdc(
    k: Float[Array, "b h w e"],
    q: Float[Array, "b H W e"],
    parameters: PCDCParameters,
    *,
    dilation: int,
    groups: int,
    norm_groups: int,
    implementation: Implementation | None = None,
    tile: int | None = None,
) -> Float[Array, "b H W taps"]:
    """Scores of the K*K neighbours of every pixel of q; see the module's docstring.

    Args:
      k: keys. A map smaller than q stands for its bilinear upsampling to q's size.
      q: queries.
      parameters: of the layers.
      dilation: d, pixels of q.
      groups: of the first two layers.
      norm_groups: of both norms.
      implementation: `"reference"` computes as the formulas stand, `"blocks"` gives the same values
        from less memory and time. `None` takes `"blocks"`.
      tile: most rows of a block. With it, the projected numbers, which wait for the statistics of
        the last norm, are computed twice rather than kept.

    Raises:
      ValueError: an unknown implementation.
    """
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(
            f"implementation must be one of {get_args(Implementation)} or None, "
            f"got {implementation!r}"
        )
    if implementation == "reference":
        return _reference(k, q, parameters, dilation, groups, norm_groups)
    return _blocks(k, q, parameters, dilation, groups, norm_groups, tile)


def _reference(k, q, p: PCDCParameters, dilation: int, groups: int, norm_groups: int) -> Array:
    if k.shape[1:3] != q.shape[1:3]:
        k = resize(k, q.shape[1:3], implementation="reference")
    k, q = (group_norm(a, p.scale, p.norm_bias, groups=norm_groups, eps=EPS) for a in (k, q))
    border = dilation * (p.kernel.shape[0] - 1) // 2
    t = grouped_conv(
        extend(k, border),
        p.kernel,
        groups=groups,
        dilation=dilation,
        implementation="reference",
    )
    t = t - grouped_linear(q, p.kernel.sum(axis=(0, 1)), groups=groups)
    t = jax.nn.relu(t + p.bias[None, None, None])
    u = grouped_linear(t, p.mix, groups=groups) + p.mix_bias[None, None, None]
    u = jax.nn.relu(u)
    u = group_norm(u, p.hidden_scale, p.hidden_bias, groups=norm_groups, eps=EPS)
    return u @ p.project + p.project_bias[None, None, None]


def _blocks(
    k,
    q,
    p: PCDCParameters,
    dilation: int,
    groups: int,
    norm_groups: int,
    tile: int | None,
) -> Array:
    b, hh, ww, _ = q.shape
    side, hidden = p.kernel.shape[0], p.kernel.shape[3]
    o, dtype = hidden // groups, q.dtype
    weights = p.kernel * p.scale.reshape(groups, -1).T[None, None].repeat(o, 3)
    weights = weights.reshape(side**2, -1, groups, o).transpose(2, 3, 0, 1)  # group out tap in
    central = -weights.sum(axis=2)
    weights = weights.reshape(groups, o, -1)

    # Units of hidden channels that share a group of both kinds, each projected by itself.
    units = math.lcm(groups, norm_groups)
    inner = units // groups  # units of a convolution group
    project = (p.hidden_scale[:, None] * p.project).T.reshape(-1, groups, inner, hidden // units)
    project = project.transpose(1, 0, 2, 3)[:, None]  # group . tap unit channel
    taps = project.shape[2]
    apart = project * jnp.eye(inner, dtype=dtype)[None, :, None, :, None]
    apart = apart.reshape(groups, inner * taps, o)
    mix = p.mix.reshape(o, groups, o).transpose(1, 2, 0)
    bias, mix_bias = (a.reshape(groups, o) for a in (p.bias, p.mix_bias))

    def compress(t, width, bias, mix, mix_bias, apart):
        """relu, mix, relu, and what leaves the block, of the first `ww` of `width` columns."""
        t = jax.nn.relu(t + bias[None, :, :, None])
        u = jax.nn.relu(_per_group(mix, t) + mix_bias[None, :, :, None])
        scores = _per_group(apart, u).reshape(b, groups, inner, taps, -1, width)[..., :ww]
        u = u.astype(at_least_float32(u.dtype)).reshape(b, groups, o, -1, width)[..., :ww]
        return scores, (u.sum(axis=(3, 4)), jnp.square(u).sum(axis=(3, 4)))

    ratio = whole_ratio(k.shape[1:3], q.shape[1:3])
    if ratio == (dilation, dilation) and dilation > 1:
        h, w = k.shape[1:3]
        wide = k.astype(at_least_float32(k.dtype))
        mean = group_mean(wide.mean(axis=(1, 2)), norm_groups)  # of the upsampled map as well
        centred = wide - mean[:, None, None]
        variance = group_mean(upsampled_mean_square(centred, ratio), norm_groups)
        k = (centred * jax.lax.rsqrt(variance + EPS)[:, None, None]).astype(k.dtype)
        # One ring of responses beyond the image, for the interpolation at its border.
        border = side // 2 + 1
        k = jnp.moveaxis(extend(k, border), 3, 1)
        k = k.reshape(b, groups, -1, *k.shape[2:])
        h, w = h + 2, w + 2
        windows = [k[..., v : v + h, u : u + w] for v, u in _offsets(side, 1)]
        windows = jnp.concatenate(windows, axis=2).reshape(b, groups, -1, h * w)
        response = _per_group(weights, windows).reshape(b, groups, o, h, w)
        response = upsample_extended_axis(response, dilation, 4)
        n = block_rows(h - 2, b * ww * dilation * hidden, tile and tile // dilation)
        out_rows, count = n * dilation, (h - 2) // n
        inputs = (Rows(3, n, n, (0, 1, 2)), Rows(3, out_rows, out_rows))

        def f(params, blocks):
            central, *rest, _ = params
            response, q = blocks
            t = _per_group(central, q.reshape(b, groups, -1, out_rows * ww))
            t = t + upsample_shifted_axis(response, dilation, 3).reshape(t.shape)
            return compress(t, ww, *rest)

        first, arrays = (central,), (response, _normalised(q, q, groups, norm_groups, 0))
    else:
        if k.shape[1:3] != (hh, ww):
            k = resize(k, (hh, ww))
        border = dilation * (side // 2)
        k = _normalised(k, k, groups, norm_groups, border)
        q = _normalised(q, k, groups, norm_groups, border)
        width = ww + 2 * border
        out_rows = block_rows(hh, b * width * hidden, tile)
        length, count = out_rows * width, hh // out_rows
        shifts = _offsets(side, dilation)
        of_k_and_q = shifts, (shifts[len(shifts) // 2],)
        sizes_known = isinstance(hh, int) and isinstance(ww, int)
        if sizes_known:
            k, q = (a.reshape(*a.shape[:3], -1) for a in (k, q))
            inputs = tuple(
                Rows(3, length, length, tuple(v * width + u for v, u in offsets))
                for offsets in of_k_and_q
            )
        else:
            # Whether such a piece is within the map is a product of unknown sizes, which
            # `jax.export` cannot decide: rows instead, one more, and the piece of those.
            inputs = tuple(
                Rows(3, out_rows, out_rows + 1, tuple(v for v, _ in offsets))
                for offsets in of_k_and_q
            )

        def taken(rows, u):
            return rows if sizes_known else rows.reshape(*rows.shape[:3], -1)[..., u : u + length]

        def f(params, blocks):
            weights, *rest, _ = params
            windows = [
                taken(rows, u)
                for block, offsets in zip(blocks, of_k_and_q, strict=True)
                for rows, (_, u) in zip(block, offsets, strict=True)
            ]
            windows = jnp.concatenate(windows, axis=2)
            return compress(_per_group(weights, windows), width, *rest)

        weights = jnp.concatenate([weights, central], axis=2)
        first, arrays = (weights,), (k, q)

    def finish(params, sums, scores):
        """Statistics of u, and what its norm makes of the projections."""
        project, project_bias, hidden_scale, hidden_bias = params[-1]
        total, squares = (
            group_mean(a.reshape(b, hidden) / jnp.asarray(hh * ww, a.dtype), norm_groups)
            for a in sums
        )
        factor = jax.lax.rsqrt(jnp.maximum(squares - jnp.square(total), 0) + EPS)
        project, project_bias, hidden_scale, hidden_bias = (
            a.astype(factor.dtype) for a in (project, project_bias, hidden_scale, hidden_bias)
        )
        shift = hidden_bias[None] - total * factor * hidden_scale[None]
        shift = (shift @ project + project_bias[None])[:, :, None, None]
        out = _sum_of_units(scores, factor.reshape(b, groups, inner, -1)[..., 0]) + shift
        return out.astype(dtype)

    last = (p.project, p.project_bias, p.hidden_scale, p.hidden_bias)
    params = (*first, bias, mix, mix_bias, apart, last)
    narrow, output = Rows(4, out_rows, out_rows), Rows(2, out_rows, out_rows)
    out = map_row_blocks_normalised(
        f, finish, count, inputs, narrow, output, params, arrays, keep=tile is None
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _normalised(
    x: Float[Array, "b h w c"], done: Array, groups: int, norm_groups: int, border: int
) -> Float[Array, "b g d h2 w2"]:
    """The normalised map, without the norm's scale and bias, made after `done`.

    Its borders are replicated, and channels come first: long rows are what all steps then go along.
    With all pixels in one axis, a tap of a convolution is a shift of them all. It wraps around into
    the next row, in columns that only the borders have; the last tap reads from a row more.
    """
    return _normalised_fwd(x, done, groups, norm_groups, border)[0]


def _normalised_fwd(x, done, groups, norm_groups, border):
    b, h, w, c = x.shape
    mean, factor = group_moments(x, groups=norm_groups, eps=EPS)

    def block(rows):
        rows = (rows.astype(factor.dtype) - mean[:, None, None]) * factor[:, None, None]
        return extend_axis(jnp.moveaxis(rows.astype(x.dtype), 3, 1), border, 3)

    # Row by row into one map: extended as a whole, it would be written several times.
    y = zeros_after(done, (b, c, h + 2 * border + 1, w + 2 * border), x.dtype)
    for row, at in ((0, 0), (h - 1, border + h)):
        edge = block(jax.lax.slice_in_dim(x, row, row + 1, axis=1))
        edges = jnp.broadcast_to(edge, (b, c, border, w + 2 * border))
        y = jax.lax.dynamic_update_slice_in_dim(y, edges, at, 2)
    n = block_rows(h, b * w * c)

    def body(i, y):
        rows = jax.lax.dynamic_slice_in_dim(x, i * n, n, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(y, block(rows), border + i * n, 2)

    y = loop(h // n, body, y).reshape(b, groups, c // groups, *y.shape[2:])
    return y, (y, factor, x[..., :0])  # of x, only the shape and the dtype


def _normalised_bwd(groups, norm_groups, border, saved, g):
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
    of_g, of_yg, factor = (a[:, :, None, None] for a in (of_g, of_yg, factor))

    def inside(rows):
        """Columns of the image, the borders' added to the first and the last."""
        x = rows[..., border : border + w]
        for column, at in ((0, 0), (w - 1, border + w)):
            edge = rows[..., at : at + border].sum(axis=3, keepdims=True)
            edge = edge + jax.lax.slice_in_dim(x, column, column + 1, axis=3)
            x = jax.lax.dynamic_update_slice_in_dim(x, edge, column, 3)
        return x.astype(factor.dtype)

    def gradient(_, blocks):
        ((g,), (y,)) = blocks
        y = y[..., border : border + w].astype(factor.dtype)
        return (jnp.moveaxis(factor * (inside(g) - of_g - y * of_yg), 1, 3),)

    n = block_rows(h, b * w * c)
    source, target = Rows(2, n, n, (border,)), Rows(1, n, n)
    (dx,) = map_row_blocks(gradient, h // n, (source, source), (target,), (), (g, y))
    for row, at in ((0, 0), (h - 1, border + h)):
        edge = factor * inside(g[:, :, at : at + border].sum(axis=2, keepdims=True))
        edge = jnp.moveaxis(edge, 1, 3) + jax.lax.slice_in_dim(dx, row, row + 1, axis=1)
        dx = jax.lax.dynamic_update_slice_in_dim(dx, edge, row, 1)
    return dx.astype(empty.dtype), None


_normalised.defvjp(_normalised_fwd, _normalised_bwd)
