"""`resfu_jax.images`: what a file of an image or of labels holds."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from resfu_jax import images
from resfu_jax.images import ImageError, image_size, read_image, read_label

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encoded(array, kind="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(array)).save(buffer, kind, **options)
    return buffer.getvalue()


def png(values, bits, colour):
    """A PNG file of (h, w) or (h, w, channels) integers, by the specification."""

    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    values = np.asarray(values)
    height, width = values.shape[:2]
    digits = values.reshape(height, -1, 1) >> np.arange(bits)[::-1] & 1
    rows = np.packbits(digits.reshape(height, -1).astype(np.uint8), axis=1)
    content = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"PLTE", bytes(range(48))) if colour == 3 else b"")
        + chunk(b"IDAT", zlib.compress(content))
        + chunk(b"IEND", b"")
    )


# ------------------------------------------------------------------------------------------ images


def test_plain_files_are_what_they_are(tmp_path):
    path = tmp_path / "a [1] ü.png"
    path.write_bytes(encoded(PIXELS))
    for source in (path, str(path), path.read_bytes()):
        pixels = read_image(source)
        assert pixels.dtype == np.uint8 and image_size(source) == (6, 9)
        np.testing.assert_array_equal(pixels, PIXELS)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.png").write_bytes(encoded(PIXELS))
    np.testing.assert_array_equal(read_image("~/x.png"), PIXELS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(0, 10))
def test_images_are_turned_as_viewers_show_them(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(PIXELS, kind, exif=exif)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    pixels = read_image(data)
    np.testing.assert_array_equal(pixels, np.asarray(shown))
    assert pixels.shape[:2] == ((9, 6) if 5 <= orientation <= 8 else (6, 9))
    assert image_size(data) == pixels.shape[:2]
    np.testing.assert_array_equal(
        read_image(data, orientation=False), np.asarray(_stored(data, kind))
    )
    assert image_size(data, orientation=False) == (6, 9)


def _stored(data, kind):
    """What a reader that knows nothing of EXIF makes of it."""
    if kind == "TIFF":
        return PIXELS  # Pillow would turn it
    return Image.open(io.BytesIO(data)).convert("RGB")


def test_a_quarter_turn_by_hand():
    exif = Image.Exif()
    exif[0x0112] = 6  # the first row of the file is the right side of the picture
    shown = read_image(encoded(PIXELS, exif=exif))
    np.testing.assert_array_equal(shown, np.rot90(PIXELS, -1))


@pytest.mark.filterwarnings("ignore")  # Pillow's; see test_pillow_does_not_speak
def test_damaged_exif_data_turn_nothing():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(PIXELS, "JPEG", exif=exif)
    at = data.index(b"Exif\0\0") + 10
    assert read_image(data[:at] + b"\xff" * 4 + data[at + 4 :]).shape == (6, 9, 3)


def test_pillow_does_not_speak():
    code = """
import io, warnings
from PIL import Image
from resfu_jax.images import read_image
exif = Image.Exif()
exif[0x0112] = 6
buffer = io.BytesIO()
Image.new("RGB", (6, 9)).save(buffer, "JPEG", exif=exif)
data = buffer.getvalue()
read_image(data.replace(exif.tobytes()[:20], exif.tobytes()[:18] + bytes([99, 0])))
image = Image.new("P", (4, 4), 1)
image.putpalette([0, 0, 0, 9, 8, 7])
buffer = io.BytesIO()
image.save(buffer, "PNG", transparency=bytes([5, 128]))
read_image(buffer.getvalue())
buffer = io.BytesIO()
Image.new("1", (10000, 9000)).save(buffer, "PNG")  # Pillow warns of so many pixels
read_image(buffer.getvalue())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(kind):
    values = np.array([[0, 128, 129, 257, 30000, 65278, 65535]], np.uint16)
    grey = read_image(encoded(values, kind))
    np.testing.assert_array_equal(grey[..., 0], np.rint(values / 257))
    assert np.all(grey == grey[..., :1])


def test_16_bit_colours_are_scaled():
    values = np.array([[[0, 30000, 65535], [256, 514, 65000]]])
    error = read_image(png(values, 16, 2)).astype(float) - values / 257
    assert np.abs(error).max() < 1  # Pillow keeps the upper byte


def test_16_bit_tiff_with_white_at_zero():
    data = encoded(np.array([[0, 65535, 257]], np.uint16), "TIFF")
    at = data.index(struct.pack("<HHIH", 262, 3, 1, 1))  # PhotometricInterpretation
    data = data[: at + 8] + b"\0" + data[at + 9 :]
    assert read_image(data)[0, :, 0].tolist() == [255, 0, 254]


@pytest.mark.parametrize("dtype, what", [(np.float32, "floating-point"), (np.int32, "32-bit")])
def test_values_without_a_range_are_refused(dtype, what):
    data = encoded(np.zeros((4, 4), dtype), "TIFF")
    with pytest.raises(ImageError, match=rf"x.tif: its pixels are {what}.*scale them to 8 or 16"):
        read_image(data, "x.tif")


def test_transparency_is_dropped_and_the_colour_below_stays():
    colours = np.dstack([PIXELS, np.zeros((6, 9), np.uint8)])
    np.testing.assert_array_equal(read_image(encoded(colours)), PIXELS)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=b"\x05\x80")
    assert np.all(read_image(buffer.getvalue()) == (9, 8, 7))
    grey = np.dstack([PIXELS[..., 0], np.zeros((6, 9), np.uint8)])
    np.testing.assert_array_equal(read_image(encoded(grey))[..., 1], PIXELS[..., 0])


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(mode):
    buffer = io.BytesIO()
    Image.new(mode, (5, 4)).save(buffer, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
    assert read_image(buffer.getvalue()).shape == (4, 5, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_truncated_files_are_named(kind, share):
    data = encoded(RNG.integers(0, 256, (60, 80, 3), dtype=np.uint8), kind)
    with pytest.raises(ImageError, match="^half: cannot be read as an image: "):
        read_image(data[: int(share * len(data))], "half")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nothing",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"II*\0",
        b"GIF89a",
        b"BM",
        b"%!PS-Adobe",
    ],
)
def test_what_is_no_image_is_named(data):
    for read in (read_image, read_label, image_size):
        with pytest.raises(ImageError, match="^x: cannot be read as an image: "):
            read(data, "x")


def test_only_the_formats_that_were_asked_for():
    data = encoded(PIXELS, "BMP")
    with pytest.raises(ImageError, match="x: cannot be read .* none of JPEG or PNG"):
        read_image(data, "x", formats=("JPEG", "PNG"))


def test_paths_without_an_image(tmp_path):
    with pytest.raises(ImageError, match="nope.png: no such file"):
        read_image(tmp_path / "nope.png")
    with pytest.raises(ImageError, match="is a folder"):
        read_image(tmp_path)


def test_large_images_are_refused_before_they_are_decoded(monkeypatch):
    buffer = io.BytesIO()
    Image.new("1", (20000, 9000)).save(buffer, "PNG")
    message = (
        "^slide: 20000x9000 .* is 180000000 pixels, more than the limit of 178956970.*"
        "RESFU_MAX_PIXELS=180000000"
    )
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    for read in (read_image, read_label, image_size):
        with pytest.raises(ImageError, match=message):
            read(buffer.getvalue(), "slide")


def test_the_limit_can_be_set(monkeypatch):
    data = encoded(PIXELS)
    with pytest.raises(ImageError, match="is 54 pixels, more than the limit of 53"):
        read_image(data, max_pixels=53)
    assert read_image(data, max_pixels=54).shape == (6, 9, 3)
    monkeypatch.setenv("RESFU_MAX_PIXELS", "53")
    with pytest.raises(ImageError, match="more than the limit of 53"):
        read_image(data)
    monkeypatch.setenv("RESFU_MAX_PIXELS", "many")
    with pytest.raises(ValueError, match="RESFU_MAX_PIXELS must be a number of pixels, got 'many'"):
        read_image(data)


def test_more_pixels_than_pillow_allows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    np.testing.assert_array_equal(read_image(encoded(PIXELS)), PIXELS)


# ------------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("colour", [0, 3])  # grey, palette
def test_labels_of_few_bits_are_their_numbers(bits, colour):
    if (bits, colour) == (8, 3):
        numbers = RNG.integers(0, 16, (5, 11))
    else:
        numbers = RNG.integers(0, 2**bits, (5, 11))
    labels = read_label(png(numbers, bits, colour))
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, numbers)


def test_labels_of_16_bits_are_read_if_they_fit():
    numbers = np.array([[0, 7, 255]], np.uint16)
    np.testing.assert_array_equal(read_label(encoded(numbers)), numbers)
    with pytest.raises(ImageError, match="x is a 16-bit file .* with numbers up to 256"):
        read_label(encoded(numbers + 1), "x")


def test_labels_are_turned_by_their_own_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    labels = RNG.integers(0, 256, (4, 7), dtype=np.uint8)
    data = encoded(labels, exif=exif)
    np.testing.assert_array_equal(read_label(data), np.rot90(labels, -1))
    np.testing.assert_array_equal(read_label(data, orientation=False), labels)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_label_maps_are_png_files(kind):
    with pytest.raises(ImageError, match=f"x: a label map has to be a PNG file.*this is {kind}"):
        read_label(encoded(np.zeros((8, 8), np.uint8), kind), "x")


@pytest.mark.parametrize(
    "values, message",
    [
        (np.zeros((4, 4, 3)), "mode 'RGB'.*keep the first channel"),
        (PIXELS, "mode 'RGB'.*looks coloured"),
        (np.zeros((4, 4, 2)), "mode 'LA'.*keep the first channel"),
        (np.zeros((4, 4, 4)), "mode 'RGBA'.*keep the first channel"),
    ],
)
def test_labels_of_several_channels_are_refused(values, message):
    with pytest.raises(ImageError, match=f"x has PIL {message}"):
        read_label(encoded(values.astype(np.uint8)), "x")


def test_the_suffixes_are_of_formats_that_are_read():
    known = Image.registered_extensions()
    assert {known[suffix] for suffix in images.SUFFIXES} <= set(images.FORMATS)
