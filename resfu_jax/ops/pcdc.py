"""Paired central difference convolution, with its compressor: ReSFU's learned similarity.

    t = relu(sum_j W_j (GN(k)[p + d j] - GN(q)[p]) + b)             grouped, E -> hidden
    u = relu(Linear_grouped(t))                                     hidden -> hidden
    score = Linear(GN(u))                                           hidden -> K*K

Both arguments share the first norm's parameters; its bias cancels in the difference.

Source: "A Refreshed Similarity-based Upsampler for Direct High-Ratio Feature Upsampling".
"""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from resfu_jax.ops._cpu import pcdc as cpu
from resfu_jax.ops._forms import Forms, Implementation
from resfu_jax.ops._xla import pcdc as xla
from resfu_jax.ops.checks import takes_maps
from resfu_jax.ops.group_norm import group_norm
from resfu_jax.ops.grouped_conv import grouped_conv, grouped_linear
from resfu_jax.ops.pad import pad
from resfu_jax.ops.resize import resize


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


@takes_maps("k", "q")
def pcdc(
    k: Float[Array, "b h w e"],
    q: Float[Array, "b H W e"],
    parameters: PCDCParameters,
    *,
    dilation: int,
    groups: int,
    norm_groups: int,
    eps: float = 1e-5,
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
      eps: of both norms.
      implementation: `"reference"` computes as the formulas stand, `"xla"` from dense products,
        `"cpu"` in blocks of rows, from less memory. `None` takes the best of the platform.
      tile: most rows of a block of the CPU's form. With it, the projected numbers, which wait for
        the statistics of the last norm, are computed twice rather than kept.

    Raises:
      ValueError: an unknown implementation.
    """
    return _FORMS(
        implementation,
        k,
        q,
        parameters,
        dilation=dilation,
        groups=groups,
        norm_groups=norm_groups,
        eps=eps,
        tile=tile,
    )


def _reference(
    k: Array,
    q: Array,
    p: PCDCParameters,
    *,
    dilation: int,
    groups: int,
    norm_groups: int,
    eps: float,
    tile: int | None,
) -> Array:
    if k.shape[1:3] != q.shape[1:3]:
        k = resize(k, q.shape[1:3], implementation="reference")
    k, q = (group_norm(a, p.scale, p.norm_bias, groups=norm_groups, eps=eps) for a in (k, q))
    border = dilation * (p.kernel.shape[0] - 1) // 2
    t = grouped_conv(pad(k, (border, border), "edge"), p.kernel, groups=groups, dilation=dilation)
    t = t - grouped_linear(q, p.kernel.sum(axis=(0, 1)), groups=groups)
    t = jax.nn.relu(t + p.bias[None, None, None])
    u = grouped_linear(t, p.mix, groups=groups) + p.mix_bias[None, None, None]
    u = jax.nn.relu(u)
    u = group_norm(u, p.hidden_scale, p.hidden_bias, groups=norm_groups, eps=eps)
    return u @ p.project + p.project_bias[None, None, None]


_FORMS = Forms("pcdc", _reference, xla=xla.pcdc, cpu=cpu.pcdc)
