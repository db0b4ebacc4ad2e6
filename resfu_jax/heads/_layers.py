"""What the heads share: layers, checks, and upsamplers that they call alike."""

from collections.abc import Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from resfu_jax._checks import check_rate, check_whole, need
from resfu_jax._layers import BatchNorm
from resfu_jax._output import counted
from resfu_jax.ops.checks import check_floating, check_not_empty, check_real
from resfu_jax.ops.sizes import Size
from resfu_jax.upsamplers import Guide, create_upsampler, upsampler_entry

_conv_init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
classifier_init = nnx.initializers.normal(0.01)


def check_arguments(
    num_classes: int, width: int, dropout: float, dtype: Dtype | None, param_dtype: Dtype
) -> None:
    """Raises a `ValueError` for what no head can be built with."""
    check_floating(dtype=dtype, param_dtype=param_dtype)
    check_whole(num_classes=num_classes, width=width)
    check_rate(dropout=dropout)


def check_maps(features: Sequence[Array], in_features: tuple[int, ...]) -> None:
    """Raises a `ValueError` unless there is a map with each of these numbers of channels."""
    if tuple(x.shape[-1] for x in features) != in_features:
        raise ValueError(
            f"features must be {counted(len(in_features), 'map')} with {in_features} channels, "
            f"got shapes {[x.shape for x in features]}"
        )
    for i, x in enumerate(features):
        check_real(f"features[{i}]", x)
        check_not_empty(f"features[{i}]", x)


def create_head_upsampler(
    name: str,
    width: int,
    scale: int,
    options: dict[str, Any] | None,
    *,
    guide_features: int | None = None,
    **types: Any,
) -> Any:
    """An upsampler of maps with `width` channels whose guide, if it takes one, has as many.

    `guide_features` is the guide's number of channels where it differs.

    Raises:
      ValueError: an unknown upsampler or option, one that the head sets itself, or an upsampler
        that is guided by something else.
    """
    options = {} if options is None else options
    if not isinstance(options, dict):
        raise ValueError(f"upsampler_options must be a dictionary, got {options!r}")
    fixed = {"features", "guide_features", "scale", *types}
    for option in options:
        need(option not in fixed, f"upsampler_options cannot hold {option!r}: the head sets it")
    guide = upsampler_entry(name).cls.guide
    need(
        guide in get_args(Guide),
        f"upsampler {name!r} needs a guide of kind {guide!r}, which heads do not have; they have "
        f"{', '.join(get_args(Guide))}",
    )
    return create_upsampler(
        name,
        features=width,
        guide_features=guide_features or width,
        scale=scale,
        **types,
        **options,
    )


def guide_inputs(
    upsampler: Any,
    guide: Float[Array, "b h w _g"],
    images: Float[Array, "b _H _W 3"] | None,
) -> tuple[Any, ...]:
    """What an upsampler to the size of `guide` is called with after the features.

    Raises:
      ValueError: images are needed and not given.
    """
    if upsampler.guide == "features":
        return (guide,)
    return guide_by_images(upsampler, images, (guide.shape[1], guide.shape[2]))


def guide_by_images(
    upsampler: Any, images: Float[Array, "b H W 3"] | None, size: tuple[Size, Size]
) -> tuple[Any, ...]:
    """What an upsampler that does not take a feature map is called with after the features.

    One that needs the colours in 0 .. 1 gets each image between its least and its largest value:
    how images are normalised, heads do not know.
    """
    if upsampler.guide == "none":
        return (size,)
    if images is None:
        raise ValueError(f"images must be given: the guide of {type(upsampler).__name__}")
    if upsampler.image == "unit":
        low, high = (f(images, axis=(1, 2, 3), keepdims=True) for f in (jnp.min, jnp.max))
        images = (images - low) / jnp.maximum(high - low, 1e-6)
    return images, size


class ConvBNReLU(nnx.Module):
    """Convolution without bias, zero padding keeping the size; BatchNorm; ReLU."""

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        kernel_size: int = 1,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = dict(
            use_bias=False, kernel_init=_conv_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.conv: nnx.Linear | nnx.Conv
        if kernel_size == 1:
            self.conv = nnx.Linear(in_features, features, **options)
        else:
            size, padding = (kernel_size,) * 2, kernel_size // 2
            self.conv = nnx.Conv(in_features, features, size, padding=padding, **options)
        self.norm = BatchNorm(features, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """The layer's output, of the compute type."""
        return jax.nn.relu(self.norm(self.conv(x)))
