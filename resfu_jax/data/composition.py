"""Foregrounds, alpha mattes and backgrounds to training examples of matting.

An image is the foreground F over a background B, with opacity alpha at every pixel:

    I = alpha F + (1 - alpha) B

Augmentation follows the released code of A2U matting (Dai et al., CVPR 2021), which FADE and SAPA
take over: with probability 1/2 a second foreground behind the first; with 1/4 all resized to a
square of 5/4 of the crop; an affine transform; mirroring; a trimap of random width; a crop around a
pixel of the unknown region; colour jitter of the foreground.

Different here: interpolation is bilinear, crops are centred on partly transparent pixels or edges,
and colours are jittered as for segmentation.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from scipy import ndimage

from resfu_jax._trimap import BACKGROUND, FOREGROUND, UNKNOWN
from resfu_jax.data.info import DataError
from resfu_jax.data.transforms import photometric_jitter

_SECOND, _SQUARE = 0.5, 0.25  # probabilities
_ROTATION, _SHEAR = 30.0, 10.0  # degrees
_ROTATED_FROM = 1024  # smaller images are not rotated, in pixels of the longer side

Grey = UInt8[np.ndarray, "h w"]
Colour = UInt8[np.ndarray, "h w 3"]


class Layer(NamedTuple):
    """A foreground, PIL mode RGB, and its alpha matte, mode L, of one size."""

    colours: Image.Image
    alpha: Image.Image


def compose(foreground: Colour, alpha: Grey, background: Colour) -> Colour:
    """The foreground over the background, rounded."""
    a = alpha[..., None].astype(np.float32) / 255
    image = a * foreground.astype(np.float32) + (1 - a) * background.astype(np.float32)
    return np.rint(image).astype(np.uint8)


def draw_trimap(alpha: Grey, foreground_width: int, background_width: int) -> Grey:
    """0 and 255 where alpha is, away from all else, and 128 between.

    Args:
      alpha: the matte.
      foreground_width: diameter in pixels of the disc by which the region of alpha 255 is eroded;
        1 leaves it.
      background_width: likewise of alpha 0.
    """
    trimap = np.full(alpha.shape, UNKNOWN, np.uint8)
    for value, width in ((FOREGROUND, foreground_width), (BACKGROUND, background_width)):
        known = alpha == value
        if not known.all():
            known &= ndimage.distance_transform_edt(known) > (width - 1) / 2
        trimap[known] = value
    return trimap


def has_edge(alpha: Grey) -> bool:
    """Whether any pixel is partly transparent, or lies at an edge: a trimap has unknown pixels."""
    return bool((alpha != alpha.flat[0]).any() or 0 < alpha.flat[0] < 255)


def check_same_size(image: Image.Image, matte: Image.Image, name: str) -> None:
    """Raises a `DataError` for a matte or trimap that is not of the size of its image."""
    if image.size != matte.size:
        raise DataError(
            f"{name} is {matte.width}x{matte.height} (width x height) and its image "
            f"{image.width}x{image.height}; they have to be of one size."
        )


def check_trimap(trimap: np.ndarray, name: str) -> None:
    """Raises a `DataError` for what is no trimap, or for one without unknown pixels."""
    values = np.unique(trimap).tolist()
    if wrong := [value for value in values if value not in (BACKGROUND, UNKNOWN, FOREGROUND)]:
        raise DataError(
            f"{name} holds the values {wrong[:5]}; a trimap has 0 (background), {UNKNOWN} "
            "(unknown) and 255 (foreground)."
        )
    if UNKNOWN not in values:
        raise DataError(f"{name} has no unknown pixel (value {UNKNOWN}): nothing is left to find.")


def covering(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image, enlarged where it is smaller than this."""
    factor = max(width / image.width, height / image.height)
    if factor <= 1:
        return image
    size = (math.ceil(image.width * factor), math.ceil(image.height * factor))
    return image.resize(size, Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Compose:
    """Draws a training example from a foreground, perhaps a second one, and a background.

    Attributes:
      crop_size: (height, width) of the result.
      scale_range: bounds of the random scale along each axis.
      trimap_width: bounds of the diameters by which known regions are eroded, see `draw_trimap`.
      flip: mirror along each axis with probability 1/2.
      photometric: `photometric_jitter` of the foreground.
    """

    crop_size: tuple[int, int]
    scale_range: tuple[float, float]
    trimap_width: tuple[int, int]
    flip: bool
    photometric: bool

    def wants_second(self, rng: np.random.Generator) -> bool:
        """Whether there is a second foreground; the first draw of an example."""
        return rng.random() < _SECOND

    def __call__(
        self,
        layer: Layer,
        second: Layer | None,
        background: Image.Image,
        rng: np.random.Generator,
    ) -> dict[str, np.ndarray]:
        """Draws everything from `rng`, so equal generators give equal results.

        Returns:
          `image`, `foreground` and `background` (h, w, 3), `alpha` and `trimap` (h, w), of uint8.
        """
        height, width = self.crop_size
        margin = self.trimap_width[1] // 2 + 1  # what a trimap depends on around the crop
        window = width + 2 * margin, height + 2 * margin
        size = layer.alpha.size
        if rng.random() < _SQUARE:
            size = (round(1.25 * width), round(1.25 * height))
        to_canvas = self._affine(size, rng)
        start = self._start(layer, size, to_canvas, rng) - margin

        def cut(layer: Layer) -> tuple[Colour, Grey]:
            # Canvas -> the layer's own pixels: back through the transform, and through resizing.
            fit = np.diag([layer.alpha.width / size[0], layer.alpha.height / size[1], 1.0])
            shift = np.eye(3)
            shift[:2, 2] = start
            matrix = (fit @ np.linalg.inv(to_canvas) @ shift)[:2].ravel().tolist()
            affine, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
            return tuple(
                np.asarray(part.transform(window, affine, matrix, bilinear)) for part in layer
            )

        foreground, alpha = cut(layer)
        if second is not None:
            foreground, alpha = _over((foreground, alpha), cut(second))
        widths = rng.integers(self.trimap_width[0], self.trimap_width[1] + 1, 2)
        trimap = draw_trimap(alpha, *map(int, widths))
        inside = slice(margin, margin + height), slice(margin, margin + width)
        foreground, alpha, trimap = foreground[inside], alpha[inside], trimap[inside]
        if self.photometric:
            foreground = np.asarray(photometric_jitter(Image.fromarray(foreground), rng))
        background = covering(background, width, height)
        left, top = (
            int(rng.integers(n - m + 1))
            for n, m in zip(background.size, (width, height), strict=True)
        )
        behind = np.asarray(background.crop((left, top, left + width, top + height)))
        return dict(
            image=compose(foreground, alpha, behind),
            trimap=trimap,
            alpha=np.ascontiguousarray(alpha),
            foreground=np.ascontiguousarray(foreground),
            background=behind,
        )

    def _affine(self, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """Pixels (x, y, 1) of an image of `size` (width, height) -> of the canvas, of that size.

        Flips, scales, shears and rotates about the middle, and enlarges what the crop exceeds.
        """
        angle, shear = np.deg2rad(rng.uniform(-1, 1, 2) * (_ROTATION, _SHEAR))
        if max(size) < _ROTATED_FROM:
            angle = 0.0
        scale = rng.uniform(*self.scale_range, 2)
        scale *= max(1.0, *(n / m for n, m in zip(self.crop_size[::-1], size, strict=True)))
        signs = np.where(rng.random(2) < 0.5, -1, 1) if self.flip else np.ones(2)
        cos, sin = np.cos(angle), np.sin(angle)
        turn = np.array([[cos, -sin], [sin, cos]])
        linear = turn @ np.array([[1, np.tan(shear)], [0, 1]]) @ np.diag(scale * signs)
        middle = np.array(size) / 2
        matrix = np.eye(3)
        matrix[:2, :2], matrix[:2, 2] = linear, middle - linear @ middle
        return matrix

    def _start(
        self,
        layer: Layer,
        size: tuple[int, int],
        to_canvas: np.ndarray,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """The left and top of a crop around an unknown pixel, within the image if it fits in."""
        alpha = np.asarray(layer.alpha)
        candidates = np.flatnonzero((alpha > 0) & (alpha < 255))
        if not candidates.size:
            candidates = np.flatnonzero(ndimage.maximum_filter(alpha, 3) != alpha)
        if not candidates.size:
            candidates = np.arange(alpha.size)
        row, column = divmod(int(candidates[rng.integers(candidates.size)]), alpha.shape[1])
        fit = np.array(size) / layer.alpha.size
        x, y = (to_canvas @ [(column + 0.5) * fit[0], (row + 0.5) * fit[1], 1.0])[:2]
        corners = to_canvas @ [[0, size[0], 0, size[0]], [0, 0, size[1], size[1]], [1, 1, 1, 1]]
        start = []
        for centre, side, along in zip((x, y), self.crop_size[::-1], corners, strict=False):
            low, high = math.ceil(along.min()), math.floor(along.max()) - side
            start.append(np.clip(round(centre - side / 2), low, max(low, high)))
        return np.array(start, np.float64)


def _over(first: tuple[Colour, Grey], second: tuple[Colour, Grey]) -> tuple[Colour, Grey]:
    """Both foregrounds as one, the first in front, unless nothing of the background was left.

    a = 1 - (1 - a1) (1 - a2) and F = (a1 F1 + (1 - a1) a2 F2) / a.
    """
    a1, a2 = (alpha.astype(np.float32) / 255 for _, alpha in (first, second))
    a = 1 - (1 - a1) * (1 - a2)
    if (a == 1).all():
        return first
    f1, f2 = (colours.astype(np.float32) for colours, _ in (first, second))
    share = (a1 / np.maximum(a, 1e-5))[..., None]
    colours = np.where(a[..., None] > 0, share * f1 + (1 - share) * f2, f1)
    return np.rint(colours).astype(np.uint8), np.rint(255 * a).astype(np.uint8)
