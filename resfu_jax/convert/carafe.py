"""open-mmlab/mmcv:CARAFEPack."""

from collections.abc import Mapping
from typing import Any

from resfu_jax.convert._state import StateDict, unfilled
from resfu_jax.upsamplers.carafe import CARAFE


def carafe_pack(
    state: Mapping[str, Any],
    *,
    channels: int,
    scale_factor: int,
    up_kernel: int = 5,
    up_group: int = 1,
    encoder_kernel: int = 3,
    encoder_dilation: int = 1,
    compressed_channels: int = 64,
    **ours: Any,
) -> CARAFE:
    """The official CARAFEPack."""
    up = unfilled(
        CARAFE,
        channels,
        scale=scale_factor,
        up_kernel=up_kernel,
        up_group=up_group,
        encoder_kernel=encoder_kernel,
        encoder_dilation=encoder_dilation,
        compressed_channels=compressed_channels,
        **ours,
    )
    s = StateDict(state, "CARAFEPack")
    s.set_layer(up.compress, "channel_compressor", layout="OI11")
    s.set_layer(up.encode, "content_encoder", layout="OIHW")
    s.done()
    return up
