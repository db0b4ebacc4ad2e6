"""SegFormer's head with a choice of upsampler.

Xie et al., "SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers",
NeurIPS 2021, section 3.2, with the direct guided upsampling of ReSFU's experiments. For an image of
H x W and the four maps c1 .. c4 of the backbone, width D and K classes:

    c1  (B, H/4,  W/4,  C1) -> project -> (B, H/4,  W/4,  D) = guide --------------------+
    c2  (B, H/8,  W/8,  C2) -> project -> (B, H/8,  W/8,  D) -> upsampler x2 with guide -+
    c3  (B, H/16, W/16, C3) -> project -> (B, H/16, W/16, D) -> upsampler x4 with guide -+
    c4  (B, H/32, W/32, C4) -> project -> (B, H/32, W/32, D) -> upsampler x8 with guide -+
                                                                                         |
        (B, H/4, W/4, K) <- classify <- dropout <- fuse <- (B, H/4, W/4, 4 D) concatenate

Every map goes to the grid of c1 in one step; sides that are no multiples of 32 are rounded up.
`project` and `fuse` are 1x1 convolution, BatchNorm, ReLU; `classify` is a 1x1 convolution.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from resfu_jax.ops._dtypes import at_least_float32
from resfu_jax.upsamplers import create_upsampler, upsampler_entry

Projection = Literal["conv_bn_relu", "linear"]

_conv_init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class SegFormerHead(nnx.Module):
    """Projects four feature maps, upsamples them to the finest and classifies every pixel.

    Args:
      in_features: channels of the backbone's four maps.
      num_classes: number of logits a pixel.
      width: channels D that every map is projected to, and of the guide.
      upsampler: a name of `list_upsamplers()`, built for the ratios 2, 4 and 8.
      upsampler_options: options of that upsampler.
      project: `"conv_bn_relu"` as above, or `"linear"`, SegFormer's own: linear with bias, the maps
        concatenated from c4 to c1. With `upsampler="bilinear"` it is `SegformerDecodeHead` of
        Hugging Face transformers.
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
        project: Projection = "conv_bn_relu",
        dropout: float = 0.1,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        guide = upsampler_entry(upsampler).cls.guide
        if guide not in ("none", "features"):
            raise ValueError(f"upsampler {upsampler!r} needs a guide of kind {guide!r}, not c1")
        if len(in_features) != 4 or not all(n > 0 for n in in_features):
            raise ValueError(f"in_features must be four positive integers, got {in_features}")
        if num_classes < 1 or width < 1:
            raise ValueError(
                f"num_classes and width must be positive, got {num_classes} and {width}"
            )
        if project not in get_args(Projection):
            raise ValueError(f"project must be one of {get_args(Projection)}, got {project!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, got {dropout}")

        types = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.in_features = tuple(in_features)
        self.num_classes = num_classes
        self.guided = guide == "features"
        self.linear = project == "linear"
        self.project = nnx.List([self._projection(n, width, types) for n in in_features])
        self.upsample = nnx.List(
            [
                create_upsampler(
                    upsampler,
                    features=width,
                    guide_features=width,
                    scale=scale,
                    **types,
                    **(upsampler_options or {}),
                )
                for scale in (2, 4, 8)
            ]
        )
        self.fuse = ConvBNReLU(4 * width, width, **types)
        # Whole channels, as the official code.
        self.dropout = nnx.Dropout(dropout, broadcast_dims=(1, 2), rngs=rngs)
        self.classify = nnx.Linear(
            width, num_classes, kernel_init=nnx.initializers.normal(0.01), **types
        )

    def _projection(self, features: int, width: int, types: dict[str, Any]) -> nnx.Module:
        if self.linear:
            return nnx.Linear(features, width, kernel_init=nnx.initializers.normal(0.02), **types)
        return ConvBNReLU(features, width, **types)

    def __call__(self, features: Sequence[Float[Array, "b _h _w _c"]]) -> Float[Array, "b h w k"]:
        """Logits on the grid of the finest map.

        Args:
          features: maps c1 .. c4 of the backbone.

        Raises:
          ValueError: maps that do not have `in_features` channels.
        """
        channels = tuple(x.shape[-1] for x in features)
        if channels != self.in_features:
            raise ValueError(
                f"features must be four maps with {self.in_features} channels, "
                f"got shapes {[x.shape for x in features]}"
            )
        guide, *coarse = [project(x) for project, x in zip(self.project, features, strict=True)]
        maps = [guide]
        for upsample, x in zip(self.upsample, coarse, strict=True):
            if self.guided:
                maps.append(upsample(x, guide))
            else:
                maps.append(upsample(x, output_size=guide.shape[1:3]))
        if self.linear:
            maps.reverse()
        x = self.fuse(jnp.concatenate(maps, axis=-1))
        return self.classify(self.dropout(x))


class ConvBNReLU(nnx.Module):
    """1x1 convolution without bias, BatchNorm, ReLU."""

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        self.conv = nnx.Linear(
            in_features,
            features,
            use_bias=False,
            kernel_init=_conv_init,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.norm = BatchNorm(features, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """The layer's output, of the compute type."""
        return jax.nn.relu(self.norm(self.conv(x)))


class BatchNorm(nnx.Module):
    """BatchNorm as PyTorch has it, in float32 at least whatever the compute type.

    On a mesh with the batch sharded, the statistics are those of the whole batch.
    """

    def __init__(self, features: int, *, param_dtype: Dtype, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))
        self.mean = nnx.BatchStat(jnp.zeros((features,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((features,), jnp.float32))
        self.use_running_average = False

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What `nnx.view` sets: normalise by the running statistics, as in evaluation."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """(x - mean) / sqrt(variance + 1e-5) * scale + bias, and an update of the running ones."""
        wide = at_least_float32(x.dtype)
        y = x.astype(wide)
        if self.use_running_average:
            mean, var = self.mean[...].astype(wide), self.var[...].astype(wide)
        else:
            mean = jnp.mean(y, axis=(0, 1, 2))
            var = jnp.mean(jnp.square(y - jnp.expand_dims(mean, (0, 1, 2))), axis=(0, 1, 2))
            n = y.size // y.shape[-1]
            unbiased = var * (n / max(n - 1, 1))
            for running, batch in ((self.mean, mean), (self.var, unbiased)):
                batch = jax.lax.stop_gradient(batch).astype(jnp.float32)
                running.set_value(0.9 * running[...] + 0.1 * batch)
        gain = jax.lax.rsqrt(var + 1e-5) * self.scale[...].astype(wide)
        mean, gain, bias = (
            jnp.expand_dims(v, (0, 1, 2)) for v in (mean, gain, self.bias[...].astype(wide))
        )
        return ((y - mean) * gain + bias).astype(x.dtype)
