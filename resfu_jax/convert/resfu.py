"""zmhhmz/ReSFU:ReSFU and its score branch."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from resfu_jax.convert._state import StateDict
from resfu_jax.upsamplers.resfu import PCDC, ReSFU


def resfu(
    state: Mapping[str, Any],
    *,
    dim_y: int,
    dim_x: int | None = None,
    scale_factor: int = 2,
    **options: Any,
) -> ReSFU:
    """The official ReSFU; `dim_x` defaults to `dim_y`, other options are named as ours."""
    up = ReSFU(
        dim_y if dim_x is None else dim_x, dim_y, scale=scale_factor, rngs=nnx.Rngs(0), **options
    )
    s = StateDict(state, "ReSFU")
    for name, norm in (("norm_x", up.norm_x), ("norm_y", up.norm_y)):
        if norm is not None:
            s.set(norm.scale, f"{name}.weight")
            s.set(norm.bias, f"{name}.bias")
    for name, layer in (("q", up.q), ("k", up.k)):
        if layer is not None:
            s.set(layer.kernel, f"{name}.weight", layout="OI11")
            if layer.bias is not None:
                s.set(layer.bias, f"{name}.bias")
    # The box filter of ones; a buffer, of size 2 * (radius // gf_scale) + 1.
    side = 2 * (up.radius // up.gf_scale) + 1
    s.take("GF.kernel", (up.k.out_features, 1, 1, side))
    _branch(s, "semantic_scores.", up.semantic_scores)
    _branch(s, "detail_scores.", up.detail_scores)
    s.done()
    return up


def pcdc_block(
    state: Mapping[str, Any],
    *,
    in_channels: int,
    scale_factor: int,
    mid_channels: int = 128,
    kernel_size: int = 3,
    groups: int = 4,
    gn_dim: int = 8,
) -> PCDC:
    """The official PCDC_Block, one score branch of ReSFU."""
    branch = PCDC(
        width=in_channels,
        dilation=scale_factor,
        kernel_size=kernel_size,
        groups=groups,
        gn_dim=gn_dim,
        hidden=mid_channels,
        rngs=nnx.Rngs(0),
    )
    s = StateDict(state, "PCDC_Block")
    _branch(s, "", branch)
    s.done()
    return branch


def _branch(s: StateDict, prefix: str, branch: PCDC) -> None:
    s.set(branch.kernel, f"{prefix}weight", layout="OIHW")
    s.set(branch.bias, f"{prefix}bias", layout="1C11")
    s.set(branch.norm.scale, f"{prefix}norm.weight")
    s.set(branch.norm.bias, f"{prefix}norm.bias")
    s.set(branch.mix_kernel, f"{prefix}channel_compressor.1.weight", layout="OI11")
    s.set(branch.mix_bias, f"{prefix}channel_compressor.1.bias")
    s.set(branch.hidden_norm.scale, f"{prefix}channel_compressor.3.weight")
    s.set(branch.hidden_norm.bias, f"{prefix}channel_compressor.3.bias")
    s.set(branch.project.kernel, f"{prefix}channel_compressor.4.weight", layout="OI11")
    s.set(branch.project.bias, f"{prefix}channel_compressor.4.bias")
