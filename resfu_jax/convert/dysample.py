"""tiny-smart/dysample:DySample."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from resfu_jax.convert._state import StateDict, unfilled
from resfu_jax.upsamplers.dysample import DySample


def dysample(
    state: Mapping[str, Any], *, in_channels: int, scale: int = 2, **options: Any
) -> DySample:
    """The official DySample; other options are named as ours."""
    up = unfilled(DySample, in_channels, scale=scale, **options)
    s = StateDict(state, "DySample")
    s.set_layer(up.offset, "offset", layout="OI11")
    s.set_layer(up.scope, "scope", layout="OI11")
    # A buffer that only restates the scale: offsets of the phases, (x, y) x group x dy x dx.
    buffer = s.take("init_pos", (1, 2 * up.groups * scale**2, 1, 1))
    phase = (np.arange(scale) - (scale - 1) / 2) / scale
    dy, dx = np.meshgrid(phase, phase, indexing="ij")
    wanted = np.repeat(np.stack([dx, dy])[:, None], up.groups, axis=1)
    if not np.allclose(buffer.reshape(wanted.shape), wanted, atol=1e-6):
        s.problem(f"'init_pos' is not that of scale={scale}")
    s.done()
    return up
