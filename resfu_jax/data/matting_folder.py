"""`matting_folder/NAME`: your own foregrounds, alpha mattes and backgrounds.

Folders of images with the same names, without regard to their suffixes:

    FOREGROUNDS/lamp.png  ALPHAS/lamp.png     and, for validation, TRIMAPS/lamp.png
    BACKGROUNDS/...                           any photos

Training composes foregrounds over backgrounds anew at every step. For validation each of its
foregrounds is composed once over one of the backgrounds; its trimap is the one that is given, or
drawn from alpha. Validation has the subfolders `validation` of foregrounds and alphas, training
those called `train`; without them, a fifth of the foregrounds, at least one, is for validation.
Which ones, and which background they get, follows from checksums of their names.
"""

import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from resfu_jax import images
from resfu_jax._checks import check_whole
from resfu_jax._files import local_path
from resfu_jax.data.composition import compose, covering, draw_trimap
from resfu_jax.data.image_folder import own_name
from resfu_jax.data.info import DataError, DatasetInfo
from resfu_jax.data.mattes import (
    MatteFiles,
    MattingBuilder,
    encoded,
    pair_mattes,
    pictures_in,
    png,
    read_layer_files,
)
from resfu_jax.data.raw import OwnConfigs

PREFIX = "matting_folder"
_NEEDED = ("foregrounds", "alphas", "backgrounds")


def create_config(name: str, own: "OwnMattes | None" = None) -> "MattingConfig":
    """The builder's configuration of `matting_folder/NAME`; `own` is for building it."""
    return MattingConfig(name=own_name(name, PREFIX), description="Mattes of folders.", own=own)


def read_info(name: str, builder: tfds.core.GeneratorBasedBuilder) -> DatasetInfo:
    """What is known of a prepared folder."""
    splits = builder.info.splits
    counts = splits["train"].num_examples, splits["validation"].num_examples
    note = f"{splits['background'].num_examples} backgrounds for training"
    return DatasetInfo(name, mattes=True, examples=counts, terms="your own", notes=(note,))


@dataclass(frozen=True)
class OwnMattes:
    """Where one's own mattes are.

    Attributes:
      foregrounds: folder of the foregrounds, whose colours also count where alpha is below 1.
      alphas: folder of their alpha mattes.
      backgrounds: folder of images to compose them over.
      trimaps: folder of trimaps for validation; None: they are drawn from alpha.
      trimap_width: of those, the diameter in pixels by which known regions are eroded.

    Raises:
      ValueError: a folder is missing, or the width is no positive number.
      FileNotFoundError: there is no such folder.
    """

    foregrounds: str | os.PathLike | None = None
    alphas: str | os.PathLike | None = None
    backgrounds: str | os.PathLike | None = None
    trimaps: str | os.PathLike | None = None
    trimap_width: int = 25

    def __post_init__(self) -> None:
        check_whole(trimap_width=self.trimap_width)
        if lacking := [name for name in _NEEDED if getattr(self, name) is None]:
            raise ValueError(f"{', '.join(_NEEDED)} go together; {', '.join(lacking)} is missing.")
        for name in (*_NEEDED, "trimaps"):
            if (folder := getattr(self, name)) is not None:
                object.__setattr__(self, name, local_path(folder, name))
                if not getattr(self, name).is_dir():
                    raise FileNotFoundError(f"{name} {folder} is not a folder.")


@dataclass
class MattingConfig(tfds.core.BuilderConfig):
    """The builder's configuration of `matting_folder/NAME`; `own` is used while it is built."""

    own: OwnMattes | None = None


class MattingFolder(OwnConfigs, MattingBuilder):
    """Foregrounds, alpha mattes and backgrounds of folders."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = """\
Say where your foregrounds, their alpha mattes of the same names, and backgrounds are:
    python -m resfu_jax.data prepare matting_folder/NAME --foregrounds DIR --alphas DIR \
--backgrounds DIR [--trimaps DIR]"""

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[str, dict]]]:
        del dl_manager
        own = self.builder_config.own
        if own is None:
            raise FileNotFoundError(self.MANUAL_DOWNLOAD_INSTRUCTIONS)
        backgrounds = [MatteFiles(*item) for item in pictures_in(own.backgrounds).items()]
        if not backgrounds:
            raise FileNotFoundError(f"backgrounds {own.backgrounds} holds no images.")
        train, validation = _splits(own)
        return {
            "train": self._generate_examples(train),
            "background": self._generate_examples(backgrounds),
            "validation": (
                (files.id, _composed(files, backgrounds, own.trimap_width)) for files in validation
            ),
        }


def _splits(own: OwnMattes) -> tuple[list[MatteFiles], list[MatteFiles]]:
    """The examples of training and validation."""
    foregrounds, alphas = Path(own.foregrounds or ""), Path(own.alphas or "")
    there = [(foregrounds / n).is_dir() for n in ("train", "validation")]
    if any(there):
        for folder in (foregrounds, alphas):
            for name in ("train", "validation"):
                if not (folder / name).is_dir():
                    raise FileNotFoundError(f"{folder} lacks the subfolder {name}.")
        train, validation = (
            _examples(foregrounds / name, alphas / name) for name in ("train", "validation")
        )
    else:
        found = sorted(_examples(foregrounds, alphas), key=lambda e: zlib.crc32(e.id.encode()))
        count = max(1, round(len(found) / 5)) if len(found) > 1 else 0
        train, validation = found[count:], found[:count]
    if not train or not validation:
        raise DataError(
            f"foregrounds {foregrounds} holds {len(train)} for training and {len(validation)} for "
            "validation; both need one."
        )
    if own.trimaps is None:
        return train, validation
    trimaps = pictures_in(own.trimaps)
    if lacking := [files.id for files in validation if files.id not in trimaps]:
        raise FileNotFoundError(
            f"trimaps {own.trimaps} lacks those of {', '.join(lacking[:5])}, which are for "
            "validation."
        )
    return train, [files._replace(trimap=trimaps[files.id]) for files in validation]


def _examples(foregrounds: Path, alphas: Path) -> list[MatteFiles]:
    colours, mattes = pictures_in(foregrounds), pictures_in(alphas)
    names = pair_mattes(foregrounds, alphas, "alpha matte", both=True)
    return [MatteFiles(name, colours[name], mattes[name]) for name in names]


def _composed(
    files: MatteFiles, backgrounds: Sequence[MatteFiles], trimap_width: int
) -> dict[str, bytes | str]:
    """An example for validation."""
    stored, layer = encoded(files), read_layer_files(files)
    chosen = backgrounds[zlib.crc32(files.id.encode()) % len(backgrounds)].image
    try:
        background = images.open_image(chosen, f"the background {chosen}")
    except images.ImageError as error:
        raise DataError(str(error)) from error
    size = layer.alpha.size
    behind = covering(background, *size).crop((0, 0, *size))
    alpha = np.asarray(layer.alpha)
    stored["image"] = png(compose(np.asarray(layer.colours), alpha, np.asarray(behind)))
    if files.trimap is None:
        stored["trimap"] = png(draw_trimap(alpha, trimap_width, trimap_width))
    return stored


BUILDER, OWN = MattingFolder, OwnMattes
