"""mhamilton723/FeatUp: JBULearnedRange, JBUStack."""

from collections.abc import Mapping
from typing import Any

from resfu_jax.convert._state import StateDict, unfilled
from resfu_jax.convert._wrapped import unwrapped
from resfu_jax.upsamplers.featup import FeatUp, FeatUpJBU


def jbu_learned_range(
    state: Mapping[str, Any],
    *,
    guidance_dim: int,
    feat_dim: int,
    key_dim: int,
    scale: int = 2,
    radius: int = 3,
    **ours: Any,
) -> FeatUpJBU:
    """JBULearnedRange. `scale` has no effect, as there."""
    up = unfilled(
        FeatUpJBU, feat_dim, guidance_dim=guidance_dim, key_dim=key_dim, radius=radius, **ours
    )
    s = StateDict(state, "JBULearnedRange")
    _set(s, up)
    s.done()
    return up


def jbu_stack(state: Mapping[str, Any], *, feat_dim: int, **ours: Any) -> FeatUp:
    """JBUStack, alone or in a checkpoint of an UpsampledBackbone, then with its norm."""
    state, norm = unwrapped(state)
    up = unfilled(FeatUp, feat_dim, norm=norm, **ours)
    s = StateDict(state, "JBUStack")
    s.set_layer(up.norm_features, "norm_features")
    for i, stage in enumerate(up.stages, start=1):
        _set(s, stage, f"up{i}.")
    s.set_layer(up.fixup, "fixup_proj.1", layout="OI11")
    s.done()
    return up


def _set(s: StateDict, up: FeatUpJBU, prefix: str = "") -> None:
    s.set(up.log_temperature, f"{prefix}range_temp")
    s.set(up.sigma, f"{prefix}sigma_spatial")
    s.set_layer(up.range1, f"{prefix}range_proj.0", layout="OI11")
    s.set_layer(up.range2, f"{prefix}range_proj.3", layout="OI11")
    s.set_layer(up.fixup1, f"{prefix}fixup_proj.0", layout="OI11")
    s.set_layer(up.fixup2, f"{prefix}fixup_proj.3", layout="OI11")
