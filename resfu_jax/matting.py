"""Trained matting models on images of any size: photos and trimaps to the opacity of every pixel.

    pipeline = MattingPipeline.from_checkpoint("runs/matting_fade")
    alpha = pipeline("photo.jpg", "trimap.png")  # (H, W) uint8

The network itself is `resfu_jax.model.MattingModel`.
"""

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, UInt8

from resfu_jax._checks import check_flag, need
from resfu_jax._running import Images, Item, Path, failed, find_images, open_run, restore
from resfu_jax.model import MattingModel, evaluating

if TYPE_CHECKING:
    from resfu_jax.images import ImageError
    from resfu_jax.training import Config


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
