"""Decoding and joint augmentation of an image and its label map, with PIL and NumPy.

Geometry follows the half-pixel convention: a crop window in the scaled image is mapped back to a
box in the source image, and only that box is resampled. The image is antialiased bilinear, the
label nearest, both with the same box, so they stay aligned at every scale.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Num, UInt8
from PIL import Image

from resfu_jax import images
from resfu_jax.data.info import CorruptExampleError, DataError, DatasetInfo
from resfu_jax.preprocess import Preprocess


def decode(
    example: dict[str, bytes], info: DatasetInfo, where: str, *, orientation: bool = True
) -> tuple[Image.Image, Image.Image]:
    """Decodes an example and checks it.

    Args:
      example: encoded `image` and `label`.
      info: what the label map may hold.
      where: dataset, split and id of the example, for messages.
      orientation: turn image and label map as their EXIF data say.

    Returns:
      An RGB image and a label map, of 8-bit class indices or of 32-bit depths; see
      `resfu_jax.images`.

    Raises:
      CorruptExampleError: a file cannot be decoded, or holds no image or no label map.
      DataError: the label map differs in size from the image, or holds values that are neither a
        class nor the ignore label.
    """
    try:
        image = images.open_image(
            example["image"], f"the image of {where}", orientation=orientation
        )
        label = info.target.read(
            example["label"], f"the label map of {where}", orientation=orientation
        )
    except images.ImageError as error:
        raise CorruptExampleError(str(error)) from error
    if image.size != label.size:
        raise DataError(
            f"Image and label map of {where} "
            f"{different_sizes(example['image'], image.size, label.size)}"
        )
    info.target.check(label, where)
    return image, label


def different_sizes(data: bytes, image: tuple[int, int], label: tuple[int, int]) -> str:
    """What is said of an encoded image and a label map whose (width, height) are different."""
    text = f"differ in size: {image[0]}x{image[1]} against {label[0]}x{label[1]} (width x height)."
    if images.image_size(data, orientation=False)[::-1] == label:
        text += (
            " The image has an EXIF orientation: it is shown, and used, turned by a quarter, and "
            "the label map was drawn on the image as it is stored. Turn the label map, or prepare "
            "with --ignore-exif."
        )
    return text


def image_size(data: bytes, where: str, *, orientation: bool = True) -> tuple[int, int]:
    """(width, height) of an encoded image, from its header alone."""
    try:
        return images.image_size(data, f"the image of {where}", orientation=orientation)[::-1]
    except images.ImageError as error:
        raise CorruptExampleError(str(error)) from error


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """A (width, height) times `scale`, rounded, at least one pixel each."""
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def resample(
    image: Image.Image,
    label: Image.Image,
    scale: float,
    window: tuple[int, int, int, int] | None = None,
) -> tuple[Image.Image, Image.Image]:
    """Scales both by `scale` and cuts out `window`, in one step.

    Args:
      image: RGB image.
      label: label map, of the same size.
      scale: factor on both sides.
      window: (left, top, right, bottom) in pixels of the scaled image; None for all of it.

    Returns:
      Image and label of the size of the window.
    """
    return (
        _resample(image, scale, window, Image.Resampling.BILINEAR),
        _resample(label, scale, window, Image.Resampling.NEAREST),
    )


def _resample(
    picture: Image.Image,
    scale: float,
    window: tuple[int, int, int, int] | None,
    method: Image.Resampling,
) -> Image.Image:
    width, height = scaled_size(picture.size, scale)
    left, top, right, bottom = window or (0, 0, width, height)
    if (width, height) == picture.size:
        return picture if window is None else picture.crop((left, top, right, bottom))
    x, y = picture.width / width, picture.height / height
    box = (left * x, top * y, min(right * x, picture.width), min(bottom * y, picture.height))
    return picture.resize((right - left, bottom - top), method, box=box)


def pad(
    image: Image.Image,
    label: Image.Image,
    height: int,
    width: int,
    color: tuple[int, int, int],
    fill: np.generic,
) -> tuple[UInt8[np.ndarray, "{height} {width} 3"], Num[np.ndarray, "{height} {width}"]]:
    """Arrays of a fixed size: `color` and `fill`, in its type, at the bottom and right."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = color
    values = np.full((height, width), fill)
    pixels[: image.height, : image.width] = np.asarray(image)
    values[: label.height, : label.width] = np.asarray(label)
    return pixels, values


@dataclass(frozen=True)
class Augment:
    """Random scale, crop, flip and colour of one example.

    Attributes:
      crop_size: (height, width) of the result.
      preprocess: how every image is resized, times the random scale, and padded.
      scale_range: bounds of the random scale, drawn uniformly.
      max_class_share: a crop of whose labelled pixels one class has this share or more is drawn
        anew, up to ten times; 1 takes the first. MMSegmentation's `cat_max_ratio`.
      flip: mirror left-right with probability 1/2.
      photometric: `photometric_jitter` on the image.
      fill: label of padded pixels, of the type of label maps.
      area_range: bounds of the share of the image that a crop covers, which is then resized to
        `crop_size`, whatever the scales: `resized_crop`. None: crops of the scaled image.
      aspect_range: bounds of width over height of such a crop.
    """

    crop_size: tuple[int, int]
    preprocess: Preprocess
    scale_range: tuple[float, float]
    max_class_share: float
    flip: bool
    photometric: bool
    fill: np.generic
    area_range: tuple[float, float] | None = None
    aspect_range: tuple[float, float] = (3 / 4, 4 / 3)

    def __call__(
        self, image: Image.Image, label: Image.Image, rng: np.random.Generator
    ) -> tuple[UInt8[np.ndarray, "h w 3"], Num[np.ndarray, "h w"]]:
        """Draws everything from `rng`, so equal generators give equal results."""
        height, width = self.crop_size
        if self.area_range is not None:
            box = resized_crop(image.size, self.area_range, self.aspect_range, rng)
            image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
            label = label.resize((width, height), Image.Resampling.NEAREST, box=box)
        else:
            image, label = self._crop(image, label, rng)
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            label = label.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.photometric:
            image = photometric_jitter(image, rng)
        return pad(image, label, height, width, self.preprocess.pad_color, self.fill)

    def _crop(
        self, image: Image.Image, label: Image.Image, rng: np.random.Generator
    ) -> tuple[Image.Image, Image.Image]:
        """A window of the image at a random scale."""
        height, width = self.crop_size
        scale = self.preprocess.resize_scale(*image.size)
        scale *= rng.uniform(*self.scale_range)
        full_width, full_height = scaled_size(image.size, scale)
        for _ in range(11):
            left = int(rng.integers(max(full_width - width, 0) + 1))
            top = int(rng.integers(max(full_height - height, 0) + 1))
            window = (left, top, min(left + width, full_width), min(top + height, full_height))
            cut = _resample(label, scale, window, Image.Resampling.NEAREST)
            if self.max_class_share == 1 or self._is_mixed(cut):
                break
        return _resample(image, scale, window, Image.Resampling.BILINEAR), cut

    def _is_mixed(self, label: Image.Image) -> bool:
        counts = label.histogram()
        counts[int(self.fill)] = 0
        return max(counts) < self.max_class_share * sum(counts)


def resized_crop(
    size: tuple[int, int],
    area_range: tuple[float, float],
    aspect_range: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[int, int, int, int]:
    """The window of a RandomResizedCrop (Szegedy et al., CVPR 2015, section 6), as torchvision's.

    The area is drawn uniformly, the aspect uniformly in its logarithm; of ten draws the first one
    that fits into the image counts, else the largest window in the middle whose aspect is allowed.

    Args:
      size: (width, height) of the image.
      area_range: bounds of the window's area over that of the image.
      aspect_range: bounds of its width over its height.
      rng: source of randomness.

    Returns:
      (left, top, right, bottom).
    """
    width, height = size
    low, high = aspect_range
    for _ in range(10):
        area = width * height * rng.uniform(*area_range)
        aspect = np.exp(rng.uniform(np.log(low), np.log(high)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(width - w + 1))
            top = int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * high)))
    h = min(height, max(1, round(width / low)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def middle(
    array: Num[np.ndarray, "h w *c"], size: tuple[int, ...], method: Image.Resampling
) -> Num[np.ndarray, "H W *c"]:
    """The middle of an image or label map, resized so that `size`, (height, width), just fits."""
    factor = max(n / m for n, m in zip(size, array.shape[:2], strict=True))
    height, width = (max(n, round(factor * m)) for n, m in zip(size, array.shape[:2], strict=True))
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    resized = np.asarray(Image.fromarray(array).resize((width, height), method))
    return resized[top : top + size[0], left : left + size[1]]


def photometric_jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Random brightness, contrast, saturation and hue, each with probability 1/2.

    The distortion of SSD (Liu et al., ECCV 2016, section 3.6) with the ranges that semantic
    segmentation uses: brightness +-32 of 255, contrast and saturation x0.5 to x1.5, hue +-18
    degrees of 180. Contrast comes before or after the colour changes, also by chance.

    Args:
      image: RGB image.
      rng: source of randomness; always consumed in the same order.

    Returns:
      RGB image of the same size.
    """
    apply = rng.random(5) < 0.5
    brightness = rng.uniform(-32, 32) if apply[0] else 0.0
    contrast = rng.uniform(0.5, 1.5) if apply[1] else 1.0
    saturation = rng.uniform(0.5, 1.5) if apply[2] else 1.0
    hue = int(rng.integers(-18, 19)) * 256 // 180 if apply[3] else 0
    contrast_first = apply[4]

    levels = np.arange(256, dtype=np.float64)
    brighter = np.clip(levels + brightness, 0, 255)
    if contrast_first:
        brighter = np.clip(brighter * contrast, 0, 255)
    image = image.point(_table(brighter) * 3)
    if saturation != 1.0 or hue:
        turned = ((np.arange(256) + hue) % 256).tolist()
        stronger = _table(np.clip(levels * saturation, 0, 255))
        image = image.convert("HSV").point(turned + stronger + list(range(256))).convert("RGB")
    if contrast != 1.0 and not contrast_first:
        image = image.point(_table(np.clip(levels * contrast, 0, 255)) * 3)
    return image


def _table(values: np.ndarray) -> list[int]:
    return np.rint(values).astype(np.uint8).tolist()
