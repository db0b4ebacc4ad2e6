"""MAP-RaysUp/RaysUp:RaysUp."""

from collections.abc import Mapping
from typing import Any

from resfu_jax.convert._state import StateDict, unfilled
from resfu_jax.convert.naf import set_encoder
from resfu_jax.upsamplers.raysup import RaysUp


def raysup(
    state: Mapping[str, Any],
    *,
    input_dim: int = 3,
    qk_dim: int = 256,
    v_dim: int = 384,
    feature_dim: int | None = None,
    kernel_size: int = 1,
    num_heads: int = 4,
    use_spe: bool = True,
    use_rope: bool = True,
    rope_freq_base: float = 3.0,
    **ours: Any,
) -> RaysUp:
    """The official RaysUp, of features of any width.

    It has no use for `input_dim`, `v_dim`, `feature_dim` and `kernel_size`: its window is 6 x 6.
    """
    up = unfilled(
        RaysUp,
        None,
        qk_dim=qk_dim,
        num_heads=num_heads,
        use_spe=use_spe,
        use_rope=use_rope,
        rope_freq_base=rope_freq_base,
        **ours,
    )
    s = StateDict(state, "RaysUp")
    if use_spe:
        names = ("enc_center", "enc_horiz", "enc_vert", "enc_corners")
        for encoder, name in zip(up.encoders, names, strict=True):
            set_encoder(s, encoder, f"image_tokenizer.img_encoder.{name}")
    else:
        s.set_layer(up.encoders[0], "image_tokenizer", layout="OIHW")
    s.done()
    return up
