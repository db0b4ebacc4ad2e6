"""`coco_stuff`: everyday photographs, every pixel labelled: 80 things and 91 kinds of stuff.

Caesar et al.: COCO-Stuff: thing and stuff classes in context, CVPR 2018; COCO's images of 2017,
118287 for training and 5000 for validation, with the label maps `stuffthingmaps`. Raw labels are
the ids of COCO-Stuff's list less one, 0 to 181, and 255 for unlabelled pixels, which are ignored.

`coco_stuff` has 171 classes: those ids in order without the eleven things of COCO that were never
labelled (they would be ignored). `coco_stuff/27` has the 27 supercategories, twelve of things and
fifteen of stuff, in the order of PiCIE (Cho et al., CVPR 2021), which STEGO and the linear probes
of feature upsamplers such as LoftUp and JAFAR keep. PiCIE and STEGO use a subset of the images;
here all are in.
"""

from dataclasses import dataclass

import numpy as np
import tensorflow_datasets as tfds
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

# Supercategory: its classes. Things are in the order of their ids, 0 to 90.
_THINGS = {
    "person": "person",
    "vehicle": "bicycle, car, motorcycle, airplane, bus, train, truck, boat",
    "outdoor": "traffic light, fire hydrant, street sign, stop sign, parking meter, bench",
    "animal": "bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe",
    "accessory": "hat, backpack, umbrella, shoe, eye glasses, handbag, tie, suitcase",
    "sports": "frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, "
    "skateboard, surfboard, tennis racket",
    "kitchen": "bottle, plate, wine glass, cup, fork, knife, spoon, bowl",
    "food": "banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake",
    "furniture": "chair, couch, potted plant, bed, mirror, dining table, window, desk, toilet, "
    "door",
    "electronic": "tv, laptop, mouse, remote, keyboard, cell phone",
    "appliance": "microwave, oven, toaster, sink, refrigerator, blender",
    "indoor": "book, clock, vase, scissors, teddy bear, hair drier, toothbrush, hair brush",
}
# The ids 91 to 181 of stuff follow the alphabet.
_STUFF = {
    "ceiling": "ceiling-other, ceiling-tile",
    "floor": "carpet, floor-marble, floor-other, floor-stone, floor-tile, floor-wood",
    "food-stuff": "food-other, fruit, salad, vegetable",
    "furniture-stuff": "cabinet, counter, cupboard, desk-stuff, door-stuff, furniture-other, "
    "light, mirror-stuff, shelf, stairs, table",
    "raw-material": "cardboard, metal, paper, plastic",
    "textile": "banner, blanket, cloth, clothes, curtain, mat, napkin, pillow, rug, "
    "textile-other, towel",
    "wall": "wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood",
    "window": "window-blind, window-other",
    "building": "bridge, building-other, house, roof, skyscraper, tent",
    "ground": "dirt, gravel, ground-other, mud, pavement, platform, playingfield, railroad, road, "
    "sand, snow",
    "plant": "branch, bush, flower, grass, leaves, moss, plant-other, straw, tree",
    "sky": "clouds, sky-other",
    "solid": "hill, mountain, rock, solid-other, stone, wood",
    "structural": "cage, fence, net, railing, structural-other",
    "water": "fog, river, sea, water-other, waterdrops",
}
_UNLABELLED = (
    "street sign, hat, shoe, eye glasses, plate, mirror, window, desk, door, blender, hair brush"
).split(", ")
_COARSE_THINGS = (
    "electronic, appliance, food, furniture, indoor, kitchen, accessory, animal, outdoor, person, "
    "sports, vehicle"
).split(", ")

_GROUP = {name: group for group, names in (_THINGS | _STUFF).items() for name in names.split(", ")}
# Names of the raw labels 0 to 181.
RAW_NAMES = (
    *(name for names in _THINGS.values() for name in names.split(", ")),
    *sorted(name for names in _STUFF.values() for name in names.split(", ")),
)
CLASS_NAMES = tuple(name for name in RAW_NAMES if name not in _UNLABELLED)
COARSE_NAMES = (*_COARSE_THINGS, *_STUFF)
_DOWNLOAD = "about 20.8 GB"
_TERMS = "label maps CC BY 4.0; images under Flickr's terms of use"
INFO = DatasetInfo(
    "coco_stuff",
    CLASS_NAMES,
    palette(1 + len(CLASS_NAMES))[1:],
    examples=(118287, 5000),
    download=_DOWNLOAD,
    terms=_TERMS,
)
COARSE_INFO = DatasetInfo(
    "coco_stuff/27",
    COARSE_NAMES,
    palette(1 + len(COARSE_NAMES))[1:],
    examples=(118287, 5000),
    download=_DOWNLOAD,
    terms=_TERMS,
)

_URLS = (
    "http://images.cocodataset.org/zips/train2017.zip",
    "http://images.cocodataset.org/zips/val2017.zip",
    "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/"
    "stuffthingmaps_trainval2017.zip",
)


@dataclass
class CocoStuffConfig(tfds.core.BuilderConfig):
    """Whether the classes are the 27 supercategories."""

    coarse: bool = False


class CocoStuff(RawBuilder):
    """COCO-Stuff with the images of COCO 2017; 255 is ignored."""

    TITLE = "COCO-Stuff"
    URLS = _URLS
    # As recorded by TensorFlow Datasets, whose coco downloads the same files.
    SHA256 = {
        _URLS[0]: (
            19336861798,
            "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
        ),
        _URLS[1]: (
            815585330,
            "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
        ),
    }
    HOMEPAGE = "https://github.com/nightrome/cocostuff"
    BUILDER_CONFIGS = [
        CocoStuffConfig(name="default", description="171 classes."),
        CocoStuffConfig(name="27", description="27 supercategories.", coarse=True),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"""\
Fetch COCO's images (19.3 and 0.8 GB) and COCO-Stuff's label maps (about 0.7 GB) by hand:
{_URLS[0]}
{_URLS[1]}
{_URLS[2]}
Then run
    python -m resfu_jax.data prepare coco_stuff --manual-dir DIR
(or coco_stuff/27) where DIR holds these zip files, or folders images and annotations, each with
train2017 and val2017."""
    builder_config: CocoStuffConfig

    @property
    def table(self) -> Int16[np.ndarray, "256"]:
        """The position of the name among the classes."""
        if self.builder_config.coarse:
            classes = {k: COARSE_NAMES.index(_GROUP[name]) for k, name in enumerate(RAW_NAMES)}
        else:
            position = {name: index for index, name in enumerate(CLASS_NAMES)}
            classes = {k: position.get(name, INFO.ignore_label) for k, name in enumerate(RAW_NAMES)}
        return label_table(classes | {INFO.ignore_label: INFO.ignore_label})

    def find_examples(self, files: RawFiles) -> dict[str, list[RawExample]]:
        """The official split."""
        splits = {}
        for split, folder in (("train", "train2017"), ("validation", "val2017")):
            images = files.find(folder, below=["images"], suffix=".jpg")
            # The label maps lie in folders of the same names.
            labels = files.find(folder, below=["annotations", "stuffthingmaps"], suffix=".png")
            if images is None or labels is None:
                kind = "images (.jpg)" if images is None else "label maps (.png)"
                raise self.missing(files, f"folder {folder} with {kind}")
            splits[split] = pair_files(images[0], labels[0])
        return splits
