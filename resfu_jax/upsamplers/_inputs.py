"""What the upsamplers share: their compute dtype, and checks of their inputs."""

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resfu_jax._checks import check_whole, need
from resfu_jax.ops.dtypes import at_least_float32, promote
from resfu_jax.ops.resize import resize
from resfu_jax.ops.sizes import Size


def compute_dtype(dtype: DTypeLike | None, *inputs: Array | None) -> DTypeLike:
    """The chosen compute dtype, or the promoted one of the inputs that are given."""
    return promote(*(a.dtype for a in inputs if a is not None)) if dtype is None else dtype


def need_guide(name: str, guide_features: int | None) -> int:
    """The number of the guide's channels; a `ValueError` if there is none or it is not a number."""
    if guide_features is None:
        raise ValueError(f"guide_features is needed: {name} is guided; give the guide's channels")
    check_whole(guide_features=guide_features)
    return guide_features


def check_features(features: Array, channels: int) -> None:
    """The features are `(batch, height, width, channels)`."""
    need(
        features.ndim == 4 and features.shape[3] == channels,
        f"features must be (batch, height, width, {channels}), got shape {features.shape}",
    )


def check_guide(features: Array, guide: Array, channels: int) -> None:
    """The guide fits the features and is at least as large."""
    need(
        guide.ndim == 4 and guide.shape[3] == channels,
        f"guide must be (batch, height, width, {channels}), got shape {guide.shape}",
    )
    need(
        features.shape[0] == guide.shape[0],
        f"guide must have the features' batch size {features.shape[0]}, got {guide.shape[0]}",
    )
    for n, m in zip(features.shape[1:3], guide.shape[1:3], strict=True):
        if isinstance(n, int) and isinstance(m, int):
            need(
                1 <= n <= m,
                "guide must be at least as large as the features along both axes, "
                f"got guide {guide.shape[1:3]} and features {features.shape[1:3]}",
            )


def check_image(features: Array, image: Array, channels: int | None = 3) -> None:
    """The image, of any size, fits the features."""
    need(
        image.ndim == 4 and channels in (None, image.shape[3]),
        f"image must be (batch, height, width, {channels or 'channels'}), got shape {image.shape}",
    )
    need(
        features.shape[0] == image.shape[0],
        f"image must have the features' batch size {features.shape[0]}, got {image.shape[0]}",
    )


def size_of_output(image: Array, output_size: tuple[Size, Size] | None) -> tuple[Size, Size]:
    """The size that is asked for, or the image's."""
    if output_size is None:
        output_size = image.shape[1], image.shape[2]
    need(
        len(output_size) == 2 and all(n >= 1 for n in output_size if isinstance(n, int)),
        f"output_size must be two positive sizes, got {output_size!r}",
    )
    height, width = output_size
    return height, width


def image_of_size(image: Array, size: tuple[Size, Size]) -> Float[Array, "b H W c"]:
    """The image in float32 or better, resized bilinearly; with antialiasing where it shrinks."""
    image = image.astype(at_least_float32(image.dtype))
    return image if image.shape[1:3] == size else resize(image, size, antialias=True)


def reassembled(
    features: Array, values: Array | None, *, groups: int = 1
) -> Float[Array, "b h w d"]:
    """What is reassembled: the features, or other values at their pixels.

    Values are in the features' dtype, to which `compute_dtype` has promoted both. Their channels
    must divide into the groups.
    """
    if values is None:
        return features
    need(
        values.ndim == 4 and values.shape[:3] == features.shape[:3],
        f"values must be {(*features.shape[:3], 'channels')}, a vector for every pixel of the "
        f"features, got shape {values.shape}",
    )
    need(
        values.shape[3] % groups == 0,
        f"values must have a multiple of {groups} channels (the groups), got {values.shape[3]}",
    )
    return values.astype(features.dtype)


def check_output_size(
    name: str, features: Array, output_size: tuple[Size, Size] | None, scale: int
) -> None:
    """For upsamplers that only know their whole scale: no other size is asked for."""
    fixed = tuple(scale * n for n in features.shape[1:3])
    need(
        output_size is None or tuple(output_size) == fixed,
        f"{name} of scale {scale} turns {features.shape[1:3]} into {fixed} only, got "
        f"output_size={None if output_size is None else tuple(output_size)}; resize its result, "
        "or choose another upsampler",
    )
