"""Finding, building and opening datasets by name."""

import contextlib
import difflib
import fcntl
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int64

from resfu_jax._output import counted
from resfu_jax.data import (
    ade20k,
    camvid,
    cityscapes,
    coco_stuff,
    depth_folder,
    image_folder,
    mattes,
    matting_folder,
    nyu_depth,
    oxford_pet,
    shapes,
    soft_shapes,
    voc,
)
from resfu_jax.data.info import DataError, DatasetInfo, DatasetNotPrepared

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
    "composition_1k": (mattes.INFO, mattes.Composition1k, None),
    "nyu_depth_v2": (nyu_depth.INFO, nyu_depth.NyuDepthV2, "default"),
    "nyu_depth_v2/filled": (nyu_depth.FILLED_INFO, nyu_depth.NyuDepthV2, "filled"),
    "oxford_pet": (oxford_pet.INFO, oxford_pet.OxfordPet, None),
    "shapes": (shapes.INFO, shapes.Shapes, "default"),
    "shapes/depth": (shapes.DEPTH_INFO, shapes.Shapes, "depth"),
    "shapes/outline_ignored": (shapes.OUTLINE_IGNORED_INFO, shapes.Shapes, "outline_ignored"),
    "soft_shapes": (soft_shapes.INFO, soft_shapes.SoftShapes, "default"),
    "voc": (voc.INFO, voc.Voc, "default"),
    "voc/train_aug": (voc.TRAIN_AUG_INFO, voc.Voc, "train_aug"),
}
# What users make of their own files, prefix/NAME.
_OWN: dict[str, Any] = {
    module.PREFIX: module for module in (image_folder, depth_folder, matting_folder)
}
OwnFiles = image_folder.OwnImages | depth_folder.OwnDepth | matting_folder.OwnMattes


def list_datasets(data_dir: str | os.PathLike | None = None) -> list[str]:
    """Names that `dataset_info`, `prepare` and `open_source` take.

    Args:
      data_dir: where datasets are kept; `default_data_dir()` if None. Your own datasets
        (`image_folder/NAME`, `depth_folder/NAME`, `matting_folder/NAME`) are listed once they are
        prepared there; those
        that are damaged are not, see `damaged_datasets`.
    """
    names = (name for name in _own(data_dir) if not _damage(name, data_dir))
    return sorted([*_DATASETS, *(name for name in names if is_prepared(name, data_dir))])


def damaged_datasets(data_dir: str | os.PathLike | None = None) -> dict[str, str]:
    """Names of prepared datasets that cannot be read, and why.

    Args:
      data_dir: where datasets are kept; `default_data_dir()` if None.
    """
    damage = {name: _damage(name, data_dir) for name in (*_DATASETS, *_own(data_dir))}
    return {name: text for name, text in damage.items() if text}


def dataset_info(name: str, data_dir: str | os.PathLike | None = None) -> DatasetInfo:
    """Classes and colours of a dataset.

    Args:
      name: one of `list_datasets()`, or `image_folder/NAME`.
      data_dir: where an `image_folder/NAME` was prepared, whose classes are read from there;
        `default_data_dir()` if None. Of other datasets no file is read.

    Raises:
      ValueError: no dataset has this name; the message lists the nearest ones.
      DatasetNotPrepared: the classes of an `image_folder/NAME` are not known yet.
      DataError: the prepared dataset is damaged.
    """
    own = _own_module(name)
    if own is None:
        return _lookup(name)[0]
    builder = _open(name, data_dir)
    try:
        return own.read_info(name, builder)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(name, data_dir, f"its metadata.json cannot be read ({error})") from error


def label_pixels(
    name: str, data_dir: str | os.PathLike | None = None
) -> Int64[np.ndarray, "256"] | None:
    """How many pixels of both splits each label value has, as counted by `prepare`.

    None for drawn datasets, and those that an earlier version prepared.
    """
    metadata = _open(name, data_dir).info.metadata
    if metadata is None or "pixels" not in metadata.keys():  # noqa: SIM118  # `in` does not load it
        return None
    return np.array(metadata["pixels"], np.int64)


def default_data_dir() -> Path:
    """Where datasets are kept: `$RESFU_DATA_DIR`, else `~/.cache/resfu_jax`."""
    return _expand(os.environ.get("RESFU_DATA_DIR") or "~/.cache/resfu_jax", "RESFU_DATA_DIR")


def is_prepared(name: str, data_dir: str | os.PathLike | None = None) -> bool:
    """Whether `open_source` would find the dataset."""
    _, _, folder = _place(name, data_dir)
    return (folder / "dataset_info.json").is_file()


def prepare(
    name: str,
    data_dir: str | os.PathLike | None = None,
    manual_dir: str | os.PathLike | None = None,
    *,
    own: OwnFiles | None = None,
    overwrite: bool = False,
) -> Path:
    """Builds a dataset; does nothing if that has been done before.

    The files are written beside their final folder and moved there when complete, so an
    interrupted run leaves nothing that could be taken for a prepared dataset; the next run
    removes what it left. Of several processes that prepare the same dataset one does, and the
    others wait for it.

    Args:
      name: one of `list_datasets()`, or `image_folder/NAME`, for any NAME, for your own images,
        `depth_folder/NAME` for your own depth maps, `matting_folder/NAME` for your own mattes.
      data_dir: where to write; `default_data_dir()` if None.
      manual_dir: raw files that were fetched by hand; None downloads them if need be.
      own: of an `image_folder/NAME` its folders and classes, of a `depth_folder/NAME` its folders
        and scale, if not as a manual folder has them; of a `matting_folder/NAME` its folders.
      overwrite: build anew, and replace what is there, which stays if that fails.

    Returns:
      The folder of the prepared dataset.

    Raises:
      ValueError: unknown dataset.
      OSError: raw files are missing, cannot be downloaded, the disk is full or not writable; the
        message says what to do.
      DataError: a raw file is unusable, or what is prepared there is damaged.
    """
    cls, config, folder = _place(name, data_dir)
    if own is not None:
        module = next(module for module in _OWN.values() if isinstance(own, module.OWN))
        if _own_module(name) is not module:
            what = {image_folder: "images and classes", depth_folder: "depth maps"}
            raise ValueError(
                f"{name} has {what.get(module, 'mattes')} of its own; yours are "
                f"{module.PREFIX}/NAME."
            )
        images = getattr(own, "images", None)
        if images is not None and manual_dir is not None:
            raise ValueError(
                f"images {images} and manual_dir {manual_dir} are two places; give one."
            )
        config = module.create_config(name, own)
        manual_dir = images or manual_dir
    if manual_dir is not None:
        manual_dir = _expand(manual_dir, "manual_dir")
        if not manual_dir.is_dir() or not any(manual_dir.iterdir()):
            raise FileNotFoundError(f"manual_dir {manual_dir} is not a folder with files in it.")
    with _only_process(folder.parent) as alone:
        # Another process may just have finished the same job.
        if folder.exists() and not overwrite:
            _open(name, data_dir)
            return folder
        for left in folder.parent.glob("incomplete.*") if alone else ():
            shutil.rmtree(left, ignore_errors=True)
        with _replacing(folder):
            builder = cls(config=config, data_dir=_root(data_dir), file_format="array_record")
            _build(name, builder, manual_dir)
    return folder


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[None]:
    """Puts a folder aside; it comes back if the block fails, and is deleted otherwise."""
    aside = folder.with_name(f".replaced.{folder.name}")
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    try:
        yield
    except BaseException:
        if aside.exists() and not folder.exists():
            aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as error:
        raise OSError(
            f"Cannot write to {folder} ({error.strerror}); choose another place with --data-dir or "
            "$RESFU_DATA_DIR."
        ) from error
    with file:
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
        """The example as encoded `image` and `label`, or what mattes have, and its `id`: bytes."""
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
      split: `"train"` or `"validation"`, of mattes also `"background"`; a slice as tfds writes it,
        such as `"train[:10%]"`, opens a part.
      data_dir: where the dataset was prepared; `default_data_dir()` if None.

    Raises:
      DatasetNotPrepared: the dataset is not there; the message is the command to run.
      DataError: it is damaged.
      ValueError: unknown dataset or split.
    """
    cls, _, _ = _place(name, data_dir)  # an unknown dataset comes first
    *most, last = getattr(cls, "SPLITS", ("train", "validation"))
    if not isinstance(split, str) or split.partition("[")[0] not in (*most, last):
        known = f"{', '.join(map(repr, most))} and {last!r}"
        raise ValueError(f"{name} has no split {split!r}; it has {known}.")
    builder = _open(name, data_dir)
    skip = tfds.decode.SkipDecoding()
    try:
        part = builder.info.splits[split]
        files = part.file_instructions
    except Exception as error:  # tfds raises several for what it cannot parse, such as "train[:"
        raise ValueError(
            f"split {split!r} of {name} cannot be read as a slice: {first_line(error)}"
        ) from error
    if part.num_examples < 1:
        raise ValueError(f"split {split!r} of {name} holds no examples.")
    encoded = {
        n: skip for n, f in builder.info.features.items() if isinstance(f, tfds.features.Image)
    }
    examples: Any = builder.as_data_source(split, decoders=encoded)
    records = _Records(
        examples,
        f"{name}, split {split!r}",
        tuple(
            (file.filename, file.examples_in_shard if file.take < 0 else file.take)
            for file in files
        ),
        _advice(name, data_dir),
    )
    for index in (0, len(records) - 1):
        records[index]  # a file that is cut short cannot even be opened
    return Source(name, split, records)


@dataclass(frozen=True)
class _Records(Sequence):
    """The examples of a split as tfds reads them; damage is told with the file's name.

    Attributes:
      examples: of tfds.
      where: dataset and split, for messages.
      files: path and number of examples of each file, in order.
      advice: what to do if one is damaged.
    """

    examples: Any
    where: str
    files: tuple[tuple[str, int], ...]
    advice: str

    def __len__(self) -> int:
        return sum(count for _, count in self.files)

    def __getitem__(self, index: int) -> dict[str, bytes]:
        try:
            return self.examples[index]
        except Exception as error:  # the reader raises whatever the bytes lead to
            ends = np.cumsum([count for _, count in self.files])
            if not 0 <= index < len(self):
                raise IndexError(
                    f"{self.where} has {counted(len(self), 'example')}, not {index}"
                ) from None
            path = self.files[int(np.searchsorted(ends, index, side="right"))][0]
            raise DataError(
                f"{self.where}: example {index} cannot be read, the file {path} is damaged "
                f"({first_line(error)}). {self.advice}"
            ) from error


def _open(name: str, data_dir: str | os.PathLike | None) -> tfds.core.GeneratorBasedBuilder:
    """The builder of a prepared dataset.

    Raises:
      DatasetNotPrepared: it is not there.
      DataError: it is damaged.
    """
    cls, config, folder = _place(name, data_dir)
    if not folder.exists():
        command = _command(name, data_dir)
        raise DatasetNotPrepared(
            f"Dataset {name!r} is not prepared in {folder}. Run:\n    {command}"
        )
    if problem := _damage(name, data_dir):
        raise _damaged(name, data_dir, problem)
    return cls(config=config, data_dir=_root(data_dir), file_format="array_record")


def _damage(name: str, data_dir: str | os.PathLike | None) -> str | None:
    """Why the files of a prepared dataset cannot be read; None if they can, or are not there."""
    cls, config, folder = _place(name, data_dir)
    if not folder.exists():
        return None
    info = folder / "dataset_info.json"
    for path in (info, folder / "features.json", folder / "metadata.json"):
        try:
            if not isinstance(json.loads(path.read_bytes()), dict):
                return f"{path} is no JSON object"
        except FileNotFoundError:
            # Earlier versions wrote no metadata of published datasets.
            own = _own_module(name)
            if path.name != "metadata.json" or own in (image_folder, depth_folder):
                return f"it has no {path.name}"
        except (OSError, ValueError) as error:
            return f"{path} cannot be read ({first_line(error)})"
    try:
        builder = cls(config=config, data_dir=_root(data_dir), file_format="array_record")
        splits = {split: builder.info.splits[split] for split in ("train", "validation")}
    except Exception as error:  # tfds raises whatever the content leads to
        return f"{info} cannot be used ({first_line(error)})"
    for split in splits.values():
        for path in map(Path, split.filepaths):
            if not path.is_file():
                return f"it has no {path.name}"
            if not path.stat().st_size:
                return f"{path} is empty"
    return None


def _damaged(name: str, data_dir: str | os.PathLike | None, problem: str) -> DataError:
    _, _, folder = _place(name, data_dir)
    return DataError(
        f"Dataset {name!r}, prepared in {folder}, is damaged: {problem}. {_advice(name, data_dir)}"
    )


def _advice(name: str, data_dir: str | os.PathLike | None) -> str:
    return f"Build it anew:\n    {_command(name, data_dir)} --overwrite"


def _command(name: str, data_dir: str | os.PathLike | None) -> str:
    command = ["python", "-m", "resfu_jax.data", "prepare", name]
    if _own_module(name) is not None:
        command += ["--manual-dir", "DIR"]
    if name.startswith(matting_folder.PREFIX):
        command += ["--foregrounds", "DIR", "--alphas", "DIR", "--backgrounds", "DIR"]
    if data_dir is not None:
        command += ["--data-dir", os.fspath(data_dir)]
    return shlex.join(command)


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _own(data_dir: str | os.PathLike | None) -> list[str]:
    """Folders of `image_folder/` and the like that a NAME could have made."""
    names = [
        (f"{prefix}/{path.name}", prefix)
        for prefix in _OWN
        for path in _root(data_dir).glob(f"{prefix}/[!.]*")
    ]
    return sorted(name for name, prefix in names if image_folder.is_name(name, prefix))


def _own_module(name: str) -> Any:
    """What prepares one's own images of this name; None for published datasets."""
    if not isinstance(name, str):
        raise ValueError(f"name must be that of a dataset, got {name!r}.")
    return next((module for prefix, module in _OWN.items() if name.startswith(prefix)), None)


def _lookup(name: str) -> _Entry:
    if name not in _DATASETS:
        near = difflib.get_close_matches(name, _DATASETS, n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"There is no dataset {name!r}.{hint} Available: {', '.join(sorted(_DATASETS))}, and "
            "image_folder/NAME for your own images, matting_folder/NAME for your own mattes."
        )
    return _DATASETS[name]


def _root(data_dir: str | os.PathLike | None) -> Path:
    return _expand(data_dir or default_data_dir(), "data_dir")


def _expand(path: str | os.PathLike, what: str) -> Path:
    """An absolute path of this machine, with a leading ~ replaced."""
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"{what} must be a path, got {path!r}.")
    text = os.fspath(path)
    if re.match("[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise ValueError(f"{what} must be a folder of this machine, got {text!r}.")
    if "\0" in text:
        raise ValueError(f"{what} must be a path, got {text!r}, with a null character.")
    try:
        return Path(text).expanduser().resolve()
    except (RuntimeError, OSError) as error:  # ~ of somebody unknown; links in a circle
        raise ValueError(f"{what} {text!r} cannot be used: {error}") from error


def _place(
    name: str, data_dir: str | os.PathLike | None
) -> tuple[type[tfds.core.GeneratorBasedBuilder], str | tfds.core.BuilderConfig | None, Path]:
    """Builder, its configuration, and the folder in which the dataset is or will be.

    tfds itself reads the folder before it tells its name.
    """
    own = _own_module(name)
    if own is not None:
        cls, config = own.BUILDER, own.create_config(name)
    else:
        _, cls, config = _lookup(name)
    part = config.name if isinstance(config, tfds.core.BuilderConfig) else config or ""
    return cls, config, _root(data_dir) / cls.name / part / str(cls.VERSION)


def create_builder(
    name: str, data_dir: str | os.PathLike | None
) -> tfds.core.GeneratorBasedBuilder:
    """The tfds builder of a dataset; a `ValueError` if there is none of this name."""
    cls, config, _ = _place(name, data_dir)
    return cls(config=config, data_dir=_root(data_dir), file_format="array_record")
