"""wimmerth/anyup: AnyUp, NATTENCrossAttentionBlock."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from resfu_jax.convert._state import StateDict, store, unfilled
from resfu_jax.convert.jafar import set_attention, set_blocks, set_encoder, set_image_encoder
from resfu_jax.upsamplers.anyup import AnyUp, WindowAttention

_BLOCK = ("block.0", "block.2", "block.3", "block.5")  # names of a block's layers


def anyup(
    state: Mapping[str, Any],
    *,
    input_dim: int = 3,
    qk_dim: int = 128,
    kernel_size: int = 1,
    kernel_size_lfu: int = 5,
    window_ratio: float = 0.1,
    num_heads: int = 4,
    init_gaussian_derivatives: bool = False,
    use_natten: bool = False,
    lfu_dim: int | None = None,
    q_chunk_size: int | None = None,
    **ours: Any,
) -> AnyUp:
    """The official AnyUp. `q_chunk_size` says nothing: memory is bounded without it.

    With `use_natten` the attention's weights may be those of either official block, as those that
    are released are of the other one.
    """
    up = unfilled(
        AnyUp,
        qk_dim,
        input_dim=input_dim,
        qk_dim=qk_dim,
        kernel_size=kernel_size,
        kernel_size_lfu=kernel_size_lfu,
        window_ratio=window_ratio,
        num_heads=num_heads,
        window="natten" if use_natten else "mask",
        lfu_dim=lfu_dim,
        **ours,
    )
    s = StateDict(state, "AnyUp")
    set_image_encoder(s, up.encode, _BLOCK)
    basis = up.encode_features.basis
    taps, count = basis.get_value().shape
    filters = s.take("key_features_encoder.0.basis", (count, 1, *(kernel_size_lfu,) * 2))
    store(basis, filters.reshape(count, taps).T)
    set_blocks(s, up.encode_features.blocks, "key_features_encoder", _BLOCK)
    set_encoder(s, up.aggregate, "aggregation", _BLOCK)
    if use_natten and "cross_decode.cross_attn.q_proj.weight" in s:
        _set_natten(s, up.attention, "cross_decode.")
    else:
        set_attention(s, up.attention, "cross_decode", value_features=qk_dim)
    s.done()
    return up


def natten_block(
    state: Mapping[str, Any],
    *,
    qk_dim: int,
    num_heads: int,
    window_ratio: float = 0.1,
    q_chunk_size: int | None = None,
    **ours: Any,
) -> WindowAttention:
    """The official NATTENCrossAttentionBlock, of queries, keys and values."""
    block = unfilled(
        WindowAttention,
        qk_dim,
        num_heads,
        window="natten",
        window_ratio=window_ratio,
        **dict(param_dtype=jnp.float32) | ours,
    )
    s = StateDict(state, "NATTENCrossAttentionBlock")
    _set_natten(s, block, "")
    s.done()
    return block


def _set_natten(s: StateDict, attention: WindowAttention, key: str) -> None:
    n = attention.k.linear.kernel.get_value().shape[0]
    s.set_layer(attention.conv, f"{key}conv2d", layout="OIHW")
    s.set(attention.q.scale, f"{key}norm_q.weight")
    s.set(attention.k.scale, f"{key}norm_k.weight")
    s.set_layer(attention.q.linear, f"{key}cross_attn.q_proj", layout="OI11")
    s.set_layer(attention.k.linear, f"{key}cross_attn.k_proj", layout="OI11")
    s.take(f"{key}cross_attn.k_proj.bias", (n,))  # adds the same to all scores of a query
