"""poppinace/sapa: SAPA, SAPAExp; tiny-smart/sapa: SAPA, SAPADeform."""

from collections.abc import Mapping
from typing import Any

from resfu_jax.convert._state import StateDict, unfilled
from resfu_jax.upsamplers.sapa import SAPA, SAPADeform


def sapa(
    state: Mapping[str, Any],
    *,
    dim_y: int,
    dim_x: int | None = None,
    up_factor: int = 2,
    up_kernel_size: int = 5,
    embedding_dim: int = 64,
    qkv_bias: bool = True,
) -> SAPA:
    """The NeurIPS paper's SAPA (SAPA-B); `dim_x` defaults to `dim_y`."""
    return sapa_exp(
        state,
        dim_y=dim_y,
        dim_x=dim_x,
        up_factor=up_factor,
        up_kernel_size=up_kernel_size,
        embedding_dim=embedding_dim,
        qkv_bias=qkv_bias,
    )


def sapa_exp(
    state: Mapping[str, Any],
    *,
    dim_y: int,
    dim_x: int | None = None,
    up_factor: int = 2,
    embedding_dim: int = 64,
    **options: Any,
) -> SAPA:
    """The NeurIPS paper's SAPAExp; `dim_x` defaults to `dim_y`, other options are named as ours."""
    up = unfilled(
        SAPA,
        dim_y if dim_x is None else dim_x,
        dim_y,
        scale=up_factor,
        embedding_dim=embedding_dim,
        **options,
    )
    return _set(StateDict(state, "SAPA"), up, "OI")


def sapa_base(
    state: Mapping[str, Any],
    *,
    dim_y: int,
    dim_x: int | None = None,
    up_factor: int = 2,
    norm: bool = True,
    **options: Any,
) -> SAPA:
    """The extended SAPA; `dim_x` defaults to `dim_y`, other options are named as ours."""
    up = unfilled(
        SAPA,
        dim_y if dim_x is None else dim_x,
        dim_y,
        scale=up_factor,
        norm="group" if norm else None,
        **options,
    )
    return _set(StateDict(state, "SAPA"), up, "OI11")


def sapa_deform(
    state: Mapping[str, Any],
    *,
    dim_y: int,
    dim_x: int | None = None,
    up_factor: int = 2,
    norm: bool = False,
    **options: Any,
) -> SAPADeform:
    """SAPADeform; `dim_x` defaults to `dim_y`, other options are named as ours."""
    up = unfilled(
        SAPADeform,
        dim_y if dim_x is None else dim_x,
        dim_y,
        scale=up_factor,
        norm="group" if norm else None,
        **options,
    )
    s = StateDict(state, "SAPADeform")
    s.set_layer(up.offset, "offset", layout="OI11")
    return _set(s, up, "OI11")


def _set(s: StateDict, up: Any, layout: str) -> Any:
    s.set_layer(up.norm_y, "norm_y")
    s.set_layer(up.norm_x, "norm_x")
    gated = getattr(up, "qx", None) is not None
    s.set_layer(up.q, "qy" if gated else "q", layout=layout)
    s.set_layer(up.k, "k", layout=layout)
    for name in ("qx", "gate", "v"):
        s.set_layer(getattr(up, name, None), name, layout=layout)
    s.done()
    return up
