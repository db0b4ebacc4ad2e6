"""Batches for training and evaluation, through grain."""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
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
from resfu_jax.preprocess import Preprocess, is_integer

Batch = dict[str, np.ndarray]
OnCorrupt = Literal["raise", "skip"]


def train_batches(
    source: Source,
    info: DatasetInfo,
    *,
    batch_size: int,
    crop_size: tuple[int, int],
    preprocess: Preprocess = Preprocess(),  # noqa: B008 - frozen
    scale_range: tuple[float, float] = (0.5, 2.0),
    max_class_share: float = 1.0,
    flip: bool = True,
    photometric: bool = True,
    area_range: tuple[float, float] | None = None,
    aspect_range: tuple[float, float] = (3 / 4, 4 / 3),
    seed: int,
    num_workers: int = 0,
    on_corrupt: OnCorrupt = "raise",
    shard: tuple[int, int] = (0, 1),
) -> "TrainBatches":
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
      preprocess: how every image is resized, combined with the random scale in one resampling,
        and padded.
      scale_range: bounds of the random scale.
      max_class_share: a crop of whose labelled pixels one class has this share or more is drawn
        anew, up to ten times.
      flip: mirror left-right with probability 1/2.
      photometric: jitter brightness, contrast, saturation and hue.
      area_range: a crop covers this share of the image, and is resized to `crop_size`
        (RandomResizedCrop); then the scales and `max_class_share` are not used. None: crops of the
        scaled image.
      aspect_range: bounds of width over height of such a crop, in the image.
      seed: of shuffling and augmentation.
      num_workers: worker processes; 0 reads in threads of this process.
      on_corrupt: what to do about examples that cannot be decoded: raise `DataError` when one
        is met, or leave them out after a check of the whole source (see `skip_corrupt`).
      shard: (index, count) of this process among those that share the dataset.

    Returns:
      Iterator over `{"image": uint8 (B, h, w, 3), "label": uint8 (B, h, w), "id": bytes (B,)}`;
      labels of datasets with depths are float32, 0 where nothing is known, as in padding.
      Its `get_state` and `set_state` save and restore the exact position, also where the sizes of
      batches, workers or shards are others by then; `close` it when done.

    Raises:
      ValueError: an argument is out of range.
    """
    _check_common(source, batch_size, preprocess, shard, on_corrupt)
    if not _is_pair(crop_size, _is_whole) or min(crop_size) < 1:
        raise ValueError(f"crop_size must be positive (height, width), got {crop_size}.")
    if not _is_pair(scale_range, _is_finite) or not 0 < scale_range[0] <= scale_range[1]:
        raise ValueError(f"scale_range must be 0 < low <= high, got {scale_range}.")
    ranged = area_range is None or _is_pair(area_range, _is_finite)
    if not ranged or area_range is not None and not 0 < area_range[0] <= area_range[1] <= 1:
        raise ValueError(f"area_range must be 0 < low <= high <= 1, or None, got {area_range}.")
    if not _is_pair(aspect_range, _is_finite) or not 0 < aspect_range[0] <= aspect_range[1]:
        raise ValueError(f"aspect_range must be 0 < low <= high, got {aspect_range}.")
    if not _is_finite(max_class_share) or not 0 < max_class_share <= 1:
        raise ValueError(f"max_class_share must be above 0, at most 1, got {max_class_share}.")
    if not _is_whole(num_workers) or num_workers < 0:
        raise ValueError(f"num_workers must be a whole number from 0, got {num_workers}.")
    if not _is_whole(seed) or seed < 0:
        raise ValueError(f"seed must be a whole number from 0, got {seed}.")
    if on_corrupt == "skip":
        source = skip_corrupt(source, info)
    augment = transforms.Augment(
        tuple(crop_size),
        preprocess,
        tuple(scale_range),
        max_class_share,
        flip,
        photometric,
        info.target.fill,
        None if area_range is None else (area_range[0], area_range[1]),
        (aspect_range[0], aspect_range[1]),
    )
    augmented = functools.partial(_augmented, source=source, info=info, augment=augment)
    return augmented_batches(
        source,
        augmented,
        batch_size=batch_size,
        seed=seed,
        num_workers=num_workers,
        shard=shard,
    )


def augmented_batches(
    source: Source,
    augmented: Callable[[dict[str, bytes], np.random.Generator], dict[str, Any]],
    *,
    batch_size: int,
    seed: int,
    num_workers: int,
    shard: tuple[int, int],
) -> "TrainBatches":
    """The machinery of `train_batches`: an endless stream of examples, shuffled, in batches.

    Args:
      source: encoded examples.
      augmented: of an encoded example and the generator of its place in the stream, one row of a
        batch: arrays by name.
      batch_size: as for `train_batches`, and the others, which are right.
      seed: as well.
      num_workers: as well.
      shard: as well.
    """
    index, count = shard
    examples = (
        grain.MapDataset.source(source).seed(seed).shuffle().repeat(None).random_map(augmented)
    )

    def batches_from(position: int) -> grain.DatasetIterator:
        rest = examples[position:].batch(batch_size, drop_remainder=True, batch_fn=_stack)
        threads = 1 if num_workers else os.cpu_count() or 1
        iterable = rest[index::count].to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        )
        if num_workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags, even in a notebook
            iterable = iterable.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
            ).map(_own)
        return iter(iterable)

    return TrainBatches(batches_from, batch_size * count)


class TrainBatches(Iterator[Batch]):
    """Batches of an endless stream of examples; see `train_batches`.

    Its position is the number of examples that all processes have taken, and says which example
    comes next, and how it is augmented, whatever the size of the batches and who reads them.

    Args:
      batches_from: makes the iterator of the batches that follow so many examples.
      examples: in each batch, over all processes.
    """

    def __init__(self, batches_from: Callable[[int], grain.DatasetIterator], examples: int):
        self._batches_from, self._examples = batches_from, examples
        self._position = 0
        self._batches: grain.DatasetIterator | None = None

    def __next__(self) -> Batch:
        self.start_prefetch()
        batch = next(self._batches)
        self._position += self._examples
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position, for JSON."""
        return {"examples": self._position}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position. Older versions saved grain's own: batches, of each worker if any."""
        self.close()
        if "examples" in state:
            self._position = state["examples"]
        else:
            workers = state.get("iterators_in_use_states", [state])
            self._position = sum(w["next_index"] for w in workers) * self._examples

    def start_prefetch(self) -> None:
        """Begins to read, if it has not."""
        if self._batches is None:
            self._batches = self._batches_from(self._position)
            self._batches.start_prefetch()

    def close(self) -> None:
        """Stops reading; the position stays."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


@dataclass(frozen=True)
class EvalBatches:
    """Batches of a whole split; see `eval_batches`.

    Attributes:
      source: the examples.
      info: what is known of the dataset.
      batch_size: rows of each batch of this process.
      preprocess: how images and label maps are resized and padded.
      slots: the rows of all processes in order: the index of an example, or None for a row that
        fills up, and the (height, width) that it is padded to, alike in every batch.
      shard: (index, count) of this process.
    """

    source: Source
    info: DatasetInfo
    batch_size: int
    preprocess: Preprocess
    slots: list[tuple[int | None, tuple[int, int]]]
    shard: tuple[int, int]

    def __len__(self) -> int:
        """Number of batches, the same in every process."""
        return len(self.slots) // (self.batch_size * self.shard[1])

    def __iter__(self) -> Iterator[Batch]:
        """Starts from the first example."""
        index, count = self.shard
        slots = grain.MapDataset.range(len(self.slots)).map(self._row)
        threads = os.cpu_count() or 1
        return iter(
            slots.batch(self.batch_size, batch_fn=_stack)[index::count].to_iter_dataset(
                grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
            )
        )

    def _row(self, slot: int) -> dict[str, Any]:
        index, (height, width) = self.slots[slot]
        filling = height, width, self.preprocess.pad_color, self.info.target.fill
        if index is None:
            empty = Image.new("RGB", (0, 0)), Image.new("L", (0, 0))
            image, label = transforms.pad(*empty, *filling)
            return {"image": image, "label": label, "id": b"", "size": np.zeros(2, np.int32)}
        example = self.source[index]
        where = self.source.where(example)
        image, label = transforms.decode(
            example, self.info, where, orientation=self.preprocess.orientation
        )
        scale = self.preprocess.resize_scale(*image.size)
        image, label = transforms.resample(image, label, scale)
        if image.height > height or image.width > width:
            raise DataError(
                f"{where} is {image.height}x{image.width} (height x width, resized by "
                f"{scale:.4g}) and does not fit pad_to=({height}, {width}). Evaluation "
                "crops nothing: give a larger pad_to, or a single number to round up to."
            )
        size = np.array([image.height, image.width], np.int32)
        image, label = transforms.pad(image, label, *filling)
        return {"image": image, "label": label, "id": example["id"], "size": size}


def eval_batches(
    source: Source,
    info: DatasetInfo,
    *,
    batch_size: int,
    preprocess: Preprocess = Preprocess(),  # noqa: B008 - frozen
    pad_to: tuple[int, int] | int | None = None,
    group_sizes: bool = False,
    on_corrupt: OnCorrupt = "raise",
    shard: tuple[int, int] = (0, 1),
) -> EvalBatches:
    """Batches of every example of a source, in order, without augmentation.

    All batches have one shape unless `group_sizes`. Images are padded at the bottom and right with
    the ignore label; the last batch is filled up with rows whose label is all ignored and whose id
    is `b""`.

    Args:
      source: from `open_source`.
      info: from `dataset_info`.
      batch_size: examples in each batch of this process.
      preprocess: how every image (antialiased bilinear) and label map (nearest) is resized, and
        padded.
      pad_to: (height, width) of the batches; or one number: the largest image of the source,
        rounded up to a multiple of it. None: the multiple of `preprocess`.
      group_sizes: round every image up to a multiple of the number `pad_to`, and put those that
        get the same size into batches of their own: little padding, but several shapes.
      on_corrupt: as for `train_batches`.
      shard: (index, count) of this process; all processes get the same number of batches.

    Returns:
      An iterable, with a length, of `{"image": uint8 (B, h, w, 3), "label": uint8 (B, h, w),
      "id": bytes (B,), "size": int32 (B, 2)}`; `size` is the height and width of each image
      before padding, (0, 0) for the rows that fill up. Labels are float32 for depths. It can be
      iterated any number of times.

    Raises:
      ValueError: an argument is out of range.
      DataError: while iterating: an example is unusable or larger than `pad_to`.
    """
    _check_common(source, batch_size, preprocess, shard, on_corrupt)
    pad_to = preprocess.multiple if pad_to is None else pad_to
    if group_sizes and not is_integer(pad_to):
        raise ValueError(f"group_sizes needs one number pad_to to round up to, got {pad_to}.")
    sides = (pad_to, pad_to) if _is_whole(pad_to) else pad_to
    if not _is_pair(sides, _is_whole) or min(sides) < 1:
        raise ValueError(f"pad_to must be positive: (height, width) or one number, got {pad_to}.")
    if on_corrupt == "skip":
        source = skip_corrupt(source, info)
    groups: dict[tuple[int, int], list[int | None]] = {}
    if is_integer(pad_to):
        read = functools.partial(_size, source, preprocess)
        sizes = [
            tuple(-(-side // pad_to) * pad_to for side in size)
            for size in _in_threads(read, len(source))
        ]
        if not group_sizes:
            sizes = [tuple(map(max, zip(*sizes, strict=True)))] * len(source)
        for index, size in enumerate(sizes):
            groups.setdefault(size, []).append(index)
    else:
        groups[tuple(pad_to)] = list(range(len(source)))
    slots = []
    for size, indices in groups.items():
        filling = -len(indices) % (batch_size * shard[1])
        slots += [(index, size) for index in [*indices, *[None] * filling]]
    return EvalBatches(source, info, batch_size, preprocess, slots, shard)


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
    image, label = transforms.decode(
        example, info, source.where(example), orientation=augment.preprocess.orientation
    )
    pixels, values = augment(image, label, rng)
    return {"image": pixels, "label": values, "id": example["id"]}


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


def _size(source: Source, preprocess: Preprocess, index: int) -> tuple[int, int]:
    """(height, width) of an example after resizing."""
    example = source[index]
    width, height = transforms.image_size(
        example["image"], source.where(example), orientation=preprocess.orientation
    )
    return preprocess.resized_size(height, width)


def _in_threads(function: Any, count: int) -> list[Any]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, range(count)))


def _check_common(
    source: Source,
    batch_size: int,
    preprocess: Preprocess,
    shard: tuple[int, int],
    on_corrupt: str,
) -> None:
    if not len(source):
        raise ValueError(f"{source.name}, split {source.split!r}, holds no examples.")
    if not _is_whole(batch_size) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number, at least 1, got {batch_size}.")
    if not isinstance(preprocess, Preprocess):
        raise ValueError(f"preprocess must be a Preprocess, got {preprocess!r}.")
    if not _is_pair(shard, _is_whole) or not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard must be (index, count) with 0 <= index < count, got {shard}.")
    if on_corrupt not in ("raise", "skip"):
        raise ValueError(f"on_corrupt must be 'raise' or 'skip', got {on_corrupt!r}.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return number and bool(np.isfinite(value))


def _is_pair(value: Any, kind: Callable[[Any], bool]) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(kind, value))
