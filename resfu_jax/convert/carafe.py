"""open-mmlab/mmcv:CARAFEPack."""

from collections.abc import Mapping
from typing import Any

from resfu_jax.convert._state import StateDict, unfilled
from resfu_jax.upsamplers.carafe import CARAFE


def carafe_pack(
    state: Mapping[str, Any], *, channels: int, scale_factor: int, **options: Any
) -> CARAFE:
    """The official CARAFEPack; other options are named as ours."""
    up = unfilled(CARAFE, channels, scale=scale_factor, **options)
    s = StateDict(state, "CARAFEPack")
    s.set_layer(up.compress, "channel_compressor", layout="OI11")
    s.set_layer(up.encode, "content_encoder", layout="OIHW")
    s.done()
    return up
