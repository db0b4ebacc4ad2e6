"""Batches for training and evaluation, through grain."""

import dataclasses
import functools
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import grain
import numpy as np
from absl import flags
from PIL import Image

from resfu_jax.data import transforms
from resfu_jax.data.info import CorruptExampleError, DataError, DatasetInfo
from resfu_jax.data.load import Source

Batch = dict[str, np.ndarray]
OnCorrupt = Literal["raise", "skip"]


def train_batches(
    source: Source,
    info: DatasetInfo,
    *,
    batch_size: int,
    crop_size: tuple[int, int],
    resize_scale: float = 1.0,
    scale_range: tuple[float, float] = (0.5, 2.0),
    flip: bool = True,
    photometric: bool = True,
    seed: int,
    num_workers: int = 0,
    on_corrupt: OnCorrupt = "raise",
    shard: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
    """An endless iterator of augmented batches.

    Every epoch is shuffled anew; batches run across the ends of epochs. All randomness comes from
    a generator that grain derives from `seed` and the position of the record in the stream, so
    the batches do not depend on `num_workers`, and the shards of one step, one after the other, are
    the unsharded batch of that step.

    Args:
        source: from `open_source`.
        info: from `dataset_info`.
        batch_size: examples in each batch of this process.
        crop_size: (height, width) of the crops; smaller images are padded at the bottom and
            right, with the ignore label.
        resize_scale: factor on every image, combined with the random scale in one resampling.
        scale_range: bounds of the random scale.
        flip: mirror left-right with probability 1/2.
        photometric: jitter brightness, contrast, saturation and hue.
        seed: of shuffling and augmentation.
        num_workers: worker processes; 0 reads in threads of this process.
        on_corrupt: what to do about examples that cannot be decoded: raise `DataError` when one
            is met, or leave them out after a check of the whole source (see `skip_corrupt`).
        shard: (index, count) of this process among those that share the dataset.

    Returns:
        Iterator over `{"image": uint8 (B, h, w, 3), "label": uint8 (B, h, w), "id": bytes (B,)}`.
        Its `get_state` and `set_state` save and restore the exact position; `close` it when done.

    Raises:
        ValueError: an argument is out of range.
    """
    _check_common(source, batch_size, resize_scale, shard, on_corrupt)
    if min(crop_size) < 1:
        raise ValueError(f"crop_size must be positive (height, width), got {crop_size}.")
    if not 0 < scale_range[0] <= scale_range[1]:
        raise ValueError(f"scale_range must be 0 < low <= high, got {scale_range}.")
    if num_workers < 0:
        raise ValueError(f"num_workers must not be negative, got {num_workers}.")
    if on_corrupt == "skip":
        source = skip_corrupt(source, info)
    augment = transforms.Augment(
        crop_size, resize_scale, scale_range, flip, photometric, info.ignore_label
    )
    index, count = shard
    dataset = (
        grain.MapDataset.source(source)
        .seed(seed)
        .shuffle()
        .repeat(None)
        .random_map(functools.partial(_augmented, source=source, info=info, augment=augment))
    )
    batches = dataset.batch(batch_size, drop_remainder=True, batch_fn=_stack)[index::count]
    threads = 1 if num_workers else os.cpu_count() or 1
    iterable = batches.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    )
    if num_workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags, even in a notebook
        iterable = iterable.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
        ).map(_own)
    return iter(iterable)


@dataclass(frozen=True)
class EvalBatches:
    """Batches of a whole split in order, all of one shape; see `eval_batches`.

    Attributes:
        source: the examples.
        info: the dataset's classes.
        batch_size: rows of each batch of this process.
        resize_scale: factor on every image and label map.
        size: (height, width) that every example is padded to.
        shard: (index, count) of this process.
    """

    source: Source
    info: DatasetInfo
    batch_size: int
    resize_scale: float
    size: tuple[int, int]
    shard: tuple[int, int]

    def __len__(self) -> int:
        """Number of batches, the same in every process."""
        return -(-len(self.source) // (self.batch_size * self.shard[1]))

    def __iter__(self) -> Iterator[Batch]:
        """Starts from the first example."""
        index, count = self.shard
        slots = grain.MapDataset.range(len(self) * self.batch_size * count).map(self._row)
        threads = os.cpu_count() or 1
        return iter(
            slots.batch(self.batch_size, batch_fn=_stack)[index::count].to_iter_dataset(
                grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
            )
        )

    def _row(self, slot: int) -> dict[str, Any]:
        height, width = self.size
        if slot >= len(self.source):
            empty = Image.new("RGB", (0, 0)), Image.new("L", (0, 0))
            image, label = transforms.pad(*empty, height, width, self.info.ignore_label)
            return {"image": image, "label": label, "id": b"", "size": np.zeros(2, np.int32)}
        example = self.source[slot]
        where = self.source.where(example)
        image, label = transforms.decode(example, self.info, where)
        image, label = transforms.resample(image, label, self.resize_scale)
        if image.height > height or image.width > width:
            raise DataError(
                f"{where} is {image.height}x{image.width} (height x width, after resize_scale="
                f"{self.resize_scale}) and does not fit pad_to=({height}, {width}). Evaluation "
                "crops nothing: give a larger pad_to, or a single number to round up to."
            )
        size = np.array([image.height, image.width], np.int32)
        image, label = transforms.pad(image, label, height, width, self.info.ignore_label)
        return {"image": image, "label": label, "id": example["id"], "size": size}


def eval_batches(
    source: Source,
    info: DatasetInfo,
    *,
    batch_size: int,
    resize_scale: float = 1.0,
    pad_to: tuple[int, int] | int,
    on_corrupt: OnCorrupt = "raise",
    shard: tuple[int, int] = (0, 1),
) -> EvalBatches:
    """Batches of every example of a source, in order, without augmentation.

    All batches have one shape. Images are padded at the bottom and right with the ignore label;
    the last batch is filled up with rows whose label is all ignored and whose id is `b""`.

    Args:
        source: from `open_source`.
        info: from `dataset_info`.
        batch_size: examples in each batch of this process.
        resize_scale: factor on every image (antialiased bilinear) and label map (nearest).
        pad_to: (height, width) of the batches; or one number: the largest image of the source,
            rounded up to a multiple of it.
        on_corrupt: as for `train_batches`.
        shard: (index, count) of this process; all processes get the same number of batches.

    Returns:
        An iterable, with a length, of `{"image": uint8 (B, h, w, 3), "label": uint8 (B, h, w),
        "id": bytes (B,), "size": int32 (B, 2)}`; `size` is the height and width of each image
        before padding, (0, 0) for the rows that fill up. It can be iterated any number of times.

    Raises:
        ValueError: an argument is out of range.
        DataError: while iterating: an example is unusable or larger than `pad_to`.
    """
    _check_common(source, batch_size, resize_scale, shard, on_corrupt)
    if min(pad_to if isinstance(pad_to, tuple) else (pad_to,)) < 1:
        raise ValueError(f"pad_to must be positive, got {pad_to}.")
    if on_corrupt == "skip":
        source = skip_corrupt(source, info)
    if isinstance(pad_to, int):
        sizes = _in_threads(functools.partial(_size, source, resize_scale), len(source))
        width, height = (-(-max(side) // pad_to) * pad_to for side in zip(*sizes, strict=True))
        pad_to = (height, width)
    return EvalBatches(source, info, batch_size, resize_scale, pad_to, shard)


def skip_corrupt(source: Source, info: DatasetInfo) -> Source:
    """Leaves out the examples that cannot be decoded.

    Decodes every example once, in threads. Finding them beforehand rather than on the way keeps
    shuffling, epochs, shards and resumed runs exact, and the count right with any number of
    workers. Examples that decode but are wrong (sizes, label values) still raise when met.

    Returns:
        A source of the good examples; `skipped` holds the ids of the others. A source that has
        been through here before is returned unchanged.
    """
    if isinstance(source.records, _Subset):
        return source
    bad = _in_threads(functools.partial(_corrupt_id, source, info), len(source))
    skipped = tuple(example_id for example_id in bad if example_id is not None)
    good = [index for index, example_id in enumerate(bad) if example_id is None]
    if not good:
        raise DataError(f"No example of {source.name}, split {source.split!r}, can be decoded.")
    if skipped:
        logging.warning(
            "%s, split %r: skipping %d corrupt of %d examples: %s",
            *(source.name, source.split, len(skipped), len(bad), ", ".join(skipped)),
        )
    return dataclasses.replace(source, records=_Subset(source.records, good), skipped=skipped)


@dataclass(frozen=True)
class _Subset(Sequence):
    records: Sequence
    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, bytes]:
        return self.records[self.indices[index]]


def _augmented(
    example: dict[str, bytes],
    rng: np.random.Generator,
    *,
    source: Source,
    info: DatasetInfo,
    augment: transforms.Augment,
) -> dict[str, Any]:
    image, label = transforms.decode(example, info, source.where(example))
    pixels, classes = augment(image, label, rng)
    return {"image": pixels, "label": classes, "id": example["id"]}


def _stack(rows: Sequence[dict[str, Any]]) -> Batch:
    return {key: np.stack([np.asarray(row[key]) for row in rows]) for key in rows[0]}


def _own(batch: Batch) -> Batch:
    # Arrays from workers live in shared memory, which complains if it outlives the interpreter.
    return {key: np.array(value, subok=False) for key, value in batch.items()}


def _corrupt_id(source: Source, info: DatasetInfo, index: int) -> str | None:
    example = source[index]
    try:
        transforms.decode(example, info, source.where(example))
    except CorruptExampleError:
        return example["id"].decode()
    except DataError:
        pass  # decodes, but is wrong: not for silent skipping
    return None


def _size(source: Source, resize_scale: float, index: int) -> tuple[int, int]:
    example = source[index]
    return transforms.scaled_size(
        transforms.image_size(example["image"], source.where(example)), resize_scale
    )


def _in_threads(function: Any, count: int) -> list[Any]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, range(count)))


def _check_common(
    source: Source,
    batch_size: int,
    resize_scale: float,
    shard: tuple[int, int],
    on_corrupt: str,
) -> None:
    if not len(source):
        raise ValueError(f"{source.name}, split {source.split!r}, holds no examples.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if resize_scale <= 0:
        raise ValueError(f"resize_scale must be positive, got {resize_scale}.")
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard must be (index, count) with 0 <= index < count, got {shard}.")
    if on_corrupt not in ("raise", "skip"):
        raise ValueError(f"on_corrupt must be 'raise' or 'skip', got {on_corrupt!r}.")
