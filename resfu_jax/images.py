"""Files of images to pixels: one reader for training, prediction and the server, one for labels.

Pillow decodes. What is decided here is what a reader may not leave open: which way up an image is,
what 16 bits mean, how large it may be, and that a file that cannot be read is named.
"""

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8, UInt32

from resfu_jax._extras import extra

with extra("train"):
    from PIL import Image

# What is read: no format of these runs another program or can hold a drawing.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# The names of such files. They decide what is taken from a folder, not how a file is read.
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# Pixels of an image, as Pillow limits them: half a GiB of RGB. $RESFU_MAX_PIXELS replaces it.
MAX_PIXELS = 178_956_970

# EXIF's orientation to what turns the stored image into the one that viewers show.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What undoes a turn, where it is not itself.
_BACK = {_TURNS[6]: _TURNS[8], _TURNS[8]: _TURNS[6]}
_ORIENTATION, _BITS, _PHOTOMETRIC = 274, 258, 262  # tags of EXIF and TIFF
_ONE_CHANNEL = "1", "L", "P", "I;16"
Source = str | os.PathLike[str] | bytes

# What is wrong with a file is said by `ImageError`. Pillow also warns, without the file's name. (A
# filter for each call would not do: those of the standard library are not safe between threads.)
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageError(ValueError):
    """An image that cannot be used. The message names it and says why."""


def read_image(
    source: Source,
    name: str | None = None,
    *,
    orientation: bool = True,
    max_pixels: int | None = None,
    formats: Sequence[str] = FORMATS,
) -> UInt8[np.ndarray, "h w 3"]:
    """RGB pixels of an encoded image, decoded completely.

    - It is turned as its EXIF data say, and so as viewers show it, unless `orientation` is False.
    - Grey values and palettes become RGB. Transparency is dropped: the colour that the file has
      below it remains.
    - 16-bit values are divided by their range, 65535 becomes 255.
    - Of several pages or frames the first counts.

    Args:
      source: path of the file, or its content.
      name: how messages call it; None: its path.
      orientation: turn it as its EXIF data say. False: the pixels are left as they are stored.
      max_pixels: the largest width times height; None: `$RESFU_MAX_PIXELS`, or `MAX_PIXELS`.
      formats: which of `FORMATS` are read.

    Raises:
      ImageError: there is no such file, it cannot be decoded to its end, it is too large, or its
        values have no range (floating point, 32-bit integers).
    """
    image = open_image(
        source, name, orientation=orientation, max_pixels=max_pixels, formats=formats
    )
    return np.asarray(image)


def open_image(
    source: Source,
    name: str | None = None,
    *,
    orientation: bool = True,
    max_pixels: int | None = None,
    formats: Sequence[str] = FORMATS,
) -> Image.Image:
    """`read_image` as a PIL image of mode RGB, which is in memory."""
    name, data = _read(source, name)
    image, turn = _load(data, name, orientation, max_pixels, formats)
    try:
        return _turned(_rgb(image, name), turn)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"{name}: cannot be read as an image: {_first_line(error)}") from error


def image_size(
    source: Source,
    name: str | None = None,
    *,
    orientation: bool = True,
    max_pixels: int | None = None,
    formats: Sequence[str] = FORMATS,
) -> tuple[int, int]:
    """(height, width) of what `read_image` would return, from the header alone.

    Args:
      source: as for `read_image`.
      name: as well.
      orientation: as well.
      max_pixels: as for `read_image`.
      formats: as well.

    Raises:
      ImageError: as `read_image`, where the header tells.
    """
    name, data = _read(source, name)
    image = _open(data, name, max_pixels, formats)
    width, height = image.size
    # Of TIFF files, which Pillow turns itself, the header has the turned size.
    swap = _orientation(image, data) >= 5 and orientation != (image.format == "TIFF")
    return (width, height) if swap else (height, width)


def read_label(
    source: Source,
    name: str | None = None,
    *,
    orientation: bool = True,
    max_pixels: int | None = None,
) -> UInt8[np.ndarray, "h w"]:
    """The numbers in a label map: a PNG file with one channel.

    A palette's indices and grey values count as they are stored, so a 1-, 2- or 4-bit file holds 0
    to 1, 3 or 15. 16 bits are read if no number exceeds 255. A label map is turned by its own EXIF
    data, if it has any.

    Args:
      source: as for `read_image`.
      name: as well.
      orientation: as well.
      max_pixels: as well.

    Raises:
      ImageError: the file cannot be decoded, is no PNG, has several channels or numbers above 255.
    """
    name, data = _read(source, name)
    image, bits = _load_label(name, data, orientation, max_pixels)
    if image.mode not in _ONE_CHANNEL:
        raise ImageError(
            f"{name} has PIL mode {image.mode!r}; class indices need one channel (mode 'L' or "
            f"'P').{_about_channels(image)}"
        )
    return _numbers(image, bits, name)


def read_values(
    source: Source,
    name: str | None = None,
    *,
    orientation: bool = True,
    max_pixels: int | None = None,
) -> Float32[np.ndarray, "h w"]:
    """The numbers in a map of measurements, such as depths: a PNG or TIFF file with one channel.

    They count as they are stored: 8 or 16 bits of a PNG file, whole or floating-point numbers of a
    TIFF file. It is turned by its own EXIF data, if it has any.

    Args:
      source: as for `read_image`.
      name: as well.
      orientation: as well.
      max_pixels: as well.

    Raises:
      ImageError: the file cannot be decoded, is neither PNG nor TIFF, or has several channels.
    """
    name, data = _read(source, name)
    image, turn = _load(data, name, orientation, max_pixels, FORMATS)
    if image.format not in ("PNG", "TIFF"):
        raise ImageError(
            f"{name}: a map of numbers has to be a PNG or TIFF file, and this is {image.format}"
        )
    if image.mode not in ("L", "I", "F") and not image.mode.startswith("I;16"):
        raise ImageError(f"{name} has PIL mode {image.mode!r}; numbers need one channel")
    return np.array(_turned(Image.fromarray(np.asarray(image, np.float32)), turn))


class Mask(NamedTuple):
    """A label map of any kind.

    Attributes:
      numbers: as they are stored; of a coloured RGB file, the positions of the colours.
      colours: (R, G, B) of each number.
      kind: `"grey"` and `"palette"` have numbers; `"rgb"` has colours only.
    """

    numbers: UInt8[np.ndarray, "h w"]
    colours: UInt8[np.ndarray, "256 3"]
    kind: Literal["grey", "palette", "rgb"]


def read_mask(
    source: Source,
    name: str | None = None,
    *,
    orientation: bool = True,
    max_pixels: int | None = None,
) -> Mask:
    """The numbers and colours in a label map: a PNG file of any kind.

    As `read_label`; and of several channels, a file in which all pixels are grey has these as its
    numbers. Transparency is dropped.

    Args:
      source: as for `read_image`.
      name: as well.
      orientation: as well.
      max_pixels: as well.

    Raises:
      ImageError: the file cannot be decoded, is no PNG, or has more than 256 colours or a number
        above 255.
    """
    name, data = _read(source, name)
    image, bits = _load_label(name, data, orientation, max_pixels)
    colours = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    if image.mode in _ONE_CHANNEL:
        if image.mode == "P":
            colours = np.zeros((256, 3), np.uint8)
            known = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
            colours[: len(known)] = known
        elif bits < 8:
            levels = 2**bits
            colours[:levels] *= 255 // (levels - 1)
        numbers = _numbers(image, bits, name)
        return Mask(numbers, colours, "palette" if image.mode == "P" else "grey")
    image = image.convert("RGB")
    found: Any = image.getcolors(256)  # [(pixels, (r, g, b)), ...]
    if found is None:
        raise ImageError(
            f"{name} has more than 256 colours: this is a photo, or a label map that was smoothed "
            "or compressed; a label map has one colour, or number, for each class"
        )
    pixels = np.asarray(image)
    if all(r == g == b for _, (r, g, b) in found):
        return Mask(pixels[..., 0], colours, "grey")
    order = np.array(sorted(colour for _, colour in found), np.uint8)
    colours[: len(order)] = order
    numbers = np.searchsorted(_packed(order), _packed(pixels))
    return Mask(numbers.astype(np.uint8), colours, "rgb")


def _packed(colours: UInt8[np.ndarray, "... 3"]) -> UInt32[np.ndarray, "..."]:
    r, g, b = np.moveaxis(colours.astype(np.uint32), -1, 0)
    return r << 16 | g << 8 | b


def _load_label(
    name: str, data: bytes, orientation: bool, max_pixels: int | None
) -> tuple[Image.Image, int]:
    """A PNG file, turned, and the bits of a channel."""
    image, turn = _load(data, name, orientation, max_pixels, FORMATS)
    if image.format != "PNG":
        raise ImageError(
            f"{name}: a label map has to be a PNG file, whatever its name, and this is "
            f"{image.format}: JPEG and WEBP blur the numbers; convert others to PNG"
        )
    return _turned(image, turn), data[24]  # of the header


def _numbers(image: Image.Image, bits: int, name: str) -> UInt8[np.ndarray, "h w"]:
    """The numbers of an image with one channel."""
    values = np.asarray(image)
    if image.mode == "L" and bits < 8:
        values = values // (255 // (2**bits - 1))  # Pillow spreads them over 0 .. 255
    elif image.mode == "I;16" and values.max(initial=0) > 255:
        raise ImageError(
            f"{name} is a 16-bit file (PIL mode 'I;16') with numbers up to {values.max()}; class "
            "indices are 0 to 255"
        )
    return values.astype(np.uint8, copy=False)


def _about_channels(image: Image.Image) -> str:
    if image.mode not in ("LA", "RGB", "RGBA"):
        return ""
    first, *others = image.convert("RGB").split()
    if any(band.tobytes() != first.tobytes() for band in others):
        return " It looks coloured: replace every colour by the index of its class."
    return " Its colours are grey: keep the first channel, Image.open(a).getchannel(0).save(b)."


# -------------------------------------------------------------------------------------------- steps
def _read(source: Source, name: str | None) -> tuple[str, bytes]:
    """The name for messages, and the content."""
    if isinstance(source, bytes):
        return name or "image", source
    if not isinstance(source, str | os.PathLike):
        raise ValueError(
            f"source must be a path or the bytes of a file, got {type(source).__name__}"
        )
    path = Path(source).expanduser()
    name = name or str(path)
    try:
        return name, path.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise ImageError(f"{name}: is a folder, not an image") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise ImageError(
            f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error


def _open(data: bytes, name: str, max_pixels: int | None, formats: Sequence[str]) -> Image.Image:
    """The header of an image, whose size is within the limit."""
    unknown = [kind for kind in formats if kind not in FORMATS]
    if unknown or isinstance(formats, str) or not formats:
        raise ValueError(f"formats must be some of {FORMATS}, got {formats!r}")
    if max_pixels is not None and not (isinstance(max_pixels, int) and max_pixels > 0):
        raise ValueError(f"max_pixels must be a positive whole number, got {max_pixels!r}")
    if not data:
        raise ImageError(f"{name}: cannot be read as an image: the file is empty")
    limit = pixel_limit() if max_pixels is None else max_pixels
    Image.init()  # all formats
    problem = None
    # As Image.open, whose limit is the same for the whole process.
    for kind in formats:
        factory, accepts = Image.OPEN[kind]
        if accepts is not None and accepts(data[:16]) is not True:
            continue
        try:
            image = factory(io.BytesIO(data), "")
            break
        except Exception as error:  # a plugin raises whatever the bytes lead to
            problem = f"its header is damaged: {_first_line(error)}"
    else:
        known = " or ".join(filter(None, (", ".join(formats[:-1]), formats[-1])))
        raise ImageError(
            f"{name}: cannot be read as an image: {problem or f'it is none of {known}'}"
        )
    width, height = image.size
    if width * height > limit:
        raise ImageError(
            f"{name}: {width}x{height} (width x height) is {width * height} pixels, more than the "
            f"limit of {limit}. Cut it into tiles or make it smaller; if you trust the file and "
            f"have the memory, set RESFU_MAX_PIXELS={width * height} in the environment"
        )
    if not width * height:
        raise ImageError(f"{name}: cannot be read as an image: it has no pixels")
    return image


def pixel_limit() -> int:
    """`$RESFU_MAX_PIXELS`, or `MAX_PIXELS`."""
    text = os.environ.get("RESFU_MAX_PIXELS") or str(MAX_PIXELS)
    if not text.isdecimal() or not int(text):
        raise ValueError(f"RESFU_MAX_PIXELS must be a number of pixels, got {text!r}")
    return int(text)


def _load(
    data: bytes, name: str, orientation: bool, max_pixels: int | None, formats: Sequence[str]
) -> tuple[Image.Image, Image.Transpose | None]:
    """The decoded image, and how it has to be turned."""
    image = _open(data, name, max_pixels, formats)
    turn = _TURNS.get(_orientation(image, data))
    if image.format == "TIFF":  # Pillow turns these itself, while it decodes
        turn = None if orientation or turn is None else _BACK.get(turn, turn)
    elif not orientation:
        turn = None
    try:
        image.load()
    except MemoryError as error:
        size = f"{image.width}x{image.height}"
        raise ImageError(f"{name}: not enough memory for {size} pixels") from error
    except Exception as error:
        raise ImageError(f"{name}: cannot be read as an image: {_first_line(error)}") from error
    return image, turn


def _turned(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image, data: bytes) -> int:
    """1 to 8; 1 if nothing is noted, or nothing that can be read."""
    marks = b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp"
    if image.format == "PNG" and not any(mark in data for mark in marks):
        return 1  # Pillow would decode the image to look behind it
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1
    return orientation if orientation in _TURNS else 1


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = {"I": "32-bit or signed integers", "F": "floating-point numbers"}[image.mode]
        raise ImageError(
            f"{name}: its pixels are {kind} (PIL mode {image.mode!r}), of which it is not known "
            "what is black and what is white; scale them to 8 or 16 bits"
        )
    if image.mode == "P" or image.has_transparency_data:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> UInt8[np.ndarray, "h w"]:
    """round(255 v / range), of 16-bit grey values v."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS, (16,))[0]
    full = 2**bits - 1 if bits < 16 else 65535
    values = np.asarray(image).astype(np.uint32)
    grey = np.minimum((255 * values + full // 2) // full, 255).astype(np.uint8)
    return 255 - grey if tags.get(_PHOTOMETRIC) == 0 else grey  # 0: white is zero


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
