"""Pictures of segmentations in a dataset's fixed class colours."""

import os
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer, UInt8
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


def save_png(path: str | os.PathLike[str], picture: UInt8[np.ndarray, "h w 3"]) -> None:
    """Writes a picture, making its directory if needed."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
