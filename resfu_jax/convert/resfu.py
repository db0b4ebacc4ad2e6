"""zmhhmz/ReSFU:ReSFU and its score branch."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from resfu_jax.convert._state import StateDict, unfilled
from resfu_jax.upsamplers.resfu import PCDC, ReSFU


def resfu(
    state: Mapping[str, Any],
    *,
    dim_y: int,
    dim_x: int | None = None,
    groups: int = 4,
    kernel_size: int = 3,
    scale_factor: int = 4,
    embedding_dim: int = 32,
    y_conv: bool = True,
    qkv_bias: bool = True,
    normx: bool = True,
    normy: bool = True,
    gn_dim: int = 8,
    radius: int = 8,
    eps: float = 1e-3,
    lr_mult: float = 1.0,
    gf_scale: int = 2,
    dilation: int | None = None,
    tile: int | None = None,
    **ours: Any,
) -> ReSFU:
    """The official ReSFU; `dim_x` defaults to `dim_y`. `dilation` and `tile` are ours."""
    up = unfilled(
        ReSFU,
        dim_y if dim_x is None else dim_x,
        dim_y,
        scale=scale_factor,
        dilation=dilation,
        groups=groups,
        kernel_size=kernel_size,
        embedding_dim=embedding_dim,
        y_conv=y_conv,
        qkv_bias=qkv_bias,
        normx=normx,
        normy=normy,
        gn_dim=gn_dim,
        radius=radius,
        eps=eps,
        lr_mult=lr_mult,
        gf_scale=gf_scale,
        tile=tile,
        **ours,
    )
    s = StateDict(state, "ReSFU")
    s.set_layer(up.norm_x, "norm_x")
    s.set_layer(up.norm_y, "norm_y")
    s.set_layer(up.q, "q", layout="OI11")
    s.set_layer(up.k, "k", layout="OI11")
    # The box filter, of size 2 * (radius // gf_scale) + 1.
    side = 2 * (up.radius // up.gf_scale) + 1
    s.buffer("GF.kernel", np.ones((up.k.out_features, 1, 1, side)), "is not a box of ones")
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
    param_dtype: DTypeLike = jnp.float32,
) -> PCDC:
    """The official PCDC_Block, one score branch of ReSFU. `param_dtype` is ours."""
    branch = unfilled(
        PCDC,
        width=in_channels,
        dilation=scale_factor,
        kernel_size=kernel_size,
        groups=groups,
        gn_dim=gn_dim,
        hidden=mid_channels,
        param_dtype=param_dtype,
    )
    s = StateDict(state, "PCDC_Block")
    _branch(s, "", branch)
    s.done()
    return branch


def _branch(s: StateDict, prefix: str, branch: PCDC) -> None:
    s.set(branch.kernel, f"{prefix}weight", layout="OIHW")
    s.set(branch.bias, f"{prefix}bias", layout="1C11")
    s.set_layer(branch.norm, f"{prefix}norm")
    s.set(branch.mix_kernel, f"{prefix}channel_compressor.1.weight", layout="OI11")
    s.set(branch.mix_bias, f"{prefix}channel_compressor.1.bias")
    s.set_layer(branch.hidden_norm, f"{prefix}channel_compressor.3")
    s.set_layer(branch.project, f"{prefix}channel_compressor.4", layout="OI11")
