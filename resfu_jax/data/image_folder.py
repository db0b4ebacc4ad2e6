"""`image_folder/NAME`: your own images and label maps.

    DIR/images/*.jpg, .png, ...     any size, also in subfolders; in train and validation below, if
                                    you have a split
    DIR/labels/*.png                of the same names, in the same subfolders: one 8-bit channel of
                                    class indices, 255 is ignored
    DIR/classes.txt                 the class of index 0, 1, ... on each line, with its colour if
                                    you like: `road, 128, 64, 128`
    DIR/labels.txt                  if the numbers in the label maps are others: `255 = road` on
                                    each line, or `255 = ignore`

Without the subfolders train and validation a fifth of the images, at least one, is for validation.
Which ones follows from checksums of their names, so it is the same on every machine.
"""

import itertools
import logging
import os
import re
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

import numpy as np
import tensorflow_datasets as tfds
from absl import logging as absl_logging
from jaxtyping import Int16

from resfu_jax.data.info import DataError, DatasetInfo
from resfu_jax.data.raw import (
    RawBuilder,
    RawExample,
    RawFiles,
    label_table,
    palette,
)
from resfu_jax.images import SUFFIXES

PREFIX = "image_folder"
_IGNORE = 255
_HINT = """\
A label map is a PNG file of the size of its image with one 8-bit channel: the position of the class
in classes.txt, counted from 0, or 255 where the pixel is to be ignored. If the numbers are others,
say what they mean in labels.txt: a line for each, such as `7 = road` or `0 = ignore`."""


def is_name(name: str) -> bool:
    """Whether it is `image_folder/NAME` with a NAME that can be a folder."""
    return re.fullmatch(f"{PREFIX}/[A-Za-z0-9_-]{{1,200}}", name) is not None


def create_config(name: str) -> tfds.core.BuilderConfig:
    """The builder's configuration of `image_folder/NAME`."""
    if not is_name(name):
        raise ValueError(
            f"There is no dataset {name!r}. Your own images are image_folder/NAME, where you "
            "choose NAME: letters, digits, - and _, at most 200."
        )
    own = name.removeprefix(f"{PREFIX}/")
    return tfds.core.BuilderConfig(name=own, description="Images and label maps of a folder.")


def read_info(name: str, builder: tfds.core.GeneratorBasedBuilder) -> DatasetInfo:
    """Classes and colours of a prepared image folder."""
    metadata, splits = builder.info.metadata, builder.info.splits
    return DatasetInfo(
        name,
        tuple(metadata["class_names"]),
        tuple(tuple(colour) for colour in metadata["palette"]),
        examples=(splits["train"].num_examples, splits["validation"].num_examples),
        terms="your own",
    )


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not empty and do not begin with #, with their numbers.

    The text is UTF-8, or UTF-16 with a byte order mark; its letters are composed (NFC).

    Raises:
      DataError: it is in another encoding; names the file and the first line of that kind.
    """
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line}: this is not {encoding.removesuffix('-sig').upper()} "
            f"({error.reason} at byte {error.start}). Save the file as UTF-8: editors have that "
            "choice where they save, and `iconv -f WINDOWS-1252 -t UTF-8` converts."
        ) from error
    if "\0" in text:
        raise DataError(
            f"{path} holds null characters, as UTF-16 without a byte order mark does; save it as "
            "UTF-8."
        )
    lines = unicodedata.normalize("NFC", text).splitlines()
    kept = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    return [(number, line) for number, line in kept if line and not line.startswith("#")]


def read_classes(path: Path) -> tuple[list[str], list[tuple[int, int, int]]]:
    """Names and colours of a class file.

    Args:
      path: one class a line, `name` or `name, R, G, B`. Empty lines and those that begin with #
        do not count. Classes without a colour get one.

    Raises:
      DataError: naming the line.
    """
    names: list[str] = []
    colours: list[tuple[int, int, int]] = []
    for number, line in read_lines(path):
        name, *colour = (field.strip() for field in line.split(","))
        colour = [int(c) if c.isdecimal() and int(c) < 256 else None for c in colour]
        if not name or len(colour) not in (0, 3) or None in colour:
            raise DataError(
                f"{path}, line {number}: {line!r} is neither 'name' nor 'name, R, G, B' with "
                "numbers from 0 to 255."
            )
        if name in names:
            raise DataError(f"{path}, line {number}: the class {name!r} is there twice.")
        colours.append(tuple(colour) or palette(len(names) + 1)[-1])
        names.append(name)
    if not 2 <= len(names) <= _IGNORE:
        raise DataError(f"{path} has {len(names)} classes; it needs 2 to {_IGNORE}.")
    return names, colours


def read_values(path: Path, names: Sequence[str]) -> dict[int, int]:
    """What the numbers in the label maps mean: class indices, or 255 for pixels to ignore.

    Args:
      path: one number a line, `255 = road` with the name of a class, or `255 = ignore`.
      names: the classes.

    Raises:
      DataError: naming the line.
    """
    classes = {name: index for index, name in enumerate(names)}
    classes.setdefault("ignore", _IGNORE)
    values: dict[int, int] = {}
    for number, line in read_lines(path):
        value, equals, name = (part.strip() for part in line.partition("="))
        if not (equals and value.isdecimal() and int(value) < 256 and name in classes):
            raise DataError(
                f"{path}, line {number}: {line!r} is not 'NUMBER = NAME' with a number from 0 to "
                f"255 and ignore or a class of classes.txt ({', '.join(names[:5])}"
                f"{', ...' if names[5:] else ''})."
            )
        if int(value) in values:
            raise DataError(f"{path}, line {number}: the number {value} is there twice.")
        values[int(value)] = classes[name]
    if not values:
        raise DataError(f"{path} is empty; without the file, labels are positions in classes.txt.")
    return values


class ImageFolder(RawBuilder):
    """Images and label maps of a folder; 255 is ignored."""

    TITLE = "image_folder"
    MANUAL_DOWNLOAD_INSTRUCTIONS = """\
Put your images into DIR/images, their label maps (PNG, one 8-bit channel of class indices, the same
names) into DIR/labels, and the names of the classes, one a line, into DIR/classes.txt. Then run
    python -m resfu_jax.data prepare image_folder/NAME --manual-dir DIR"""

    def __init__(self, **kwargs: object) -> None:
        verbosity = absl_logging.get_verbosity()
        absl_logging.set_verbosity(absl_logging.ERROR)  # tfds would warn of every unknown NAME
        try:
            super().__init__(**kwargs)
        finally:
            absl_logging.set_verbosity(verbosity)

    @property
    def table(self) -> Int16[np.ndarray, "256"]:
        """Classes as they are, and 255 ignored; or what labels.txt says."""
        values = self.info.metadata["label_values"]
        return label_table({int(value): index for value, index in values.items()})

    def _convert(self, files: tuple[RawExample, bytes, bytes]) -> tuple[str, dict | None]:
        try:
            return super()._convert(files)
        except DataError as error:
            if str(error).startswith("the image "):
                raise
            raise DataError(f"{error}\n{_HINT}") from error

    def _count(self) -> Iterator[tuple[str, dict]]:
        names = self.info.metadata["class_names"]
        counts = self._pixels[: len(names)]
        ignored = self._pixels[_IGNORE] / self._pixels.sum()
        # Binary masks are often 0 and 255. Whoever means 255 to be ignored says so in labels.txt.
        if np.count_nonzero(counts) < 2 and ignored > 0 and not self.info.metadata["stated"]:
            never = [name for name, count in zip(names, counts, strict=True) if not count]
            raise DataError(
                f"The label maps of {self.info.full_name.split('/')[1]} have at most one class: "
                f"{_listed(never)} never occur{'s' if len(never) == 1 else ''}, and {ignored:.1%} "
                f"of the pixels are 255, which is ignored. If 255 is a class, as in masks of 0 and "
                f"255, write a file labels.txt beside classes.txt:\n    0 = {names[0]}\n    255 = "
                f"{names[1]}\nIf it is to be ignored, the second line is\n    255 = ignore"
            )
        yield from super()._count()

    def find_examples(self, files: RawFiles) -> dict[str, list[RawExample]]:
        """The two subfolders, or a split by checksum."""
        (root,) = files.roots
        images, labels = root / "images", root / "labels"
        if not images.is_dir() or not labels.is_dir():
            raise self.missing(files, f"folder {'labels' if images.is_dir() else 'images'}")
        if not (root / "classes.txt").is_file():
            raise self.missing(files, "file classes.txt")
        names, colours = read_classes(root / "classes.txt")
        values = {index: index for index in (*range(len(names)), _IGNORE)}
        stated = (root / "labels.txt").is_file()
        if stated:
            values = read_values(root / "labels.txt", names)
        self.info.metadata.update(
            class_names=names,
            palette=colours,
            label_values={str(value): index for value, index in values.items()},  # JSON
            stated=stated,
        )
        if (images / "train").is_dir() or (images / "validation").is_dir():
            for split in ("train", "validation"):
                for folder in (images / split, labels / split):
                    if not folder.is_dir():
                        raise self.missing(files, f"folder {Path(folder).relative_to(root)}")
            outside = [p for p in _files(images) if _part(p, images) not in ("train", "validation")]
            _tell(outside, f"files outside of {images}/train and {images}/validation")
            splits = {
                split: _pairs(images / split, labels / split) for split in ("train", "validation")
            }
        else:
            examples = _pairs(images, labels)
            examples.sort(key=lambda e: zlib.crc32(e.id.encode()))
            count = max(1, round(len(examples) / 5)) if len(examples) > 1 else 0
            splits = {"train": examples[count:], "validation": examples[:count]}
        return splits


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


def _part(path: Path, folder: Path) -> str:
    return path.relative_to(folder).parts[0]


def _key(path: PurePath) -> str:
    """A path without suffix, the same for every way to write its letters.

    File systems differ: some decompose é into e and an accent. Names that are not UTF-8 keep their
    bytes, as \\xe9.
    """
    text = os.fsencode(path.with_suffix("")).decode("utf-8", "backslashreplace")
    return unicodedata.normalize("NFC", text)


def _pairs(images: Path, labels: Path) -> list[RawExample]:
    """Every image with its label map. Files that are neither are named in a warning."""
    found, others = [], []
    for path in _files(images):
        (found if path.suffix.lower() in SUFFIXES else others).append(path)
    _tell(others, f"files of {images} that are no images ({', '.join(SUFFIXES)})")
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
        candidates = maps.pop(key, [])
        label = [path for path in candidates if path.suffix.lower() == ".png"]
        if len(label) > 1:
            raise DataError(f"{label[0]} and {label[1]} are both label maps of {image}.")
        if not label:
            missing.append(f"{key}.png")
            unlike += candidates
        by_id[key] = RawExample(key, image, label[0] if label else labels / f"{key}.png")
    if missing:
        text = f"{labels} lacks {len(missing)} label maps of images in {images}: {_listed(missing)}"
        if unlike:
            text += (
                f"\nThere is {_listed([str(path) for path in unlike])}, but a label map has to be "
                "a PNG file."
            )
        raise FileNotFoundError(
            f"{text}\nEvery image needs a label map of its name: add it, or remove the image."
        )
    _tell(sorted(itertools.chain(*maps.values())), f"files of {labels} without an image")
    return list(by_id.values())


def _tell(paths: Sequence[Path], what: str) -> None:
    if paths:
        names = [os.fsencode(path).decode("utf-8", "backslashreplace") for path in paths]
        names = [PurePath(name).name for name in names]
        logging.warning("left out %d %s: %s", len(paths), what, _listed(names))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if names[5:] else "")
