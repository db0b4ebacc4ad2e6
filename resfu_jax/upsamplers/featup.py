"""FeatUp: joint bilateral upsampling whose range term is learned, and a stack that doubles by it.

With x the features, I the image pooled to the output's size, N(p) the K x K pixels around p,
reflected at the border, and u in -1 .. 1 how far q is from p, in windows:

    key = Conv(GELU(Conv(I)))                                           1x1
    range[p, q] = softmax over q in N(p) (temperature <key[p], key[q]>)
    w[p, q] = range[p, q] exp(-|u|^2 / (2 sigma^2)) / sum_q             of both factors
    w <- w + 0.1 Conv(GELU(Conv([w, I])))                               not renormalised
    out[p] = sum_q w[p, q] bicubic(x)[q]                                `ops.adaptive_filter`

The stack doubles log2(scale) times, each time with weights of its own, and adds a linear map of the
result, s + 0.1 (Linear(s) + b). As the filters treat all channels alike, they commute with that
map, which is applied to x, where it costs next to nothing.

Source: Fu et al., "FeatUp: A Model-Agnostic Framework for Features at Any Resolution", ICLR 2024,
section 3.2; the semantics are those of the authors' repository.
"""

from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resfu_jax import ops
from resfu_jax._checks import check_choice, check_flag, check_whole, need
from resfu_jax._layers import PYTORCH_UNIFORM, LayerNorm, Linear
from resfu_jax.ops import Implementation
from resfu_jax.ops.adaptive_filter import reflected
from resfu_jax.ops.checks import check_floating
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.sizes import Size
from resfu_jax.upsamplers._inputs import (
    check_features,
    check_image,
    check_output_size,
    compute_dtype,
    reassembled,
    size_of_output,
)
from resfu_jax.upsamplers._registry import register
from resfu_jax.upsamplers._upsampler import Upsampler


@register("featup_jbu")
class FeatUpJBU(Upsampler):
    """Filters features that are resized bicubically, with weights that the image decides.

    Built for evaluation: `up.train()`, or `nnx.view(up, deterministic=False)`, switches on the
    dropout of hidden channels, for which the call then needs `rngs`. On a map with no more than
    `radius` rows or columns, which the official module refuses, reflection goes back and forth.

    Args:
      features: channels C, kept; any others, as `values`, get the same weights.
      guide_features: ignored.
      scale: ignored: the image, or `output_size`, decides the size.
      guidance_dim: channels of the image.
      key_dim: channels of the keys.
      radius: pixels of the window to each side: K = 2 radius + 1.
      implementation: as in `ops.adaptive_filter`.
      dtype: of the result; the promoted one of features and values if not given. All that is made
        of the image is float32 or better.
      param_dtype: of the parameters.
      rngs: source of the initial weights: PyTorch's defaults, temperature and sigma 1.

    Raises:
      ValueError: an argument out of range.
    """

    guide = "image"

    def __init__(
        self,
        features: int,
        guide_features: int | None = None,
        *,
        scale: int = 16,
        guidance_dim: int = 3,
        key_dim: int = 32,
        radius: int = 3,
        implementation: Implementation | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_floating(dtype=dtype, param_dtype=param_dtype)
        check_whole(
            features=features,
            scale=scale,
            guidance_dim=guidance_dim,
            key_dim=key_dim,
            radius=radius,
        )
        check_choice((*get_args(Implementation), None), implementation=implementation)
        self.features, self.guidance_dim, self.radius = features, guidance_dim, radius
        self.implementation, self.dtype = implementation, dtype

        def linear(n: int, m: int) -> Linear:
            return Linear(n, m, kernel_init=PYTORCH_UNIFORM, param_dtype=param_dtype, rngs=rngs)

        taps = (2 * radius + 1) ** 2
        self.log_temperature = nnx.Param(jnp.zeros((), param_dtype))
        self.sigma = nnx.Param(jnp.ones((), param_dtype))
        self.range1, self.range2 = linear(guidance_dim, key_dim), linear(key_dim, key_dim)
        self.fixup1, self.fixup2 = linear(taps + guidance_dim, taps), linear(taps, taps)
        self.dropout = nnx.Dropout(0.1, deterministic=True)

    def __call__(
        self,
        features: Float[Array, "b h w {self.features}"],
        image: Float[Array, "b hi wi {self.guidance_dim}"],
        output_size: tuple[Size, Size] | None = None,
        *,
        values: Float[Array, "b h w d"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b H W d"]:
        """Features `(B, h, w, C)`, or `values`, at the image's size, or at `output_size`.

        For another size, the image is pooled to it first.
        """
        check_features(features, self.features)
        check_image(features, image, self.guidance_dim)
        x = features.astype(compute_dtype(self.dtype, features, values))
        image = pooled(image, size_of_output(image, output_size))
        weights = self.weights(image, rngs)
        v = reassembled(x, values)
        return ops.adaptive_filter(v, weights, implementation=self.implementation)

    def weights(
        self, image: Float[Array, "b H W i"], rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b H W taps"]:
        """Those of the K*K pixels around every pixel of the image."""
        scores = self.scores(image, rngs)
        taps = scores.shape[3]
        # How far the pixels of the window are away.
        away = jnp.square(jnp.linspace(-1, 1, 2 * self.radius + 1, dtype=image.dtype))
        away = (away[:, None] + away[None]).reshape(1, 1, 1, taps)
        temperature = jnp.clip(jnp.exp(self.log_temperature[...].astype(image.dtype)), 1e-4, 1e4)
        spatial = jnp.exp(-away / (2 * jnp.square(self.sigma[...].astype(image.dtype))))
        kept = _kept(self.dropout, (image.shape[0], taps), image.dtype, rngs)
        graphdef, state = nnx.split((self.fixup1, self.fixup2))

        def of_rows(scores: Array, image: Array, shared: Any) -> Array:
            state, temperature, spatial, kept = shared
            fixup1, fixup2 = nnx.merge(graphdef, state)
            w = jax.nn.softmax(temperature * scores) * spatial
            w /= jnp.maximum(w.sum(axis=-1, keepdims=True), 1e-7)
            hidden = fixup1(jnp.concatenate([w, image], axis=-1))
            return w + 0.1 * fixup2(jax.nn.gelu(hidden, approximate=False) * kept)

        shared = state, temperature, spatial, kept
        return ops.map_rows(of_rows, scores, image, shared=shared, values=2 * taps)

    def scores(
        self, image: Float[Array, "b H W i"], rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b H W taps"]:
        """What a softmax over K*K, times the temperature, makes the range term of."""
        keys = jax.nn.gelu(self.range1(image), approximate=False)
        shape = keys.shape[0], keys.shape[3]
        keys = self.range2(keys * _kept(self.dropout, shape, keys.dtype, rngs))
        r = self.radius
        for axis in (1, 2):
            keys = reflected(keys, r, axis)
        scores = ops.local_similarity(
            keys, keys, kernel_size=2 * r + 1, implementation=self.implementation
        )
        return scores[:, r:-r, r:-r]


@register("featup")
class FeatUp(Upsampler):
    """Doubles features again and again, guided by the image at each size.

    Built for evaluation, as `FeatUpJBU`. The image may be of any size.

    Args:
      features: channels C, kept.
      guide_features: ignored.
      scale: a power of 2; 16 (four stages) officially.
      norm: layer normalisation of the features first, as in the released models but for those
        called "no norm".
      implementation: as in `ops.adaptive_filter`.
      dtype: of the result; the features' if not given. All that is made of the image is float32 or
        better.
      param_dtype: of the parameters.
      rngs: source of the initial weights, as in `FeatUpJBU`.

    Raises:
      ValueError: an argument out of range.
    """

    guide = "image"
    needs_whole_scale = True
    mixes = True

    def __init__(
        self,
        features: int,
        guide_features: int | None = None,
        *,
        scale: int = 16,
        norm: bool = False,
        implementation: Implementation | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_floating(dtype=dtype, param_dtype=param_dtype)
        check_whole(features=features, scale=scale)
        check_flag(norm=norm)
        stages = scale.bit_length() - 1
        need(scale == 2**stages, f"scale must be a power of 2, got {scale}")
        self.features, self.scale, self.dtype = features, scale, dtype
        types: dict[str, Any] = dict(param_dtype=param_dtype, rngs=rngs)
        self.norm_features = LayerNorm(features, param_dtype=param_dtype) if norm else None
        self.stages = nnx.List(
            [FeatUpJBU(features, implementation=implementation, **types) for _ in range(stages)]
        )
        self.fixup = Linear(features, features, kernel_init=PYTORCH_UNIFORM, **types)
        self.dropout = nnx.Dropout(0.2, deterministic=True)

    def __call__(
        self,
        features: Float[Array, "b h w {self.features}"],
        image: Float[Array, "b hi wi 3"],
        output_size: tuple[Size, Size] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b H W {self.features}"]:
        """Features `(B, h, w, C)` at `scale` times their size, whatever that of the image.

        Raises:
          ValueError: wrong shapes, or an `output_size` other than that.
        """
        check_features(features, self.features)
        check_image(features, image)
        check_output_size("featup", features, output_size, self.scale)
        x = features.astype(compute_dtype(self.dtype, features))
        x = x if self.norm_features is None else self.norm_features(x)
        kept = _kept(self.dropout, (x.shape[0], self.features), x.dtype, rngs)
        x += 0.1 * ((x * kept) @ self.fixup.kernel[...].astype(x.dtype))
        for stage in self.stages:
            size = 2 * x.shape[1], 2 * x.shape[2]
            weights = stage.weights(pooled(image, size), rngs)
            x = ops.adaptive_filter(x, weights, implementation=stage.implementation)
        assert self.fixup.bias is not None
        return x + 0.1 * jnp.expand_dims(self.fixup.bias[...].astype(x.dtype), (0, 1, 2))


def _kept(
    dropout: nnx.Dropout, shape: tuple[Size, int], dtype: DTypeLike, rngs: nnx.Rngs | None
) -> Float[Array, "b 1 1 c"]:
    """What dropout of whole channels multiplies them by."""
    batch, channels = shape
    return dropout(jnp.ones((batch, 1, 1, channels), dtype), rngs=rngs)


def pooled(image: Array, size: tuple[Size, Size]) -> Float[Array, "b H W i"]:
    """The image at another size, in float32 or better."""
    image = image.astype(at_least_float32(image.dtype))
    return image if size == image.shape[1:3] else ops.adaptive_avg_pool(image, size)
