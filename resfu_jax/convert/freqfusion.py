"""Linwei-Chen/FreqFusion:FreqFusion."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from resfu_jax.convert._state import StateDict, unfilled
from resfu_jax.upsamplers.freqfusion import FreqFusion

_SCALE = 2  # the only one that the official module knows


def freqfusion(
    state: Mapping[str, Any],
    *,
    hr_channels: int,
    lr_channels: int,
    scale_factor: int = 1,
    lowpass_kernel: int = 5,
    highpass_kernel: int = 3,
    up_group: int = 1,
    encoder_kernel: int = 3,
    encoder_dilation: int = 1,
    compressed_channels: int = 64,
    align_corners: bool = False,
    upsample_mode: str = "nearest",
    feature_resample: bool = False,
    feature_resample_group: int = 4,
    comp_feat_upsample: bool = True,
    use_high_pass: bool = True,
    use_low_pass: bool = True,
    hr_residual: bool = True,
    semi_conv: bool = True,
    hamming_window: bool = True,
    feature_resample_norm: bool = True,
    direction_feat: str = "sim_concat",
    **ours: Any,
) -> FreqFusion:
    """The official FreqFusion; that of the SegNeXt copy with `direction_feat="sim"`.

    `align_corners` and `use_low_pass` change nothing there.
    """
    for name, value in (("scale_factor", scale_factor), ("up_group", up_group)):
        if value != 1:
            raise ValueError(f"{name} must be 1, as the official module needs it, got {value!r}")
    up = unfilled(
        FreqFusion,
        lr_channels,
        hr_channels,
        scale=_SCALE,
        compressed_channels=compressed_channels,
        lowpass_kernel=lowpass_kernel,
        highpass_kernel=highpass_kernel,
        encoder_kernel=encoder_kernel,
        encoder_dilation=encoder_dilation,
        upsample_mode=upsample_mode,
        feature_resample=feature_resample,
        feature_resample_group=feature_resample_group,
        comp_feat_upsample=comp_feat_upsample,
        use_high_pass=use_high_pass,
        hr_residual=hr_residual,
        semi_conv=semi_conv,
        hamming_window=hamming_window,
        feature_resample_norm=feature_resample_norm,
        direction_feat=direction_feat,
        **ours,
    )
    s = StateDict(state, "FreqFusion")
    s.set_layer(up.compress, "lr_channel_compressor", layout="OI11")
    s.set_layer(up.compress_guide, "hr_channel_compressor", layout="OI11")
    s.set_layer(up.low, "content_encoder", layout="OIHW")
    s.set_layer(up.high, "content_encoder2", layout="OIHW")
    for name, side in (("lowpass", lowpass_kernel), ("highpass", highpass_kernel)):
        line = np.hamming(side)
        window = np.outer(line, line)[None, None] if hamming_window else np.ones(1)
        s.buffer(f"hamming_{name}", window, f"is not that of hamming_window={hamming_window}")
    if (offsets := up.offsets) is not None:
        s.set_layer(offsets.offset_x, "dysampler.offset", layout="OIHW")
        s.set_layer(offsets.scope_x, "dysampler.direct_scale", layout="OIHW")
        s.set_layer(offsets.offset_y, "dysampler.hr_offset", layout="OIHW")
        s.set_layer(offsets.scope_y, "dysampler.hr_direct_scale", layout="OIHW")
        s.set_layer(offsets.norm_x, "dysampler.norm_lr")
        s.set_layer(offsets.norm_y, "dysampler.norm_hr")
        s.buffer("dysampler.init_pos", _phases(feature_resample_group), "is not that of scale 2")
    s.done()
    return up


def _phases(groups: int) -> np.ndarray:
    """Offsets of the phases, (x, y) x group x dy x dx: they only restate the scale."""
    phase = (np.arange(_SCALE) - (_SCALE - 1) / 2) / _SCALE
    dy, dx = np.meshgrid(phase, phase, indexing="ij")
    phases = np.repeat(np.stack([dx, dy])[:, None], groups, axis=1)
    return phases.reshape(1, -1, 1, 1)
