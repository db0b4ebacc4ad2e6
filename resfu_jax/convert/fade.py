"""poppinace/fade: FADE, FADELite and SemiShiftUp, in all their files."""

from collections.abc import Mapping
from typing import Any

from resfu_jax.convert._state import StateDict, unfilled
from resfu_jax.upsamplers.fade import FADE


def fade(
    state: Mapping[str, Any],
    *,
    in_channels_en: int,
    in_channels_de: int | None = None,
    scale: int = 2,
    up_kernel_size: int = 5,
    scrambled_phases: bool = False,
    **ours: Any,
) -> FADE:
    """The official FADE of `FADE_L2H.py` or, told apart by its keys, of `FADE_H2L.py`.

    Both are the same function, except that the plain PyTorch H2L file mixes up the phases of its
    convolution. `scrambled_phases=True` reproduces that, for weights trained with it.
    """
    high_to_low = any(name.endswith("kernel_generator.conv2_kernels") for name in state)
    if scrambled_phases and not high_to_low:
        raise ValueError("scrambled_phases is for weights of FADE_H2L.py; these are of FADE_L2H.py")
    up = _module(
        in_channels_en,
        in_channels_de,
        scale,
        up_kernel_size,
        scrambled_phases=scrambled_phases,
        **ours,
    )
    s = StateDict(state, "FADE")
    s.set_layer(up.gate, "gate_generator.conv", layout="OI11")
    if high_to_low:
        s.set(up.encode.kernel, "kernel_generator.conv2_kernels", layout="OIHW")
        s.set(up.encode.bias, "kernel_generator.conv2_bias")
        s.set_layer(up.compress_guide, "kernel_generator.conv1_en", layout="OI11")
        s.set_layer(up.compress, "kernel_generator.conv1_de", layout="OI11")
    else:
        _semi_shift(s, up, "OIHW")
    s.done()
    return up


def fade_lite(
    state: Mapping[str, Any],
    *,
    in_channels_en: int,
    in_channels_de: int | None = None,
    scale: int = 2,
    up_kernel_size: int = 5,
    **ours: Any,
) -> FADE:
    """The official FADELite."""
    up = _module(in_channels_en, in_channels_de, scale, up_kernel_size, lite=True, **ours)
    s = StateDict(state, "FADELite")
    s.set_layer(up.gate, "gate_generator.conv", layout="OI11")
    _semi_shift(s, up, "C1HW")
    s.done()
    return up


def semi_shift_up(
    state: Mapping[str, Any],
    *,
    in_channels_en: int,
    in_channels_de: int | None = None,
    scale: int = 2,
    up_kernel_size: int = 5,
    **ours: Any,
) -> FADE:
    """The official SemiShiftUp: FADE without the gate."""
    up = _module(in_channels_en, in_channels_de, scale, up_kernel_size, gate=False, **ours)
    s = StateDict(state, "SemiShiftUp")
    _semi_shift(s, up, "OIHW")
    s.done()
    return up


def _module(
    in_channels_en: int,
    in_channels_de: int | None,
    scale: int,
    up_kernel_size: int,
    **options: Any,
) -> FADE:
    """Our module from the official arguments; `in_channels_de` defaults to `in_channels_en`."""
    return unfilled(
        FADE,
        in_channels_en if in_channels_de is None else in_channels_de,
        in_channels_en,
        scale=scale,
        up_kernel_size=up_kernel_size,
        **options,
    )


def _semi_shift(s: StateDict, up: FADE, layout: str) -> None:
    s.set_layer(up.compress_guide, "ker_generator.compressor_en", layout="OI11")
    s.set_layer(up.compress, "ker_generator.compressor_de", layout="OI11")
    s.set_layer(up.encode, "ker_generator.content_encoder", layout=layout)
