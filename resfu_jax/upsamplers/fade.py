"""FADE: fusing the assets of decoder and encoder.

With x the features (decoder, low resolution) and y the guide (encoder, high resolution):

    scores = Conv3x3(Linear(y)) + nearest(Conv3x3(Linear'(x)))      semi-shift: the same Conv3x3
    out[p] = sum_uv softmax(scores)[p, uv] x[cell(p) + (u, v) - r]  `ops.local_attention`
    gate = sigmoid(nearest(Linear''(x)))                            one channel
    FADE = gate y + (1 - gate) out

This is the "low-to-high" form: the decoder's part is convolved before it is upsampled. FADE-Lite
has K*K channels after the linear maps and a depthwise Conv3x3; SemiShiftUp has no gate, so that
the guide may have any width. Published for x2; here the guide may be of any size that is not
smaller: `nearest` and the windows take the low-resolution cell floor(p n_in / n_out) at any ratio.

Source: Lu et al., "FADE: Fusing the Assets of Decoder and Encoder for Task-Agnostic Upsampling",
ECCV 2022 (semi-shift convolution, section 3.2; gated fusion, section 3.3), and its journal
extension for FADE-Lite.
"""

from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resfu_jax._checks import check_choice, check_flag, check_odd, check_whole, need
from resfu_jax._layers import XAVIER_UNIFORM, Conv, DepthwiseConv, Linear
from resfu_jax.ops import Implementation
from resfu_jax.ops.checks import check_floating
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.local_window import local_attention
from resfu_jax.ops.resize import resize
from resfu_jax.upsamplers._inputs import (
    check_features,
    check_guide,
    compute_dtype,
    need_guide,
    reassembled,
)
from resfu_jax.upsamplers._registry import register
from resfu_jax.upsamplers._upsampler import Upsampler


@register("fade")
@register("fade_lite", lite=True)
@register("semishift", gate=False)
class FADE(Upsampler):
    """Upsamples features to the size of a guide, and fuses the guide in through a gate.

    Args:
      features: channels C, kept.
      guide_features: channels Cg of the guide; with the gate, Cg = C (or 1).
      scale: nominal ratio; the guide decides the size.
      up_kernel_size: K, side of the reassembly window, odd.
      embedding_dim: channels between the layers; not for `lite`, where they are K*K.
      gate: fuse the guide in; without, the upsampler is SemiShiftUp.
      lite: FADE-Lite, a depthwise 3x3 convolution on K*K channels.
      scrambled_phases: computes what the official `pytorch_implementation/FADE_H2L.py` computes,
        which mixes up the four phases of its x2 convolution; only for weights trained with it.
      implementation: as in `ops.local_attention`.
      dtype: of the computation; the inputs' promoted dtype if not given. The softmax is float32 or
        better.
      param_dtype: of the parameters.
      rngs: source of the initial weights: Xavier uniform, biases zero.

    Raises:
      ValueError: an argument out of range, a missing guide, or widths that the gate cannot fuse.
    """

    guide = "features"

    def __init__(
        self,
        features: int,
        guide_features: int | None,
        *,
        scale: int = 2,
        up_kernel_size: int = 5,
        embedding_dim: int = 64,
        gate: bool = True,
        lite: bool = False,
        scrambled_phases: bool = False,
        implementation: Implementation | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_floating(dtype=dtype, param_dtype=param_dtype)
        guide_features = need_guide("fade", guide_features)
        check_whole(features=features, scale=scale, embedding_dim=embedding_dim)
        check_odd(up_kernel_size=up_kernel_size)
        check_flag(gate=gate, lite=lite, scrambled_phases=scrambled_phases)
        check_choice((*get_args(Implementation), None), implementation=implementation)
        need(
            not gate or guide_features in (features, 1),
            f"the gate mixes guide and features: guide_features must be features={features} (or "
            f"1), got {guide_features}; project the guide, or use 'semishift' (gate=False)",
        )
        need(not (lite and scrambled_phases), "scrambled_phases does not apply to lite")
        self.features, self.guide_features = features, guide_features
        self.same_width = self.mixes = gate
        self.weights_are_convex = not gate
        self.scrambled_phases = scrambled_phases
        self.implementation, self.dtype = implementation, dtype
        taps = up_kernel_size**2
        width = taps if lite else embedding_dim
        types: dict[str, Any] = dict(param_dtype=param_dtype, rngs=rngs)
        linear: dict[str, Any] = dict(kernel_init=XAVIER_UNIFORM, **types)
        self.compress_guide = Linear(guide_features, width, **linear)
        self.compress = Linear(features, width, use_bias=False, **linear)
        self.encode = DepthwiseConv(taps, **types) if lite else Conv(width, taps, 3, **types)
        self.gate = Linear(features, 1, **linear) if gate else None

    def __call__(
        self,
        features: Float[Array, "b h w {self.features}"],
        guide: Float[Array, "b H W cg"],
        *,
        values: Float[Array, "b h w d"] | None = None,
    ) -> Float[Array, "b H W d"]:
        """Features `(B, h, w, C)` at the guide's size `(B, H, W, Cg)`, any H >= h and W >= w.

        With `values`, the kernels and the gate, which come from features and guide, apply to these
        instead. The gate then mixes the guide with them: it needs values of the guide's width.
        """
        check_features(features, self.features)
        check_guide(features, guide, self.guide_features)
        dtype = compute_dtype(self.dtype, features, guide, values)
        x, y = features.astype(dtype), guide.astype(dtype)
        scores = self._scores(x, y)
        options: dict[str, Any] = dict(implementation=self.implementation)
        if self.gate is None:
            return local_attention(scores, reassembled(x, values), **options)
        v = reassembled(x, values)
        need(
            y.shape[3] in (v.shape[3], 1),
            f"values must have the guide's {y.shape[3]} channels, with which the gate mixes them, "
            f"got {v.shape[3]}; use 'semishift' (gate=False)",
        )
        gate = jax.nn.sigmoid(resize(self.gate(x), y.shape[1:3], method="nearest"))
        # The gate goes into the kernels, so that the upsampled features are never kept.
        up = local_attention(scores, v, scale=1 - gate, **options)
        return gate * y + up

    def kernels(
        self, x: Float[Array, "b h w c"], y: Float[Array, "b H W cg"]
    ) -> Float[Array, "b H W taps"]:
        """The K*K weights of every output pixel, which sum to 1."""
        return jax.nn.softmax(self._scores(x, y))

    def _scores(
        self, x: Float[Array, "b h w c"], y: Float[Array, "b H W cg"]
    ) -> Float[Array, "b H W taps"]:
        """What the softmax makes kernels of."""
        encode_guide = self._scrambled if self.scrambled_phases else self.encode
        encoder = encode_guide(self.compress_guide(y))
        decoder = self.encode(self.compress(x))
        scores = encoder + resize(decoder, encoder.shape[1:3], method="nearest")
        return scores.astype(at_least_float32(scores.dtype))

    def _scrambled(self, y: Float[Array, "b H W c"]) -> Float[Array, "b H W taps"]:
        """Conv3x3 as a stride-2 convolution a phase, the phases mixed up as in FADE_H2L.py.

        The maps of the four phases are concatenated phase by phase and read back as if they were
        interleaved channel by channel: phase f gets the channels 4 c + f of the concatenation.
        """
        b, hh, ww, _ = y.shape
        need(
            hh % 2 == 0 and ww % 2 == 0,
            f"scrambled_phases is defined at x2 only, got a guide of {hh}x{ww}",
        )
        padded = jnp.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
        phases = jnp.concatenate(
            [padded[:, i : i + hh + 1, j : j + ww + 1] for i in (0, 1) for j in (0, 1)], axis=-1
        )
        assert self.encode.bias is not None
        kernel, bias = (a[...].astype(y.dtype) for a in (self.encode.kernel, self.encode.bias))
        out = [
            jax.lax.conv_general_dilated(
                phases[..., f::4],
                kernel,
                window_strides=(2, 2),
                padding="VALID",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            + bias[None, None, None]
            for f in range(4)
        ]
        out = jnp.stack(out, axis=3).reshape(b, hh // 2, ww // 2, 2, 2, -1)
        return out.transpose(0, 1, 3, 2, 4, 5).reshape(b, hh, ww, -1)
