"""`ade20k`: scenes of all kinds, 150 classes.

Zhou et al.: Scene parsing through ADE20K dataset, CVPR 2017; the scene parsing benchmark
(ADEChallengeData2016), 20210 training and 2000 validation images. In the raw label maps 0 is
"other", which is ignored, and k = 1 to 150 is class k - 1.
"""

import numpy as np
from jaxtyping import Int16

from resfu_jax.data.info import DatasetInfo
from resfu_jax.data.raw import (
    RawBuilder,
    RawExample,
    RawFiles,
    label_table,
    pair_files,
    palette,
)

# The first name of each class in the benchmark's objectInfo150.
CLASS_NAMES = tuple(
    """\
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person,
earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea,
mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion,
base, box, column, signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace,
refrigerator, grandstand, path, stairs, runway, case, pool table, pillow, screen door, stairway,
river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop, stove,
palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light,
truck, tower, chandelier, awning, streetlight, booth, television, airplane, dirt track, apparel,
pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain,
conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent,
bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle,
lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan,
pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag""".replace(
        "\n", " "
    ).split(", ")
)
INFO = DatasetInfo(
    "ade20k",
    CLASS_NAMES,
    palette(151)[1:],
    examples=(20210, 2000),
    download="about 0.97 GB",
    terms="non-commercial research and education",
)

_ARCHIVE = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
_SPLITS = ("training", "validation")


class Ade20k(RawBuilder):
    """The ADE20K scene parsing benchmark; raw label 0 is ignored, k is class k - 1."""

    TITLE = "ADE20K"
    URLS = (_ARCHIVE,)
    HOMEPAGE = "http://sceneparsing.csail.mit.edu"
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"""\
Fetch the scene parsing benchmark (not the full ADE20K, whose labels differ) by hand:
{_ARCHIVE}
Then run
    python -m resfu_jax.data prepare ade20k --manual-dir DIR
where DIR holds that zip file, or its folder ADEChallengeData2016 with images/training,
images/validation, annotations/training and annotations/validation."""

    @property
    def table(self) -> Int16[np.ndarray, "256"]:
        """One less; 0 is ignored."""
        return label_table({0: INFO.ignore_label} | {k + 1: k for k in range(len(CLASS_NAMES))})

    def find_examples(self, files: RawFiles) -> dict[str, list[RawExample]]:
        """The benchmark's own split."""
        folders = [f"{kind}/{split}" for kind in ("images", "annotations") for split in _SPLITS]
        found = files.find(*folders, below=["ADEChallengeData2016"])
        if found is None:
            raise self.missing(files, f"folders {', '.join(folders)}")
        return {
            "train": pair_files(found[0], found[2]),
            "validation": pair_files(found[1], found[3]),
        }
