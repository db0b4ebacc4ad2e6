"""`soft_shapes`: a small matting dataset that is drawn instead of downloaded.

Its shapes have what makes alpha hard to find. HAIR: strands around a solid body, thinner than a
pixel towards their ends. GLASS: a body that lets the same share of the background through
everywhere, within a denser rim, with opaque glints. DEFOCUS: an outline that is blurred over many
pixels. Foregrounds and backgrounds are textured alike, so that colours alone do not tell them apart.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw, ImageFilter

from resfu_jax.data.composition import compose, draw_trimap
from resfu_jax.data.info import DatasetInfo
from resfu_jax.data.mattes import MattingBuilder, png
from resfu_jax.data.shapes import texture

INFO = DatasetInfo(
    "soft_shapes",
    mattes=True,
    embedded=True,
    examples=(1000, 100),
    terms="drawn by this library",
)
KINDS = ("hair", "glass", "defocus")

_SUPERSAMPLE = 4  # mattes are drawn this much larger and box-filtered down
_SEED = 2024
_SPLIT_SEED = {"train": 0, "background": 1, "validation": 2}
_TRIMAP_WIDTHS = (5, 16)  # of validation, in pixels; at least and less than


def draw_matte(rng: np.random.Generator, kind: str, size: int = 128) -> np.ndarray:
    """Draws an alpha matte.

    Args:
      rng: the only source of randomness.
      kind: one of `KINDS`.
      size: height and width in pixels.

    Returns:
      alpha (size, size) uint8.
    """
    return {"hair": _hair, "glass": _glass, "defocus": _defocus}[kind](rng, size)


def draw_picture(rng: np.random.Generator, size: int = 128) -> np.ndarray:
    """A texture of two colours, for foregrounds and backgrounds alike: (size, size, 3) uint8."""
    colours = rng.uniform(20, 235, (2, 3)).astype(np.float32)
    first, second = (texture(rng, size, colour, background=True) for colour in colours)
    cells = rng.standard_normal((rng.integers(2, 8),) * 2, np.float32)
    resized = Image.fromarray(cells).resize((size, size), Image.Resampling.BICUBIC)
    share = np.clip(0.5 + 2 * np.asarray(resized), 0, 1)[..., None]
    picture = share * first + (1 - share) * second
    picture += rng.uniform(1, 5) * rng.standard_normal(picture.shape, np.float32)  # sensor noise
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _outline(rng: np.random.Generator, size: int) -> np.ndarray:
    """Points (n, 2) around a smooth blob that fills about a third of the image."""
    angles = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    radius = np.full_like(angles, size * rng.uniform(0.18, 0.28))
    for wave in (2, 3, 5):
        radius *= 1 + rng.uniform(0, 0.4 / wave) * np.sin(wave * angles + rng.uniform(0, 2 * np.pi))
    centre = size * rng.uniform(0.4, 0.6, 2)
    return centre + radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def _canvas(size: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    canvas = Image.new("L", (size * _SUPERSAMPLE,) * 2)
    return canvas, ImageDraw.Draw(canvas)


def _points(xy: np.ndarray) -> list[tuple[float, float]]:
    return [(x, y) for x, y in (_SUPERSAMPLE * xy).tolist()]


def _hair(rng: np.random.Generator, size: int) -> np.ndarray:
    outline, (canvas, draw) = _outline(rng, size), _canvas(size)
    draw.polygon(_points(outline), fill=255)
    middle = outline.mean(axis=0)
    comb = rng.uniform(-1, 1, 2)  # which way all strands bend
    t = np.linspace(0, 1, 12)[:, None]
    for _ in range(int(rng.integers(40, 120))):
        root = outline[int(rng.integers(len(outline)))]
        away = (root - middle) / np.linalg.norm(root - middle)
        length = size * rng.uniform(0.06, 0.22)
        bend = length * (0.5 * comb + rng.normal(0, 0.25, 2))
        strand = root + t * length * away + t**2 * bend
        width = _SUPERSAMPLE * rng.uniform(0.5, 1.5)
        for i in range(len(strand) - 1):
            taper = max(1, round(width * (1 - i / len(strand))))
            draw.line(_points(strand[i : i + 2]), fill=255, width=taper)
    return np.asarray(canvas.reduce(_SUPERSAMPLE))


def _glass(rng: np.random.Generator, size: int) -> np.ndarray:
    outline, (canvas, draw) = _outline(rng, size), _canvas(size)
    body, rim = (int(255 * share) for share in (rng.uniform(0.15, 0.5), rng.uniform(0.6, 0.95)))
    draw.polygon(_points(outline), fill=rim)
    middle, inner = outline.mean(axis=0), 1 - rng.uniform(0.08, 0.2)
    draw.polygon(_points(middle + inner * (outline - middle)), fill=body)
    for _ in range(int(rng.integers(1, 4))):
        x, y = middle + 0.6 * (outline[int(rng.integers(len(outline)))] - middle)
        r = size * rng.uniform(0.01, 0.03)
        box = [_SUPERSAMPLE * v for v in (x - r, y - 2 * r, x + r, y + 2 * r)]
        draw.ellipse(box, fill=255)
    return np.asarray(canvas.reduce(_SUPERSAMPLE))


def _defocus(rng: np.random.Generator, size: int) -> np.ndarray:
    (canvas, draw), spikes = _canvas(size), int(rng.integers(3, 8))
    angles = rng.uniform(0, 2 * np.pi) + np.arange(2 * spikes) * math.pi / spikes
    radius = size * rng.uniform(0.25, 0.36) * np.where(np.arange(2 * spikes) % 2, 0.6, 1.0)
    around = radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    draw.polygon(_points(size * rng.uniform(0.4, 0.6, 2) + around), fill=255)
    blurred = ImageFilter.GaussianBlur(size * rng.uniform(0.012, 0.04))
    return np.asarray(canvas.reduce(_SUPERSAMPLE).filter(blurred))


@dataclass
class SoftShapesConfig(tfds.core.BuilderConfig):
    """Size of the dataset."""

    size: int = 128
    train_examples: int = 1000
    background_examples: int = 300
    validation_examples: int = 100


class SoftShapes(MattingBuilder):
    """Procedurally drawn hair, glass and defocused shapes, and textures to compose them over."""

    BUILDER_CONFIGS = [SoftShapesConfig(name="default", description="128 x 128 pixels.")]
    builder_config: SoftShapesConfig

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict]]]:
        del dl_manager
        config = self.builder_config
        return {
            split: self._draw(split, getattr(config, f"{split}_examples")) for split in self.SPLITS
        }

    def _draw(self, split: str, count: int) -> Iterator[tuple[str, dict]]:
        size = self.builder_config.size
        for index in range(count):
            rng = np.random.default_rng((_SEED, _SPLIT_SEED[split], index))
            key = f"{split}_{index:05d}"
            example: dict[str, Any] = dict(alpha=b"", trimap=b"", id=key)
            picture = draw_picture(rng, size)
            if split != "background":
                alpha = draw_matte(rng, KINDS[index % len(KINDS)], size)
                example["alpha"] = png(alpha)
            if split == "validation":
                picture = compose(picture, alpha, draw_picture(rng, size))
                widths = rng.integers(*_TRIMAP_WIDTHS, 2).tolist()
                example["trimap"] = png(draw_trimap(alpha, *widths))
            yield key, example | {"image": png(picture)}
