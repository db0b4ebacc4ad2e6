"""Pictures: segmentations in the classes' colours, features by their principal components, weights.

A picture is an array of RGB pixels. Matplotlib is imported where it is used.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Integer, UInt8

from resfu_jax._extras import extra

with extra("train"):
    from PIL import Image, ImageDraw, ImageFont

Path = str | os.PathLike[str]
Panel = tuple[str, UInt8[np.ndarray, "_h _w 3"]]  # title and picture


def colorize(
    labels: Integer[np.ndarray, "h w"],
    palette: Sequence[tuple[int, int, int]],
    *,
    ignore_label: int = 255,
) -> UInt8[np.ndarray, "h w 3"]:
    """The colour of each pixel's class; ignored pixels are hatched in white and dark grey."""
    diagonal = np.indices(labels.shape).sum(axis=0)
    hatch = np.where(diagonal // 3 % 2, 255, 64).astype(np.uint8)[..., None]
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


def compare_predictions(
    path: Path, pictures: Mapping[str, Sequence[Path]], *, gap: int = 4, **layout: Any
) -> None:
    """Image | label | prediction of each model, a row for every image.

    Args:
      path: the picture to write.
      pictures: files as `side_by_side` makes them, the same images for every model.
      gap: as there.
      layout: of `save_grid`.
    """
    panels: list[Panel] = []
    for files in zip(*pictures.values(), strict=True):
        shown = []
        for file in files:
            with Image.open(file) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            width = (pixels.shape[1] - 2 * gap) // 3
            shown.append([pixels[:, i * (width + gap) :][:, :width] for i in range(3)])
        titles = ("", "") if panels else ("image", "label")
        panels += zip(titles, shown[0], strict=False)
        panels += [
            ("" if titles[0] == "" else name, prediction)
            for name, (_, _, prediction) in zip(pictures, shown, strict=True)
        ]
    save_grid(path, panels, columns=2 + len(pictures), **layout)


def save_grid(
    path: Path,
    panels: Sequence[Panel],
    *,
    columns: int,
    width: float = 2.2,
    space: float = 0.05,
    dpi: int = 110,
) -> None:
    """Writes panels side by side, row by row, under their titles.

    Args:
      path: the picture to write; its suffix says which kind.
      panels: titles and pictures; all are shown in the shape of the first.
      columns: panels in a row.
      width: of a panel, in inches.
      space: between panels, in inches.
      dpi: pixels of an inch.
    """
    with extra("train"):
        from matplotlib.figure import Figure

    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    height = width * panels[0][1].shape[0] / panels[0][1].shape[1]
    titles = [0.22 if any(title for title, _ in row) else 0.0 for row in rows]
    whole = (
        columns * width + (columns - 1) * space,
        len(rows) * height + (len(rows) - 1) * space + sum(titles),
    )
    figure = Figure(figsize=whole, dpi=dpi)
    top = 0.0
    for row, title_height in zip(rows, titles, strict=True):
        top += title_height + height
        for i, (title, picture) in enumerate(row):
            box = (i * (width + space), whole[1] - top, width, height)
            left, bottom, across, up = (a / b for a, b in zip(box, whole * 2, strict=True))
            axes = figure.add_axes((left, bottom, across, up))
            axes.imshow(picture, aspect="auto")
            axes.axis("off")
            axes.set_title(title, fontsize=9, pad=3, parse_math=False)
        top += space
    _make_parent(path)
    figure.savefig(path)


def heatmap(
    values: Float[np.ndarray, "h w"], low: float, high: float, colours: str = "viridis"
) -> UInt8[np.ndarray, "h w 3"]:
    """Numbers from `low` to `high` in colours of Matplotlib; grey where they are not finite."""
    with extra("train"):
        from matplotlib import colormaps

    finite = np.isfinite(values)
    share = (np.where(finite, values, low) - low) / max(high - low, 1e-12)
    picture = colormaps[colours](np.clip(share, 0, 1), bytes=True)[..., :3]
    return np.where(finite[..., None], picture, np.uint8(128))


def panels_with_scales(
    panels: Sequence[tuple[UInt8[np.ndarray, "h w 3"], tuple[float, float, str] | None]],
    *,
    gap: int = 4,
) -> UInt8[np.ndarray, "tall wide 3"]:
    """Pictures of one size side by side; below each the scale (low, high, colours) of a heatmap."""
    height, width = panels[0][0].shape[:2]
    size = max(10, width // 24)  # of letters; the bar is half as high
    font = ImageFont.load_default(size)
    page = Image.new(
        "RGB", (len(panels) * (width + gap) - gap, height + gap + size // 2 + size + gap), "white"
    )
    draw = ImageDraw.Draw(page)
    for i, (picture, scale) in enumerate(panels):
        left, top = i * (width + gap), height + gap
        page.paste(Image.fromarray(picture), (left, 0))
        if scale is None:
            continue
        low, high, colours = scale
        ramp = np.broadcast_to(np.linspace(0, 1, width), (size // 2, width))
        page.paste(Image.fromarray(heatmap(ramp, 0.0, 1.0, colours)), (left, top))
        draw.text((left, top + size // 2), f"{low:.3g}", "black", font, anchor="lt")
        draw.text((left + width, top + size // 2), f"{high:.3g}", "black", font, anchor="rt")
    return np.asarray(page)


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
    def fit(cls, features: Float[np.ndarray, "h w c"]) -> "PCA":
        """Directions, and the range of all but the outermost percent along each.

        They are those of the map without its margin of an eighth: what a network sees of the
        padding beyond the image differs more than all that is in it. Of maps with fewer than six
        rows or columns nothing is left out there.
        """
        top, left = (max(1, n // 8) if n > 5 else 0 for n in features.shape[:2])
        inner = features[top : features.shape[0] - top, left : features.shape[1] - left]
        x = np.asarray(inner, np.float64).reshape(-1, features.shape[2])
        mean = x.mean(axis=0)
        _, _, rows = np.linalg.svd(x - mean, full_matrices=False)
        # A tiny map may have fewer than three.
        directions = np.concatenate([rows, np.zeros((3, x.shape[1]))])[:3].T
        # A direction's sign is arbitrary; fix it, so that pictures repeat.
        directions = directions * np.sign(directions[np.abs(directions).argmax(axis=0), range(3)])
        low, high = np.percentile((x - mean) @ directions, (1, 99), axis=0)
        return cls(mean, directions, low, high)

    def __call__(self, features: Float[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w 3"]:
        """The map in colours; what lies beyond the range is clipped."""
        y = (np.asarray(features, np.float64) - self.mean) @ self.directions
        y = (y - self.low) / np.maximum(self.high - self.low, 1e-12)
        return (255 * np.clip(y, 0, 1)).round().astype(np.uint8)


def save_png(path: Path, picture: UInt8[np.ndarray, "h w 3"]) -> None:
    """Writes a picture, making its directory if needed."""
    _make_parent(path)
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


def with_legend(
    picture: UInt8[np.ndarray, "h w 3"],
    names: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
) -> UInt8[np.ndarray, "_h _w 3"]:
    """The picture, and below it names on white, each after a square of its colour.

    It is wider than the picture if a name is.
    """
    size = max(12, picture.shape[1] // 48)  # of letters and squares
    font = ImageFont.load_default(size)
    # From the left edge of a square to that of the next one, in the same row.
    widths = [2 * size + math.ceil(font.getlength(name)) + size for name in names]
    width = max([picture.shape[1], *widths])
    places, left, row = [], 0, 0
    for step in widths:
        if left + step > width:
            left, row = 0, row + 1
        places.append((left + size // 2, picture.shape[0] + 2 * size * row + size // 2))
        left += step
    page = Image.new("RGB", (width, picture.shape[0] + 2 * size * (row + 1)), "white")
    page.paste(Image.fromarray(picture))
    draw = ImageDraw.Draw(page)
    for (x, y), name, color in zip(places, names, colors, strict=True):
        draw.rectangle((x, y, x + size, y + size), fill=tuple(color), outline="black")
        draw.text((x + 1.5 * size, y + size / 2), name, "black", font, anchor="lm")
    return np.asarray(page)


@dataclasses.dataclass(frozen=True)
class Window:
    """The part of an image that shows the weights of one pixel: whole cells of the features.

    Attributes:
      pixel: row and column in the image.
      cell: height and width of a pixel of the features, in pixels of the image.
      rows: first and last + 1 of the features' rows shown.
      columns: likewise.
    """

    pixel: tuple[int, int]
    cell: tuple[int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]

    @classmethod
    def around(
        cls,
        pixel: tuple[int, int],
        image: tuple[int, int],
        features: tuple[int, int],
        *,
        rows: int = 9,
    ) -> "Window":
        """So many rows of features around a pixel, and columns in proportion to the image.

        Args:
          pixel: row and column in the image.
          image: height and width of the image, multiples of those of the features.
          features: height and width of the features.
          rows: at most.
        """
        cell = image[0] // features[0], image[1] // features[1]
        count = min(rows, features[0])
        counts = (count, min(features[1], max(1, round(count * features[1] / features[0]))))
        spans = []
        for p, n, size, side in zip(pixel, counts, features, cell, strict=True):
            first = min(max(p // side - n // 2, 0), size - n)
            spans.append((first, first + n))
        return cls((pixel[0], pixel[1]), cell, *spans)

    def show(
        self,
        image: UInt8[np.ndarray, "H W 3"],
        weights: Float[np.ndarray, "h w"] | None = None,
        *,
        zoom: int = 4,
    ) -> UInt8[np.ndarray, "_ _ 3"]:
        """The window of the image, a cross at the pixel, and the weights over the darkened image.

        The largest weight is drawn opaque, others in proportion; orange is positive, blue negative.

        Args:
          image: the whole image.
          weights: of the features' pixels.
          zoom: how much larger than in the image the window is shown.
        """
        (top, bottom), (left, right) = (
            (first * n, last * n)
            for (first, last), n in zip((self.rows, self.columns), self.cell, strict=True)
        )
        size = (zoom * (right - left), zoom * (bottom - top))
        part = Image.fromarray(image[top:bottom, left:right])
        picture = np.asarray(part.resize(size, Image.Resampling.BICUBIC))
        if weights is not None:
            part = weights[slice(*self.rows), slice(*self.columns)]
            cells = np.kron(part, np.ones([zoom * n for n in self.cell]))
            opacity = np.abs(cells)[..., None] / max(np.abs(weights).max(), 1e-12)
            colour = np.where(cells[..., None] > 0, _POSITIVE, _NEGATIVE)
            picture = (1 - opacity) * 0.45 * picture + opacity * colour
            picture = picture.round().astype(np.uint8)
        centre = (
            zoom * (self.pixel[0] - top) + zoom // 2,
            zoom * (self.pixel[1] - left) + zoom // 2,
        )
        return mark(picture, centre)

    def frame(self, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
        """The whole image, the pixel and the window's outline drawn in."""
        spans = zip((self.rows, self.columns), self.cell, strict=True)
        (top, bottom), (left, right) = ((first * n, last * n - 1) for (first, last), n in spans)
        picture = mark(image, self.pixel)
        width = max(1, image.shape[0] // 150)
        for i in range(width):
            for edge in (
                np.s_[top + i, left : right + 1],
                np.s_[bottom - i, left : right + 1],
                np.s_[top : bottom + 1, left + i],
                np.s_[top : bottom + 1, right - i],
            ):
                picture[edge] = 255
        return picture


_POSITIVE, _NEGATIVE = (255, 170, 30), (60, 130, 255)


def mark(picture: UInt8[np.ndarray, "h w 3"], pixel: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """A copy with a cross at a pixel: white, outlined in black."""
    size = max(3, picture.shape[0] // 40)
    y, x = np.indices(picture.shape[:2])
    dy, dx = np.abs(y - pixel[0]), np.abs(x - pixel[1])
    long, short = np.maximum(dy, dx), np.minimum(dy, dx)
    width = size // 6
    out = np.where(((short <= 2 * width + 1) & (long <= size + width + 1))[..., None], 0, picture)
    return np.where(((short <= width) & (long <= size))[..., None], 255, out).astype(np.uint8)


def save_labels(
    path: Path,
    labels: UInt8[np.ndarray, "h w"],
    palette: Sequence[tuple[int, int, int]],
) -> None:
    """Writes class indices as a PNG that shows them in their colours (PIL mode "P")."""
    _make_parent(path)
    picture = Image.fromarray(labels)
    picture.putpalette([value for color in palette for value in color])
    picture.save(path)


def _make_parent(path: Path) -> None:
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
