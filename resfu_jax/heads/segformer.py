"""SegFormer's head with a choice of upsampler.

Xie et al., "SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers",
NeurIPS 2021, section 3.2. For an image of H x W and the four maps c1 .. c4 of the backbone, width D
and K classes, with the direct upsampling of ReSFU's experiments (`wiring="direct"`), every map goes
to the grid of c1 in one step:

    c1  (B, H/4,  W/4,  C1) -> project -> (B, H/4,  W/4,  D) = guide --------------------+
    c2  (B, H/8,  W/8,  C2) -> project -> (B, H/8,  W/8,  D) -> upsampler x2 with guide -+
    c3  (B, H/16, W/16, C3) -> project -> (B, H/16, W/16, D) -> upsampler x4 with guide -+
    c4  (B, H/32, W/32, C4) -> project -> (B, H/32, W/32, D) -> upsampler x8 with guide -+
                                                                                         |
        (B, H/4, W/4, K) <- classify <- dropout <- fuse <- (B, H/4, W/4, 4 D) concatenate

With the stage-by-stage upsampling of SAPA's and FADE's experiments (`wiring="stagewise"`), the
steps between neighbouring grids are taken one by one. Each has its own upsampler, numbered as in
`SegFormerHead.upsample`, and the projected map of the grid that it reaches, p1 .. p3, as its guide:

    p1 (H/4) -----------------------------------------------------------+
    p2 (H/8) ------------------------------------------- x2 [5] with p1 -+
    p3 (H/16) ------------------------ x2 [3] with p2 -- x2 [4] with p1 -+
    p4 (H/32) ------ x2 [0] with p3 -- x2 [1] with p2 -- x2 [2] with p1 -+
                                                                        |
                                             concatenate, and on as above

Sides that are no multiples of 32 are rounded up. Upsamplers without a guide take its size only,
those that are guided by the image take the image instead.
`project` and `fuse` are 1x1 convolution, BatchNorm, ReLU; `classify` is a 1x1 convolution.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from resfu_jax._checks import check_choice, check_sizes
from resfu_jax.heads._layers import (
    ConvBNReLU,
    check_arguments,
    check_maps,
    classifier_init,
    create_head_upsampler,
    guide_inputs,
)

Wiring = Literal["direct", "stagewise"]
Projection = Literal["conv_bn_relu", "linear"]

# The upsamplers in order: which map each enlarges, to the grid of which, by which ratio.
_STEPS = {
    "direct": ((1, 0, 2), (2, 0, 4), (3, 0, 8)),
    "stagewise": ((3, 2, 2), (3, 1, 2), (3, 0, 2), (2, 1, 2), (2, 0, 2), (1, 0, 2)),
}


class SegFormerHead(nnx.Module):
    """Projects four feature maps, upsamples them to the finest and classifies every pixel.

    Args:
      in_features: channels of the backbone's four maps.
      num_classes: number of logits a pixel.
      width: channels D that every map is projected to, and of the guides.
      upsampler: a name of `list_upsamplers()`, built for the ratios above.
      upsampler_options: options of that upsampler.
      wiring: `"direct"`, three upsamplers, or `"stagewise"`, six, as above.
      project: `"conv_bn_relu"` as above, or `"linear"`, SegFormer's own: linear with bias, the maps
        concatenated from c4 to c1. With `upsampler="bilinear"` and the direct wiring it is
        `SegformerDecodeHead` of Hugging Face transformers; with the stagewise wiring it is the head
        of SAPA's and FADE's experiments.
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
        wiring: Wiring = "direct",
        project: Projection = "conv_bn_relu",
        dropout: float = 0.1,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_sizes(4, in_features=in_features)
        check_arguments(num_classes, width, dropout, dtype, param_dtype)
        check_choice(get_args(Wiring), wiring=wiring)
        check_choice(get_args(Projection), project=project)

        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.in_features = tuple(in_features)
        self.num_classes = num_classes
        self.wiring = wiring
        self.linear = project == "linear"
        self.project = nnx.List([self._projection(n, width, types) for n in in_features])
        self.upsample = nnx.List(
            [
                create_head_upsampler(upsampler, width, ratio, upsampler_options, **types)
                for *_, ratio in _STEPS[wiring]
            ]
        )
        self.fuse = ConvBNReLU(4 * width, width, **types)
        # Whole channels, as the official code.
        self.dropout = nnx.Dropout(dropout, broadcast_dims=(1, 2), rngs=rngs)
        self.classify = nnx.Linear(width, num_classes, kernel_init=classifier_init, **types)

    def _projection(self, features: int, width: int, types: dict[str, Any]) -> nnx.Module:
        if self.linear:
            return nnx.Linear(features, width, kernel_init=nnx.initializers.normal(0.02), **types)
        return ConvBNReLU(features, width, **types)

    def __call__(
        self,
        features: Sequence[Float[Array, "b _h _w _c"]],
        images: Float[Array, "b H W 3"] | None = None,
    ) -> Float[Array, "b h w k"]:
        """Logits on the grid of the finest map.

        Args:
          features: maps c1 .. c4 of the backbone.
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
        maps, _ = self._upsampled_maps(features, images)
        if self.linear:
            maps.reverse()
        return self.fuse(jnp.concatenate(maps, axis=-1))

    def upsampler_path(
        self,
        features: Sequence[Float[Array, "b _h _w _c"]],
        images: Float[Array, "b H W 3"] | None = None,
    ) -> list[tuple[Any, ...]]:
        """The upsamplers that the coarsest map goes through, each with what it is called with.

        For `upsamplers.path_weights`.
        """
        _, paths = self._upsampled_maps(features, images)
        return paths[3]

    def _upsampled_maps(self, features, images):
        """The projected maps on the grid of the finest, and each one's `upsampler_path`."""
        check_maps(features, self.in_features)
        guides = [project(x) for project, x in zip(self.project, features, strict=True)]
        maps, paths = list(guides), [[] for _ in guides]
        for upsample, (source, target, _) in zip(self.upsample, _STEPS[self.wiring], strict=True):
            inputs = maps[source], *guide_inputs(upsample, guides[target], images)
            maps[source] = upsample(*inputs)
            paths[source].append((upsample, *inputs))
        return maps, paths
