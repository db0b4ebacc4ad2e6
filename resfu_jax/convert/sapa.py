"""poppinace/sapa: SAPA, SAPAExp; tiny-smart/sapa: SAPA, SAPADeform.

In all of them `dim_x` defaults to `dim_y`.
"""

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
    norm: Any = "LayerNorm",
    **ours: Any,
) -> SAPA:
    """The NeurIPS paper's SAPA (SAPA-B). `norm` is `torch.nn.LayerNorm`, or its name."""
    _layer_norm(norm)
    up = unfilled(
        SAPA,
        dim_y if dim_x is None else dim_x,
        dim_y,
        scale=up_factor,
        up_kernel_size=up_kernel_size,
        embedding_dim=embedding_dim,
        qkv_bias=qkv_bias,
        norm="layer",
        **ours,
    )
    return _set(StateDict(state, "SAPA"), up, "OI")


def sapa_exp(
    state: Mapping[str, Any],
    *,
    dim_y: int,
    dim_x: int | None = None,
    out_dim: int | None = None,
    q_mode: str = "encoder_only",
    v_embed: bool = False,
    up_factor: int = 2,
    up_kernel_size: int = 5,
    embedding_dim: int = 64,
    qkv_bias: bool = True,
    norm: Any = "LayerNorm",
    **ours: Any,
) -> SAPA:
    """The NeurIPS paper's SAPAExp. `norm` is `torch.nn.LayerNorm`, or its name."""
    _layer_norm(norm)
    up = unfilled(
        SAPA,
        dim_y if dim_x is None else dim_x,
        dim_y,
        scale=up_factor,
        q_mode=q_mode,
        v_embed=v_embed,
        out_dim=out_dim,
        up_kernel_size=up_kernel_size,
        embedding_dim=embedding_dim,
        qkv_bias=qkv_bias,
        norm="layer",
        **ours,
    )
    return _set(StateDict(state, "SAPAExp"), up, "OI")


def sapa_base(
    state: Mapping[str, Any],
    *,
    dim_y: int,
    dim_x: int | None = None,
    up_factor: int = 2,
    up_kernel_size: int = 5,
    embedding_dim: int = 32,
    qkv_bias: bool = True,
    norm: bool = True,
    **ours: Any,
) -> SAPA:
    """The extended SAPA."""
    up = unfilled(
        SAPA,
        dim_y if dim_x is None else dim_x,
        dim_y,
        scale=up_factor,
        up_kernel_size=up_kernel_size,
        embedding_dim=embedding_dim,
        qkv_bias=qkv_bias,
        norm="group" if norm else None,
        **ours,
    )
    return _set(StateDict(state, "SAPA"), up, "OI11")


def sapa_deform(
    state: Mapping[str, Any],
    *,
    dim_y: int,
    dim_x: int | None = None,
    up_factor: int = 2,
    num_point: int = 9,
    groups: int = 4,
    embedding_dim: int = 32,
    qkv_bias: bool = True,
    high_offset: bool = True,
    norm: bool = False,
    **ours: Any,
) -> SAPADeform:
    """SAPADeform."""
    up = unfilled(
        SAPADeform,
        dim_y if dim_x is None else dim_x,
        dim_y,
        scale=up_factor,
        num_point=num_point,
        groups=groups,
        embedding_dim=embedding_dim,
        qkv_bias=qkv_bias,
        high_offset=high_offset,
        norm="group" if norm else None,
        **ours,
    )
    s = StateDict(state, "SAPADeform")
    s.set_layer(up.offset, "offset", layout="OI11")
    return _set(s, up, "OI11")


def _layer_norm(norm: Any) -> None:
    name = norm if isinstance(norm, str) else getattr(norm, "__name__", repr(norm))
    if name.rpartition(".")[2] != "LayerNorm":
        raise ValueError(f"norm must be torch.nn.LayerNorm, or 'LayerNorm', got {norm!r}")


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
