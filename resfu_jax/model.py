"""Segmentation models: images to logits."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float, Num

from resfu_jax.backbones import create_backbone
from resfu_jax.heads import create_head
from resfu_jax.ops._dtypes import at_least_float32
from resfu_jax.ops.resize import resize

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


class SegmentationModel(nnx.Module):
    """Backbone, head, and what is around them: normalised images in, logits at their size out.

    Modules are built for training. To evaluate:

        model = nnx.view(
            model, deterministic=True, use_running_average=True, raise_if_not_found=False
        )

    Args:
      backbone: images `(B, H, W, 3)` to feature maps.
      head: feature maps to logits.
      mean: mean of the three colours, in 0 .. 255.
      std: their standard deviation.
    """

    def __init__(
        self,
        backbone: nnx.Module,
        head: nnx.Module,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
            raise ValueError(f"mean and std must be three numbers, std > 0, got {mean} and {std}")
        self.backbone = backbone
        self.head = head
        self.mean = tuple(mean)
        self.std = tuple(std)

    def __call__(self, images: Num[Array, "b h w 3"]) -> Float[Array, "b h w k"]:
        """Logits of every pixel, float32 at least.

        Args:
          images: RGB in 0 .. 255, uint8 or floating point.
        """
        logits = self.logits(images)
        logits = logits.astype(at_least_float32(logits.dtype))
        return resize(logits, images.shape[1:3], method="bilinear")

    def logits(self, images: Num[Array, "b h w 3"]) -> Float[Array, "b h4 w4 k"]:
        """Logits at the head's resolution, in its compute type."""
        return self.head(self.features(images))

    def features(self, images: Num[Array, "b h w 3"]) -> tuple[Float[Array, "b _h _w _c"], ...]:
        """The backbone's feature maps of the normalised images."""
        if images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images must be (batch, height, width, 3), got {images.shape}")
        if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images must be uint8 or floating point, got {images.dtype}")
        x = images.astype(at_least_float32(images.dtype))
        mean, std = (jnp.asarray(v, x.dtype).reshape(1, 1, 1, 3) for v in (self.mean, self.std))
        return self.backbone((x - mean) / std)


def create_model(
    *,
    backbone: dict[str, Any],
    head: dict[str, Any],
    num_classes: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    remat: bool = False,
    rngs: nnx.Rngs,
) -> SegmentationModel:
    """Build a model from the settings of its parts.

    Args:
      backbone: arguments of `create_backbone`, `name` among them: `{"variant": "b0"}`.
      head: arguments of `create_head`: `{"upsampler": "resfu", "width": 256}`.
      num_classes: number of logits a pixel.
      mean: mean of the three colours, in 0 .. 255.
      std: their standard deviation.
      dtype: compute type of backbone and head; float32 images compute in float32 by default.
      param_dtype: type of the parameters.
      remat: recompute the backbone's activations in the backward pass instead of keeping them.
      rngs: source of initial weights, dropout and dropped paths.

    Raises:
      ValueError: unknown names, or options that do not fit together.
    """
    types = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    pyramid = create_backbone(**backbone, remat=remat, **types)
    top = create_head(**head, in_features=pyramid.features, num_classes=num_classes, **types)
    return SegmentationModel(pyramid, top, mean=mean, std=std)
