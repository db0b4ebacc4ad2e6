"""`cityscapes`: street scenes of 50 cities, 2048x1024, 19 classes.

Cordts et al.: The Cityscapes dataset for semantic urban scene understanding, CVPR 2016; the finely
annotated images, 2975 for training and 500 for validation. The label maps come from the files
`*_gtFine_labelIds.png`: of the 34 ids the 19 that the benchmark evaluates become the classes, in
the order of its train ids; all others are ignored.
"""

import numpy as np
from jaxtyping import Int16

from resfu_jax.data.info import DatasetInfo
from resfu_jax.data.raw import (
    RawBuilder,
    RawExample,
    RawFiles,
    RawPath,
    label_table,
    pair_files,
    visible,
)

# Raw id: class and its colour, in the order of the train ids.
_CLASSES = {
    7: ("road", (128, 64, 128)),
    8: ("sidewalk", (244, 35, 232)),
    11: ("building", (70, 70, 70)),
    12: ("wall", (102, 102, 156)),
    13: ("fence", (190, 153, 153)),
    17: ("pole", (153, 153, 153)),
    19: ("traffic light", (250, 170, 30)),
    20: ("traffic sign", (220, 220, 0)),
    21: ("vegetation", (107, 142, 35)),
    22: ("terrain", (152, 251, 152)),
    23: ("sky", (70, 130, 180)),
    24: ("person", (220, 20, 60)),
    25: ("rider", (255, 0, 0)),
    26: ("car", (0, 0, 142)),
    27: ("truck", (0, 0, 70)),
    28: ("bus", (0, 60, 100)),
    31: ("train", (0, 80, 100)),
    32: ("motorcycle", (0, 0, 230)),
    33: ("bicycle", (119, 11, 32)),
}
INFO = DatasetInfo(
    "cityscapes",
    tuple(name for name, _ in _CLASSES.values()),
    tuple(colour for _, colour in _CLASSES.values()),
    examples=(2975, 500),
    download="about 11.8 GB, with a login",
    terms="Cityscapes licence: non-commercial, after registration",
)


class Cityscapes(RawBuilder):
    """Cityscapes, fine annotations; 19 classes, everything else is ignored."""

    TITLE = "Cityscapes"
    HOMEPAGE = "https://www.cityscapes-dataset.com"
    MANUAL_DOWNLOAD_INSTRUCTIONS = """\
Register at https://www.cityscapes-dataset.com, and fetch leftImg8bit_trainvaltest.zip (11 GB) and
gtFine_trainvaltest.zip (241 MB) from its download page. Then run
    python -m resfu_jax.data prepare cityscapes --manual-dir DIR
where DIR holds both zip files, or their folders leftImg8bit and gtFine."""

    @property
    def table(self) -> Int16[np.ndarray, "256"]:
        """The 19 train ids; everything else is ignored."""
        classes = {raw: index for index, raw in enumerate(_CLASSES)}
        return label_table(classes, default=INFO.ignore_label)

    def find_examples(self, files: RawFiles) -> dict[str, list[RawExample]]:
        """The official split; the cities of a split are its folders."""
        images = files.find("leftImg8bit/train", "leftImg8bit/val")
        if images is None:
            raise self.missing(files, "folders leftImg8bit/train and leftImg8bit/val")
        labels = files.find("gtFine/train", "gtFine/val")
        if labels is None:
            raise self.missing(files, "folders gtFine/train and gtFine/val")
        return {
            "train": _all_cities(images[0], labels[0]),
            "validation": _all_cities(images[1], labels[1]),
        }


def _all_cities(images: RawPath, labels: RawPath) -> list[RawExample]:
    return [
        example
        for city in visible(images)
        if city.is_dir()
        for example in pair_files(
            city,
            labels / city.name,
            image_end="_leftImg8bit",
            label_end="_gtFine_labelIds.png",
        )
    ]
