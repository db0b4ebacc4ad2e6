"""What is known about a dataset without reading it: its classes and their colours."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetInfo:
    """Classes, colours and conventions of one segmentation dataset.

    Attributes:
      name: the name that `open_source` and `prepare` take, for instance `"camvid/clean"`.
      class_names: names in the order of the label values 0, 1, ...
      palette: an (R, G, B) colour for every class.
      ignore_label: label value of pixels that count neither in the loss nor in the metrics.
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


class DataError(ValueError):
    """An example that cannot be used. The message names dataset, split and example."""


class CorruptExampleError(DataError):
    """An example whose image or label file cannot be decoded at all."""


class DatasetNotPrepared(FileNotFoundError):
    """The dataset is not on this machine yet. The message is the command that prepares it."""
