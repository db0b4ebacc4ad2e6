"""FreqFusion: frequency-aware feature fusion.

With x the features (low resolution) and y the guide (high resolution), L and H convolutions to the
K*K scores of a low-pass and a high-pass kernel, and for scores z and a map v

    F(z, v)[p] = sum_uv softmax_uv(z[p] + log window) v[cell(p) + (u, v) - r]

with a Hamming window, `ops.local_attention`; the map may have y's size or, as in CARAFE, x's:

    X = Linear(x),  Y = Linear(y),  h = H(Y),  Y' = 2 Y - F(h, Y)       compressed, Y sharpened
    l = L(Y'),  low = l + F(l, L(X))                                    adaptive low-pass filter
    high = h + F(low, H(X))                                             adaptive high-pass filter
    x' = F(low, x)                                                      upsampled, and smooth
    y' = y + (y - F(high, y))                                           the guide, and its details
    out_g[p] = x'_g[p + s O_g[p]]                                       offset generator, optional

What a head fuses are out and y'. Calls return out; `FreqFusion.fuse` returns both. Beyond the image
all counts as zero, and kernels are not renormalised.

The offsets O, in pixels of x, replace features that disagree with their neighbours by others. With
S(Y') the cosine similarities of a pixel to the 8 pixels two rows or columns away,

    O = D sigmoid(E),  D, E = up(Conv(N(X), S(N(X)))) + Conv(N(Y'), S(N(Y'))),    up: pixel shuffle

Without `comp_feat_upsample`, scores are upsampled by nearest-neighbour resizing and Y is not
sharpened: low = L(Y) + up(L(X)), and high likewise. Without `semi_conv`, both are convolutions of
the sum Y + up(X), and x is resized before it is filtered.

Source: Chen et al., "Frequency-aware Feature Fusion for Dense Image Prediction", TPAMI 2024,
section 3. The published operators know a scale of 2; here the guide may be of any size that is not
smaller, the cell of pixel p being floor(p n_in / n_out); with the offset generator, `scale` times
as large.
"""

import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resfu_jax import ops
from resfu_jax._checks import check_choice, check_flag, check_odd, check_whole, need
from resfu_jax._layers import XAVIER_UNIFORM, Conv, GroupNorm, Linear, normalised
from resfu_jax.ops import Implementation
from resfu_jax.ops.checks import check_floating, takes_maps
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.sizes import Size, whole_ratio
from resfu_jax.upsamplers._inputs import (
    check_features,
    check_guide,
    compute_dtype,
    need_guide,
    reassembled,
)
from resfu_jax.upsamplers._registry import register
from resfu_jax.upsamplers._upsampler import Upsampler

UpsampleMode = Literal["nearest", "bilinear", "bicubic"]
Direction = Literal["sim_concat", "sim"]

_NORM_CHANNELS = 8  # of a group
_APART = 2  # pixels between those that are compared
_NEIGHBOURS = 8


@register("freqfusion")
class FreqFusion(Upsampler):
    """Upsamples features to the size of a guide with adaptive low-pass kernels.

    Args:
      features: channels C of the features.
      guide_features: channels Cg of the guide.
      scale: nominal ratio; the guide decides the size. With `feature_resample`, the guide must be
        exactly that much larger.
      compressed_channels: channels between the two layers; with `feature_resample` and its norm, a
        multiple of 8.
      lowpass_kernel: side of the low-pass kernels, odd.
      highpass_kernel: side of the high-pass kernels, odd.
      encoder_kernel: side of the convolutions L and H, odd.
      encoder_dilation: their dilation.
      upsample_mode: how features are resized without `semi_conv`.
      feature_resample: sample the result at offsets.
      feature_resample_group: contiguous groups of channels with offsets of their own.
      comp_feat_upsample: upsample scores by their own kernels; it needs `use_high_pass`.
      use_high_pass: have high-pass kernels; else the guide is fused as it is.
      hr_residual: add the guide to its high frequencies.
      semi_conv: make scores at both resolutions; `feature_resample` needs it.
      hamming_window: weigh kernels by a Hamming window.
      feature_resample_norm: norms N before the offsets, of 8 channels a group.
      direction_feat: what D sees, similarities with the features, `"sim_concat"`, or alone,
        `"sim"`, where E sees the features alone.
      implementation: as in `ops.local_attention`.
      dtype: of the computation; the inputs' promoted dtype if not given. The softmax, statistics,
        similarities and positions are float32 or better.
      param_dtype: of the parameters.
      rngs: source of the initial weights: normal of standard deviation 0.001 for L and H, Xavier
        uniform for all others, biases zero. (So do the official modules begin: their offsets were
        meant to begin near zero, too, but are drawn anew.)

    Raises:
      ValueError: an argument out of range, a missing guide, or options that exclude each other.
    """

    guide = "features"

    def __init__(
        self,
        features: int,
        guide_features: int | None,
        *,
        scale: int = 2,
        compressed_channels: int = 64,
        lowpass_kernel: int = 5,
        highpass_kernel: int = 3,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
        upsample_mode: UpsampleMode = "nearest",
        feature_resample: bool = False,
        feature_resample_group: int = 4,
        comp_feat_upsample: bool = True,
        use_high_pass: bool = True,
        hr_residual: bool = True,
        semi_conv: bool = True,
        hamming_window: bool = True,
        feature_resample_norm: bool = True,
        direction_feat: Direction = "sim_concat",
        implementation: Implementation | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_floating(dtype=dtype, param_dtype=param_dtype)
        guide_features = need_guide("freqfusion", guide_features)
        check_whole(
            features=features,
            scale=scale,
            compressed_channels=compressed_channels,
            encoder_dilation=encoder_dilation,
            feature_resample_group=feature_resample_group,
        )
        check_odd(
            lowpass_kernel=lowpass_kernel,
            highpass_kernel=highpass_kernel,
            encoder_kernel=encoder_kernel,
        )
        check_choice(get_args(UpsampleMode), upsample_mode=upsample_mode)
        check_choice(get_args(Direction), direction_feat=direction_feat)
        check_flag(
            feature_resample=feature_resample,
            comp_feat_upsample=comp_feat_upsample,
            use_high_pass=use_high_pass,
            hr_residual=hr_residual,
            semi_conv=semi_conv,
            hamming_window=hamming_window,
            feature_resample_norm=feature_resample_norm,
        )
        check_choice((*get_args(Implementation), None), implementation=implementation)
        sharpens = semi_conv and comp_feat_upsample
        need(use_high_pass or not sharpens, "comp_feat_upsample=True needs use_high_pass=True")
        need(semi_conv or not feature_resample, "feature_resample=True needs semi_conv=True")
        groups = feature_resample_group if feature_resample else 1
        need(
            features % groups == 0,
            f"feature_resample_group must divide features={features}, got {groups}",
        )
        self.features, self.guide_features, self.scale = features, guide_features, scale
        self.sharpens, self.semi_conv, self.upsample_mode = sharpens, semi_conv, upsample_mode
        self.hamming_window, self.hr_residual = hamming_window, hr_residual
        self.implementation, self.dtype = implementation, dtype
        self.value_groups, self.needs_whole_scale = groups, feature_resample
        self.weights_are_convex = semi_conv or upsample_mode != "bicubic"
        if use_high_pass and not sharpens:
            self.without_gradient = ("high", "kernel"), ("high", "bias")  # see `fuse`

        types: dict[str, Any] = dict(param_dtype=param_dtype, rngs=rngs)

        def scores(kernel_size: int) -> Conv:
            return Conv(
                compressed_channels,
                kernel_size**2,
                encoder_kernel,
                dilation=encoder_dilation,
                kernel_init=nnx.initializers.normal(0.001),
                **types,
            )

        compress = dict(kernel_init=XAVIER_UNIFORM, **types)
        self.compress = Linear(features, compressed_channels, **compress)
        self.compress_guide = Linear(guide_features, compressed_channels, **compress)
        self.low = scores(lowpass_kernel)
        self.high = scores(highpass_kernel) if use_high_pass else None
        self.offsets = (
            Offsets(
                compressed_channels,
                scale=scale,
                groups=groups,
                norm=feature_resample_norm,
                direction=direction_feat,
                **types,
            )
            if feature_resample
            else None
        )

    def __call__(
        self,
        features: Float[Array, "b h w {self.features}"],
        guide: Float[Array, "b H W cg"],
        *,
        values: Float[Array, "b h w d"] | None = None,
    ) -> Float[Array, "b H W d"]:
        """Features `(B, h, w, C)`, or `values`, at the guide's size `(B, H, W, Cg)`.

        Raises:
          ValueError: wrong shapes; with `feature_resample`, a guide not exactly `scale` times as
            large.
        """
        x, y = self._inputs(features, guide, values)
        v = reassembled(x, values, groups=self.value_groups)
        return self._upsampled(v, self._kernels(x, y))

    @takes_maps("features", "guide")
    def fuse(
        self, features: Float[Array, "b h w {self.features}"], guide: Float[Array, "b H W cg"]
    ) -> tuple[Float[Array, "b H W c"], Float[Array, "b H W cg"]]:
        """The upsampled features and the guide with its details, for a head to add or concatenate.

        Raises:
          ValueError: as calls.
        """
        x, y = self._inputs(features, guide, None)
        kernels = self._kernels(x, y)
        out = self._upsampled(x, kernels)
        high = self._high(kernels)
        if high is None:
            return out, y
        details = y - self._filtered(high, y)
        return out, y + details if self.hr_residual else details

    def attention(
        self, x: Float[Array, "b h w c"], y: Float[Array, "b H W cg"]
    ) -> Float[Array, "b H W taps"]:
        """The low-pass kernels, which sum to 1."""
        scores = self._windowed(self._kernels(x, y).low)
        return jax.nn.softmax(scores.astype(at_least_float32(scores.dtype)))

    def _inputs(self, features: Array, guide: Array, values: Array | None) -> tuple[Array, Array]:
        check_features(features, self.features)
        check_guide(features, guide, self.guide_features)
        size, out_size = features.shape[1:3], guide.shape[1:3]
        need(
            not self.needs_whole_scale or whole_ratio(size, out_size) == (self.scale, self.scale),
            f"freqfusion of scale {self.scale} with feature_resample needs a guide exactly that "
            f"much larger, got {size} to {out_size}; use feature_resample=False",
        )
        dtype = compute_dtype(self.dtype, features, guide, values)
        return features.astype(dtype), guide.astype(dtype)

    def _kernels(self, x: Float[Array, "b h w c"], y: Float[Array, "b H W cg"]) -> "_Kernels":
        """The scores of the low-pass kernels, and what else is made of their arguments."""
        x, y = self.compress(x), self.compress_guide(y)
        size = y.shape[1:3]
        if not self.semi_conv:
            y = y + _nearest(x, size)
            return _Kernels(self.low(y), None, x, y)
        if not self.sharpens or self.high is None:
            return _Kernels(self.low(y) + _nearest(self.low(x), size), None, x, y)
        h = self.high(y)
        y = 2 * y - self._filtered(h, y)
        low = self.low(y)
        return _Kernels(low + self._filtered(low, self.low(x)), h, x, y)

    def _high(self, kernels: "_Kernels") -> Float[Array, "b H W taps"] | None:
        """The scores of the high-pass kernels."""
        low, h, x, y = kernels
        if self.high is None:
            return None
        if h is not None:
            return h + self._filtered(low, self.high(x))
        h = self.high(y)
        return h + _nearest(self.high(x), y.shape[1:3]) if self.semi_conv else h

    def _upsampled(self, v: Float[Array, "b h w d"], kernels: "_Kernels") -> Array:
        if not self.semi_conv:
            v = ops.resize(v, kernels.low.shape[1:3], method=self.upsample_mode)
        out = self._filtered(kernels.low, v)
        if self.offsets is None:
            return out
        points = self.offsets(kernels.x, kernels.y)
        samples = ops.deformable_sample(
            out, points, padding_mode="border", implementation=self._form_of_samples
        )
        return samples.reshape(*samples.shape[:3], -1)

    @property
    def _form_of_samples(self) -> Implementation | None:
        return None if self.implementation == "pallas" else self.implementation

    def _filtered(self, scores: Float[Array, "b H W taps"], v: Float[Array, "b _h _w d"]) -> Array:
        """F(scores, v)."""
        return ops.local_attention(self._windowed(scores), v, implementation=self.implementation)

    def _windowed(self, scores: Float[Array, "b H W taps"]) -> Float[Array, "b H W taps"]:
        """With the logarithm of the window, which the softmax makes a factor."""
        if not self.hamming_window:
            return scores
        line = np.log(np.hamming(math.isqrt(scores.shape[3])))
        window = (line[:, None] + line[None]).reshape(1, 1, 1, -1)
        return scores + jnp.asarray(window, scores.dtype)


class _Kernels(NamedTuple):
    """Scores of kernels, and what they are made of.

    Attributes:
      low: of low-pass kernels.
      h: of high-pass kernels, as far as the guide makes them, if that is known.
      x, y: features and guide, compressed and sharpened.
    """

    low: Float[Array, "b H W taps"]
    h: Float[Array, "b H W taps2"] | None
    x: Float[Array, "b h w d"]
    y: Float[Array, "b H W d"]


class Offsets(nnx.Module):
    """Where every output pixel samples the upsampled features.

    Args:
      features: channels of both maps, a multiple of 8 for the norms.
      scale: s, ratio of their sizes.
      groups: of channels that are sampled.
      norm: have norms.
      direction: as `direction_feat` of `FreqFusion`.
      param_dtype: of the parameters.
      rngs: source of the initial weights.

    Raises:
      ValueError: channels that the norms cannot group.
    """

    def __init__(
        self,
        features: int,
        *,
        scale: int,
        groups: int,
        norm: bool,
        direction: Direction,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        need(
            not norm or features % _NORM_CHANNELS == 0,
            f"feature_resample_norm=True needs compressed_channels to be a multiple of "
            f"{_NORM_CHANNELS}, got {features}",
        )
        self.scale, self.groups, self.direction = scale, groups, direction
        both = direction == "sim_concat"
        types: dict[str, Any] = dict(param_dtype=param_dtype, rngs=rngs)

        def make_norm() -> GroupNorm | None:
            if not norm:
                return None
            return GroupNorm(features, features // _NORM_CHANNELS, param_dtype=param_dtype)

        def conv(n: int, phases: int) -> Conv:
            return Conv(n, 2 * groups * phases, 3, **types)

        offset = features + _NEIGHBOURS if both else _NEIGHBOURS
        scope = features + _NEIGHBOURS if both else features
        self.norm_x, self.norm_y = make_norm(), make_norm()
        self.offset_x, self.scope_x = conv(offset, scale**2), conv(scope, scale**2)
        self.offset_y, self.scope_y = conv(offset, 1), conv(scope, 1)

    def __call__(
        self, x: Float[Array, "b h w d"], y: Float[Array, "b H W d"]
    ) -> Float[Array, "b H W g 1 2"]:
        """(row, column) in pixels of the output."""
        seen_x = self._seen(normalised(x, self.norm_x))
        seen_y = self._seen(normalised(y, self.norm_y))

        def both(on_x: Conv, on_y: Conv, i: int) -> Array:
            return ops.pixel_shuffle(on_x(seen_x[i]), self.scale) + on_y(seen_y[i])

        offset = both(self.offset_x, self.offset_y, 0)
        wide = at_least_float32(offset.dtype)
        scope = jax.nn.sigmoid(both(self.scope_x, self.scope_y, 1).astype(wide))
        offset = self.scale * offset.astype(wide) * scope
        b, hh, ww, _ = offset.shape
        # The channels are (column, row) times group.
        offset = offset.reshape(b, hh, ww, 2, self.groups)[..., ::-1, :].swapaxes(-1, -2)
        own = [jnp.arange(n, dtype=jnp.int32).astype(wide) for n in (hh, ww)]
        own = jnp.stack(jnp.meshgrid(*own, indexing="ij"), axis=-1)
        return (offset + own[None, :, :, None])[..., None, :]

    def _seen(self, x: Float[Array, "b h w d"]) -> tuple[Array, Array]:
        """What the convolutions for the offsets and for their scope see."""
        similar = _similarities(x)
        if self.direction == "sim":
            return similar, x
        both = jnp.concatenate([x, similar], axis=-1)
        return both, both


def _similarities(x: Float[Array, "b h w d"]) -> Float[Array, "b h w 8"]:
    """Cosines with the 8 neighbours `_APART` pixels away, row by row; 0 beyond the map."""
    wide = x.astype(at_least_float32(x.dtype))
    norm = jnp.sqrt(jnp.maximum(jnp.square(wide).sum(axis=-1, keepdims=True), 1e-16))
    unit = wide / norm
    padded = ops.pad(unit, (_APART, _APART))
    (height, width), steps = x.shape[1:3], (0, _APART, 2 * _APART)
    cosines = [
        (unit * padded[:, i : i + height, j : j + width]).sum(axis=-1)
        for i in steps
        for j in steps
        if (i, j) != (_APART, _APART)
    ]
    return jnp.stack(cosines, axis=-1).astype(x.dtype)


def _nearest(x: Float[Array, "b h w d"], size: tuple[Size, ...]) -> Float[Array, "b H W d"]:
    height, width = size
    return ops.resize(x, (height, width), method="nearest")
