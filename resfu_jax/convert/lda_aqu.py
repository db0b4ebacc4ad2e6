"""duzw9311/LDA-AQU:LDA_AQU."""

from collections.abc import Mapping
from typing import Any

from resfu_jax.convert._state import StateDict, unfilled
from resfu_jax.upsamplers.lda_aqu import LDAAQU


def lda_aqu(
    state: Mapping[str, Any],
    *,
    in_channels: int,
    reduction_factor: int = 4,
    nh: int = 1,
    scale_factor: float = 2.0,
    k_e: int = 3,
    k_u: int = 3,
    n_groups: int = 2,
    range_factor: float = 11,
    rpb: bool = True,
    **ours: Any,
) -> LDAAQU:
    """The official LDA_AQU."""
    up = unfilled(
        LDAAQU,
        in_channels,
        scale=scale_factor,
        reduction_factor=reduction_factor,
        nh=nh,
        k_e=k_e,
        k_u=k_u,
        n_groups=n_groups,
        range_factor=range_factor,
        rpb=rpb,
        **ours,
    )
    s = StateDict(state, "LDA_AQU")
    s.set_layer(up.norm, "layer_norm.norm")
    s.set_layer(up.q, "proj_q", layout="OI11")
    s.set_layer(up.k, "proj_k", layout="OI11")
    s.set(up.offset.kernel, "conv_offset.0.weight", layout="C1HW")
    s.set_layer(up.offset.norm, "conv_offset.1.norm")
    s.set_layer(up.offset.conv, "conv_offset.3", layout="OIHW")
    if up.table is not None:
        s.set(up.table, "relative_position_bias_table", layout="1N1TD")
    s.done()
    return up
