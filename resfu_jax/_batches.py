"""What `Predictor` and `DepthPipeline` share: images of any size through a model, in batches.

XLA compiles a program for every shape, so images are padded at the bottom and right with the mean
colour to a few sizes, see `Preprocess.padded_side`. The size of an image alone decides what it is
padded to, and the batch always has the same number of rows, so an image gets the same result, up to
rounding, alone and among others.
"""

import abc
import dataclasses
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Integer, UInt8

from resfu_jax._running import (
    Images,
    Item,
    check_fields,
    failed,
    find_images,
    in_threads,
    local_devices,
)
from resfu_jax.images import ImageError, Source, read_image
from resfu_jax.model import evaluating
from resfu_jax.preprocess import Preprocess, check_preprocess, is_integer, preprocess_of

if TYPE_CHECKING:
    from resfu_jax.training import Config

Shape = tuple[int, int, int]  # batch, height, width
Outputs = tuple[bool, ...]  # which of the outputs that can be asked for: a program for each choice


class Batches(abc.ABC):
    """A model and the programs that are compiled of it, one for each size of padded images.

    Args:
      model: images `(B, H, W, 3)` of uint8 to maps of the same height and width.
      preprocess: how images are resized and padded. None: no resizing, and the model's colours and
        strides (`preprocess_of`).
      batch_size: images in a batch, a multiple of the number of devices; None: one per device.
      max_compilations: most programs compiled.
      devices: which share a batch; None: all of this process.
      on_compile: called with (batch, height, width) before a program is compiled.
      **changes: fields of `preprocess` to change.

    Raises:
      ValueError: an argument is out of range.
    """

    _less: str  # what needs less memory, for messages

    def __init__(
        self,
        model: nnx.Module,
        *,
        preprocess: Preprocess | None = None,
        batch_size: int | None = None,
        max_compilations: int = 32,
        devices: Sequence[jax.Device] | None = None,
        on_compile: Callable[[Shape], None] | None = None,
        **changes: Any,
    ):
        if not isinstance(model, nnx.Module):
            raise ValueError(f"model must be a Flax NNX module, got {type(model).__name__}")
        if not isinstance(preprocess, Preprocess | None):
            raise ValueError(f"preprocess must be a Preprocess or None, got {preprocess!r}")
        check_fields(Preprocess, changes, f"an option of {type(self).__name__}")
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

    def read_image(self, source: Source, name: str | None = None) -> UInt8[np.ndarray, "h w 3"]:
        """`resfu_jax.images.read_image`, turned as `preprocess` says, as results are."""
        return read_image(source, name, orientation=self.preprocess.orientation)

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """What images of this height and width (after resizing) are padded to."""
        return self.preprocess.padded_size(height, width)

    # ------------------------------------------------------------------------------ of a subclass
    @abc.abstractmethod
    def _run(
        self,
        weights: Any,
        images: UInt8[Array, "b h w 3"],
        sizes: Integer[Array, "b 2"],
        *outputs: bool,
    ) -> dict[str, Array]:
        """What is computed for padded images, whose own sizes are given; inside `jit`."""

    @abc.abstractmethod
    def _result(self, item: Item, result: dict[str, np.ndarray], *outputs: bool) -> Any:
        """Of that, an image's own result: without the padding, at the size of the image."""

    # ----------------------------------------------------------------------------------- pipeline
    def _stream(self, images: Images, *outputs: bool) -> Iterator[tuple[int, Any]]:
        """The number of each image, and its result or `ImageError`, as soon as it is there."""
        items = find_images(images)
        waiting: dict[tuple[int, int], list[Item]] = {}
        running: deque[tuple[list[Item], Any]] = deque()

        def finish() -> Iterator[tuple[int, Any]]:
            rows, results = running.popleft()
            try:
                results = jax.device_get(results)
            except jax.errors.JaxRuntimeError as error:
                results = error
            for i, item in enumerate(rows):
                if isinstance(results, Exception):
                    yield item.index, failed(item, results, self._less)
                else:
                    result = {name: value[i] for name, value in results.items()}
                    yield item.index, self._result(item, result, *outputs)

        def start(size: tuple[int, int]) -> Iterator[tuple[int, Any]]:
            rows = waiting.pop(size)
            try:
                results = self._programs[size, *outputs](self._weights, *self._batch(rows, size))
            except jax.errors.JaxRuntimeError as error:
                yield from ((item.index, failed(item, error, self._less)) for item in rows)
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

    # ----------------------------------------------------------------------------------- programs
    def _compiled_size(self, item: Item, outputs: Outputs) -> tuple[int, int]:
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
                    raise failed(item, error, self._less) from error
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

    def _compile(self, size: tuple[int, int], outputs: Outputs) -> None:
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


def collect(
    images: Images, stream: Iterator[tuple[int, Any]]
) -> tuple[list[Any], list[ImageError]]:
    """All results of a stream of these images and all errors, each in the order of the input.

    Raises:
      ImageError: a single image, or an empty folder, has no result.
    """
    results: dict[int, Any] = {}
    errors: dict[int, ImageError] = {}
    for index, result in stream:
        (errors if isinstance(result, ImageError) else results)[index] = result
    if errors and (is_one(images) or not results and isinstance(images, str | os.PathLike)):
        raise errors[min(errors)]
    return [results[i] for i in sorted(results)], [errors[i] for i in sorted(errors)]


def is_one(images: Images) -> bool:
    """Whether this is a single image: a file, or an array of one."""
    if isinstance(images, str | os.PathLike):
        return not os.path.isdir(os.path.expanduser(images))
    return getattr(images, "ndim", None) == 3
