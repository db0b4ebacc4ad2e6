"""open-mmlab/mmcv:CARAFEPack."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from resfu_jax.convert._state import StateDict
from resfu_jax.upsamplers.carafe import CARAFE


def carafe_pack(
    state: Mapping[str, Any], *, channels: int, scale_factor: int, **options: Any
) -> CARAFE:
    """The official CARAFEPack; other options are named as ours."""
    up = CARAFE(channels, scale=scale_factor, rngs=nnx.Rngs(0), **options)
    s = StateDict(state, "CARAFEPack")
    s.set_layer(up.compress, "channel_compressor", layout="OI11")
    s.set_layer(up.encode, "content_encoder", layout="OIHW")
    s.done()
    return up
