"""Matting models: an image and a trimap to the opacity of every pixel.

    pipeline = MattingPipeline.from_checkpoint("runs/matting_fade")
    alpha = pipeline("photo.jpg", "trimap.png")  # (H, W) uint8

or, in JAX,

    model = create_matting_model(head={"upsampler": "fade"}, rngs=nnx.Rngs(0))
    alpha = evaluating(model).matte(images, trimaps)  # (B, H, W) in 0 .. 1
"""

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float, Num, UInt8

from resfu_jax._checks import check_flag, need
from resfu_jax._running import Images, Item, Path, failed, find_images, open_run, restore
from resfu_jax._trimap import BACKGROUND, FOREGROUND
from resfu_jax.backbones.matting import MattingEncoder
from resfu_jax.heads.matting import MattingHead
from resfu_jax.model import evaluating, normalise
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.preprocess import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from resfu_jax.images import ImageError
    from resfu_jax.training import Config


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


@dataclasses.dataclass(frozen=True, eq=False)
class ImageMatte:
    """The result for one image of H x W.

    Attributes:
      id: the file's name without folder and suffix.
      path: the file.
      alpha: 255 where the foreground is opaque.
    """

    id: str
    path: pathlib.Path
    alpha: UInt8[np.ndarray, "h w"]


class MattingPipeline:
    """Mattes of images of any size; a program is compiled for every size, in multiples of 16.

    Args:
      model: a `MattingModel`.
      orientation: turn photos and trimaps as their EXIF data say, and so as viewers show them.
      on_compile: called with (1, height, width) before a program is compiled.

    Attributes:
      config, step: of the run, if made by `from_checkpoint`; else None.
    """

    def __init__(
        self,
        model: MattingModel,
        *,
        orientation: bool = True,
        on_compile: Callable[[tuple[int, int, int]], None] | None = None,
    ):
        check_flag(orientation=orientation)
        self.config: Config | None = None
        self.step: int | None = None
        self.orientation, self.on_compile = orientation, on_compile
        self._graphdef, self._weights = nnx.split(evaluating(model))
        self._programs: dict[tuple[int, int], Any] = {}
        self._seconds: list[float] = []

    @classmethod
    def from_checkpoint(
        cls, path: Path, which: str | int = "best", *, dtype: Dtype | None = None, **options: Any
    ) -> "MattingPipeline":
        """A run of train.py with `task = "matting"`.

        Args:
          path: the workdir, or one checkpoint in it, `WORKDIR/checkpoints/STEP`.
          which: "best" by SAD, "latest", or a step.
          dtype: compute type; None: that of the run.
          **options: further arguments of the class.

        Raises:
          ValueError: the folder does not hold such a run.
          CheckpointError: there is no such checkpoint, or it is of another architecture.
        """
        from resfu_jax import tasks

        workdir, which, config = open_run(path, which, "matting", dtype)
        model, step = restore(
            workdir,
            which,
            lambda: tasks.matting_model(config, nnx.Rngs(0)),
            jax.local_devices()[:1],
        )
        pipeline = cls(model, **options)
        pipeline.config, pipeline.step = config, step
        return pipeline

    @property
    def compiled_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(1, height, width) of the compiled programs, in the order of their compilation."""
        return tuple((1, *size) for size in self._programs)

    @property
    def compile_seconds(self) -> tuple[float, ...]:
        """How long each of them took to compile."""
        return tuple(self._seconds)

    def read_image(self, source: Any) -> UInt8[np.ndarray, "h w 3"]:
        """`resfu_jax.images.read_image`, turned as the pipeline turns photos."""
        from resfu_jax.images import read_image

        return read_image(source, orientation=self.orientation)

    def __call__(
        self, image: Path | UInt8[np.ndarray, "h w 3"], trimap: Path | UInt8[np.ndarray, "_h _w"]
    ) -> UInt8[np.ndarray, "h w"]:
        """The alpha matte in 8 bits.

        Args:
          image: a file, or its RGB pixels.
          trimap: a file, or its values: 0 for background, 128 for unknown, 255 for foreground.

        Raises:
          ImageError: a file that cannot be read, or the device has not enough memory.
          DataError: a trimap of another size, with other values, or without unknown pixels.
        """
        from PIL import Image

        from resfu_jax.data.composition import check_same_size, check_trimap

        pixels = image if isinstance(image, np.ndarray) else self.read_image(image)
        if not isinstance(trimap, np.ndarray):
            name, trimap = f"the trimap {trimap}", self.read_image(trimap)[..., 0]
        else:
            name = "trimap"
        check_same_size(Image.fromarray(pixels), Image.fromarray(trimap), name)
        check_trimap(trimap, name)
        height, width = trimap.shape
        sides = (0, -height % 16), (0, -width % 16)
        padded = np.pad(pixels, (*sides, (0, 0)), "symmetric"), np.pad(trimap, sides)
        try:
            alpha = self._program(*padded)(self._weights, *padded)
            return np.asarray(alpha)[:height, :width]
        except jax.errors.JaxRuntimeError as error:
            path = None if isinstance(image, np.ndarray) else pathlib.Path(image)
            raise failed(Item(0, "0", path), error, "smaller photos") from error

    def stream(self, images: Images, trimaps: Path) -> "Iterator[ImageMatte | ImageError]":
        """Each photo's matte, or why it has none, in order.

        Args:
          images: files and folders of photos.
          trimaps: the trimap of a single photo, or a folder with one for every photo, named alike
            but for the suffix.

        Raises:
          ValueError: one trimap for several photos, or photos that are not files.
        """
        from resfu_jax.images import SUFFIXES, ImageError

        items = find_images(images)
        need(all(item.path is not None for item in items), "images must be files or folders")
        place = pathlib.Path(os.path.expanduser(trimaps))
        need(
            len(items) == 1 or place.is_dir(),
            f"trimaps must be a folder for {len(items)} photos, and {place} is none",
        )
        found = (
            {f.stem: f for f in place.iterdir() if f.suffix.lower() in SUFFIXES}
            if (place.is_dir())
            else {item.id: place for item in items}
        )
        for item in items:
            try:
                if item.error is not None:
                    raise item.error
                if item.id not in found:
                    raise ImageError(f"{item.path}: {place} has no trimap {item.id}.*")
                assert item.path is not None
                alpha = self(item.path, found[item.id])
                yield ImageMatte(item.id, item.path, alpha)
            except ValueError as error:  # an ImageError, or a DataError of the trimap
                yield (
                    error if isinstance(error, ImageError) else ImageError(f"{item.path}: {error}")
                )

    def _program(self, image: np.ndarray, trimap: np.ndarray) -> Any:
        """The compiled program of padded images of this size."""
        if trimap.shape not in self._programs:
            if self.on_compile is not None:
                self.on_compile((1, *trimap.shape))
            start = time.perf_counter()

            def matte(weights: Any, image: Array, trimap: Array) -> Array:
                network: Any = nnx.merge(self._graphdef, weights)
                alpha = network.matte(image[None], trimap[None])[0]
                return jnp.round(255 * alpha).astype(jnp.uint8)

            lowered = jax.jit(matte).lower(self._weights, image, trimap)
            self._programs[trimap.shape] = lowered.compile()
            self._seconds.append(time.perf_counter() - start)
        return self._programs[trimap.shape]
