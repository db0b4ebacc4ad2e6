"""Heads that predict depth: a linear probe over bins, and a decoder, each with any upsampler.

`BinsHead` is the probe of the literature on frozen backbones (DINOv2; JAFAR; AnyUp). With f the
upsampled features of a pixel, t the backbone's class token and c_k the centres of K bins:

    w_k = relu(W [f; t / |t|] + b)_k + 0.1,     depth = sum_k c_k w_k / sum_k w_k

`DepthDecoder` goes up a pyramid, as BTS (Lee et al., "From Big to Small", 2019) and DPT (Ranftl et
al., ICCV 2021) do. For maps c1 .. c4 of the backbone, each half as large as the one before:

    c4 -> lateral 4 -> upsampler x2, guided by lateral 3 -> concatenate with lateral 3 -> fuse
                    -> upsampler x2, guided by lateral 2 -> concatenate with lateral 2 -> fuse -> ..
    depth = max_depth sigmoid(3x3 convolution of the last map), at the size of c1

`lateral` is 1x1 convolution, BatchNorm, ReLU; `fuse` the same with a 3x3 convolution. BTS' local
planar guidance, pyramid pooling and steps finer than c1 are left out.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from resfu_jax._checks import check_flag, check_positive, check_sizes, check_whole, need
from resfu_jax.heads._layers import (
    ConvBNReLU,
    check_arguments,
    check_maps,
    classifier_init,
    create_head_upsampler,
    guide_inputs,
)
from resfu_jax.heads.linear import LinearHead


def depth_of_bins(
    scores: Float[Array, "*s k"], min_depth: float, max_depth: float
) -> Float[Array, "*s"]:
    """The depth that weighs the centres of K bins by relu(scores) + 0.1, float32.

    Args:
      scores: of each bin.
      min_depth: the first centre.
      max_depth: the last one.
    """
    weights = jax.nn.relu(scores.astype(jnp.float32)) + 0.1
    centres = jnp.linspace(min_depth, max_depth, scores.shape[-1], dtype=jnp.float32)
    return jnp.einsum("...k,k->...", weights, centres) / weights.sum(axis=-1)


class BinsHead(LinearHead):
    """Upsamples the backbone's last map and weighs bins of depth by one matrix.

    Args:
      in_features: channels of the backbone's maps, all of one size; one map as a rule.
      num_classes: 1, the depth.
      bins: number K of bins, whose centres are evenly spaced from min_depth to max_depth.
      min_depth: smallest depth.
      max_depth: largest depth.
      class_token: the maps end with the backbone's class token, `(B, 1, 1, C)`.
      upsampler: as for `LinearHead`.
      upsampler_options: as well.
      scale: as well.
      guide_stride: as well; the depth has 1 / guide_stride of the image's sides.
      width: as well.
      stem_width: as well.
      norm: as well.
      dropout: as well.
      dtype: as well.
      param_dtype: as well.
      rngs: as well.

    Raises:
      ValueError: an unknown upsampler or option, or sizes that do not fit together.
    """

    def __init__(
        self,
        in_features: Sequence[int],
        num_classes: int = 1,
        *,
        bins: int = 256,
        min_depth: float = 1e-3,
        max_depth: float = 10.0,
        class_token: bool = False,
        upsampler: str = "resfu",
        upsampler_options: dict[str, Any] | None = None,
        scale: int = 16,
        guide_stride: int = 1,
        width: int = 32,
        stem_width: int = 64,
        norm: bool = False,
        dropout: float = 0.0,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_sizes(in_features=in_features)
        _check_depths(num_classes, min_depth, max_depth)
        check_whole(bins=bins)
        check_flag(class_token=class_token)
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        super().__init__(
            in_features,
            bins,
            upsampler=upsampler,
            upsampler_options=upsampler_options,
            scale=scale,
            guide_stride=guide_stride,
            width=width,
            stem_width=stem_width,
            norm=norm,
            dropout=dropout,
            **types,
        )
        self.range = (min_depth, max_depth)
        self.token = (
            nnx.Linear(in_features[-1], bins, use_bias=False, kernel_init=classifier_init, **types)
            if class_token
            else None
        )

    def __call__(
        self, features: Sequence[Float[Array, "b _h _w _c"]], images: Float[Array, "b H W 3"]
    ) -> Float[Array, "b h w 1"]:
        """Depth at 1 / guide_stride of the image, float32.

        Args:
          features: maps of the backbone, and its class token if the head has it.
          images: the images, normalised as the backbone had them.

        Raises:
          ValueError: as `LinearHead`.
        """
        if self.token is None:
            scores = super().__call__(features, images)
        else:
            *features, token = features
            token = token / jnp.maximum(jnp.linalg.norm(token, axis=-1, keepdims=True), 1e-12)
            scores = super().__call__(features, images)
            scores = scores + jnp.broadcast_to(self.token(token), scores.shape)
        return depth_of_bins(scores, *self.range)[..., None]


class DepthDecoder(nnx.Module):
    """Goes up the backbone's pyramid by upsamplers x2, fusing a map at each step.

    Args:
      in_features: channels of the backbone's maps, from fine to coarse; two maps or more.
      num_classes: 1, the depth.
      max_depth: largest depth.
      min_depth: not used: the sigmoid ends at 0.
      width: channels of all maps in the head.
      upsampler: a name of `list_upsamplers()`, built for the ratio 2 between neighbouring maps.
      upsampler_options: options of that upsampler.
      dropout: probability with which a whole channel is dropped before the last convolution.
      dtype: compute type; that of the features by default. BatchNorm is float32 at least.
      param_dtype: type of the parameters.
      rngs: source of the initial weights and of the dropout.

    Raises:
      ValueError: an unknown upsampler or option, or sizes that do not fit together.
    """

    def __init__(
        self,
        in_features: Sequence[int],
        num_classes: int = 1,
        *,
        min_depth: float = 1e-3,
        max_depth: float = 10.0,
        width: int = 128,
        upsampler: str = "resfu",
        upsampler_options: dict[str, Any] | None = None,
        dropout: float = 0.0,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_sizes(in_features=in_features)
        need(
            len(in_features) >= 2,
            f"in_features must be two or more positive integers, got {in_features}",
        )
        _check_depths(num_classes, min_depth, max_depth)
        check_arguments(num_classes, width, dropout, dtype, param_dtype)
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.in_features = tuple(in_features)
        self.num_classes = num_classes
        self.max_depth = max_depth
        self.lateral = nnx.List([ConvBNReLU(n, width, **types) for n in in_features])
        steps = range(len(in_features) - 1)
        self.upsample = nnx.List(
            [create_head_upsampler(upsampler, width, 2, upsampler_options, **types) for _ in steps]
        )
        self.fuse = nnx.List([ConvBNReLU(2 * width, width, kernel_size=3, **types) for _ in steps])
        self.dropout = nnx.Dropout(dropout, broadcast_dims=(1, 2), rngs=rngs)
        self.predict = nnx.Conv(width, 1, (3, 3), padding=1, kernel_init=classifier_init, **types)

    def __call__(
        self,
        features: Sequence[Float[Array, "b _h _w _c"]],
        images: Float[Array, "b H W 3"] | None = None,
    ) -> Float[Array, "b h w 1"]:
        """Depth on the grid of the finest map, float32.

        Args:
          features: maps of the backbone, from fine to coarse.
          images: the images, normalised as the backbone had them; only upsamplers that are guided
            by the image use them.

        Raises:
          ValueError: maps that do not have `in_features` channels, or sizes between which the
            upsampler cannot go.
        """
        x = self.predict(self.dropout(self.upsampled(features, images)))
        return self.max_depth * jax.nn.sigmoid(x.astype(jnp.float32))

    def upsampled(
        self,
        features: Sequence[Float[Array, "b _h _w _c"]],
        images: Float[Array, "b H W 3"] | None = None,
    ) -> Float[Array, "b h w c"]:
        """What the depth is predicted from, on the grid of the finest map; as `__call__`."""
        check_maps(features, self.in_features)
        maps = [lateral(x) for lateral, x in zip(self.lateral, features, strict=True)]
        x = maps.pop()
        for i in reversed(range(len(self.upsample))):
            x = self.upsample[i](x, *guide_inputs(self.upsample[i], maps[i], images))
            x = self.fuse[i](jnp.concatenate([x, maps[i]], axis=-1))
        return x


def _check_depths(num_classes: int, min_depth: float, max_depth: float) -> None:
    check_whole(num_classes=num_classes)
    need(num_classes == 1, f"num_classes must be 1, the depth, got {num_classes!r}")
    check_positive(min_depth=min_depth, max_depth=max_depth)
    need(min_depth < max_depth, f"min_depth must be below max_depth, got {min_depth}, {max_depth}")
