"""UPerNet's head, and the plain feature pyramid network, with a choice of upsampler.

Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018, section 3, as the
field knows it from MMSegmentation. For an image of H x W and the maps c1 .. c4 of the backbone (or
any other number of maps, each half as large as the one before), width D and K classes:

    c1  (B, H/4,  W/4,  C1) -> lateral ----> + ------------- smooth -------------+
                                             ^ upsampler [0] x2, with lateral 1  |
    c2  (B, H/8,  W/8,  C2) -> lateral ----> + ------------- smooth -- resize x2 -+
                                             ^ upsampler [1] x2, with lateral 2  |
    c3  (B, H/16, W/16, C3) -> lateral ----> + ------------- smooth -- resize x4 -+
                                             ^ upsampler [2] x2, with lateral 3  |
    c4  (B, H/32, W/32, C4) -> pyramid pooling ---------------------- resize x8 -+
                                                                                 |
              (B, H/4, W/4, K) <- classify <- dropout <- fuse <- concatenate (4 D)

The top-down path is `lateral[i - 1] += upsampler(lateral[i])`; an upsampler with a guide gets
`lateral[i - 1]`, before the sum, as its guide, one without gets its size only. `resize` is
bilinear. `lateral` is 1x1 convolution, BatchNorm, ReLU; `smooth` and `fuse` are the same with a 3x3
convolution; `classify` is a 1x1 convolution. Pyramid pooling is that of Zhao et al., "Pyramid Scene
Parsing Network", CVPR 2017, see `PyramidPooling`.

Without pooling (`pool_sizes=()`, the head "fpn"), c4 has `lateral` and `smooth` as the other maps
have: a plain feature pyramid network (Lin et al., "Feature Pyramid Networks for Object Detection",
CVPR 2017), read out for segmentation as above. It is the wiring in which the detection experiments
of CARAFE and DySample try upsamplers, there without BatchNorm and ReLU.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from resfu_jax._checks import check_sizes, need
from resfu_jax.heads._layers import (
    ConvBNReLU,
    check_arguments,
    check_maps,
    classifier_init,
    create_head_upsampler,
    guide_inputs,
)
from resfu_jax.ops.pool import adaptive_avg_pool
from resfu_jax.ops.resize import resize


class UPerNetHead(nnx.Module):
    """Adds coarse maps to finer ones, top down, and classifies every pixel of the finest.

    Args:
      in_features: channels of the backbone's maps, from fine to coarse; two maps or more.
      num_classes: number of logits a pixel.
      width: channels D of all maps in the head. (MMSegmentation's UPerNets have 512.)
      upsampler: a name of `list_upsamplers()`, built for the ratio 2 between neighbouring maps.
      upsampler_options: options of that upsampler.
      pool_sizes: sides of the grids that the coarsest map is pooled to; none for a plain FPN.
      dropout: probability with which a whole channel is dropped before `classify`.
      dtype: compute type; that of the features by default. BatchNorm is float32 at least.
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
        width: int = 256,
        upsampler: str = "resfu",
        upsampler_options: dict[str, Any] | None = None,
        pool_sizes: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_sizes(in_features=in_features, pool_sizes=pool_sizes)
        need(
            len(in_features) >= 2,
            f"in_features must be two or more positive integers, got {in_features}",
        )
        check_arguments(num_classes, width, dropout, dtype, param_dtype)

        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.in_features = tuple(in_features)
        self.num_classes = num_classes
        lateral = [ConvBNReLU(n, width, **types) for n in in_features[:-1]]
        if pool_sizes:
            coarsest = PyramidPooling(in_features[-1], width, pool_sizes, **types)
        else:
            coarsest = ConvBNReLU(in_features[-1], width, **types)
        self.lateral = nnx.List([*lateral, coarsest])
        self.upsample = nnx.List(
            [
                create_head_upsampler(upsampler, width, 2, upsampler_options, **types)
                for _ in lateral
            ]
        )
        # Pyramid pooling ends in a 3x3 convolution of its own.
        smoothed = len(in_features) - bool(pool_sizes)
        self.smooth = nnx.List(
            [ConvBNReLU(width, width, kernel_size=3, **types) for _ in range(smoothed)]
        )
        self.fuse = ConvBNReLU(len(in_features) * width, width, kernel_size=3, **types)
        self.dropout = nnx.Dropout(dropout, broadcast_dims=(1, 2), rngs=rngs)
        self.classify = nnx.Linear(width, num_classes, kernel_init=classifier_init, **types)

    def __call__(
        self,
        features: Sequence[Float[Array, "b _h _w _c"]],
        images: Float[Array, "b H W 3"] | None = None,
    ) -> Float[Array, "b h w k"]:
        """Logits on the grid of the finest map.

        Args:
          features: maps of the backbone, from fine to coarse.
          images: the images, normalised as the backbone had them; only upsamplers that are guided
            by the image use them.

        Raises:
          ValueError: maps that do not have `in_features` channels, or sizes between which the
            upsampler cannot go.
        """
        return self.classify(self.dropout(self.upsampled(features, images)))

    def upsampled(
        self,
        features: Sequence[Float[Array, "b _h _w _c"]],
        images: Float[Array, "b H W 3"] | None = None,
    ) -> Float[Array, "b h w c"]:
        """What is classified: the fused map, on the grid of the finest one; as `__call__`."""
        maps, _ = self._summed_maps(features, images)
        for i, smooth in enumerate(self.smooth):
            maps[i] = smooth(maps[i])
        size = maps[0].shape[1:3]
        maps = [maps[0], *(resize(x, size, method="bilinear") for x in maps[1:])]
        return self.fuse(jnp.concatenate(maps, axis=-1))

    def upsampler_path(
        self,
        features: Sequence[Float[Array, "b _h _w _c"]],
        images: Float[Array, "b H W 3"] | None = None,
    ) -> list[tuple[Any, ...]]:
        """The upsamplers that the coarsest map goes through, each with what it is called with.

        For `upsamplers.path_weights`.
        """
        return self._summed_maps(features, images)[1]

    def _summed_maps(self, features, images):
        """The maps after the top-down path, and the path: each upsampler with its inputs."""
        check_maps(features, self.in_features)
        maps = [lateral(x) for lateral, x in zip(self.lateral, features, strict=True)]
        path = []
        for i in reversed(range(len(self.upsample))):
            inputs = maps[i + 1], *guide_inputs(self.upsample[i], maps[i], images)
            maps[i] += self.upsample[i](*inputs)
            path.append((self.upsample[i], *inputs))
        return maps, path


class PyramidPooling(nnx.Module):
    """Pools a map to several small grids, brings them back and merges them with the map.

    For every pool size n: average pooling to n x n, 1x1 convolution, BatchNorm, ReLU, bilinear
    resizing back. Map and results, concatenated, go through 3x3 convolution, BatchNorm, ReLU.

    In training, with one image a batch, BatchNorm of the 1 x 1 grid leaves its bias only.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        pool_sizes: Sequence[int],
        *,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.pool_sizes = tuple(pool_sizes)
        self.project = nnx.List([ConvBNReLU(in_features, features, **types) for _ in pool_sizes])
        merged = in_features + len(self.pool_sizes) * features
        self.merge = ConvBNReLU(merged, features, kernel_size=3, **types)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """The merged map, of the compute type."""
        pooled = [
            resize(project(adaptive_avg_pool(x, (n, n))), x.shape[1:3], method="bilinear")
            for n, project in zip(self.pool_sizes, self.project, strict=True)
        ]
        return self.merge(jnp.concatenate([x, *pooled], axis=-1))
