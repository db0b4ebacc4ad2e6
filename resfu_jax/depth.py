"""Trained models of depth on images of any size: files, arrays, lists and folders to depth maps.

    pipeline = DepthPipeline.from_checkpoint("runs/depth_bts")
    depth = pipeline("photo.jpg")  # (H, W) float32, in the unit of the run's depth maps

Images are seen whole, as in the run's evaluation, padded and resized as `Preprocess` says.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float, Float32, Integer, UInt8, UInt16

from resfu_jax._batches import Batches, collect, is_one
from resfu_jax._checks import check_positive, need
from resfu_jax._running import Images, Item, Path, local_devices, open_run, restore
from resfu_jax.images import ImageError


@dataclasses.dataclass(frozen=True, eq=False)
class ImageDepth:
    """The result for one image of H x W.

    Attributes:
      id: the file's name without folder and suffix; of an array, its position in the input.
      path: the file; None for an array.
      depth: of each pixel, in the unit that the model was trained with, metres as a rule.
    """

    id: str
    path: pathlib.Path | None
    depth: Float32[np.ndarray, "h w"]


class DepthPipeline(Batches):
    """The depth of images of any size, in batches, with few compiled programs.

    Args:
      model: images `(B, H, W, 3)` of uint8 to depths `(B, H, W, 1)`, as those of `train.py` with
        `task = "depth"`.
      preprocess: how images are resized and padded. Where it resizes, depths are resized back to
        the image, bilinearly. None: no resizing, and the model's colours and strides.
      batch_size: images in a batch, a multiple of the number of devices; None: one per device.
      max_compilations: most programs compiled, as for `Predictor`.
      devices: which share a batch; None: all of this process.
      on_compile: called with (batch, height, width) before a program is compiled.
      **changes: fields of `preprocess` to change. `resize_to=(448, 672)` shows large photos to the
        network at a size that it has learned; the result keeps the photo's size.

    Attributes:
      config, step: of the run, if made by `from_checkpoint`; else None.

    Raises:
      ValueError: an argument is out of range.
    """

    _less = "smaller batches, or images that resize_to or scale make smaller,"

    @classmethod
    def from_checkpoint(
        cls,
        path: Path,
        which: str | int = "best",
        *,
        dtype: Dtype | None = None,
        devices: Sequence[jax.Device] | None = None,
        **options: Any,
    ) -> "DepthPipeline":
        """A run of train.py with `task = "depth"`.

        Nothing in the workdir is changed; the run may still be going on.

        Args:
          path: the workdir, or one checkpoint in it, `WORKDIR/checkpoints/STEP`.
          which: "best" by AbsRel, "latest", or a step.
          dtype: compute type; None: that of the run.
          devices: as for the class.
          **options: further arguments of the class. Images are resized and padded as in the run,
            but for the fields given here.

        Raises:
          ValueError: the folder does not hold such a run, or an argument is out of range.
          CheckpointError: there is no such checkpoint, or it is of another architecture.
        """
        from resfu_jax import tasks, training

        devices = local_devices(devices)
        workdir, which, config = open_run(path, which, "depth", dtype)
        model, step = restore(
            workdir, which, lambda: tasks.depth_model(config, nnx.Rngs(0)), devices
        )
        preprocess = training.create_preprocess(config)
        pipeline = cls(model, devices=devices, **dict(preprocess=preprocess) | options)
        pipeline.config, pipeline.step = config, step
        return pipeline

    def __call__(self, images: Images) -> Any:
        """Depths of a photo, or of several.

        Args:
          images: a file, a folder, an array (H, W, 3) or (B, H, W, 3) of uint8, RGB, or a list of
            these, as `Predictor.predict` takes.

        Returns:
          Of one photo (H, W), of an array of B photos (B, H, W), of a list or folder a list of
          arrays in order. NumPy's, float32, in the unit of the run's depth maps.

        Raises:
          ImageError: an image that cannot be read (`stream` goes on with the others), or the device
            has not enough memory.
          ValueError: arrays of other shapes or types.
        """
        results, errors = collect(images, self._stream(images))
        if errors:
            raise errors[0]
        maps = [result.depth for result in results]
        if is_one(images):
            return maps[0]
        return np.stack(maps) if getattr(images, "ndim", None) == 4 else maps

    def stream(self, images: Images) -> Iterator[ImageDepth | ImageError]:
        """Each image's result, or an `ImageError`, as soon as it is there, so not in order.

        Few images are in memory at any time.

        Args:
          images: as for a call.
        """
        for _, result in self._stream(images):
            yield result

    # ------------------------------------------------------------------------------- of `Batches`
    def _run(
        self,
        weights: Any,
        images: UInt8[Array, "b h w 3"],
        sizes: Integer[Array, "b 2"],
        *outputs: bool,
    ) -> dict[str, Array]:
        del sizes, outputs
        model: Any = nnx.merge(self._graphdef, weights)
        depth = model(images)
        need(
            depth.shape == (*images.shape[:3], 1),
            f"model must return depths {(*images.shape[:3], 1)} for images {images.shape}, got "
            f"{depth.shape}",
        )
        return {"depth": depth.astype(jnp.float32)}

    def _result(self, item: Item, result: dict[str, np.ndarray], *outputs: bool) -> ImageDepth:
        """Without the padding, and at the size of the image."""
        del outputs
        height, width = item.pixels.shape[:2]
        depth = self.preprocess.resize_back(result["depth"][:height, :width], item.size)
        return ImageDepth(item.id, item.path, np.array(depth[..., 0]))


def depth_and_photo(
    image: UInt8[np.ndarray, "h w 3"], depth: Float[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "tall wide 3"]:
    """The photo and, beside it, its depth in colours, with their scale.

    The colours go from the first to the last percent of the depths.

    Args:
      image: RGB.
      depth: of each of its pixels.
    """
    from resfu_jax.visualize import heatmap, panels_with_scales

    low, high = (float(x) for x in np.percentile(depth, (1, 99)))
    scale = (low, high, "viridis")
    return panels_with_scales([(image, None), (heatmap(depth, low, high), scale)])


def png_scale(max_depth: float) -> float:
    """The depth that the number 1 stands for in 16-bit files of depths up to `max_depth`.

    0.001, so that of metres the numbers are millimetres; where 65535 of these are less than
    `max_depth`, the smallest power of ten of which they are not: 0.01 for 80 metres.

    Raises:
      ValueError: a depth that is not positive.
    """
    check_positive(max_depth=max_depth)
    return 10.0 ** max(-3, int(np.ceil(np.log10(max_depth / 65535))))


def as_numbers(depth: Float[np.ndarray, "h w"], scale: float) -> UInt16[np.ndarray, "h w"]:
    """Depths as a 16-bit file holds them: rounded multiples of `scale`, from 1 to 65535.

    0 says that nothing is known, as in the files that `resfu prepare depth_folder/NAME` reads.

    Args:
      depth: positive.
      scale: what the number 1 stands for.
    """
    return np.clip(np.rint(depth / np.float32(scale)), 1, 65535).astype(np.uint16)
