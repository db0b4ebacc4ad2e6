"""`resfu features`, on a tiny ViT of which the weights are in a file."""

import re

import matplotlib
import numpy as np
import pytest
import safetensors.numpy
import weights
from matplotlib import pyplot as plt
from matplotlib.backend_bases import MouseEvent
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from resfu_jax.cli import main
from resfu_jax.features import FeaturePipeline

pytestmark = pytest.mark.usefixtures("programs_are_kept")

matplotlib.use("Agg")  # has no windows, on a machine with a display either
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A ViT of two blocks, 16 channels and patches of 4."""
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    return str(weights.write(path, weights.entries("vit")))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in "ab":
        blocks = RNG.integers(0, 256, (5, 7, 3), np.uint8).repeat(4, axis=0).repeat(4, axis=1)
        Image.fromarray(blocks).save(folder / f"{name}.png")
    return folder


def command(backbone, photos, *words):
    return ["features", *photos, "--backbone", backbone, "--normalisation", "half", *words]


def test_arrays_and_pictures(backbone, photos, tmp_path, capsys):
    out = tmp_path / "out"
    words = ("--upsampler", "jbu", "--stride", "2", "--class-token", "--out", str(out))
    assert main(command(backbone, [str(photos)], *words)) == 0
    told = capsys.readouterr()
    assert f"2 images in {out}, 0 failed" in told.out
    line = r"a.png: 5x7 cells to 10x14 of 16 channels, 0.0 MB; \d+\.\d\d s$"
    assert re.search(line, told.out + told.err, re.M)
    pipeline = FeaturePipeline(backbone, "jbu", normalisation="half")
    for name in "ab":
        expected, token = pipeline(photos / f"{name}.png", 2, class_token=True)
        with np.load(out / f"{name}.npz") as file:
            assert set(file.files) == {"features", "low", "class_token"}
            np.testing.assert_allclose(file["features"], expected, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(file["class_token"], token, rtol=1e-4, atol=1e-5)
            assert file["low"].shape == (5, 7, 16)
        with Image.open(out / "pictures" / f"{name}.png") as picture:
            assert picture.size == (14 + 4 + 14, 10)
            assert len(picture.getcolors(1000)) > 20


@pytest.mark.parametrize(("form", "dtype"), [("npz", "float32"), ("safetensors", "bfloat16")])
def test_bfloat16_is_kept_or_widened(backbone, photos, tmp_path, form, dtype):
    out = tmp_path / "out"
    words = ("--dtype", "bfloat16", "--format", form, "--no-pictures", "--out", str(out))
    assert main(command(backbone, [str(photos / "a.png")], *words)) == 0
    assert [path.name for path in out.iterdir()] == [f"a.{form}"]
    load = np.load if form == "npz" else safetensors.numpy.load_file
    found = load(out / f"a.{form}")["features"]
    assert found.shape == (20, 28, 16) and found.dtype.name == dtype
    pipeline = FeaturePipeline(backbone, "bilinear", normalisation="half", dtype="bfloat16")
    expected = pipeline(photos / "a.png").astype(np.float32)
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=0.02, atol=0.02)


def test_correspondence(backbone, photos, tmp_path, capsys):
    """Of a photo with itself."""
    out = tmp_path / "out"
    files = [str(photos / "a.png"), str(photos / "b.png")]
    with Image.open(files[0]) as image:
        image.save(files[1])
    words = ("--stride", "4", "--format", "none", "--out", str(out), "--pixel", "9", "22")
    assert main(command(backbone, files, *words)) == 0
    # The pixel's own cell, of 4 x 4 pixels, is the best match.
    told = capsys.readouterr().out
    assert re.search(
        r"similarity_9_22.png: pixel 9 22 of .*a.png is most like 10 22 of .*b.png", told
    )
    assert "with cosine 1.000" in told
    with Image.open(out / "similarity_9_22.png") as picture:
        wide = picture.width
    assert not list(out.glob("*.npz")) and len(list((out / "pictures").iterdir())) == 2
    assert main(command(backbone, files[:1], *words)) == 0
    assert "similarity to pixel 9 22" in capsys.readouterr().out
    with Image.open(out / "similarity_9_22.png") as picture:
        assert abs(picture.width - wide / 2) < 5  # photo and similarity, not twice


def test_a_clicked_pixel(backbone, photos, tmp_path, capsys, monkeypatch):
    """Every click on the first photo draws what --pixel draws; others do nothing."""
    out = tmp_path / "out"
    names = []

    def click_and_close():
        figure = plt.gcf()
        for axes, row, column in ((0, 9, 22), (2, 3, 3), (0, 0, 0)):
            x, y = figure.axes[axes].transData.transform((column, row))
            event = MouseEvent("button_press_event", figure.canvas, x, y, 1)
            figure.canvas.callbacks.process("button_press_event", event)
            names.append([ax.get_title() for ax in figure.axes])

    monkeypatch.setattr(FigureCanvasAgg, "required_interactive_framework", "test", raising=False)
    monkeypatch.setattr(plt, "show", click_and_close)
    words = ("--stride", "4", "--format", "none", "--no-pictures", "--out", str(out), "--click")
    assert main(command(backbone, [str(photos)], *words)) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "similarity_0_0.png",
        "similarity_9_22.png",
    ]
    assert capsys.readouterr().out.count("is most like") == 2
    assert names[0] == ["a.png", "cosine similarity", "b.png", "cosine similarity"]
    assert not plt.get_fignums()


def test_one_bad_file_does_not_stop_the_others(backbone, photos, tmp_path, capsys):
    (photos / "broken.png").write_bytes(b"no image")
    out = tmp_path / "out"
    assert main(command(backbone, [str(photos)], "--out", str(out), "--no-pictures")) == 1
    told = capsys.readouterr()
    assert "broken.png: cannot be read as an image" in told.err
    assert "2 images in" in told.out and ", 1 failed" in told.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no images: give files or folders"),
        (["A"], "--backbone or --run must be given"),
        (["A", "--backbone", "V"], "normalisation is needed"),
        (["A", "--backbone", "V", "--stride", "0"], "--stride must be at least 1"),
        (["A", "--backbone", "V", "--pixel", "20", "0"], "--pixel must lie in"),
        (["A", "A", "A", "--backbone", "V", "--pixel", "2", "0"], "--pixel is for one photo or"),
        (["A", "--backbone", "V", "--click"], "--click needs a display"),
        (["A", "A", "A", "--backbone", "V", "--click"], "--click is for one photo or two, got 3"),
        (["A", "--backbone", "V", "--click", "--pixel", "2", "0"], "--pixel or --click, not both"),
        (["A", "--backbone", "V", "--upsampler", "jbuu"], "did you mean 'jbu'"),
        (["A", "--backbone", "V", "--out", "gs://x/y"], "has to be a folder or file"),
        (["A", "--run", "R", "--upsampler", "jbu"], "--upsampler is that of the run"),
    ],
)
def test_mistakes_end_in_one_line(backbone, photos, capsys, words, message):
    places = {"A": str(photos / "a.png"), "V": backbone}
    assert main(["features", *(places.get(word, word) for word in words)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
