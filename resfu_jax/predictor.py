"""Trained models on images of any size: files, arrays, lists and folders to classes of pixels.

    predictor = Predictor.from_checkpoint("runs/shapes_resfu")
    for result in predictor.predict("photos/"):
        print(result.id, predictor.class_names[result.labels[0, 0]])

XLA compiles a program for every shape, so images are padded at the bottom and right with the mean
colour to a few sizes, see `Preprocess.padded_side`. The size of an image alone decides what it is
padded to, and the batch always has the same number of rows, so an image gets the same result, up to
rounding, alone and among others. Padding does influence it a little where an image is seen whole:
attention sees it. `Preprocess` has the rule, which exported files and the server follow, too.
"""

import dataclasses
import math
import os
import pathlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Integer, UInt8

from resfu_jax._running import (
    Images,
    Item,
    Path,
    check_fields,
    compute_type,
    failed,
    find_images,
    in_threads,
    local_devices,
    restore,
    run_folder,
)
from resfu_jax.images import ImageError, Source, read_image
from resfu_jax.inference import Inference
from resfu_jax.model import create_model, evaluating
from resfu_jax.preprocess import Preprocess, check_preprocess, is_integer, preprocess_of

if TYPE_CHECKING:
    from resfu_jax.data import DatasetInfo
    from resfu_jax.training import Config

Shape = tuple[int, int, int]  # batch, height, width
_LESS = "smaller batches or windows (slide)"


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


class Predictor:
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
        if not isinstance(model, nnx.Module):
            raise ValueError(f"model must be a Flax NNX module, got {type(model).__name__}")
        check_classes(class_names, palette)
        if not 1 <= len(class_names) == len(palette) <= 256:
            raise ValueError(
                "class_names and palette must be equally long, 1 to 256, got "
                f"{len(class_names)} and {len(palette)}"
            )
        if not isinstance(inference, Inference | None):
            raise ValueError(f"inference must be an Inference or None, got {inference!r}")
        if not isinstance(preprocess, Preprocess | None):
            raise ValueError(f"preprocess must be a Preprocess or None, got {preprocess!r}")
        check_fields(Preprocess, changes, "an option of Predictor")
        if preprocess is None:
            preprocess = preprocess_of(model, **changes)
        else:
            preprocess = check_preprocess(dataclasses.replace(preprocess, **changes), model)
        devices = local_devices(devices)
        batch_size = len(devices) if batch_size is None else batch_size
        if not is_integer(batch_size) or batch_size < 1 or batch_size % len(devices):
            raise ValueError(
                f"batch_size must be a multiple of {len(devices)} (the devices), got {batch_size!r}"
            )
        if not is_integer(max_compilations) or max_compilations < 1:
            raise ValueError(f"max_compilations must be at least 1, got {max_compilations!r}")
        self.class_names = tuple(class_names)
        self.palette = tuple(palette)
        self.inference = inference or Inference()
        self.preprocess = preprocess
        self.batch_size = batch_size
        self.max_compilations = max_compilations
        self.on_compile = on_compile
        self.config: Config | None = None
        self.step: int | None = None
        mesh = jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)
        self._over_batch = NamedSharding(mesh, PartitionSpec("data"))
        self._graphdef, weights = nnx.split(evaluating(model))
        self._weights = jax.device_put(weights, NamedSharding(mesh, PartitionSpec()))
        self._programs: dict[tuple, Any] = {}
        self._seconds: list[float] = []
        self._compiling = threading.Lock()

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

        compute = None if dtype is None else compute_type(dtype)
        if not isinstance(inference, Inference | Mapping | None):
            raise ValueError(
                f"inference must be an Inference, a dictionary or None, got {inference!r}"
            )
        if isinstance(inference, Mapping):
            check_fields(Inference, inference, "an option in inference")
        devices = local_devices(devices)
        workdir, which = training.find_run(run_folder(path), str(which))
        config = training.read_config(workdir)
        if training.task_kind(config) != "segmentation":
            raise ValueError(
                f"path must be a run that segments, and {workdir} has task={config.task!r}: "
                "FeaturePipeline.from_checkpoint loads those of 'features', `resfu matte` or "
                "MattingPipeline.from_checkpoint those of 'matting'; a run of train.py starts from "
                "one of 'mirl' with --config.init_from"
            )
        config.model.dtype = compute or config.model.dtype
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

    @property
    def model(self) -> Any:
        """The model, set to evaluation."""
        return nnx.merge(self._graphdef, self._weights)

    @property
    def compiled_shapes(self) -> tuple[Shape, ...]:
        """(batch, height, width) of the compiled programs, in the order of their compilation.

        A shape comes again when other outputs were asked for.
        """
        return tuple((self.batch_size, *size) for size, *_ in self._programs)

    @property
    def compile_seconds(self) -> tuple[float, ...]:
        """How long each of them took to compile."""
        return tuple(self._seconds)

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
        alone = isinstance(images, str | os.PathLike) and not os.path.isdir(images)
        alone |= getattr(images, "ndim", None) == 3
        results: dict[int, Prediction] = {}
        errors: dict[int, ImageError] = {}
        for index, result in self._stream(images, probabilities, features):
            if isinstance(result, ImageError):
                errors[index] = result
            else:
                results[index] = result
        if errors and (alone or not results and isinstance(images, str | os.PathLike)):
            raise errors[min(errors)]
        return Predictions(
            [results[i] for i in sorted(results)], [errors[i] for i in sorted(errors)]
        )

    def stream(
        self, images: Images, *, probabilities: bool = False, features: bool = False
    ) -> Iterator[Prediction | ImageError]:
        """As `predict`, each result or error as soon as it is there, so not in order.

        Few images are in memory at any time. Reading files, computing, and what the caller does
        with the results go on at the same time.
        """
        for _, result in self._stream(images, probabilities, features):
            yield result

    def read_image(self, source: Source, name: str | None = None) -> UInt8[np.ndarray, "h w 3"]:
        """`resfu_jax.images.read_image`, turned as `preprocess` says, as results are."""
        return read_image(source, name, orientation=self.preprocess.orientation)

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """What images of this height and width (after resizing) are padded to."""
        return self.preprocess.padded_size(height, width)

    # ----------------------------------------------------------------------------------- pipeline
    def _stream(
        self, images: Images, probabilities: bool, features: bool
    ) -> Iterator[tuple[int, Prediction | ImageError]]:
        items = find_images(images)
        # Resizing needs the probabilities, not the classes.
        outputs = (probabilities or self.preprocess.resizes, features)
        waiting: dict[tuple[int, int], list[Item]] = {}
        running: deque[tuple[list[Item], Any]] = deque()

        def finish() -> Iterator[tuple[int, Prediction | ImageError]]:
            rows, results = running.popleft()
            try:
                results = jax.device_get(results)
            except jax.errors.JaxRuntimeError as error:
                results = error
            for i, item in enumerate(rows):
                if isinstance(results, Exception):
                    yield item.index, failed(item, results, _LESS)
                else:
                    result = {name: value[i] for name, value in results.items()}
                    yield item.index, self._result(item, result, probabilities)

        def start(size: tuple[int, int]) -> Iterator[tuple[int, Prediction | ImageError]]:
            rows = waiting.pop(size)
            try:
                results = self._programs[size, *outputs](self._weights, *self._batch(rows, size))
            except jax.errors.JaxRuntimeError as error:
                yield from ((item.index, failed(item, error, _LESS)) for item in rows)
                return
            running.append((rows, results))
            if len(running) > 1:  # the device works on this batch, we on the one before
                yield from finish()

        for item in in_threads(self._load, items):
            try:
                if item.error is not None:
                    raise item.error
                size = self._compiled_size(item, outputs)
            except ImageError as error:
                yield item.index, error
                continue
            waiting.setdefault(size, []).append(item)
            if len(waiting[size]) == self.batch_size:
                yield from start(size)
        for size in list(waiting):
            yield from start(size)
        while running:
            yield from finish()

    def _load(self, item: Item) -> Item:
        """Reads and scales an image."""
        if item.error is not None:
            return item
        try:
            pixels = item.pixels if item.path is None else self.read_image(item.path)
        except ImageError as error:
            return dataclasses.replace(item, error=error)
        return dataclasses.replace(
            item, pixels=self.preprocess.resize(pixels), size=pixels.shape[:2]
        )

    def _batch(self, rows: list[Item], size: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        images = np.empty((self.batch_size, *size, 3), np.uint8)
        images[:] = self.preprocess.pad_color
        sizes = np.zeros((self.batch_size, 2), np.int32)
        for i, item in enumerate(rows):
            sizes[i] = height, width = item.pixels.shape[:2]
            images[i, :height, :width] = item.pixels
        return jax.device_put((images, sizes), self._over_batch)

    def _result(self, item: Item, result: dict[str, np.ndarray], probabilities: bool) -> Prediction:
        """Without the padding, and at the size of the image."""
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
        if "probabilities" in result:
            every = result["probabilities"][:height, :width]
            if every.shape[:2] != item.size:
                every = self.preprocess.resize_back(every, item.size)
                labels = every.argmax(axis=-1).astype(np.uint8)
            every = np.array(every) if probabilities else None
        else:
            every = None
        return Prediction(item.id, item.path, np.array(labels), every, features)

    # ----------------------------------------------------------------------------------- programs
    def _compiled_size(self, item: Item, outputs: tuple[bool, bool]) -> tuple[int, int]:
        """The padded size of an image; its program is compiled when this returns."""
        height, width = item.pixels.shape[:2]
        size = self.padded_size(height, width)
        with self._compiling:
            if (size, *outputs) in self._programs:
                return size
            if len(self._programs) < self.max_compilations:
                try:
                    self._compile(size, outputs)
                except jax.errors.JaxRuntimeError as error:
                    raise failed(item, error, _LESS) from error
                return size
            there = [key[0] for key in self._programs if key[1:] == outputs]
            there = [s for s in there if s[0] >= height and s[1] >= width]
            if not there:
                raise ImageError(
                    f"{item.path or f'image {item.id}'}: {height}x{width} (height x width) fits no "
                    f"compiled size, and max_compilations is {self.max_compilations}: raise it, or "
                    "growth"
                )
            return min(there, key=math.prod)

    def _compile(self, size: tuple[int, int], outputs: tuple[bool, bool]) -> None:
        if self.on_compile is not None:
            self.on_compile((self.batch_size, *size))
        start = time.perf_counter()

        def run(weights: Any, images: Array, sizes: Array) -> dict[str, Array]:
            return self._run(weights, images, sizes, *outputs)

        images = jax.ShapeDtypeStruct(
            (self.batch_size, *size, 3), jnp.uint8, sharding=self._over_batch
        )
        sizes = jax.ShapeDtypeStruct((self.batch_size, 2), jnp.int32, sharding=self._over_batch)
        compiled = jax.jit(run, out_shardings=self._over_batch)
        self._programs[size, *outputs] = compiled.lower(self._weights, images, sizes).compile()
        self._seconds.append(time.perf_counter() - start)

    def _run(
        self,
        weights: Any,
        images: UInt8[Array, "b h w 3"],
        sizes: Integer[Array, "b 2"],
        probabilities: bool,
        features: bool,
    ) -> dict[str, Array]:
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
