"""andrehuang/loftup: LoftUp, UpsamplerwithChannelNorm."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from resfu_jax._layers import BatchNorm
from resfu_jax.convert._state import StateDict, store, unfilled
from resfu_jax.convert._wrapped import unwrapped
from resfu_jax.upsamplers.loftup import FourierFeatures, Layer, LoftUp


def loftup(
    state: Mapping[str, Any],
    *,
    dim: int,
    color_feats: bool = True,
    n_freqs: int = 20,
    num_heads: int = 4,
    num_layers: int = 2,
    num_conv_layers: int = 1,
    lr_size: int = 16,
    lr_pe_type: str = "sine",
    scale_per_image: bool = False,
    **ours: Any,
) -> LoftUp:
    """LoftUp, alone or in UpsamplerwithChannelNorm. `num_conv_layers` has no effect, as there."""
    state, norm = unwrapped(state)
    up = unfilled(
        LoftUp,
        dim,
        color_feats=color_feats,
        n_freqs=n_freqs,
        num_heads=num_heads,
        num_layers=num_layers,
        lr_size=lr_size,
        lr_pe_type=lr_pe_type,
        norm=norm,
        scale_per_image=scale_per_image,
        **ours,
    )
    counters = "num_batches_tracked"
    s = StateDict({k: v for k, v in state.items() if not k.endswith(counters)}, "LoftUp")
    s.set_layer(up.norm_features, "norm_features")
    queries = up.queries
    _phases(s, queries.fourier, "fourier_feat.1.biases")
    s.set_layer(queries.norm, "first_conv.0.norm")
    s.set_layer(queries.conv1, "first_conv.1", layout="OIHW")
    _batch_norm(s, queries.bn1, "first_conv.2")
    s.set_layer(queries.conv2, "first_conv.4", layout="OIHW")
    _batch_norm(s, queries.bn2, "first_conv.5")
    if up.table is None:
        _phases(s, up.places, "lr_pe.biases")
        s.set_layer(up.project, "final_conv.0", layout="OI11")
        s.set_layer(up.norm_out, "final_conv.1")
    else:
        store(up.table, s.take("lr_pe", (1, lr_size**2, dim)))
        s.set_layer(up.norm_out, "final_conv")
    for i, layer in enumerate(up.layers):
        _layer(s, layer, f"ca_transformer.layers.{i}")
    s.set_layer(up.norm_queries, "ca_transformer.norm")
    s.done()
    return up


def _phases(s: StateDict, fourier: FourierFeatures, key: str) -> None:
    n = fourier.n_freqs
    # Said to be (2, coordinates, frequencies), but read as (2, frequencies, coordinates).
    store(fourier.phases, s.take(key, (2, fourier.features // (2 * n), n)))


def _batch_norm(s: StateDict, norm: BatchNorm, key: str) -> None:
    s.set_layer(norm, key)
    s.set(norm.mean, f"{key}.running_mean")
    s.set(norm.var, f"{key}.running_var")


def _layer(s: StateDict, layer: Layer, key: str) -> None:
    attention, width = f"{key}.0.attention", layer.q.in_features
    s.set_layer(layer.norm_q, f"{key}.0.norm_q")
    s.set_layer(layer.norm_kv, f"{key}.0.norm_kv")
    weights = s.take(f"{attention}.in_proj_weight", (3 * width, width))
    biases = s.take(f"{attention}.in_proj_bias", (3 * width,))
    parts = zip(np.split(weights, 3), np.split(biases, 3), strict=True)
    for linear, (weight, bias) in zip((layer.q, layer.k, layer.v), parts, strict=True):
        store(linear.kernel, weight.T)
        if linear.bias is not None:  # that of the keys has no effect
            store(linear.bias, bias)
    s.set_layer(layer.out, f"{attention}.out_proj", layout="OI")
    s.set_layer(layer.norm, f"{key}.1.net.0")
    s.set_layer(layer.up, f"{key}.1.net.1", layout="OI")
    s.set_layer(layer.down, f"{key}.1.net.4", layout="OI")
