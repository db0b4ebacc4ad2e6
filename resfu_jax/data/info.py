"""What is known of a dataset without reading it: its classes, or what else label maps hold."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32
from PIL import Image

from resfu_jax import images


@dataclass(frozen=True)
class ClassMap:
    """Label maps that hold the class of every pixel, uint8.

    Attributes:
      name: of the dataset, for messages.
      num_classes: number of classes; the ignore label is not one of them.
      ignore_label: label value of pixels that count nowhere.
    """

    name: str
    num_classes: int
    ignore_label: int

    @property
    def fill(self) -> np.generic:
        """What padding holds, of the maps' type."""
        return np.uint8(self.ignore_label)

    def read(self, data: bytes, name: str, *, orientation: bool = True) -> Image.Image:
        """Decodes a map; an `ImageError` if that cannot be done."""
        return Image.fromarray(images.read_label(data, name, orientation=orientation))

    def check(self, label: Image.Image, where: str) -> None:
        """Raises a `DataError` for values that are neither a class nor the ignore label."""
        wrong = [
            value
            for value, count in enumerate(label.histogram())
            if count and value >= self.num_classes and value != self.ignore_label
        ]
        if wrong:
            raise DataError(
                f"The label map of {where} holds the values {wrong}; {self.name} has classes 0 to "
                f"{self.num_classes - 1} and the ignore label {self.ignore_label}."
            )


@dataclass(frozen=True)
class DepthMap:
    """Label maps that hold the depth of every pixel, float32, 0 where it is not known.

    Attributes:
      scale: depth, as a rule in metres, that the number 1 in a file stands for.
      invalid: number that says that nothing is known. So do all that are not above 0, or not
        finite.
    """

    scale: float = 0.001
    invalid: float = 0.0

    @property
    def fill(self) -> np.generic:
        """What padding holds, of the maps' type."""
        return np.float32(0)

    def read(self, data: bytes, name: str, *, orientation: bool = True) -> Image.Image:
        """Decodes a map, PIL mode "F"; an `ImageError` if that cannot be done."""
        return Image.fromarray(self.depths(images.read_values(data, name, orientation=orientation)))

    def depths(self, numbers: Float32[np.ndarray, "h w"]) -> Float32[np.ndarray, "h w"]:
        """Depths of the numbers in a file, 0 where nothing is known."""
        known = np.isfinite(numbers) & (numbers > 0) & (numbers != np.float32(self.invalid))
        return np.where(known, numbers, np.float32(0)) * np.float32(self.scale)

    def check(self, label: Image.Image, where: str) -> None:
        """Any depth may occur."""


@dataclass(frozen=True)
class DatasetInfo:
    """Classes, colours and conventions of one dataset.

    Attributes:
      name: the name that `open_source` and `prepare` take, for instance `"camvid/clean"`.
      class_names: names in the order of the label values 0, 1, ...; none where there are depths.
      palette: an (R, G, B) colour for every class.
      ignore_label: label value of pixels that count neither in the loss nor in the metrics.
      depth: what the numbers of depth maps mean; None: label maps hold classes.
      mattes: examples are foregrounds, alpha mattes and backgrounds, for matting.
      embedded: True if `prepare` needs neither a download nor files from elsewhere.
      examples: number of training and validation images as published; None if unknown.
      download: size of the raw archives, in words.
      terms: licence or terms of use in short.
      notes: what `prepare` found out about one's own images.
    """

    name: str
    class_names: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    ignore_label: int = 255
    depth: DepthMap | None = None
    mattes: bool = False
    embedded: bool = False
    examples: tuple[int, int] | None = None
    download: str = "none"
    terms: str = ""
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes; the ignore label is not one of them."""
        return len(self.class_names)

    @property
    def target(self) -> ClassMap | DepthMap:
        """What label maps hold: how they are read, checked and padded."""
        return self.depth or ClassMap(self.name, self.num_classes, self.ignore_label)


class DataError(ValueError):
    """An example that cannot be used. The message names dataset, split and example."""


class CorruptExampleError(DataError):
    """An example whose image or label file cannot be decoded at all."""


class DatasetNotPrepared(FileNotFoundError):
    """The dataset is not on this machine yet. The message is the command that prepares it."""
