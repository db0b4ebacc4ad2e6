"""PaulCouairon/JAFAR:JAFAR."""

from collections.abc import Mapping
from typing import Any

from resfu_jax.convert._state import StateDict, store, unfilled
from resfu_jax.upsamplers._cross_attention import CrossAttention, ImageEncoder
from resfu_jax.upsamplers._encoder import Block, Encoder
from resfu_jax.upsamplers.jafar import JAFAR

JAFAR_BLOCK = ("norm1", "conv1", "norm2", "conv2")  # names of a block's layers


def jafar(
    state: Mapping[str, Any],
    *,
    input_dim: int = 3,
    qk_dim: int = 128,
    v_dim: int = 384,
    feature_dim: Any = None,
    kernel_size: int = 1,
    num_heads: int = 4,
    **ours: Any,
) -> JAFAR:
    """The official JAFAR, which does not use `feature_dim`."""
    up = unfilled(
        JAFAR,
        v_dim,
        input_dim=input_dim,
        qk_dim=qk_dim,
        kernel_size=kernel_size,
        num_heads=num_heads,
        **ours,
    )
    s = StateDict(state, "JAFAR")
    set_image_encoder(s, up.encode, JAFAR_BLOCK)
    set_encoder(s, up.encode_features, "key_features_encoder", JAFAR_BLOCK)
    s.set_layer(up.gamma, "sft_key.gamma", layout="OI11")
    s.set_layer(up.beta, "sft_key.beta", layout="OI11")
    set_attention(s, up.attention, "cross_decode", value_features=v_dim)
    s.take("cross_decode.cross_attn.norm_v.weight", (v_dim,))  # of values that nothing uses
    s.done()
    return up


def set_image_encoder(s: StateDict, encode: ImageEncoder, names: tuple[str, ...]) -> None:
    """The entries that JAFAR and AnyUp have in common."""
    set_encoder(s, encode.image, "image_encoder", names)
    set_encoder(s, encode.key, "key_encoder", names)
    set_encoder(s, encode.query, "query_encoder", names)
    s.set(encode.rope.freqs, "rope.freqs")


def set_encoder(s: StateDict, encoder: Encoder, key: str, names: tuple[str, ...]) -> None:
    """A convolution and blocks, whose layers have these names."""
    s.set_layer(encoder.conv, f"{key}.0", layout="OIHW")
    set_blocks(s, encoder.blocks, key, names)


def set_blocks(s: StateDict, blocks: Any, key: str, names: tuple[str, ...]) -> None:
    """Blocks 1, 2, ... of an encoder."""
    block: Block
    for i, block in enumerate(blocks, 1):
        layers = (block.norm1, block.conv1, block.norm2, block.conv2)
        for layer, name, layout in zip(layers, names, ("", "OIHW") * 2, strict=True):
            s.set_layer(layer, f"{key}.{i}.{name}", layout=layout)
        s.set_layer(block.shortcut, f"{key}.{i}.shortcut", layout="OIHW")


def set_attention(
    s: StateDict, attention: CrossAttention, key: str, *, value_features: int
) -> None:
    """The block around PyTorch's MultiheadAttention.

    Values and output of that never reach the result, nor does the keys' bias.
    """
    n, inner = attention.q.linear.kernel.get_value().shape[0], f"{key}.cross_attn.attention"
    s.set_layer(attention.conv, f"{key}.conv2d", layout="OIHW")
    s.set(attention.q.scale, f"{key}.cross_attn.norm_q.weight")
    s.set(attention.k.scale, f"{key}.cross_attn.norm_k.weight")
    if value_features == n:
        fused = s.take(f"{inner}.in_proj_weight", (3 * n, n))
        store(attention.q.linear.kernel, fused[:n].T)
        store(attention.k.linear.kernel, fused[n : 2 * n].T)
    else:
        s.set(attention.q.linear.kernel, f"{inner}.q_proj_weight", layout="OI")
        s.set(attention.k.linear.kernel, f"{inner}.k_proj_weight", layout="OI")
        s.take(f"{inner}.v_proj_weight", (n, value_features))
    store(attention.q.linear.bias, s.take(f"{inner}.in_proj_bias", (3 * n,))[:n])
    s.take(f"{inner}.out_proj.weight", (n, n))
    s.take(f"{inner}.out_proj.bias", (n,))
