"""`voc`: photographs of 20 kinds of objects, and background.

Everingham et al.: The Pascal visual object classes challenge: a retrospective, IJCV 2015; the
segmentation task of 2012, 1464 training and 1449 validation images. Raw labels are the classes;
the outlines of objects and difficult ones have 255 and are ignored.

`voc/train_aug` trains on more images, as most papers do: on those that Hariharan et al. (Semantic
contours from inverse detectors, ICCV 2011; "SBD") labelled, too, without those of VOC's validation
split: 10582. Where both have a label map, it is VOC's. SBD's do not mark outlines as ignored.
"""

import dataclasses
import io
from dataclasses import dataclass

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int16, Integer

from resfu_jax.data.info import DataError, DatasetInfo
from resfu_jax.data.raw import (
    RawBuilder,
    RawExample,
    RawFiles,
    RawPath,
    check_files,
    decode_label,
    label_table,
    palette,
    read_file,
)

CLASS_NAMES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
INFO = DatasetInfo(
    "voc",
    CLASS_NAMES,
    palette(len(CLASS_NAMES)),
    examples=(1464, 1449),
    download="2.0 GB",
    terms="research; images under Flickr's terms of use",
)
TRAIN_AUG_INFO = dataclasses.replace(
    INFO, name="voc/train_aug", examples=(10582, 1449), download="2.0 GB and about 1.4 GB"
)

_VOC = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar"
_SBD = (
    "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/"
    "benchmark.tgz"
)


@dataclass
class VocConfig(tfds.core.BuilderConfig):
    """Whether SBD's images are trained on, too."""

    sbd: bool = False


class Voc(RawBuilder):
    """Pascal VOC 2012, semantic segmentation; 255 is ignored."""

    TITLE = "Pascal VOC 2012"
    # As recorded by TensorFlow Datasets, whose voc downloads the same file.
    SHA256 = {
        _VOC: (
            1999639040,
            "e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb",
        )
    }
    HOMEPAGE = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/"
    BUILDER_CONFIGS = [
        VocConfig(name="default", description="The official split."),
        VocConfig(name="train_aug", description="Trains on the images of SBD, too.", sbd=True),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"""\
Fetch Pascal VOC 2012 by hand:
{_VOC}
and for voc/train_aug SBD, too:
{_SBD}
Then run
    python -m resfu_jax.data prepare voc --manual-dir DIR
(or voc/train_aug) where DIR holds these archives, or their folders VOCdevkit and
benchmark_RELEASE."""
    builder_config: VocConfig

    @property
    def urls(self) -> tuple[str, ...]:
        """SBD's archive only where it is needed."""
        return (_VOC, _SBD) if self.builder_config.sbd else (_VOC,)

    @property
    def table(self) -> Int16[np.ndarray, "256"]:
        """Classes as they are; 255 is ignored."""
        return label_table({k: k for k in (*range(len(CLASS_NAMES)), INFO.ignore_label)})

    def find_examples(self, files: RawFiles) -> dict[str, list[RawExample]]:
        """The lists of `ImageSets/Segmentation`, and with `sbd` the larger training split."""
        found = files.find(
            *("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"),
            below=[
                "VOC2012",
                "VOCdevkit/VOC2012",
                "VOCtrainval_11-May-2012/VOCdevkit/VOC2012",
            ],
        )
        if found is None:
            raise self.missing(files, "JPEGImages, SegmentationClass and ImageSets")
        images, labels, lists = found
        train, validation = (_read_ids(lists / name) for name in ("train.txt", "val.txt"))
        files_of_labels = {name: labels / f"{name}.png" for name in (*train, *validation)}
        if self.builder_config.sbd:
            sbd = files.find("cls", "", below=["dataset", "benchmark_RELEASE/dataset"])
            if sbd is None:
                raise self.missing(files, "folder benchmark_RELEASE/dataset with cls (SBD)")
            more = {*_read_ids(sbd[1] / "train.txt"), *_read_ids(sbd[1] / "val.txt")}
            for name in sorted(more.difference(train, validation)):
                train.append(name)
                files_of_labels[name] = sbd[0] / f"{name}.mat"
        splits = {
            split: [
                RawExample(name, images / f"{name}.jpg", files_of_labels[name]) for name in names
            ]
            for split, names in (("train", train), ("validation", validation))
        }
        for split, examples in splits.items():
            check_files([e.image for e in examples], images, "image", f"of {split}")
            check_files([e.label for e in examples], files, "label map", f"of {split}")
        return splits

    def read_label(self, data: bytes, path: RawPath) -> Integer[np.ndarray, "h w"]:
        """SBD's label maps are MATLAB files: `GTcls.Segmentation`."""
        if path.suffix != ".mat":
            return decode_label(data, path)
        from scipy.io import loadmat  # slow to import, and for this only

        try:
            return loadmat(io.BytesIO(data))["GTcls"]["Segmentation"][0, 0]
        except Exception as error:  # scipy raises whatever the bytes lead to
            raise DataError(f"Cannot decode the label map {path}: {error}") from error


def _read_ids(path: RawPath) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no list of images {path}.")
    return read_file(path).decode().split()
