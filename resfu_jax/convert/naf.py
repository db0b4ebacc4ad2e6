"""valeoai/NAF:NAF."""

from collections.abc import Mapping
from typing import Any

from resfu_jax._checks import need
from resfu_jax.convert._state import StateDict, unfilled
from resfu_jax.upsamplers._encoder import Encoder
from resfu_jax.upsamplers.naf import NAF


def naf(
    state: Mapping[str, Any],
    *,
    dim: int = 256,
    heads_attn: int = 4,
    heads_rope: int = 4,
    kernel_size: int = 9,
    use_encoder: bool = True,
    rope_base: float = 100.0,
    rope_rescale: float | None = 2.0,
    img_layers: int = 2,
    **ours: Any,
) -> NAF:
    """The official NAF, of features of any width."""
    need(use_encoder, "use_encoder must be True: without encoders the official module cannot run")
    up = unfilled(
        NAF,
        None,
        dim=dim,
        heads_attn=heads_attn,
        heads_rope=heads_rope,
        kernel_size=kernel_size,
        rope_base=rope_base,
        rope_rescale=rope_rescale,
        img_layers=img_layers,
        **ours,
    )
    s = StateDict(state, "NAF")
    for name in ("encoder", "sem_encoder"):
        set_encoder(s, getattr(up, name), f"image_encoder.{name}")
    otherwise = f"is not that of rope_base={rope_base}, dim={dim} and heads_rope={heads_rope}"
    s.buffer("image_encoder.rope.periods", up.periods(), otherwise)
    s.done()
    return up


def set_encoder(s: StateDict, encoder: Encoder, name: str) -> None:
    """The official `nn.Sequential` of a convolution and blocks."""
    s.set_layer(encoder.conv, f"{name}.0", layout="OIHW")
    for i, block in enumerate(encoder.blocks, 1):
        for layer in ("norm1", "conv1", "norm2", "conv2"):
            layout = "OIHW" if layer.startswith("conv") else ""
            s.set_layer(getattr(block, layer), f"{name}.{i}.{layer}", layout=layout)
