"""tiny-smart/dysample:DySample."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from resfu_jax.convert._state import StateDict, unfilled
from resfu_jax.upsamplers.dysample import DySample


def dysample(
    state: Mapping[str, Any],
    *,
    in_channels: int,
    scale: int = 2,
    style: str = "lp",
    groups: int = 4,
    dyscope: bool = False,
    **ours: Any,
) -> DySample:
    """The official DySample."""
    up = unfilled(
        DySample, in_channels, scale=scale, style=style, groups=groups, dyscope=dyscope, **ours
    )
    s = StateDict(state, "DySample")
    s.set_layer(up.offset, "offset", layout="OI11")
    s.set_layer(up.scope, "scope", layout="OI11")
    # Offsets of the phases, (x, y) x group x dy x dx: they only restate the scale.
    phase = (np.arange(scale) - (scale - 1) / 2) / scale
    dy, dx = np.meshgrid(phase, phase, indexing="ij")
    phases = np.repeat(np.stack([dx, dy])[:, None], groups, axis=1)
    s.buffer("init_pos", phases.reshape(1, -1, 1, 1), f"is not that of scale={scale}")
    s.done()
    return up
