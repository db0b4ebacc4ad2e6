"""A linear classifier behind one upsampler: Segmenter's linear head, and the linear probe.

Strudel et al., "Segmenter: Transformer for Semantic Segmentation", ICCV 2021, section 3.2 (linear
decoder), with the wiring of ReSFU's Segmenter experiments: the features of a plain transformer, at
1/16 of the image, go to 1/4 in one step, guided by a stem that sees the image only. For an image of
H x W, patches of side P, width C and K classes, with `guide_stride` S and `scale` P / S:

    image     (B, H, W, 3) -> stem -> (B, H/S, W/S, G) = guide ---------+
                                                                        |
    features  (B, H/P, W/P, C) -> [norm] -> upsampler, with the guide --+
                                                                        |
                         (B, H/S, W/S, K) <- classify <- dropout <- (B, H/S, W/S, C)

    stem:  conv 3x3 -> GroupNorm(1) -> ReLU -> conv 3x3, replicated borders, strides
           (2, 2) for S = 4, (2, 1) for S = 2, (1, 1) for S = 1

`classify` is a 1x1 convolution, `norm` a GroupNorm over all channels. Upsamplers without a guide
have no stem, nor have those that are guided by the image itself. Several maps of a backbone are
used as their concatenation, at the size of the first.

For given kernels, most upsamplers are linear in the features, as `classify` is. Where there are
fewer classes than features, the head classifies first and upsamples the logits, with the kernels of
the features: the same result, and no map of C channels is ever large.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from resfu_jax._checks import check_choice, check_flag, check_sizes, check_whole, need
from resfu_jax._layers import GroupNorm
from resfu_jax.backbones._layers import check_images
from resfu_jax.heads._layers import (
    check_arguments,
    check_maps,
    classifier_init,
    create_head_upsampler,
    guide_by_images,
)
from resfu_jax.ops.conv import conv
from resfu_jax.upsamplers import keeps_space

_STEM_STRIDES = {1: (1, 1), 2: (2, 1), 4: (2, 2), 8: (4, 2)}


class LinearHead(nnx.Module):
    """Upsamples the backbone's last map and classifies every pixel with one matrix.

    Args:
      in_features: channels of the backbone's maps, all of one size; one map as a rule.
      num_classes: number of logits a pixel.
      upsampler: a name of `list_upsamplers()`.
      upsampler_options: options of that upsampler.
      scale: ratio that the upsampler is built for, the backbone's stride over `guide_stride`. With
        16 and guide_stride 1, features go to the pixels of the image: the linear probe of the
        literature on frozen backbones.
      guide_stride: 1, 2, 4 or 8; the guide, and the logits, have 1 / guide_stride of the image's
        sides, rounded up.
      width: channels G of the guide. FADE with its gate needs those of the features.
      stem_width: channels between the stem's convolutions.
      norm: normalise the features before the upsampler.
      dropout: probability with which a whole channel is dropped before `classify`.
      dtype: compute type; that of the features by default. Norms are float32 at least.
      param_dtype: type of the parameters.
      rngs: source of the initial weights and of the dropout.

    Raises:
      ValueError: an unknown upsampler or option, or sizes that do not fit together.
    """

    def __init__(
        self,
        in_features: Sequence[int],
        num_classes: int,
        *,
        upsampler: str = "resfu",
        upsampler_options: dict[str, Any] | None = None,
        scale: int = 4,
        guide_stride: int = 4,
        width: int = 32,
        stem_width: int = 64,
        norm: bool = False,
        dropout: float = 0.0,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_sizes(in_features=in_features)
        need(len(in_features) > 0, "in_features must be positive integers, one or more, got ()")
        check_arguments(num_classes, width, dropout, dtype, param_dtype)
        check_whole(scale=scale, stem_width=stem_width)
        check_choice(tuple(_STEM_STRIDES), guide_stride=guide_stride)
        check_flag(norm=norm)
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        features = sum(in_features)
        self.in_features = tuple(in_features)
        self.num_classes = num_classes
        self.guide_stride = guide_stride
        self.norm = GroupNorm(features, 1, param_dtype=param_dtype) if norm else None
        self.upsample = create_head_upsampler(
            upsampler, features, scale, upsampler_options, guide_features=width, **types
        )
        self.stem = (
            ImageStem(stem_width, width, _STEM_STRIDES[guide_stride], **types)
            if self.upsample.guide == "features"
            else None
        )
        self.dropout = nnx.Dropout(dropout, broadcast_dims=(1, 2), rngs=rngs)
        self.classify = nnx.Linear(features, num_classes, kernel_init=classifier_init, **types)

    def __call__(
        self, features: Sequence[Float[Array, "b _h _w _c"]], images: Float[Array, "b H W 3"]
    ) -> Float[Array, "b h w k"]:
        """Logits at 1 / guide_stride of the image.

        Args:
          features: maps of the backbone.
          images: the images, normalised as the backbone had them.

        Raises:
          ValueError: maps that do not have `in_features` channels, or sizes between which the
            upsampler cannot go.
        """
        x, *others = self.upsampler_inputs(features, images)
        groups = self.upsample.value_groups
        if keeps_space(self.upsample) and groups * self.num_classes < x.shape[-1]:
            return self._upsampled_logits(x, others, groups)
        return self.classify(self.dropout(self.upsample(x, *others)))

    def upsampled(
        self, features: Sequence[Float[Array, "b _h _w _c"]], images: Float[Array, "b H W 3"]
    ) -> Float[Array, "b h w c"]:
        """What is classified, the upsampled features; as `__call__`."""
        return self.upsample(*self.upsampler_inputs(features, images))

    def upsampler_path(
        self, features: Sequence[Float[Array, "b _h _w _c"]], images: Float[Array, "b H W 3"]
    ) -> list[tuple[Any, ...]]:
        """The upsampler with what it is called with, for `upsamplers.path_weights`."""
        return [(self.upsample, *self.upsampler_inputs(features, images))]

    def _upsampled_logits(self, x, others, groups):
        """`classify(dropout(upsample(x, *others)))`, with logits of each group of channels."""
        layer, (b, h, w, _) = self.classify, x.shape
        values, kernel, bias = layer.promote_dtype(
            (self.dropout(x), layer.kernel[...], layer.bias[...]), dtype=layer.dtype
        )
        values = jnp.einsum(
            "bhwgc,gck->bhwgk",
            values.reshape(b, h, w, groups, values.shape[3] // groups),
            kernel.reshape(groups, -1, self.num_classes),
        ).reshape(b, h, w, groups * self.num_classes)
        logits = self.upsample(x, *others, values=values).astype(bias.dtype)
        logits = logits.reshape(*logits.shape[:3], groups, self.num_classes).sum(axis=3)
        return logits + bias[None, None, None]

    def upsampler_inputs(
        self, features: Sequence[Float[Array, "b _h _w _c"]], images: Float[Array, "b H W 3"]
    ) -> tuple[Any, ...]:
        """What the upsampler is called with: the features, then the guide or the output's size.

        An upsampler that is guided by the image takes both, the image and the output's size.
        """
        check_maps(features, self.in_features)
        need(
            len({x.shape[:3] for x in features}) == 1,
            "features must be maps of one size for the linear head, got shapes "
            f"{[x.shape for x in features]}; choose another head, or one map of the backbone",
        )
        check_images(images, 3)
        x = features[0] if len(features) == 1 else jnp.concatenate(features, axis=-1)
        if self.norm is not None:
            x = self.norm(x)
        if self.stem is not None:
            return x, self.stem(images.astype(x.dtype))
        s, (_, h, w, _) = self.guide_stride, images.shape
        size = (h + s - 1) // s, (w + s - 1) // s
        return x, *guide_by_images(self.upsample, images.astype(x.dtype), size)


class ImageStem(nnx.Module):
    """Two 3x3 convolutions on the image, GroupNorm(1) and ReLU between them: ReSFU's guidance."""

    def __init__(
        self,
        width: int,
        features: int,
        strides: tuple[int, int],
        *,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.conv1 = ReplicatedConv(3, width, (3, 3), strides=strides[0], **types)
        self.norm = GroupNorm(width, 1, param_dtype=param_dtype)
        self.conv2 = ReplicatedConv(width, features, (3, 3), strides=strides[1], **types)

    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w g"]:
        """The guide, of the compute type."""
        return self.conv2(jax.nn.relu(self.norm(self.conv1(images))))


class ReplicatedConv(nnx.Conv):
    """A 3x3 convolution with replicated borders, which `nnx.Conv` does not have."""

    bias: nnx.Param

    def __call__(  # type: ignore[override]  # without Flax's `out_sharding`
        self, x: Float[Array, "b h w c"]
    ) -> Float[Array, "b h2 w2 d"]:
        """The convolved map."""
        x, kernel, bias = self.promote_dtype(
            (x, self.kernel[...], self.bias[...]), dtype=self.dtype
        )
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        return conv(x, kernel, stride=self.strides) + bias[None, None, None]
