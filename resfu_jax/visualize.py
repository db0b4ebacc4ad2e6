"""Pictures: segmentations in the classes' colours, features by their principal components."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Integer, UInt8
from PIL import Image


def colorize(
    labels: Integer[np.ndarray, "h w"],
    palette: Sequence[tuple[int, int, int]],
    *,
    ignore_label: int = 255,
) -> UInt8[np.ndarray, "h w 3"]:
    """The colour of each pixel's class; ignored pixels are hatched in white and dark grey."""
    y, x = np.indices(labels.shape)
    hatch = np.where(((y + x) // 3 % 2)[..., None], 255, 64).astype(np.uint8)
    ignored = labels == ignore_label
    colors = np.asarray(palette, np.uint8)[np.where(ignored, 0, labels)]
    return np.where(ignored[..., None], hatch, colors)


def side_by_side(
    image: UInt8[np.ndarray, "h w 3"],
    label: Integer[np.ndarray, "h w"],
    prediction: Integer[np.ndarray, "h w"],
    palette: Sequence[tuple[int, int, int]],
    *,
    ignore_label: int = 255,
    gap: int = 4,
) -> UInt8[np.ndarray, "h wide 3"]:
    """Image | label | prediction, with white gaps of `gap` pixels."""
    panels = [
        image,
        colorize(label, palette, ignore_label=ignore_label),
        colorize(prediction, palette, ignore_label=ignore_label),
    ]
    space = np.full((image.shape[0], gap, 3), 255, np.uint8)
    return np.concatenate([panels[0], space, panels[1], space, panels[2]], axis=1)


@dataclasses.dataclass(frozen=True)
class PCA:
    """The three main directions of a set of feature vectors, as colours.

    Fit on one map and applied to others, equal features get equal colours.
    """

    mean: Float[np.ndarray, " c"]
    directions: Float[np.ndarray, "c 3"]
    low: Float[np.ndarray, "3"]
    high: Float[np.ndarray, "3"]

    @classmethod
    def fit(cls, features: Float[np.ndarray, "... c"]) -> "PCA":
        """Directions, and the range of all but the outermost percent along each."""
        x = np.asarray(features, np.float64).reshape(-1, features.shape[-1])
        mean = x.mean(axis=0)
        _, _, rows = np.linalg.svd(x - mean, full_matrices=False)
        directions = rows[:3].T
        # A direction's sign is arbitrary; fix it, so that pictures repeat.
        directions = directions * np.sign(directions[np.abs(directions).argmax(axis=0), range(3)])
        low, high = np.percentile((x - mean) @ directions, (1, 99), axis=0)
        return cls(mean, directions, low, high)

    def __call__(self, features: Float[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w 3"]:
        """The map in colours; what lies beyond the range is clipped."""
        y = (np.asarray(features, np.float64) - self.mean) @ self.directions
        y = (y - self.low) / np.maximum(self.high - self.low, 1e-12)
        return (255 * np.clip(y, 0, 1)).round().astype(np.uint8)


def save_png(path: str | os.PathLike[str], picture: UInt8[np.ndarray, "h w 3"]) -> None:
    """Writes a picture, making its directory if needed."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def overlay(
    image: UInt8[np.ndarray, "h w 3"],
    labels: Integer[np.ndarray, "h w"],
    palette: Sequence[tuple[int, int, int]],
    *,
    opacity: float = 0.5,
    ignore_label: int = 255,
) -> UInt8[np.ndarray, "h w 3"]:
    """The image under the classes' colours."""
    colors = colorize(labels, palette, ignore_label=ignore_label)
    mixed = (1 - opacity) * image.astype(np.float32) + opacity * colors
    return mixed.round().astype(np.uint8)


def save_labels(
    path: str | os.PathLike[str],
    labels: UInt8[np.ndarray, "h w"],
    palette: Sequence[tuple[int, int, int]],
) -> None:
    """Writes class indices as a PNG that shows them in their colours (PIL mode "P")."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(labels)
    picture.putpalette([value for color in palette for value in color])
    picture.save(path)
