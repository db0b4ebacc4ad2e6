"""A linear map of a normalised map, of which a CPU never writes the latter."""

from typing import Literal, get_args

from jaxtyping import Array, Float

from resfu_jax.ops._cpu import norm as cpu
from resfu_jax.ops._forms import Forms, Implementation
from resfu_jax.ops.checks import takes_maps
from resfu_jax.ops.group_norm import group_norm
from resfu_jax.ops.layer_norm import layer_norm

Norm = Literal["group", "layer"]


@takes_maps("x", others=("scale", "norm_bias", "kernel", "bias"))
def norm_linear(
    x: Float[Array, "b h w c"],
    scale: Float[Array, " c"],
    norm_bias: Float[Array, " c"],
    kernel: Float[Array, "c d"],
    bias: Float[Array, " d"] | None = None,
    *,
    norm: Norm,
    groups: int = 1,
    eps: float = 1e-5,
    implementation: Implementation | None = None,
) -> Float[Array, "b h w d"]:
    """`norm(x) @ kernel + bias`.

    Args:
      x: features.
      scale: of the norm.
      norm_bias: of the norm.
      kernel: of the linear map.
      bias: of the linear map, none if not given.
      norm: `"layer"` over the channels of a pixel, or `"group"` over space and groups of channels.
      groups: of the group norm.
      eps: of the norm.
      implementation: `"reference"` is one after the other; `"cpu"` makes both in blocks of rows.
        `None` takes the best of the platform.

    Returns:
      In the dtype of x; statistics are in float32 or better.

    Raises:
      ValueError: an unknown norm or form.
    """
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be one of {get_args(Norm)}, got {norm!r}")
    arrays = x, scale, norm_bias, kernel, bias
    return _FORMS(implementation, *arrays, norm=norm, groups=groups, eps=eps)


def _reference(
    x: Array,
    scale: Array,
    norm_bias: Array,
    kernel: Array,
    bias: Array | None,
    *,
    norm: Norm,
    groups: int,
    eps: float,
) -> Array:
    if norm == "group":
        y = group_norm(x, scale, norm_bias, groups=groups, eps=eps)
    else:
        y = layer_norm(x, scale, norm_bias, eps=eps)
    y = y @ kernel.astype(x.dtype)
    return y if bias is None else y + bias.astype(x.dtype)[None, None, None]


_FORMS = Forms("norm_linear", _reference, cpu=cpu.norm_linear)
