"""Trained models on images of any size: files, arrays, lists and folders to classes of pixels.

    predictor = Predictor.from_checkpoint("runs/shapes_resfu")
    for result in predictor.predict("photos/"):
        print(result.id, predictor.class_names[result.labels[0, 0]])

How images of many sizes share few compiled programs is in `_batches.py`. They are padded for that,
which influences a result a little where an image is seen whole: attention sees it. `Preprocess` has
the rule, which exported files and the server follow, too.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float, Integer, UInt8

from resfu_jax._batches import Batches, Shape, collect
from resfu_jax._running import Images, Item, Path, check_fields, local_devices, open_run, restore
from resfu_jax.images import ImageError
from resfu_jax.inference import Inference
from resfu_jax.model import create_model
from resfu_jax.preprocess import Preprocess, is_integer

if TYPE_CHECKING:
    from resfu_jax.data import DatasetInfo


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """The result for one image of H x W.

    Attributes:
      id: the file's name without folder and suffix; of an array, its position in the input.
      path: the file; None for an array.
      labels: the most probable class of each pixel.
      probabilities: of all K classes, if asked for.
      features: what the classifier sees, if asked for: the head's upsampled map of C channels, as
        a rule at H/4 x W/4 of the image (after resizing).
    """

    id: str
    path: pathlib.Path | None
    labels: UInt8[np.ndarray, "h w"]
    probabilities: Float[np.ndarray, "h w k"] | None = None
    features: Float[np.ndarray, "_h _w c"] | None = None

    @property
    def shares(self) -> dict[int, float]:
        """The share of the pixels of each class that is there, the largest first."""
        counts = np.bincount(self.labels.ravel())
        order = np.argsort(-counts, kind="stable")
        return {int(i): float(counts[i] / self.labels.size) for i in order if counts[i]}


class Predictions(list[Prediction]):
    """Results in the order of the input.

    Attributes:
      errors: an `ImageError` for each image of a list or folder that has no result.
    """

    def __init__(self, results: Sequence[Prediction], errors: Sequence[ImageError]):
        super().__init__(results)
        self.errors = list(errors)


class Predictor(Batches):
    """Runs a model on images of any size, in batches, with few compiled programs.

    Args:
      model: images `(B, H, W, 3)` to logits of the same height and width, as `SegmentationModel`.
      class_names: K names.
      palette: a colour for each.
      inference: how images become logits. In windows ("slide") the result does not depend on
        `growth`.
      preprocess: how images are resized and padded. Where it resizes, probabilities are resized
        back, bilinearly; classes are decided at the size of the image. None: no resizing, and the
        model's colours and strides (`preprocess_of`).
      batch_size: images in a batch, a multiple of the number of devices; None: one per device.
        Missing rows are filled with blank images, which cost as much as others.
      max_compilations: most programs compiled. Images for which there would be another one go into
        the smallest size compiled so far that holds them. Only then does a result depend on what
        was predicted before; without such a size it is an `ImageError`.
      devices: which share a batch; None: all of this process.
      on_compile: called with (batch, height, width) before a program is compiled.
      **changes: fields of `preprocess` to change: `growth=1` pads to the next multiple only, as in
        the evaluation of equally large images; `scale=0.5`; `orientation=False`.

    Attributes:
      config, step: of the run, if made by `from_checkpoint`; else None.

    Raises:
      ValueError: an argument is out of range.
    """

    _less = "smaller batches or windows (slide)"

    def __init__(
        self,
        model: nnx.Module,
        *,
        class_names: Sequence[str],
        palette: Sequence[tuple[int, int, int]],
        inference: Inference | None = None,
        preprocess: Preprocess | None = None,
        batch_size: int | None = None,
        max_compilations: int = 32,
        devices: Sequence[jax.Device] | None = None,
        on_compile: Callable[[Shape], None] | None = None,
        **changes: Any,
    ):
        check_classes(class_names, palette)
        if not 1 <= len(class_names) == len(palette) <= 256:
            raise ValueError(
                "class_names and palette must be equally long, 1 to 256, got "
                f"{len(class_names)} and {len(palette)}"
            )
        if not isinstance(inference, Inference | None):
            raise ValueError(f"inference must be an Inference or None, got {inference!r}")
        super().__init__(
            model,
            preprocess=preprocess,
            batch_size=batch_size,
            max_compilations=max_compilations,
            devices=devices,
            on_compile=on_compile,
            **changes,
        )
        self.class_names = tuple(class_names)
        self.palette = tuple(palette)
        self.inference = inference or Inference()

    @classmethod
    def from_checkpoint(
        cls,
        path: Path,
        which: str | int = "best",
        *,
        dtype: Dtype | None = None,
        inference: Inference | Mapping[str, Any] | None = None,
        info: "DatasetInfo | None" = None,
        data_dir: Path | None = None,
        devices: Sequence[jax.Device] | None = None,
        **options: Any,
    ) -> "Predictor":
        """A run of train.py: its model, classes, and test protocol.

        Nothing in the workdir is changed; the run may still be going on.

        Args:
          path: the workdir, or one checkpoint in it, `WORKDIR/checkpoints/STEP`.
          which: "best" by mIoU, "latest", or a step.
          dtype: compute type, a floating-point one such as `jnp.bfloat16`; None: that of the run.
            Weights, norms and probabilities are float32.
          inference: how images become logits; a dictionary changes single options of the run's
            evaluation: `{"flip": True}`. None: as in the run's evaluation.
          info: classes and colours; None: those of the dataset that the run was trained on.
          data_dir: where that dataset was prepared, if it is an `image_folder/NAME`.
          devices: as for `Predictor`.
          **options: further arguments of `Predictor`. Images are resized and padded as in the run,
            but for the fields given here.

        Raises:
          ValueError: the folder does not hold a run, its config is not one of this version, or an
            argument is out of range.
          CheckpointError: there is no such checkpoint, or it is of another architecture.
          DatasetNotPrepared: the classes of an `image_folder/NAME` are not known here: give `info`.
        """
        from resfu_jax import data, training

        if not isinstance(inference, Inference | Mapping | None):
            raise ValueError(
                f"inference must be an Inference, a dictionary or None, got {inference!r}"
            )
        if isinstance(inference, Mapping):
            check_fields(Inference, inference, "an option in inference")
        devices = local_devices(devices)
        workdir, which, config = open_run(path, which, "segmentation", dtype)
        if info is None:
            data_dir = None if data_dir is None else os.path.expanduser(data_dir)
            info = data.dataset_info(config.data.name, data_dir or config.data.dir)
        if not isinstance(inference, Inference):
            inference = dataclasses.replace(training.create_inference(config), **(inference or {}))

        def create() -> nnx.Module:
            return create_model(
                **training.model_arguments(config.model),
                num_classes=info.num_classes,
                rngs=nnx.Rngs(0),
            )

        model, step = restore(workdir, which, create, devices)
        predictor = cls(
            model,
            class_names=info.class_names,
            palette=info.palette,
            inference=inference,
            devices=devices,
            **dict(preprocess=training.create_preprocess(config)) | options,
        )
        predictor.config, predictor.step = config, step
        return predictor

    def predict(
        self, images: Images, *, probabilities: bool = False, features: bool = False
    ) -> Predictions:
        """The classes of all pixels.

        Args:
          images: a file, a folder (its images, sorted by name, without subfolders; kinds that are
            not read are errors), an array
            (H, W, 3) or (B, H, W, 3) of uint8, RGB, or a list of these. Files are read as in
            training, by `read_image`.
          probabilities: also the probabilities of all classes.
          features: also the map that the classifier sees. It comes from one pass over the padded
            image, whatever `inference` is.

        Returns:
          A list with one result per image, in order. Of lists and folders, images without a result
          have an entry in its `errors`.

        Raises:
          ValueError: arrays of other shapes or types.
          ImageError: a single image, or an empty folder, has no result.
        """
        return Predictions(*collect(images, self._results(images, probabilities, features)))

    def stream(
        self, images: Images, *, probabilities: bool = False, features: bool = False
    ) -> Iterator[Prediction | ImageError]:
        """As `predict`, each result or error as soon as it is there, so not in order.

        Few images are in memory at any time. Reading files, computing, and what the caller does
        with the results go on at the same time.
        """
        for _, result in self._results(images, probabilities, features):
            yield result

    def _results(
        self, images: Images, probabilities: bool, features: bool
    ) -> Iterator[tuple[int, Prediction | ImageError]]:
        # Resizing needs the probabilities, not the classes.
        computed = probabilities or self.preprocess.resizes
        for index, result in self._stream(images, computed, features):
            if not probabilities and isinstance(result, Prediction):
                result = dataclasses.replace(result, probabilities=None)
            yield index, result

    # ------------------------------------------------------------------------------- of `Batches`
    def _result(self, item: Item, result: dict[str, np.ndarray], *outputs: bool) -> Prediction:
        """Without the padding, and at the size of the image."""
        del outputs
        height, width = item.pixels.shape[:2]
        shape = result["labels"].shape
        features = result.get("features")
        if features is not None:
            h, w = (
                -(-n * m // N)
                for n, m, N in zip((height, width), features.shape, shape, strict=False)
            )
            features = np.array(features[:h, :w])
        labels = result["labels"][:height, :width]
        every = result.get("probabilities")
        if every is not None:
            every = every[:height, :width]
            if every.shape[:2] != item.size:
                every = self.preprocess.resize_back(every, item.size)
                labels = every.argmax(axis=-1).astype(np.uint8)
            every = np.array(every)
        return Prediction(item.id, item.path, np.array(labels), every, features)

    def _run(
        self,
        weights: Any,
        images: UInt8[Array, "b h w 3"],
        sizes: Integer[Array, "b 2"],
        *outputs: bool,
    ) -> dict[str, Array]:
        """Classes; and probabilities, and features, where these are asked for."""
        probabilities, features = outputs
        model: Any = nnx.merge(self._graphdef, weights)
        logits = self.inference(model, images, sizes=sizes, preprocess=self.preprocess)
        if logits.shape[-1] != len(self.class_names):
            raise ValueError(
                f"class_names must have an entry for each of the {logits.shape[-1]} logits, got "
                f"{len(self.class_names)}"
            )
        results = {"labels": jnp.argmax(logits, axis=-1).astype(jnp.uint8)}
        if probabilities:
            results["probabilities"] = jax.nn.softmax(logits.astype(jnp.float32))
        if features:
            # The same pass up to the classifier; XLA computes it once where it is the same.
            results["features"] = model.upsampled(images).astype(jnp.float32)
        return results


def check_classes(class_names: Any, palette: Any) -> None:
    """Raises a `ValueError` unless they are names and 8-bit colours."""
    names = isinstance(class_names, Sequence) and not isinstance(class_names, str)
    if not names or not all(isinstance(name, str) for name in class_names):
        raise ValueError(f"class_names must be a list of names, got {class_names!r}")
    for color in palette if isinstance(palette, Sequence | np.ndarray) else [palette]:
        three = isinstance(color, Sequence | np.ndarray) and len(color) == 3
        if not three or not all(is_integer(part) and 0 <= part <= 255 for part in color):
            raise ValueError(f"palette must be colours of three integers 0 .. 255, got {color!r}")
