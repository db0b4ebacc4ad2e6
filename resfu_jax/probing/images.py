"""A probe's images, as backbone and upsampler see them, and the backbone's features of them."""

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, UInt8

from resfu_jax import data
from resfu_jax._checks import need
from resfu_jax._extras import extra
from resfu_jax._files import local_path, write_whole
from resfu_jax.data import transforms
from resfu_jax.probing.settings import ProbeSettings

with extra("train"):
    from PIL import Image

PathLike = str | os.PathLike[str]


@runtime_checkable
class Pipeline(Protocol):
    """What is probed: of a `FeaturePipeline`, or of anything that has its methods.

    Attributes:
      name: of the upsampler.
      multiple: sides of the images that `encode` takes are multiples of it.
      value_groups: blocks of channels that the upsampler gives weights of their own, for `values`;
        0 if its output is more than a sum of features with weights.
    """

    name: str
    multiple: int
    value_groups: int

    def encode(self, images: Num[np.ndarray, "b H W 3"]) -> Float[Array, "b h w c"]:
        """Features of images in 0 .. 255."""
        ...

    def upsample(
        self,
        features: Float[Array, "b h w c"],
        images: Num[np.ndarray, "b _H _W 3"],
        size: tuple[int, int],
        *,
        values: Float[Array, "b h w d"] | None = None,
    ) -> Float[Array, "b H W d"]:
        """Features, or values with the features' weights, at a size; images guide, of any size."""
        ...


class Batch(NamedTuple):
    """Images of one size."""

    inputs: UInt8[np.ndarray, "b Hi Wi 3"]  # what the backbone sees
    images: UInt8[np.ndarray, "b H W 3"]  # what guides
    labels: Num[np.ndarray, "b H W"]  # classes or depths
    size: tuple[int, int]  # of the upsampled map
    views: tuple[tuple[int, bool], ...]  # example, mirrored; further rows repeat the last one

    @property
    def filled(self) -> int:
        """How many rows are images of their own."""
        return len(self.views)


@dataclasses.dataclass(frozen=True)
class Split:
    """A split as the pipeline sees it."""

    source: data.Source
    info: data.DatasetInfo
    pipeline: Pipeline
    settings: ProbeSettings

    def read(self, index: int, mirrored: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the backbone sees, what guides, and the labels."""
        example, s = self.source[index], self.settings
        image, label = transforms.decode(example, self.info, self.source.where(example))
        width, height = image.size
        box, size = (0.0, 0.0, float(width), float(height)), (width, height)
        if s.crop is not None:
            side = min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            box, size = (left, top, left + side, top + side), (s.crop, s.crop)
        m = self.pipeline.multiple
        seen = [max(1, round(n * s.scale / m)) * m for n in size]
        pictures = (
            image.resize((seen[0], seen[1]), Image.Resampling.BILINEAR, box),
            image.resize(size, Image.Resampling.BILINEAR, box),
            label.resize(size, Image.Resampling.NEAREST, box),
        )
        arrays = [np.asarray(picture) for picture in pictures]
        x, y, z = (np.ascontiguousarray(a[:, ::-1]) if mirrored else a for a in arrays)
        return x, y, z

    def batch(self, views: Sequence[int]) -> Batch:
        """These views of images that learn, which must be of one size."""
        places = [divmod(view, 2) if self.settings.flip else (view, 0) for view in views]
        examples = [self.read(index, mirrored == 1) for index, mirrored in places]
        sizes = {label.shape for _, _, label in examples}
        need(
            len(sizes) == 1,
            "pixels_per_image=None fits whole images of one size at once, and there are "
            f"{' and '.join(f'{h}x{w}' for h, w in sorted(sizes))}: give crop, or batch_size=1",
        )
        return self._stack([(i, m == 1) for i, m in places], examples, len(examples))

    def batches(self, at_once: int, *, flip: bool) -> Iterator[Batch]:
        """All views in order. Fewer of a size than `at_once` are filled up: one compilation."""
        waiting: list[Any] = []
        places: list[tuple[int, bool]] = []
        for index in range(len(self.source)):
            for mirrored in (False, True) if flip else (False,):
                example = self.read(index, mirrored)
                full = len(waiting) == at_once
                if waiting and (full or waiting[0][2].shape != example[2].shape):
                    yield self._stack(places, waiting, at_once)
                    waiting, places = [], []
                waiting.append(example)
                places.append((index, mirrored))
        yield self._stack(places, waiting, at_once)

    def _stack(self, views: list[tuple[int, bool]], examples: list[Any], rows: int) -> Batch:
        filled = examples + examples[-1:] * (rows - len(examples))
        inputs, images, labels = (np.stack(arrays) for arrays in zip(*filled, strict=True))
        labels[len(examples) :] = self.info.target.fill
        stride = self.settings.output_stride
        h, w = inputs.shape[1:3] if stride else labels.shape[1:3]
        size = (h // stride, w // stride) if stride else (h, w)
        return Batch(inputs, images, labels, size, tuple(views))


class Encoder:
    """The backbone's features of batches, kept on disk where there is a folder for them.

    Other upsamplers, protocols and settings of the classifier find them there: a file for each
    view, in a folder for what the images are, and what the backbone gives for the first of them.
    """

    def __init__(self, split: Split, at_once: int, cache_dir: PathLike | None):
        self._pipeline, self._folder = split.pipeline, None
        if cache_dir is None:
            return
        s, digest = split.settings, hashlib.blake2b(digest_size=12)
        digest.update(json.dumps([s.crop, s.scale, split.pipeline.multiple]).encode())
        for example in split.source:
            for name in ("image", "label"):
                digest.update(hashlib.blake2b(example[name]).digest())
        first = next(split.batches(at_once, flip=False))
        low = np.asarray(split.pipeline.encode(first.inputs), np.float32)
        digest.update(low[:1].tobytes())
        self._folder = local_path(cache_dir, "cache_dir") / f"encoded_{digest.hexdigest()}"
        self._folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, batch: Batch) -> Any:
        """Features `(b, h, w, C)`."""
        if self._folder is None:
            return self._pipeline.encode(batch.inputs)
        paths = [self._folder / f"{i}{'_mirrored' if m else ''}.npy" for i, m in batch.views]
        if not all(path.exists() for path in paths):
            low = np.asarray(self._pipeline.encode(batch.inputs), np.float32)
            for path, x in zip(paths, low, strict=False):
                content = io.BytesIO()
                np.save(content, x)
                write_whole(path, content.getbuffer())
        rows = [np.load(path) for path in paths]
        return jnp.asarray(np.stack(rows + rows[-1:] * (len(batch.inputs) - len(rows))))

    @property
    def name(self) -> str:
        """Of the folder: stands for the images and the backbone."""
        return "" if self._folder is None else self._folder.name
