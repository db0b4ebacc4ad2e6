"""`shapes`: a small segmentation dataset that is drawn instead of downloaded.

It shows what a feature upsampler is for. FILLED shapes (disc, square, triangle, star) need crisp
outlines, THIN ones (ring, cross, line; 2 to 5 pixels wide) vanish in a coarse feature map, and
shapes that TOUCH or overlap must not bleed into each other. Shapes are mottled: patches of a hue
that is typical of the class, on a ground of any colour. A small network learns in minutes which
class it sees, but only from a neighbourhood: single pixels do not tell, so that what is known
coarsely has to be brought to the outlines, which the image shows.
"""

import colorsys
import dataclasses
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw, ImageFilter

from resfu_jax.data.info import DatasetInfo, DepthMap

CLASS_NAMES = ("background", "disc", "square", "triangle", "star", "ring", "cross", "line")
PALETTE = (
    (40, 40, 48),
    (230, 75, 60),
    (70, 130, 230),
    (80, 190, 90),
    (245, 200, 50),
    (165, 90, 205),
    (60, 205, 210),
    (245, 140, 190),
)
INFO = DatasetInfo(
    "shapes",
    CLASS_NAMES,
    PALETTE,
    embedded=True,
    examples=(2000, 200),
    terms="drawn by this library",
)
OUTLINE_IGNORED_INFO = dataclasses.replace(INFO, name="shapes/outline_ignored")
DEPTH_INFO = dataclasses.replace(
    INFO, name="shapes/depth", class_names=(), palette=(), depth=DepthMap(scale=0.001)
)

_SUPERSAMPLE = 4  # masks are drawn this much larger and box-filtered down: antialiased edges
_MIN_CONTRAST = 60.0  # smallest distance between two base colours of one image, in RGB units
_HUE_SPREAD = 0.025  # standard deviation of a class's hue, in turns; classes are 1/7 apart
_FOG = np.float32(225.0)  # grey of the fog in `draw_depth_example`
_SEED = 2024
_SPLIT_SEED = {"train": 0, "validation": 1}


def draw_example(
    rng: np.random.Generator,
    size: int = 128,
    max_shapes: int = 10,
    ignore_outlines: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws one image and its label map.

    Args:
      rng: the only source of randomness.
      size: height and width in pixels; the shapes scale with it, thin strokes do not.
      max_shapes: the image holds 1 to `max_shapes` shapes.
      ignore_outlines: whether the one pixel around each shape is labelled as ignored.

    Returns:
      image (size, size, 3) uint8 and label (size, size) uint8.
    """
    image, label, _ = _draw(rng, size, max_shapes, ignore_outlines)
    return _with_noise(rng, image), label


def draw_depth_example(
    rng: np.random.Generator, size: int = 128, max_shapes: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """Draws one image in fog, and its depth.

    The ground is a slanted plane, 9 m away at the top and 5 m at the bottom; each shape is nearer
    than those that were drawn before it, from 4.5 m on. Fog hides what is far: with z the depth,
    exp(-z / 5 m) of a colour is left.

    Args:
      rng: as for `draw_example`.
      size: as well.
      max_shapes: as well.

    Returns:
      image (size, size, 3) uint8 and depth in millimetres, (size, size) uint16.
    """
    image, _, owner = _draw(rng, size, max_shapes, False)
    ground = np.broadcast_to(np.linspace(9.0, 5.0, size)[:, None], (size, size))
    nearer = np.sort(rng.uniform(1.0, 4.5, owner.max()))[::-1]
    depth = np.where(owner > 0, np.append(0.0, nearer)[owner], ground)
    left = np.exp(-depth / 5)[..., None].astype(np.float32)
    image = left * image + (1 - left) * _FOG
    return _with_noise(rng, image), np.rint(1000 * depth).astype(np.uint16)


def _draw(
    rng: np.random.Generator, size: int, max_shapes: int, ignore_outlines: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image without noise, label map, and which shape is on top: 0 the ground, 1 the lowest, ..."""
    count = int(rng.integers(1, max_shapes + 1))
    colours = [_colour(rng, 0, [])]  # background
    image = texture(rng, size, colours[0], background=True)
    label = np.zeros((size, size), np.uint8)
    owner = np.zeros((size, size), np.int32)  # which shape is on top; 0 is the background
    areas: list[int] = []
    placed: list[tuple[float, float, float]] = []

    for _ in range(count):
        for _ in range(10):
            kind = int(rng.integers(1, len(CLASS_NAMES)))
            x, y, radius = _place(rng, size, placed, thin=kind >= 5)
            coverage = _coverage(rng, kind, x, y, radius, size)
            mask = coverage >= 0.5
            if mask.sum() >= 24 and _leaves_others_visible(mask, owner, areas):
                break
        else:
            continue
        placed.append((x, y, radius))
        areas.append(int(mask.sum()))
        owner[mask] = len(areas)
        if ignore_outlines:
            grown = Image.fromarray(mask.astype(np.uint8)).filter(ImageFilter.MaxFilter(3))
            label[np.asarray(grown) > 0] = INFO.ignore_label
        label[mask] = kind
        ground = _colour(rng, None, colours)
        patches = _colour(rng, kind, [*colours, ground])
        colours += [ground, patches]
        inside = _bounding_box(coverage)
        mottled = (smooth_noise(rng, size, cells=size // 8)[inside] > 0)[..., None]
        fill = texture(rng, size, ground, inside) + mottled * (patches - ground)
        alpha = coverage[inside][..., None]
        image[inside] = image[inside] * (1 - alpha) + fill * alpha

    return image, label, owner


def _with_noise(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """The sensor's noise, and its 8 bits."""
    image = image + rng.uniform(1, 5) * rng.standard_normal(image.shape, np.float32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _colour(rng: np.random.Generator, kind: int | None, others: list[np.ndarray]) -> np.ndarray:
    """A base colour: of the class's hue, greyish for the background, any for `None`."""
    contrast = _MIN_CONTRAST
    while True:
        hue, saturation = rng.uniform(), rng.uniform(0.2, 0.9)
        if kind == 0:
            saturation = rng.uniform(0, 0.2)
        elif kind is not None:
            hue = (kind - 1) / (len(CLASS_NAMES) - 1) + _HUE_SPREAD * rng.standard_normal()
            saturation = rng.uniform(0.6, 0.95)
        rgb = colorsys.hsv_to_rgb(hue % 1, saturation, rng.uniform(0.45, 0.9))
        candidate = 255 * np.array(rgb, np.float32)
        if all(np.linalg.norm(candidate - other) >= contrast for other in others):
            return candidate
        contrast *= 0.98  # a crowded image must not stall the loop


def smooth_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Unit-variance noise on a grid of `cells`, bicubically enlarged to (size, size)."""
    coarse = rng.standard_normal((cells, cells), np.float32)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def _bounding_box(coverage: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the pixels that are not 0."""
    rows, columns = (np.flatnonzero(coverage.any(axis=axis)) for axis in (1, 0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def texture(
    rng: np.random.Generator,
    size: int,
    colour: np.ndarray,
    inside: tuple[slice, slice] = (slice(None), slice(None)),
    background: bool = False,
) -> np.ndarray:
    """Rows and columns of a float32 field around `colour`: gradient, stripes and smooth noise."""
    yx = np.linspace(-1, 1, size, dtype=np.float32)
    rows, columns = (yx[s] for s in inside)
    angle = rng.uniform(0, np.pi)
    along = math.cos(angle) * columns[None, :] + math.sin(angle) * rows[:, None]
    field = rng.uniform(0, 18) * along
    if rng.random() < 0.4:
        waves = rng.uniform(3, 14) * size / 128
        field = field + rng.uniform(5, 14) * np.sin(np.pi * waves * along + rng.uniform(0, 6))
    tint = rng.uniform(0.6, 1.0, 3).astype(np.float32)
    out = colour + field[..., None] * tint
    if background or rng.random() < 0.5:
        cells = int(rng.integers(3, 24))
        strength = rng.uniform(4, 12)
        out = out + strength * smooth_noise(rng, size, cells)[inside][..., None] * tint
    return out


def _place(
    rng: np.random.Generator,
    size: int,
    placed: list[tuple[float, float, float]],
    thin: bool,
) -> tuple[float, float, float]:
    """Centre and radius in pixels; half of the shapes are put against one that is there."""
    radius = size * rng.uniform(0.11, 0.25 if thin else 0.23)
    if placed and rng.random() < 0.5:
        x, y, other = placed[int(rng.integers(len(placed)))]
        angle = rng.uniform(0, 2 * np.pi)
        reach = (radius + other) * rng.uniform(0.6, 1.0)
        x, y = x + reach * np.cos(angle), y + reach * np.sin(angle)
        if 0.05 * size < x < 0.95 * size and 0.05 * size < y < 0.95 * size:
            return x, y, radius
    x, y = rng.uniform(0.08 * size, 0.92 * size, 2)
    return x, y, radius


def _leaves_others_visible(mask: np.ndarray, owner: np.ndarray, areas: list[int]) -> bool:
    """True if every shape below keeps most of its pixels once `mask` lies on top."""
    left = np.bincount(owner[~mask], minlength=len(areas) + 1)[1:]
    return bool(np.all(left >= 0.6 * np.asarray(areas)))


def _coverage(
    rng: np.random.Generator, kind: int, x: float, y: float, radius: float, size: int
) -> np.ndarray:
    """Fraction of each pixel that a shape covers, (size, size) float32 in [0, 1]."""
    s = _SUPERSAMPLE
    canvas = Image.new("L", (size * s, size * s))
    draw = ImageDraw.Draw(canvas)
    angle = rng.uniform(0, 2 * np.pi)
    stroke = rng.uniform(2.5, 5.0)

    def polygon(angles: np.ndarray, radii: Any, fill: int = 255) -> None:
        px = s * (x + radii * np.cos(angle + angles))
        py = s * (y + radii * np.sin(angle + angles))
        draw.polygon(list(zip(px.tolist(), py.tolist(), strict=True)), fill=fill)

    def disc(r: float, fill: int) -> None:
        draw.ellipse([s * (x - r), s * (y - r), s * (x + r), s * (y + r)], fill=fill)

    def bar(half_length: float, width: float, turn: float) -> None:
        corner = np.arctan2(width / 2, half_length)
        corners = np.array([corner, np.pi - corner, np.pi + corner, -corner])
        polygon(turn + corners, np.hypot(half_length, width / 2))

    match CLASS_NAMES[kind]:
        case "disc":
            disc(0.9 * radius, 255)
        case "square":
            polygon(np.arange(4) * np.pi / 2, 1.1 * radius)
        case "triangle":
            polygon(np.arange(3) * 2 * np.pi / 3, 1.25 * radius)
        case "star":
            spikes = np.where(np.arange(10) % 2, 0.45, 1.2) * radius
            polygon(np.arange(10) * np.pi / 5, spikes)
        case "ring":
            disc(radius, 255)
            disc(max(radius - stroke, 0), 0)
        case "cross":
            bar(1.1 * radius, stroke, 0.0)
            bar(1.1 * radius, stroke, np.pi / 2)
        case "line":
            bar(rng.uniform(1.2, 2.8) * radius, rng.uniform(2.0, 4.0), 0.0)
    return np.asarray(canvas.reduce(s), np.float32) / 255


@dataclass
class ShapesConfig(tfds.core.BuilderConfig):
    """Size of the dataset and what its labels say about outlines."""

    size: int = 128
    train_examples: int = 2000
    validation_examples: int = 200
    ignore_outlines: bool = False
    depth: bool = False


class Shapes(tfds.core.GeneratorBasedBuilder):
    """Procedurally drawn filled, thin and touching shapes over a textured background."""

    VERSION = tfds.core.Version("1.2.0")
    BUILDER_CONFIGS = [
        ShapesConfig(name="default", description="Every pixel belongs to a class."),
        ShapesConfig(
            name="outline_ignored",
            description="The pixel around each shape is labelled 255, to be ignored.",
            ignore_outlines=True,
        ),
        ShapesConfig(
            name="depth", description="Depth in millimetres, of the shapes in fog.", depth=True
        ),
    ]
    builder_config: ShapesConfig

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                    "label": tfds.features.Image(
                        shape=(None, None, 1),
                        dtype=np.uint16 if self.builder_config.depth else np.uint8,
                        encoding_format="png",
                    ),
                    "id": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict]]]:
        return {
            "train": self._generate_examples("train", self.builder_config.train_examples),
            "validation": self._generate_examples(
                "validation", self.builder_config.validation_examples
            ),
        }

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[str, dict]]:
        config = self.builder_config
        for index in range(count):
            rng = np.random.default_rng((_SEED, _SPLIT_SEED[split], index))
            if config.depth:
                image, label = draw_depth_example(rng, size=config.size)
            else:
                image, label = draw_example(
                    rng, size=config.size, ignore_outlines=config.ignore_outlines
                )
            key = f"{split}_{index:05d}"
            yield key, {"image": _png(image), "label": _png(label), "id": key}


def _png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
