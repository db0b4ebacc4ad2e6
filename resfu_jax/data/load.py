"""Finding, building and opening datasets by name."""

import contextlib
import difflib
import fcntl
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from resfu_jax.data import (
    ade20k,
    camvid,
    cityscapes,
    coco_stuff,
    image_folder,
    oxford_pet,
    shapes,
    voc,
)
from resfu_jax.data.info import DatasetInfo, DatasetNotPrepared

# Classes, builder, and the builder's configuration.
_Entry = tuple[
    DatasetInfo, type[tfds.core.GeneratorBasedBuilder], str | tfds.core.BuilderConfig | None
]
_DATASETS: dict[str, _Entry] = {
    "ade20k": (ade20k.INFO, ade20k.Ade20k, None),
    "camvid": (camvid.INFO, camvid.Camvid, "default"),
    "camvid/clean": (camvid.CLEAN_INFO, camvid.Camvid, "clean"),
    "cityscapes": (cityscapes.INFO, cityscapes.Cityscapes, None),
    "coco_stuff": (coco_stuff.INFO, coco_stuff.CocoStuff, "default"),
    "coco_stuff/27": (coco_stuff.COARSE_INFO, coco_stuff.CocoStuff, "27"),
    "oxford_pet": (oxford_pet.INFO, oxford_pet.OxfordPet, None),
    "shapes": (shapes.INFO, shapes.Shapes, "default"),
    "shapes/outline_ignored": (shapes.OUTLINE_IGNORED_INFO, shapes.Shapes, "outline_ignored"),
    "voc": (voc.INFO, voc.Voc, "default"),
    "voc/train_aug": (voc.TRAIN_AUG_INFO, voc.Voc, "train_aug"),
}


def list_datasets(data_dir: str | os.PathLike | None = None) -> list[str]:
    """Names that `dataset_info`, `prepare` and `open_source` take.

    Args:
        data_dir: where datasets are kept; `default_data_dir()` if None. Your own datasets
            (`image_folder/NAME`) are listed once they are prepared there.
    """
    own = [f"{image_folder.PREFIX}/{p.name}" for p in _root(data_dir).glob("image_folder/[!.]*")]
    return sorted([*_DATASETS, *(name for name in own if is_prepared(name, data_dir))])


def dataset_info(name: str, data_dir: str | os.PathLike | None = None) -> DatasetInfo:
    """Classes and colours of a dataset.

    Args:
        name: one of `list_datasets()`, or `image_folder/NAME`.
        data_dir: where an `image_folder/NAME` was prepared, whose classes are read from there;
            `default_data_dir()` if None. Of other datasets no file is read.

    Raises:
        ValueError: no dataset has this name; the message lists the nearest ones.
        DatasetNotPrepared: the classes of an `image_folder/NAME` are not known yet.
    """
    if not name.startswith(image_folder.PREFIX):
        return _lookup(name)[0]
    builder = create_builder(name, data_dir)
    _check_prepared(name, builder, data_dir)
    return image_folder.read_info(name, builder)


def default_data_dir() -> Path:
    """Where datasets are kept: `$RESFU_DATA_DIR`, else `~/.cache/resfu_jax`."""
    return Path(os.environ.get("RESFU_DATA_DIR") or "~/.cache/resfu_jax").expanduser()


def is_prepared(name: str, data_dir: str | os.PathLike | None = None) -> bool:
    """Whether `open_source` would find the dataset."""
    return _is_prepared(create_builder(name, data_dir))


def prepare(
    name: str,
    data_dir: str | os.PathLike | None = None,
    manual_dir: str | os.PathLike | None = None,
) -> Path:
    """Builds a dataset; does nothing if that has been done before.

    The files are written beside their final folder and moved there when complete, so an
    interrupted run leaves nothing that could be taken for a prepared dataset; the next run
    removes what it left. Of several processes that prepare the same dataset one does, and the
    others wait for it.

    Args:
        name: one of `list_datasets()`, or `image_folder/NAME`, for any NAME, for your own images.
        data_dir: where to write; `default_data_dir()` if None.
        manual_dir: raw files that were fetched by hand; None downloads them if need be.

    Returns:
        The folder of the prepared dataset.

    Raises:
        ValueError: unknown dataset.
        OSError: raw files are missing, cannot be downloaded, or the disk is full; the message says
            what to do.
        DataError: a raw file is unusable.
    """
    builder = create_builder(name, data_dir)
    if manual_dir is not None:
        manual_dir = Path(manual_dir).expanduser().resolve()
        if not manual_dir.is_dir() or not any(manual_dir.iterdir()):
            raise FileNotFoundError(f"manual_dir {manual_dir} is not a folder with files in it.")
    if _is_prepared(builder):
        return Path(builder.data_path)
    folder = Path(builder.data_path).parent
    with _only_process(folder) as alone:
        if not _is_prepared(builder):  # else another process has just finished the same job
            for left in folder.glob("incomplete.*") if alone else ():
                shutil.rmtree(left, ignore_errors=True)
            _build(name, builder, manual_dir)
    return Path(builder.data_path)


def _build(name: str, builder: tfds.core.GeneratorBasedBuilder, manual_dir: Path | None) -> None:
    config = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
    try:
        builder.download_and_prepare(file_format="array_record", download_config=config)
    except RuntimeError as error:  # how array_record's writer reports a full disk
        if "No space left on device" not in str(error):
            raise
        raise OSError(
            f"No room on the disk of {builder.data_dir_root} for {name}; choose another place "
            "with --data-dir or $RESFU_DATA_DIR."
        ) from error


@contextlib.contextmanager
def _only_process(folder: Path) -> Iterator[bool]:
    """Waits until no other process prepares this dataset; False if that cannot be known."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # a killed process loses it
            alone = True
        except OSError:  # some network file systems have no locks
            alone = False
        yield alone


@dataclass(frozen=True)
class Source:
    """Random access to the encoded examples of one split.

    Attributes:
        name: name of the dataset.
        split: `"train"` or `"validation"`, or a slice of them.
        records: the examples.
        skipped: ids of corrupt examples that were left out.
    """

    name: str
    split: str
    records: Sequence[dict[str, bytes]]
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, bytes]:
        """The example as encoded `image` and `label` and its `id`, all bytes."""
        return self.records[index]

    def __iter__(self) -> Iterator[dict[str, bytes]]:
        """All examples in order."""
        return (self[index] for index in range(len(self)))

    def where(self, example: dict[str, bytes]) -> str:
        """How messages name an example."""
        return f"{self.name}, split {self.split!r}, example {example['id'].decode()!r}"


def open_source(name: str, split: str, data_dir: str | os.PathLike | None = None) -> Source:
    """Opens a split of a prepared dataset.

    Args:
        name: one of `list_datasets()`.
        split: `"train"` or `"validation"`; a slice as tfds writes it, such as `"train[:10%]"`,
            opens a part.
        data_dir: where the dataset was prepared; `default_data_dir()` if None.

    Raises:
        DatasetNotPrepared: the dataset is not there; the message is the command to run.
        ValueError: unknown dataset or split.
    """
    builder = create_builder(name, data_dir)
    if split.partition("[")[0] not in ("train", "validation"):
        raise ValueError(f"{name} has no split {split!r}; it has 'train' and 'validation'.")
    _check_prepared(name, builder, data_dir)
    skip = tfds.decode.SkipDecoding()
    records: Any = builder.as_data_source(split, decoders={"image": skip, "label": skip})
    return Source(name, split, records)


def _check_prepared(
    name: str, builder: tfds.core.GeneratorBasedBuilder, data_dir: str | os.PathLike | None
) -> None:
    if _is_prepared(builder):
        return
    command = ["python", "-m", "resfu_jax.data", "prepare", name]
    if name.startswith(image_folder.PREFIX):
        command += ["--manual-dir", "DIR"]
    if data_dir is not None:
        command += ["--data-dir", os.fspath(data_dir)]
    raise DatasetNotPrepared(
        f"Dataset {name!r} is not prepared in {builder.data_path}. Run:\n    {shlex.join(command)}"
    )


def _lookup(name: str) -> _Entry:
    if name not in _DATASETS:
        near = difflib.get_close_matches(name, _DATASETS, n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"There is no dataset {name!r}.{hint} Available: {', '.join(sorted(_DATASETS))}, and "
            "image_folder/NAME for your own images."
        )
    return _DATASETS[name]


def _is_prepared(builder: tfds.core.GeneratorBasedBuilder) -> bool:
    # tfds would log a warning about a folder that does not exist.
    return builder.data_path.exists() and builder.is_prepared()


def _root(data_dir: str | os.PathLike | None) -> Path:
    return Path(data_dir or default_data_dir()).expanduser().resolve()


def create_builder(
    name: str, data_dir: str | os.PathLike | None
) -> tfds.core.GeneratorBasedBuilder:
    """The tfds builder of a dataset; a `ValueError` if there is none of this name."""
    if name.startswith(image_folder.PREFIX):
        cls, config = image_folder.ImageFolder, image_folder.create_config(name)
    else:
        _, cls, config = _lookup(name)
    return cls(config=config, data_dir=_root(data_dir), file_format="array_record")
