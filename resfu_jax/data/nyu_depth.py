"""`nyu_depth_v2`: indoor scenes with the depth of a Kinect, 640x480, in metres.

Silberman, Hoiem, Kohli and Fergus, "Indoor Segmentation and Support Inference from RGBD Images",
ECCV 2012. A manual folder holds one of

    nyu_depth_v2_labeled.mat, splits.mat      the 1449 labelled images, 795 and 654
    train/SCENE/*.h5, val/official/*.h5       the layout of FastDepth, which tfds reads: 47,584 and
                                              654; also below nyudepthv2/

Of the first, `nyu_depth_v2` has the measured depths (`rawDepths`), with holes, on which BTS and its
successors are evaluated, and `nyu_depth_v2/filled` the filled-in ones (`depths`). Depths are stored
in millimetres.
"""

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float, UInt8
from PIL import Image

from resfu_jax._extras import extra
from resfu_jax.data.info import DataError, DatasetInfo, DepthMap
from resfu_jax.data.raw import RawBuilder, RawFiles, depth_features

INFO = DatasetInfo(
    "nyu_depth_v2",
    depth=DepthMap(scale=0.001),
    download="2.8 GB, by hand",
    terms="not stated by the authors",
)
FILLED_INFO = dataclasses.replace(INFO, name="nyu_depth_v2/filled", examples=(795, 654))
_LABELLED, _SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"


class NyuDepthV2(RawBuilder):
    """NYU Depth V2: images and depths in millimetres, 0 where nothing was measured."""

    TITLE = "NYU Depth V2"
    HOMEPAGE = "https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html"
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="default", description="Measured depths."),
        tfds.core.BuilderConfig(name="filled", description="Depths without holes."),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = """\
Fetch nyu_depth_v2_labeled.mat from https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html (2.8 GB)
and splits.mat from https://cs.nyu.edu/~fergus/datasets/indoor_seg_support.html. Then run
    python -m resfu_jax.data prepare nyu_depth_v2 --manual-dir DIR
where DIR holds both, or the folders train and val of FastDepth's nyudepthv2.tar.gz."""

    def _info(self) -> tfds.core.DatasetInfo:
        return depth_features(self)

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[str, dict]]]:
        try:
            root = Path(dl_manager.manual_dir)
        except AssertionError:  # tfds: no manual folder, or nothing in it
            self._download(dl_manager)
        filled = self.builder_config.name == "filled"
        if (root / _LABELLED).is_file():
            if not (root / _SPLITS).is_file():
                raise self.missing(RawFiles([root]), f"file {_SPLITS}")
            splits = _read_splits(root / _SPLITS)
            name = "depths" if filled else "rawDepths"
            return {
                split: _labelled_examples(root / _LABELLED, name, numbers)
                for split, numbers in splits.items()
            }
        for place in (root, root / "nyudepthv2"):
            if not filled and (place / "train").is_dir() and (place / "val").is_dir():
                return {
                    "train": _h5_examples(place / "train"),
                    "validation": _h5_examples(place / "val"),
                }
        folders = "" if filled else ", nor folders train and val"
        raise self.missing(RawFiles([root]), f"file {_LABELLED}{folders}")


def _read_splits(path: Path) -> dict[str, list[int]]:
    """Numbers, from 1, of the labelled images of both splits."""
    from scipy.io import loadmat  # slow to import

    try:
        content = loadmat(path)
        return {
            split: sorted(int(n) for n in content[name].ravel())
            for split, name in (("train", "trainNdxs"), ("validation", "testNdxs"))
        }
    except Exception as error:  # SciPy raises whatever the bytes lead to
        raise DataError(
            f"{path} cannot be read as the lists trainNdxs and testNdxs: {error}"
        ) from error


def _labelled_examples(path: Path, name: str, numbers: list[int]) -> Iterator[tuple[str, dict]]:
    """Of the MATLAB file, whose arrays are (image, channel, column, row) here."""
    with _open(path) as file:
        images, depths = _entry(file, "images", path), _entry(file, name, path)
        if numbers[0] < 1 or numbers[-1] > len(images) or len(images) != len(depths):
            raise DataError(
                f"{path} has {len(images)} images and {len(depths)} depths, and {_SPLITS} numbers "
                f"from {numbers[0]} to {numbers[-1]}."
            )
        for number in numbers:
            image, depth = images[number - 1].transpose(2, 1, 0), depths[number - 1].T
            yield _example(f"{number:04d}", image, depth, path)


def _h5_examples(folder: Path) -> Iterator[tuple[str, dict]]:
    """Of files that hold `rgb` (channel, row, column) and `depth` (row, column)."""
    paths = sorted(folder.glob("*/*.h5"))
    if not paths:
        raise DataError(f"{folder} has no files SCENE/*.h5.")
    for path in paths:
        with _open(path) as file:
            image = _entry(file, "rgb", path)[:].transpose(1, 2, 0)
            depth = _entry(file, "depth", path)[:]
        yield _example(f"{path.parent.name}_{path.stem}", image, depth, path)


def _open(path: Path) -> Any:
    with extra("depth"):
        import h5py
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path} cannot be read as HDF5 ({error}); download it again.") from error


def _entry(file: Any, name: str, path: Path) -> Any:
    if name not in file:
        raise DataError(f"{path} has no array {name!r}; it has {sorted(file)}.")
    return file[name]


def _example(
    key: str, image: UInt8[np.ndarray, "h w 3"], depth: Float[np.ndarray, "h2 w2"], path: Path
) -> tuple[str, dict]:
    if image.shape[:2] != depth.shape:
        raise DataError(f"{path}: image and depth of {key} are {image.shape} and {depth.shape}.")
    metres = np.where(np.isfinite(depth) & (depth > 0) & (depth < 65.5), depth, 0)
    millimetres = np.rint(1000 * metres.astype(np.float64)).astype(np.uint16)
    return key, {"image": _png(image), "label": _png(millimetres), "id": key}


def _png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, "PNG")
    return buffer.getvalue()
