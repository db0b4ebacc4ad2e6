"""Networks from their parts: images to logits, and images with trimaps to mattes.

    model = create_matting_model(head={"upsampler": "fade"}, rngs=nnx.Rngs(0))
    alpha = evaluating(model).matte(images, trimaps)  # (B, H, W) in 0 .. 1

They are built for training; `evaluating(model)` is the one to evaluate.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float, Num, UInt8

from resfu_jax._checks import check_flag, is_number, need
from resfu_jax._trimap import BACKGROUND, FOREGROUND
from resfu_jax.backbones import create_backbone
from resfu_jax.backbones.matting import MattingEncoder
from resfu_jax.heads import create_head
from resfu_jax.heads.matting import MattingHead
from resfu_jax.ops.checks import check_not_empty
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.resize import resize
from resfu_jax.preprocess import IMAGENET_MEAN, IMAGENET_STD

Features = tuple[Float[Array, "b _h _w _c"], ...]


def evaluating(module: nnx.Module) -> nnx.Module:
    """The module without dropout and with the running statistics of BatchNorm; weights shared."""
    return nnx.view(module, deterministic=True, use_running_average=True, raise_if_not_found=False)


class SegmentationModel(nnx.Module):
    """Backbone, head, and what is around them: normalised images in, logits at their size out.

    Modules are built for training; `evaluating(model)` is the model to evaluate.

    Args:
      backbone: images `(B, H, W, 3)` to feature maps.
      head: feature maps and normalised images to logits.
      mean: mean of the three colours, in 0 .. 255.
      std: their standard deviation.
      frozen: the backbone runs as in evaluation, and no gradient reaches it; see `trainable`.
    """

    def __init__(
        self,
        backbone: nnx.Module,
        head: nnx.Module,
        *,
        frozen: bool = False,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        check_flag(frozen=frozen)
        three = all(len(v) == 3 and all(map(is_number, v)) for v in (mean, std))
        if not three or min(std) <= 0:
            raise ValueError(f"mean and std must be three numbers, std > 0, got {mean} and {std}")
        self.backbone: Any = backbone
        self.head: Any = head
        self.frozen = frozen
        self.mean = tuple(mean)
        self.std = tuple(std)

    def __call__(
        self, images: Num[Array, "b h w 3"], features: Features | None = None
    ) -> Float[Array, "b h w k"]:
        """Logits of every pixel, float32 at least.

        Args:
          images: RGB in 0 .. 255, uint8 or floating point.
          features: what `self.features(images)` returns, if it is known already.
        """
        logits = self.logits(images, features)
        logits = logits.astype(at_least_float32(logits.dtype))
        return resize(logits, images.shape[1:3], method="bilinear")

    def logits(
        self, images: Num[Array, "b h w 3"], features: Features | None = None
    ) -> Float[Array, "b h4 w4 k"]:
        """Logits at the head's resolution, in its compute type."""
        if features is None:
            features = self.features(images)
        return self.head(features, self.normalise(images))

    def upsampled(
        self, images: Num[Array, "b h w 3"], features: Features | None = None
    ) -> Float[Array, "b h4 w4 c"]:
        """What the head classifies, at the head's resolution, in its compute type."""
        if features is None:
            features = self.features(images)
        return self.head.upsampled(features, self.normalise(images))

    def features(self, images: Num[Array, "b h w 3"]) -> Features:
        """The backbone's feature maps of the normalised images."""
        if not self.frozen:
            return self.backbone(self.normalise(images))
        return jax.lax.stop_gradient(evaluating(self.backbone)(self.normalise(images)))

    def trainable(self, path: tuple, variable: Any) -> bool:
        """Filter for `nnx.split`: the parameters that learn, without those of a frozen backbone."""
        return isinstance(variable, nnx.Param) and not (self.frozen and path[0] == "backbone")

    def normalise(self, images: Num[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
        """(images - mean) / std, float32 at least."""
        return normalise(images, self.mean, self.std)


def normalise(
    images: Num[Array, "b h w 3"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "b h w 3"]:
    """(images - mean) / std, float32 at least.

    Raises:
      ValueError: images of another shape, or neither uint8 nor floating point.
    """
    if images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be (batch, height, width, 3), got {images.shape}")
    if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be uint8 or floating point, got {images.dtype}")
    check_not_empty("images", images)
    x = images.astype(at_least_float32(images.dtype))
    mean, std = (jnp.asarray(v, x.dtype).reshape(1, 1, 1, 3) for v in (mean, std))
    return (x - mean) / std


def create_model(
    *,
    backbone: dict[str, Any],
    head: dict[str, Any],
    num_classes: int,
    frozen: bool = False,
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
      frozen: the backbone does not learn.
      mean: mean of the three colours, in 0 .. 255.
      std: their standard deviation.
      dtype: compute type of backbone and head; float32 images compute in float32 by default.
      param_dtype: type of the parameters.
      remat: recompute the backbone's activations in the backward pass instead of keeping them.
      rngs: source of initial weights, dropout and dropped paths.

    Raises:
      ValueError: unknown names, or options that do not fit together.
    """
    types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    pyramid: Any = create_backbone(**backbone, remat=remat, **types)
    top = create_head(**head, in_features=pyramid.features, num_classes=num_classes, **types)
    # Some upsamplers are made for evaluation. Here, like the backbone, they learn: `evaluating`.
    top.set_attributes(use_running_average=False, raise_if_not_found=False)
    return SegmentationModel(pyramid, top, frozen=frozen, mean=mean, std=std)


class MattingModel(nnx.Module):
    """Encoder and decoder of A2U matting, and what is around them.

    Modules are built for training; `evaluating(model)` is the model to evaluate.

    Args:
      backbone: `MattingEncoder`.
      head: `MattingHead`.
      mean: mean of the three colours, in 0 .. 255.
      std: their standard deviation.
      frozen: the encoder's parameters do not learn.
    """

    def __init__(
        self,
        backbone: MattingEncoder,
        head: MattingHead,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        frozen: bool = False,
    ):
        check_flag(frozen=frozen)
        self.backbone, self.head = backbone, head
        self.mean, self.std, self.frozen = tuple(mean), tuple(std), frozen

    def __call__(
        self, images: Num[Array, "b h w 3"], trimaps: UInt8[Array, "b h w"]
    ) -> Float[Array, "b h w"]:
        """Alpha of every pixel as it comes out of the network, not bounded; float32 at least.

        Args:
          images: RGB in 0 .. 255, uint8 or floating point; sides are multiples of 16.
          trimaps: 0 where alpha is known to be 0, 255 where it is known to be 1, else 128.

        Raises:
          ValueError: images or trimaps of other sizes or types.
        """
        need(
            trimaps.shape == images.shape[:3] and trimaps.dtype == jnp.uint8,
            f"trimaps must be uint8 of shape {images.shape[:3]}, as the images, got "
            f"{trimaps.dtype} of {trimaps.shape}",
        )
        colours = normalise(images, self.mean, self.std)
        inputs = jnp.concatenate([colours, trimaps[..., None].astype(colours.dtype) / 255], -1)
        alpha = self.head(self.backbone(inputs), inputs, colours)
        return alpha.astype(at_least_float32(alpha.dtype))

    def matte(
        self, images: Num[Array, "b h w 3"], trimaps: UInt8[Array, "b h w"]
    ) -> Float[Array, "b h w"]:
        """Alpha in 0 .. 1; where the trimap knows it, what it says. Arguments as for a call."""
        alpha = jnp.clip(self(images, trimaps), 0, 1)
        alpha = jnp.where(trimaps == BACKGROUND, 0, alpha)
        return jnp.where(trimaps == FOREGROUND, 1, alpha)

    def trainable(self, path: tuple, variable: Any) -> bool:
        """Filter for `nnx.split`: the parameters that learn."""
        return isinstance(variable, nnx.Param) and not (self.frozen and path[0] == "backbone")


def create_matting_model(
    *,
    backbone: dict[str, Any] | None = None,
    head: dict[str, Any] | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    frozen: bool = False,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    remat: bool = False,
    rngs: nnx.Rngs,
) -> MattingModel:
    """Build a model from the settings of its parts.

    Args:
      backbone: arguments of `MattingEncoder`.
      head: arguments of `MattingHead`: `{"upsampler": "sapa"}`.
      mean: mean of the three colours, in 0 .. 255.
      std: their standard deviation.
      frozen: the encoder does not learn.
      dtype: compute type; float32 images compute in float32 by default.
      param_dtype: type of the parameters.
      remat: recompute the encoder's activations in the backward pass instead of keeping them.
      rngs: source of initial weights and dropout.

    Raises:
      ValueError: unknown names, or options that do not fit together.
    """
    types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    encoder = MattingEncoder(**(backbone or {}), remat=remat, **types)
    decoder = MattingHead(
        encoder.features,
        encoder.guide_features,
        in_channels=encoder.in_channels,
        **(head or {}),
        **types,
    )
    # Some upsamplers are made for evaluation. Here they learn: `evaluating`.
    decoder.set_attributes(use_running_average=False, raise_if_not_found=False)
    return MattingModel(encoder, decoder, mean=mean, std=std, frozen=frozen)
