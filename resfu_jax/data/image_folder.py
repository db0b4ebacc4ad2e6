"""`image_folder/NAME`: your own images and label maps.

    DIR/images/*.jpg or .png        any size; in train and validation below, if you have a split
    DIR/labels/*.png                of the same names: one 8-bit channel of class indices, 255 is
                                    ignored; in the same subfolders as the images
    DIR/classes.txt                 the class of index 0, 1, ... on each line, with its colour if
                                    you like: `road, 128, 64, 128`

Without the subfolders a fifth of the images, at least one, is for validation. Which ones follows
from checksums of their names, so it is the same on every machine.
"""

import re
import zlib
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from jaxtyping import Int16

from resfu_jax.data.info import DataError, DatasetInfo
from resfu_jax.data.raw import (
    RawBuilder,
    RawExample,
    RawFiles,
    RawPath,
    label_table,
    pair_files,
    palette,
)

PREFIX = "image_folder"
_IGNORE = 255
_HINT = """\
A label map is a PNG file of the size of its image with one 8-bit channel: the position of the class
in classes.txt, counted from 0, or 255 where the pixel is to be ignored."""


def create_config(name: str) -> tfds.core.BuilderConfig:
    """The builder's configuration of `image_folder/NAME`."""
    own = name.removeprefix(f"{PREFIX}/")
    if not re.fullmatch("[A-Za-z0-9_-]+", own) or own == name:
        raise ValueError(
            f"There is no dataset {name!r}. Your own images are image_folder/NAME, where you "
            "choose NAME: letters, digits, - and _."
        )
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


def read_classes(path: RawPath) -> tuple[list[str], list[tuple[int, int, int]]]:
    """Names and colours of a class file.

    Args:
        path: one class a line, `name` or `name, R, G, B`. Empty lines and those that begin with #
            do not count. Classes without a colour get one.

    Raises:
        DataError: naming the line.
    """
    names: list[str] = []
    colours: list[tuple[int, int, int]] = []
    for number, line in enumerate(path.read_bytes().decode("utf-8-sig").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
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


class ImageFolder(RawBuilder):
    """Images and label maps of a folder; 255 is ignored."""

    TITLE = "image_folder"
    MANUAL_DOWNLOAD_INSTRUCTIONS = """\
Put your images into DIR/images, their label maps (PNG, one 8-bit channel of class indices, the same
names) into DIR/labels, and the names of the classes, one a line, into DIR/classes.txt. Then run
    python -m resfu_jax.data prepare image_folder/NAME --manual-dir DIR"""

    def _info(self) -> tfds.core.DatasetInfo:
        info = super()._info()
        return tfds.core.DatasetInfo(
            builder=self,
            description=info.description,
            features=info.features,
            metadata=tfds.core.MetadataDict(),  # filled by find_examples
        )

    def __init__(self, **kwargs: object) -> None:
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)  # tfds would warn of every NAME that it does not know
        try:
            super().__init__(**kwargs)
        finally:
            logging.set_verbosity(verbosity)

    @property
    def table(self) -> Int16[np.ndarray, "256"]:
        """Classes as they are; 255 is ignored."""
        count = len(self.info.metadata["class_names"])
        return label_table({k: k for k in (*range(count), _IGNORE)})

    def _convert(self, files: tuple[RawExample, bytes, bytes]) -> tuple[str, dict | None]:
        try:
            return super()._convert(files)
        except DataError as error:
            raise DataError(f"{error}\n{_HINT}") from error

    def find_examples(self, files: RawFiles) -> dict[str, list[RawExample]]:
        """The two subfolders, or a split by checksum."""
        (root,) = files.roots
        images, labels = root / "images", root / "labels"
        if not images.is_dir() or not labels.is_dir():
            raise self.missing(files, f"folder {'labels' if images.is_dir() else 'images'}")
        if not (root / "classes.txt").is_file():
            raise self.missing(files, "file classes.txt")
        names, colours = read_classes(root / "classes.txt")
        self.info.metadata.update(class_names=names, palette=colours)
        if (images / "train").is_dir() or (images / "validation").is_dir():
            for split in ("train", "validation"):
                for folder in (images / split, labels / split):
                    if not folder.is_dir():
                        raise self.missing(files, f"folder {Path(folder).relative_to(root)}")
            splits = {
                split: _pairs(images / split, labels / split) for split in ("train", "validation")
            }
        else:
            examples = _pairs(images, labels)
            examples.sort(key=lambda e: zlib.crc32(e.id.encode()))
            count = max(1, round(len(examples) / 5)) if len(examples) > 1 else 0
            splits = {"train": examples[count:], "validation": examples[:count]}
        return splits


def _pairs(images: RawPath, labels: RawPath) -> list[RawExample]:
    try:
        examples = pair_files(images, labels)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}\nEvery image needs a label map of its name: add it, or remove the image."
        ) from error
    by_id: dict[str, RawExample] = {}
    for example in examples:
        if other := by_id.get(example.id):
            raise DataError(
                f"{other.image} and {example.image} share the label map {example.label}; remove "
                "or rename one of them."
            )
        by_id[example.id] = example
    return examples
