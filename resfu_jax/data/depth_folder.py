"""`depth_folder/NAME`: your own images and depth maps, also pseudo-labels of another model.

The depth map of an image is a file of the same name, in the same subfolder, which may end in
`_depth`: PNG (8 or 16 bits), TIFF, .npy, or .npz with one array or one that is named `depth`. Its
numbers times `scale` are depths, in metres as a rule; those that equal `invalid`, are not above 0
or not finite say that nothing is known. Folders come from `OwnDepth`, or are DIR/images and
DIR/depth of a manual folder. Images for validation are those of `image_folder/NAME`: of folders of
their own, of subfolders train and validation, or a fifth.
"""

import io
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Num
from PIL import Image

from resfu_jax import images
from resfu_jax._checks import is_number
from resfu_jax._files import local_path
from resfu_jax.data.image_folder import ImageFolder, OwnImages, own_name
from resfu_jax.data.info import DataError, DatasetInfo, DepthMap
from resfu_jax.data.raw import RawExample, RawFiles, depth_features

PREFIX = "depth_folder"


@dataclass(frozen=True)
class OwnDepth:
    """Where one's own images and depth maps are, and what the numbers mean.

    Attributes:
      images: folder of the images; None: `images` in the manual folder.
      depth: folder of their depth maps; None: `depth` in the manual folder.
      validation_images: folder of the images for validation; None: some of the others.
      validation_depth: folder of their depth maps.
      scale: depth that the number 1 stands for: 0.001 for millimetres.
      invalid: number that says that nothing is known.
      orientation: images and depth maps are turned as their EXIF data say.

    Raises:
      ValueError: one folder without the other, or a number that is none.
    """

    images: str | os.PathLike | None = None
    depth: str | os.PathLike | None = None
    validation_images: str | os.PathLike | None = None
    validation_depth: str | os.PathLike | None = None
    scale: float = 0.001
    invalid: float = 0.0
    orientation: bool = True

    def __post_init__(self) -> None:
        for pair in (("images", "depth"), ("validation_images", "validation_depth")):
            given = {name: getattr(self, name) for name in pair if getattr(self, name) is not None}
            for name, folder in given.items():
                if len(given) == 1:
                    raise ValueError(f"{' and '.join(pair)} go together, got only {name} {folder}.")
                object.__setattr__(self, name, local_path(folder, name))
                if not getattr(self, name).is_dir():
                    raise FileNotFoundError(f"{name} {folder} is not a folder.")
        if self.validation_images is not None and self.images is None:
            raise ValueError("validation_images must be None unless images are given.")
        if not is_number(self.scale) or self.scale <= 0:
            raise ValueError(f"scale must be a positive number, got {self.scale!r}.")
        if not is_number(self.invalid):
            raise ValueError(f"invalid must be a number, got {self.invalid!r}.")


@dataclass
class DepthFolderConfig(tfds.core.BuilderConfig):
    """The builder's configuration of `depth_folder/NAME`; `own` is used while it is built."""

    own: OwnDepth = OwnDepth()


def create_config(name: str, own: OwnDepth | None = None) -> DepthFolderConfig:
    """The builder's configuration of `depth_folder/NAME`; `own` is for building it."""
    return DepthFolderConfig(
        name=own_name(name, PREFIX),
        description="Images and depth maps of a folder.",
        own=own or OwnDepth(),
    )


def read_info(name: str, builder: tfds.core.GeneratorBasedBuilder) -> DatasetInfo:
    """What the numbers of a prepared depth folder mean."""
    metadata, splits = builder.info.metadata, builder.info.splits
    return DatasetInfo(
        name,
        depth=DepthMap(scale=metadata["scale"], invalid=metadata["invalid"]),
        examples=(splits["train"].num_examples, splits["validation"].num_examples),
        terms="your own",
        notes=tuple(metadata["notes"]),
    )


class DepthFolder(ImageFolder):
    """Images and depth maps of a folder."""

    TITLE = "depth_folder"
    LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".npy", ".npz")
    MANUAL_DOWNLOAD_INSTRUCTIONS = """\
Put your images into DIR/images and their depth maps (16-bit PNG in millimetres, the same names)
into DIR/depth. Then run
    python -m resfu_jax.data prepare depth_folder/NAME --manual-dir DIR
or, with folders and numbers of any kind,
    python -m resfu_jax.data prepare depth_folder/NAME --images DIR --depth DIR --scale 0.001"""

    def _info(self) -> tfds.core.DatasetInfo:
        return depth_features(self)

    def find_examples(self, files: RawFiles) -> dict[str, list[RawExample]]:
        """The examples of both splits."""
        own, (root,) = self.builder_config.own, files.roots
        if own.images is None:
            for name in ("images", "depth"):
                if not (root / name).is_dir():
                    raise self.missing(files, f"folder {name}")
        folders = OwnImages(
            images=own.images or root / "images",
            labels=own.depth or root / "depth",
            validation_images=own.validation_images,
            validation_labels=own.validation_depth,
            orientation=own.orientation,
        )
        splits, note = self._splits(folders, files)
        self.info.metadata.update(scale=own.scale, invalid=own.invalid, notes=[note])
        self._known: list[tuple[float, float, float]] = []  # least, largest, share; of each map
        self._noting = threading.Lock()
        return splits

    def _stored_label(
        self, example: RawExample, label: bytes | None, size: tuple[int, int]
    ) -> tuple[tuple[int, int], bytes]:
        """PNG and TIFF files as they are, arrays as TIFF files."""
        own = self.builder_config.own
        name = f"the depth map {example.label}"
        assert label is not None and example.label is not None  # folders hold both
        try:
            if example.label.suffix.lower() in (".npy", ".npz"):
                label = _tiff(_array(label, name))
            elif not own.orientation:
                label = _tiff(images.read_values(label, name, orientation=False))
            numbers = images.read_values(label, name)
        except images.ImageError as error:
            raise DataError(str(error)) from error
        depths = DepthMap(own.scale, own.invalid).depths(numbers)
        known = depths[depths > 0]
        with self._noting:
            if known.size:
                share = known.size / depths.size
                self._known.append((float(known.min()), float(known.max()), share))
            else:
                self._known.append((np.nan, np.nan, 0.0))
        return numbers.shape[::-1], label

    def _count(self) -> Iterator[tuple[str, dict]]:
        """Notes the range of the depths; no further examples."""
        least, largest, share = np.array(self._known).T
        if not share.any():
            own = self.builder_config.own
            raise DataError(
                f"No pixel of the {len(share)} depth maps has a depth: their numbers are not above "
                f"0, not finite, or invalid ({own.invalid:g})."
            )
        text = (
            f"depths from {np.nanmin(least):.4g} to {np.nanmax(largest):.4g} (metres, if the scale "
            f"is right); known are {share.mean():.1%} of the pixels"
        )
        if empty := int((share == 0).sum()):
            text += f", and none of {empty} of the {len(share)} depth maps"
        self.info.metadata["notes"] = [*self.info.metadata["notes"], text]
        yield from ()


BUILDER, OWN = DepthFolder, OwnDepth


def _array(data: bytes, name: str) -> Num[np.ndarray, "h w"]:
    """The array of a .npy or .npz file; a `DataError` if it is not one depth map."""
    try:
        found = np.load(io.BytesIO(data), allow_pickle=False)
        if not isinstance(found, np.ndarray):
            known = found.files
            key = "depth" if "depth" in known else known[0]
            if len(known) > 1 and key != "depth":
                raise DataError(f"{name} has the arrays {known}; name one of them 'depth'.")
            found = found[key]
    except DataError:
        raise
    except Exception as error:  # NumPy raises whatever the bytes lead to
        raise DataError(f"{name} cannot be read as an array: {error}") from error
    found = found.reshape(found.shape[-2:]) if found.size == np.prod(found.shape[-2:]) else found
    if found.ndim != 2 or not found.size or found.dtype.kind not in "uif":
        raise DataError(
            f"{name} holds {found.dtype} of shape {found.shape}; a depth map has numbers of shape "
            "(height, width)."
        )
    return found


def _tiff(numbers: Num[np.ndarray, "h w"]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(numbers.astype(np.float32)).save(
        buffer, "TIFF", compression="tiff_adobe_deflate"
    )
    return buffer.getvalue()
