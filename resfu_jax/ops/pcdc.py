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
from resfu_jax.ops._polyphase import extend, upsample_extended, upsampled_moments, whole_ratio
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

    Raises:
      ValueError: an unknown implementation.
    """
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(
            f"implementation must be one of {get_args(Implementation)} or None, "
            f"got {implementation!r}"
        )
    form = _reference if implementation == "reference" else _blocks
    return form(k, q, parameters, dilation, groups, norm_groups)


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


def _blocks(k, q, p: PCDCParameters, dilation: int, groups: int, norm_groups: int) -> Array:
    b, hh, ww, _ = q.shape
    side, hidden = p.kernel.shape[0], p.kernel.shape[3]
    o = hidden // groups
    dtype = q.dtype
    of_q = group_moments(q, groups=norm_groups, eps=EPS)
    weights = p.kernel.reshape(side**2, -1, groups, o).transpose(2, 0, 1, 3)  # group tap in out
    central = -weights.sum(axis=1)
    weights = weights.reshape(groups, -1, o)

    # Units of hidden channels that share a group of both kinds, each projected by itself.
    units = math.lcm(groups, norm_groups)
    inner = units // groups  # units of a convolution group
    project = (p.hidden_scale[:, None] * p.project).reshape(groups, inner, hidden // units, -1)
    taps = project.shape[-1]
    apart = project[:, :, :, None] * jnp.eye(inner, dtype=q.dtype)[None, :, None, :, None]
    apart = apart.reshape(groups, o, inner * taps)
    mix = p.mix.reshape(o, groups, o).transpose(1, 0, 2)
    bias, mix_bias = (a.reshape(groups, o) for a in (p.bias, p.mix_bias))

    def compress(t, mix, mix_bias, apart):
        """relu, mix, relu, and what leaves the block."""
        b, g, h, w, _ = t.shape
        t = jax.nn.relu(t).reshape(b, g, h * w, o)
        u = jax.nn.relu(_per_group(t, mix) + mix_bias[None, :, None])
        scores = _per_group(u, apart).reshape(b, g, h, w, inner * taps)
        u = u.astype(at_least_float32(u.dtype))
        return scores, (u.sum(axis=2), jnp.square(u).sum(axis=2))

    # Normalisation and the order of axes, too, are made block by block.
    def normalised(x, moments, scale):
        return _by_group(_centred(x, moments, scale), groups)

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
        response = _windows(k, side, 1)
        _, _, h, w, _ = response.shape
        response = _per_group(response.reshape(b, groups, h * w, -1), weights)
        response = response.reshape(b, groups, h, w, o)
        rows = block_rows(h - 2, b * ww * dilation)
        inputs = (Rows(2, rows, rows + 2), Rows(1, rows * dilation, rows * dilation))

        def f(params, blocks):
            of_q, scale, central, bias, *rest, _ = params
            response, q = blocks
            q = normalised(q, of_q, scale)
            up = response.reshape(b * groups, *response.shape[2:])
            up = upsample_extended(up, ratio).reshape(*q.shape[:4], o)
            t = _per_group(q.reshape(b, groups, -1, q.shape[4]), central)
            t = t.reshape(up.shape) + up + bias[None, :, None, None]
            return compress(t, *rest)

        first, arrays, count = (central,), (response, q), (h - 2) // rows
        out_rows = rows * dilation
    else:
        if k.shape[1:3] != (hh, ww):
            k = resize(k, (hh, ww))
        of_k = group_moments(k, groups=norm_groups, eps=EPS)
        border = dilation * (side - 1) // 2
        k = extend(k, border)
        rows = block_rows(hh, b * ww)
        inputs = (Rows(1, rows, rows + 2 * border), Rows(1, rows, rows))

        def f(params, blocks):
            of_q, scale, of_k, weights, bias, *rest, _ = params
            k, q = blocks
            k, q = normalised(k, of_k, scale), normalised(q, of_q, scale)
            x = jnp.concatenate([_windows(k, side, dilation), q], axis=-1)
            t = _per_group(x.reshape(b, groups, -1, x.shape[4]), weights)
            return compress(t.reshape(*q.shape[:4], o) + bias[None, :, None, None], *rest)

        weights = jnp.concatenate([weights, central], axis=1)
        first, arrays, count = (of_k, weights), (k, q), hh // rows
        out_rows = rows

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
        out = (shift @ project + project_bias[None])[:, None, None]
        scores = scores.reshape(*scores.shape[:4], inner, taps)
        out = out + _sum_of_units(scores, factor.reshape(b, groups, inner, -1)[..., 0])
        return out.astype(dtype)

    last = (p.project, p.project_bias, p.hidden_scale, p.hidden_bias)
    params = (of_q, p.scale, *first, bias, mix, mix_bias, apart, last)
    narrow, output = Rows(2, out_rows, out_rows), Rows(1, out_rows, out_rows)
    return map_row_blocks_normalised(f, finish, count, inputs, narrow, output, params, arrays)


@jax.custom_vjp
def _sum_of_units(
    scores: Float[Array, "b g h w i taps"], factor: Float[Array, "b g i"]
) -> Float[Array, "b h w taps"]:
    _, groups, _, _, inner, _ = scores.shape
    return sum(
        scores[:, g, :, :, i].astype(factor.dtype) * factor[:, g, i][:, None, None, None]
        for g in range(groups)
        for i in range(inner)
    )


def _sum_of_units_bwd(saved, d_out):
    # As broadcast products: differentiated as it stands, the sum would be a padded map a unit.
    scores, factor = saved
    d_out = d_out[:, None, :, :, None]
    d_scores = d_out * factor[:, :, None, None, :, None]
    d_factor = (scores.astype(factor.dtype) * d_out).sum(axis=(2, 3, 5))
    return d_scores.astype(scores.dtype), d_factor


_sum_of_units.defvjp(lambda s, f: (_sum_of_units(s, f), (s, f)), _sum_of_units_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _windows(x: Float[Array, "b g h w c"], side: int, dilation: int) -> Array:
    """All side x side windows, (b, g, h - d (side - 1), w - d (side - 1), side^2 c)."""
    h, w = (n - dilation * (side - 1) for n in x.shape[2:4])
    steps = range(0, dilation * side, dilation)
    return jnp.concatenate([x[:, :, u : u + h, v : v + w] for u in steps for v in steps], axis=-1)


def _windows_bwd(side, dilation, _, g):
    # Overlap-added axis by axis: differentiated as it stands, a padded map a tap.
    c = g.shape[4] // side**2
    reach = dilation * (side - 1)

    def place(a, i, axis):
        border = [(0, 0)] * 5
        border[axis] = (i * dilation, reach - i * dilation)
        return jnp.pad(a, border)

    rows = 0
    for u in range(side):
        taps = [g[..., (u * side + v) * c : (u * side + v + 1) * c] for v in range(side)]
        rows = rows + place(sum(place(t, v, 3) for v, t in enumerate(taps)), u, 2)
    return (rows,)


_windows.defvjp(lambda x, side, dilation: (_windows(x, side, dilation), None), _windows_bwd)


def _per_group(x: Float[Array, "b g n i"], weights: Float[Array, "g i o"]) -> Array:
    """Each group's pixels times its matrix."""
    return jnp.matmul(x, jnp.broadcast_to(weights[None], (x.shape[0], *weights.shape)))


def _by_group(x: Float[Array, "b h w c"], groups: int) -> Float[Array, "b g h w d"]:
    b, h, w, c = x.shape
    return x.reshape(b, h, w, groups, c // groups).transpose(0, 3, 1, 2, 4)


def _centred(x: Array, moments: tuple[Array, Array], scale: Array) -> Array:
    """The normalised map without the norm's bias, which cancels in the difference."""
    mean, factor = moments
    factor = factor * scale.astype(factor.dtype)[None]
    centred = (x.astype(factor.dtype) - mean[:, None, None]) * factor[:, None, None]
    return centred.astype(x.dtype)
