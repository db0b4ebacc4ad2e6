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

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops._dtypes import at_least_float32
from resfu_jax.ops._interp import Size
from resfu_jax.ops._polyphase import (
    extend,
    extend_axis,
    upsample_extended_axis,
    upsampled_moments,
    whole_ratio,
)
from resfu_jax.ops._row_blocks import Rows, block_rows, map_row_blocks_normalised
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
    of_q = group_moments(q, groups=norm_groups, eps=EPS)
    weights = p.kernel.reshape(side**2, -1, groups, o).transpose(2, 3, 0, 1)  # group out tap in
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

    # Within a block, channels come first: rows of pixels are what all steps go along.
    def normalised(q, of_q, scale):
        return _by_group(_centred(q, of_q, scale), groups)

    def compress(t, bias, mix, mix_bias, apart):
        """relu, mix, relu, and what leaves the block."""
        *_, h, w = t.shape
        t = jax.nn.relu(t + bias[None, :, :, None, None])
        u = jax.nn.relu(_per_group(mix, t) + mix_bias[None, :, :, None, None])
        scores = _per_group(apart, u).reshape(b, groups, inner, taps, h, w)
        u = u.astype(at_least_float32(u.dtype))
        return scores, (u.sum(axis=(3, 4)), jnp.square(u).sum(axis=(3, 4)))

    ratio = whole_ratio(k.shape[1:3], q.shape[1:3])
    if ratio == (dilation, dilation) and dilation > 1:
        small = k.astype(at_least_float32(k.dtype))
        centre = group_mean(small.mean(axis=(1, 2)), norm_groups)
        mean, square = upsampled_moments(small, ratio, centre)
        mean = group_mean(mean, norm_groups)
        variance = group_mean(square, norm_groups) - jnp.square(mean - centre)
        k = _centred(k, (mean, jax.lax.rsqrt(variance + EPS)), p.scale)
        # One ring of responses beyond the image, for the interpolation at its border.
        k = _by_group(extend(k, side // 2 + 1), groups)
        h = k.shape[3] - (side - 1)
        rows = [k[:, :, :, u : u + h] for u in range(side)]
        windows = _windows(rows, range(side), k.shape[4] - (side - 1))
        response = _per_group(weights, jnp.concatenate(windows, axis=2))
        response = jnp.moveaxis(response, 2, 4)  # columns are upsampled with channels last
        response = jnp.moveaxis(upsample_extended_axis(response, dilation, 3), 4, 2)
        n = block_rows(h - 2, b * ww * dilation * hidden, tile and tile // dilation)
        inputs = (Rows(3, n, n + 2), Rows(1, n * dilation, n * dilation))

        def f(params, blocks):
            of_q, scale, central, *rest, _ = params
            response, q = blocks
            t = _per_group(central, normalised(q, of_q, scale))
            return compress(t + upsample_extended_axis(response, dilation, 3), *rest)

        first, arrays, count = (central,), (response, q), (h - 2) // n
        out_rows = n * dilation
    else:
        if k.shape[1:3] != (hh, ww):
            k = resize(k, (hh, ww))
        of_k = group_moments(k, groups=norm_groups, eps=EPS)
        border, steps = dilation * (side // 2), tuple(range(0, dilation * side, dilation))
        k = extend_axis(k, border, 1)
        out_rows = block_rows(hh, b * ww * hidden, tile)
        inputs = (Rows(1, out_rows, out_rows, steps), Rows(1, out_rows, out_rows))

        def f(params, blocks):
            of_q, scale, of_k, weights, *rest, _ = params
            rows, q = blocks
            rows = [extend_axis(normalised(a, of_k, scale), border, 4) for a in rows]
            windows = [*_windows(rows, steps, ww), normalised(q, of_q, scale)]
            return compress(_per_group(weights, jnp.concatenate(windows, axis=2)), *rest)

        weights = jnp.concatenate([weights, central], axis=2)
        first, arrays, count = (of_k, weights), (k, q), hh // out_rows

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
    params = (of_q, p.scale, *first, bias, mix, mix_bias, apart, last)
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


def _windows(rows: list[Array], columns: Iterable[int], width: Size) -> list[Array]:
    """The taps of a convolution: `width` columns from every one of `columns` on, row by row."""
    return [a[..., v : v + width] for a in rows for v in columns]


def _per_group(weights: Float[Array, "g o i"], x: Float[Array, "b g i h w"]) -> Array:
    """Each group's matrix times its pixels."""
    *lead, _, h, w = x.shape
    weights = jnp.broadcast_to(weights[None], (x.shape[0], *weights.shape))
    return jnp.matmul(weights, x.reshape(*x.shape[:3], h * w)).reshape(*lead, -1, h, w)


def _by_group(x: Float[Array, "b h w c"], groups: int) -> Float[Array, "b g d h w"]:
    b, h, w, c = x.shape
    return jnp.moveaxis(x, 3, 1).reshape(b, groups, c // groups, h, w)


def _centred(x: Array, moments: tuple[Array, Array], scale: Array) -> Array:
    """The normalised map without the norm's bias, which cancels in the difference."""
    mean, factor = moments
    factor = factor * scale.astype(factor.dtype)[None]
    centred = (x.astype(factor.dtype) - mean[:, None, None]) * factor[:, None, None]
    return centred.astype(x.dtype)
