"""`image_folder/NAME`: your own images and label maps.

Images are files of any size, also in subfolders. The label map of an image is a PNG file of the
same name, in the same subfolder, which may have one of `LABEL_ENDINGS`; see `own_classes` for what
label maps hold. Folders come from `OwnImages`, or are those of a manual folder DIR:

    DIR/images, DIR/labels
    DIR/classes.txt             a class file
    DIR/labels.txt              if the numbers in the label maps are not those of the class file:
                                `255 = road` on each line, or `255 = ignore`

Without label maps (`OwnImages(images=...)` alone), no pixel has a class: such images teach
upsamplers, the task "features" of train.py.

Without folders for validation or subfolders train and validation, a fifth of the images, at least
one, is for validation. Which ones follows from checksums of their names, so it is the same on every
machine.
"""

import dataclasses
import io
import itertools
import logging
import os
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int16, UInt8
from tqdm import tqdm

from resfu_jax import images
from resfu_jax._files import local_path
from resfu_jax._output import counted
from resfu_jax.data.info import DataError, DatasetInfo
from resfu_jax.data.own_classes import (
    HINT,
    IGNORE,
    Classes,
    Contents,
    check_255,
    colours_count,
    find_classes,
    listed,
    read_classes,
    read_values,
)
from resfu_jax.data.raw import OwnConfigs, RawBuilder, RawExample, RawFiles, label_table
from resfu_jax.data.transforms import different_sizes
from resfu_jax.images import SUFFIXES
from resfu_jax.serving import is_integer

PREFIX = "image_folder"
# What may follow the name of an image in that of its label map, and what of the image's name the
# label map may lack.
LABEL_ENDINGS = (
    *("_mask", "_masks", "_label", "_labels", "_labelIds", "_gtFine_labelIds"),
    *("_gt", "_seg", "_segmentation", "_depth"),
)
IMAGE_ENDINGS = ("_leftImg8bit", "_image", "_img", "_rgb")
_SPLITS = ("train", "validation", "val")


def is_name(name: str, prefix: str = PREFIX) -> bool:
    """Whether it is `image_folder/NAME` with a NAME that can be a folder."""
    return re.fullmatch(f"{prefix}/[A-Za-z0-9_-]{{1,200}}", name) is not None


def own_name(name: str, prefix: str) -> str:
    """NAME of `prefix/NAME`; a `ValueError` if it cannot be a folder."""
    if not is_name(name, prefix):
        raise ValueError(
            f"There is no dataset {name!r}. Your own images are {prefix}/NAME, where you "
            "choose NAME: letters, digits, - and _, at most 200."
        )
    return name.removeprefix(f"{prefix}/")


def create_config(name: str, own: "OwnImages | None" = None) -> "FolderConfig":
    """The builder's configuration of `image_folder/NAME`; `own` is for building it."""
    return FolderConfig(
        name=own_name(name, PREFIX),
        description="Images and label maps of a folder.",
        own=own or OwnImages(),
    )


def read_info(name: str, builder: tfds.core.GeneratorBasedBuilder) -> DatasetInfo:
    """Classes and colours of a prepared image folder."""
    metadata, splits = builder.info.metadata, builder.info.splits
    noted = "notes" in metadata.keys()  # noqa: SIM118  # `in` does not load it
    return DatasetInfo(
        name,
        tuple(metadata["class_names"]),
        tuple(tuple(colour) for colour in metadata["palette"]),
        examples=(splits["train"].num_examples, splits["validation"].num_examples),
        terms="your own",
        notes=tuple(metadata["notes"]) if noted else (),
    )


@dataclass(frozen=True)
class OwnImages:
    """Where one's own images are, and what their label maps mean.

    Attributes:
      images: folder of the images; None: `images` in the manual folder.
      labels: folder of their label maps; None: `labels` in the manual folder, or, for given
        `images`, none.
      validation_images: folder of the images for validation. None: subfolders `train` and
        `validation` of the others, or a fifth of them.
      validation_labels: folder of their label maps.
      classes: a class file, or its lines, see `own_classes`. None: `classes.txt` in the manual
        folder; without one, what the label maps hold, if `confirm` takes it.
      ignore_label: number of pixels that do not count; None: 255.
      orientation: images are turned as their EXIF data say.
      confirm: is told of the classes that were found, and says whether they are right. None:
        found classes are an error, which tells them.

    Raises:
      ValueError: label maps without images, of some images only, or options of label maps without
        any; or a number that is none.
    """

    images: str | os.PathLike | None = None
    labels: str | os.PathLike | None = None
    validation_images: str | os.PathLike | None = None
    validation_labels: str | os.PathLike | None = None
    classes: str | os.PathLike | Sequence[str] | None = None
    ignore_label: int | None = None
    orientation: bool = True
    confirm: Callable[[str], bool] | None = None

    def __post_init__(self) -> None:
        for pair in (("images", "labels"), ("validation_images", "validation_labels")):
            given = {name: getattr(self, name) for name in pair if getattr(self, name) is not None}
            for name, folder in given.items():
                if pair[0] not in given:
                    raise ValueError(f"{' and '.join(pair)} go together, got only {name} {folder}.")
                object.__setattr__(self, name, local_path(folder, name))
                if not getattr(self, name).is_dir():
                    raise FileNotFoundError(f"{name} {folder} is not a folder.")
            if len(given) == 2 and getattr(self, pair[0]) == getattr(self, pair[1]):
                raise ValueError(f"{' and '.join(pair)} must be two folders, got {folder} twice.")
        if self.validation_images is not None and self.images is None:
            raise ValueError("validation_images must be None unless images are given.")
        if self.validation_images is not None and (self.labels is None) != (
            self.validation_labels is None
        ):
            raise ValueError("labels and validation_labels must be given both, or neither.")
        if self.unlabelled and (self.classes is not None or self.ignore_label is not None):
            raise ValueError("classes and ignore_label must be None without labels.")
        if isinstance(self.classes, str | os.PathLike):
            object.__setattr__(self, "classes", local_path(self.classes, "classes"))
            if not self.classes.is_file():
                raise FileNotFoundError(
                    f"classes {self.classes} is not a file; of classes themselves there are at "
                    "least two."
                )
        number = self.ignore_label
        if number is not None and not (is_integer(number) and 0 <= number <= 255):
            raise ValueError(f"ignore_label must be a number from 0 to 255, got {number!r}.")

    @property
    def unlabelled(self) -> bool:
        """Whether there are images alone."""
        return self.images is not None and self.labels is None


@dataclass
class FolderConfig(tfds.core.BuilderConfig):
    """The builder's configuration of `image_folder/NAME`; `own` is used while it is built."""

    own: OwnImages = OwnImages()


class ImageFolder(OwnConfigs, RawBuilder):
    """Images and label maps of a folder; 255 is ignored."""

    TITLE = "image_folder"
    LABEL_SUFFIXES: tuple[str, ...] = (".png",)
    MANUAL_DOWNLOAD_INSTRUCTIONS = """\
Put your images into DIR/images, their label maps (PNG, the same names) into DIR/labels, and the
names of the classes, one a line, into DIR/classes.txt. Then run
    python -m resfu_jax.data prepare image_folder/NAME --manual-dir DIR
or, with folders of any names, and classes that are found in the label maps,
    python -m resfu_jax.data prepare image_folder/NAME --images DIR --labels DIR"""

    @property
    def table(self) -> Int16[np.ndarray, "256"]:
        """What the numbers of label maps mean; where colours count, `read_label` has seen to it."""
        values = self.info.metadata["label_values"]
        return label_table({int(value): index for value, index in values.items()})

    def read_image(self, data: bytes, path: Path) -> bytes:
        """The file; if its EXIF orientation is to be ignored, the stored pixels as PNG."""
        if self.builder_config.own.orientation:
            return data
        shown, stored = (
            images.open_image(data, f"the image {path}", orientation=turned)
            for turned in (True, False)
        )
        if shown == stored:
            return data
        buffer = io.BytesIO()
        stored.save(buffer, "PNG")
        return buffer.getvalue()

    def read_label(self, data: bytes, path: Path) -> UInt8[np.ndarray, "h w"]:
        """The numbers of a label map, or the classes that its colours mean."""
        turned = self.builder_config.own.orientation
        mask = images.read_mask(data, f"the label map {path}", orientation=turned)
        if self._colours is None:
            return mask.numbers
        classes = [self._colours.get(tuple(colour), 0) for colour in mask.colours.tolist()]
        return np.array(classes, np.uint8)[mask.numbers]

    def find_examples(self, files: RawFiles) -> dict[str, list[RawExample]]:
        """The examples of both splits, after a look at all label maps."""
        own, values = self._places(files)
        given = None if own.classes is None else read_classes(own.classes)
        splits, note = self._splits(own, files)
        if own.unlabelled:
            notes = [note, "without label maps, to teach upsamplers"]
            self.info.metadata.update(class_names=[], palette=[], label_values={}, notes=notes)
            return splits
        contents = _look_at(list(itertools.chain(*splits.values())), own.orientation)
        if given is None:
            given = read_classes(_confirmed(contents, own))
        classes = _with_ignored(given, own.ignore_label)
        if values is not None:
            classes = classes._replace(numbers=read_values(values, classes.names))
        by_colour = colours_count(contents, classes)
        if not (by_colour or values or own.ignore_label is not None or 255 in given.numbers):
            check_255(contents, classes)
        self._colours = classes.colours if by_colour else None
        numbers = classes.numbers
        if by_colour:
            numbers = {index: index for index in (*range(len(classes.names)), IGNORE)}
        self.info.metadata.update(
            class_names=classes.names,
            palette=classes.palette,
            label_values={str(number): index for number, index in numbers.items()},  # JSON
            notes=[note, f"classes are the {'colours' if by_colour else 'numbers'} of label maps"],
        )
        return splits

    def _places(self, files: RawFiles) -> tuple[OwnImages, Path | None]:
        """Where everything is, and the file labels.txt, if there is one."""
        own, (root,) = self.builder_config.own, files.roots
        if own.images is not None:
            return own, None
        found, labels = root / "images", root / "labels"
        if not found.is_dir() or not labels.is_dir():
            raise self.missing(files, f"folder {'labels' if found.is_dir() else 'images'}")
        own = dataclasses.replace(own, images=found, labels=labels)
        if own.classes is not None:
            return own, None
        if not (root / "classes.txt").is_file():
            raise self.missing(files, "file classes.txt")
        own = dataclasses.replace(own, classes=root / "classes.txt")
        return own, root / "labels.txt" if (root / "labels.txt").is_file() else None

    def _pairs(self, images: Path, labels: Path | None) -> list[RawExample]:
        return _pairs(images, labels, self.LABEL_SUFFIXES)

    def _splits(self, own: OwnImages, files: RawFiles) -> tuple[dict[str, list[RawExample]], str]:
        """The examples of both splits, and where those for validation come from."""
        if own.validation_images is not None:
            train = self._pairs(own.images, own.labels)
            validation = self._pairs(own.validation_images, own.validation_labels)
            if both := {e.image.resolve() for e in train} & {e.image.resolve() for e in validation}:
                raise DataError(
                    f"images and validation_images share {counted(len(both), 'file')}, {min(both)} "
                    "first; validation needs images of its own."
                )
            source = f"of {own.validation_images}"
        elif there := [name for name in _SPLITS if (own.images / name).is_dir()]:
            names = {"train": "train", "validation": "val" if "val" in there else "validation"}
            places = [own.images] if own.unlabelled else [own.images, own.labels]
            for name, place in itertools.product(names.values(), places):
                if not (place / name).is_dir():
                    raise self.missing(files, f"folder {place.name}/{name}")
            outside = [p for p in _files(own.images) if _part(p, own.images) not in names.values()]
            folders = " and ".join(str(own.images / name) for name in names.values())
            _tell(outside, f"outside of {folders}")
            train, validation = (
                self._pairs(own.images / name, own.labels and own.labels / name)
                for name in names.values()
            )
            source = f"of {own.images / names['validation']}"
        else:
            examples = sorted(self._pairs(own.images, own.labels), key=_checksum)
            count = max(1, round(len(examples) / 5)) if len(examples) > 1 else 0
            train, validation = examples[count:], examples[:count]
            source = "a fifth, by the checksums of their names"
        text = (
            f"validation: {len(validation)} of {len(train) + len(validation)} images, {source}: "
            + listed(sorted(e.id for e in validation), 20)
        )
        return {"train": train, "validation": validation}, text


BUILDER, OWN = ImageFolder, OwnImages


def _confirmed(contents: Sequence[Contents], own: OwnImages) -> list[str]:
    """Classes that were found in the label maps, if that is what is meant."""
    lines, text = find_classes(contents, own.ignore_label)
    if own.confirm is None or not own.confirm(text):
        raise DataError(f"{text}\nor take them as they are with --yes (`confirm` in Python).")
    return lines


def _with_ignored(classes: Classes, ignore_label: int | None) -> Classes:
    """With the number that does not count, where no class has it."""
    number = IGNORE if ignore_label is None else ignore_label
    meaning = classes.numbers.get(number, IGNORE)
    if ignore_label is not None and meaning != IGNORE:
        raise DataError(
            f"ignore_label is {number}, which is the number of the class "
            f"{classes.names[meaning]!r}; give the classes their numbers: NUMBER = name."
        )
    return classes._replace(numbers=classes.numbers | {number: meaning})


def _look_at(examples: Sequence[RawExample], orientation: bool) -> list[Contents]:
    """What all label maps hold; nothing is written before.

    Raises:
      DataError: label maps that cannot be read, or are not of the size of their image; tells what
        is wrong with the first, and names others.
    """
    contents, problems = [], []

    def look(example: RawExample) -> Contents | DataError:
        try:
            return _contents(example, orientation)
        except ValueError as error:
            return DataError(str(error))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        looks = pool.map(look, examples)
        for example, seen in zip(
            examples, tqdm(looks, "label maps", len(examples), disable=None), strict=True
        ):
            if isinstance(seen, Contents):
                contents.append(seen)
            else:
                problems.append((example, seen))
    if problems:
        text = str(problems[0][1])
        if problems[1:]:
            others = [example.label.name for example, _ in problems[1:]]
            text += (
                f"\n{counted(len(others), 'other label map')} cannot be used either: "
                f"{listed(others)}"
            )
        raise DataError(text if text.startswith("the image ") else f"{text}\n{HINT}")
    return contents


def _contents(example: RawExample, orientation: bool) -> Contents:
    name = f"the label map {example.label}"
    mask = images.read_mask(example.label, name, orientation=orientation)
    data = example.image.read_bytes()
    height, width = images.image_size(data, f"the image {example.image}", orientation=orientation)
    if (height, width) != mask.numbers.shape:
        sizes = (width, height), mask.numbers.shape[::-1]
        raise DataError(f"{example.image} and {example.label} {different_sizes(data, *sizes)}")
    counts = np.bincount(mask.numbers.ravel(), minlength=256).tolist()
    pixels = {number: count for number, count in enumerate(counts) if count}
    colours = {number: tuple(mask.colours[number].tolist()) for number in pixels}
    return Contents(example.label, mask.kind, pixels, colours)


# -------------------------------------------------------------------------------------- the files
def _files(folder: Path) -> list[Path]:
    """All files below, without hidden ones, in alphabetical order; links are followed."""
    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        real = os.path.realpath(place)
        # A link to a folder above would lead round and round.
        folders[:] = [] if real in seen else [f for f in folders if not f.startswith(".")]
        if real not in seen:
            found += [Path(place, name) for name in names if not name.startswith(".")]
        seen.add(real)
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _checksum(example: RawExample) -> int:
    return zlib.crc32(example.id.encode())


def _part(path: Path, folder: Path) -> str:
    return path.relative_to(folder).parts[0]


def _key(path: PurePath) -> str:
    """A path without suffix, the same for every way to write its letters.

    File systems differ: some decompose é into e and an accent. Names that are not UTF-8 keep their
    bytes, as \\xe9.
    """
    text = os.fsencode(path.with_suffix("")).decode("utf-8", "backslashreplace")
    return unicodedata.normalize("NFC", text)


def _pairs(images: Path, labels: Path | None, suffixes: Sequence[str]) -> list[RawExample]:
    """Every image with its label map, if any. Files that are neither are named in a warning."""
    found, others = [], []
    for path in _files(images):
        (found if path.suffix.lower() in SUFFIXES else others).append(path)
    _tell(others, f"of {images} without an ending of images ({', '.join(SUFFIXES)})")
    if labels is None:
        return [RawExample(_key(path.relative_to(images)), path, None) for path in found]
    maps: dict[str, list[Path]] = {}
    for path in _files(labels):
        maps.setdefault(_key(path.relative_to(labels)), []).append(path)
    by_id: dict[str, RawExample] = {}
    missing, unlike = [], []
    for image in found:
        key = _key(image.relative_to(images))
        if key in by_id:
            raise DataError(
                f"{by_id[key].image} and {image} share the label map {by_id[key].label}; remove "
                "or rename one of them."
            )
        candidates = next((c for names in _label_names(key) if (c := _taken(maps, names))), [])
        label = [path for path in candidates if path.suffix.lower() in suffixes]
        if len(label) > 1:
            raise DataError(f"{label[0]} and {label[1]} are both label maps of {image}.")
        if not label:
            missing.append(f"{key}.png")
            unlike += candidates
        by_id[key] = RawExample(key, image, label[0] if label else labels / f"{key}.png")
    if missing:
        lacks = counted(len(missing), "label map")
        text = f"{labels} lacks {lacks} of images in {images}: {listed(missing)}"
        if unlike:
            text += (
                f"\nThere is {listed([str(path) for path in unlike])}, but a label map has to be "
                f"a {' or '.join(s[1:].upper() for s in suffixes)} file."
            )
        raise FileNotFoundError(
            f"{text}\nEvery image needs a label map of its name, which may also end in one of "
            f"{', '.join(LABEL_ENDINGS)}: add it, or remove the image."
        )
    _tell(sorted(itertools.chain(*maps.values())), f"of {labels} without an image")
    return list(by_id.values())


def _label_names(key: str) -> Iterator[list[str]]:
    """Names that the label map of an image may have, better ones first."""
    for ending in ("", *IMAGE_ENDINGS):
        if key.endswith(ending):
            name = key.removesuffix(ending)
            yield [name]
            yield [name + label_ending for label_ending in LABEL_ENDINGS]


def _taken(maps: dict[str, list[Path]], names: Sequence[str]) -> list[Path]:
    return [path for name in names for path in maps.pop(name, [])]


def _tell(paths: Sequence[Path], what: str) -> None:
    if paths:
        names = [os.fsencode(path).decode("utf-8", "backslashreplace") for path in paths]
        names = [PurePath(name).name for name in names]
        logging.warning("left out %s %s: %s", counted(len(paths), "file"), what, listed(names))
