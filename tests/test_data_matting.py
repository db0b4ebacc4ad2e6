"""Datasets of alpha mattes: composition, trimaps, the official layout, what is wrong with files."""

import numpy as np
import pytest
from PIL import Image

from resfu_jax import data
from resfu_jax.data.composition import Compose, Layer, compose, draw_trimap
from resfu_jax.data.fabricate import fabricate, prepare_fabricated
from resfu_jax.data.soft_shapes import KINDS, draw_matte

RNG = np.random.default_rng(0)


def disc(height, width, radius, soft=2.0):
    """An alpha matte with a soft outline."""
    y, x = np.mgrid[:height, :width]
    distance = np.hypot(y - height / 2, x - width / 2)
    return np.clip(127 + 127 * (radius - distance) / soft, 0, 255).astype(np.uint8)


def picture(height, width):
    cells = RNG.integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(cells).resize((width, height))


def test_trimaps_are_alpha_eroded_by_discs():
    alpha = np.zeros((40, 60), np.uint8)
    alpha[:, 30:] = 255
    expected = np.repeat([[0, 128, 255]], 40, 0).repeat([27, 5, 28], 1)
    np.testing.assert_array_equal(draw_trimap(alpha, 5, 7), expected)
    np.testing.assert_array_equal(draw_trimap(alpha, 1, 1), alpha)


@pytest.mark.parametrize("size", [(90, 70), (30, 200)])
def test_composed_crops_agree_with_each_other(size):
    """Where the foreground shows its own alpha, all are cut, turned and resized alike."""
    alpha = disc(*size, 0.3 * min(size))
    layer = Layer(Image.fromarray(np.stack([alpha] * 3, -1)), Image.fromarray(alpha))
    draw = Compose((48, 64), (0.8, 1.25), (3, 9), flip=True, photometric=False)
    for seed in range(12):
        rngs = [np.random.default_rng(seed) for _ in range(2)]
        behind = picture(20, 300)
        one, two = (draw(layer, None, behind, rng) for rng in rngs)
        assert all((one[name] == two[name]).all() for name in one)
        assert one["image"].shape == (48, 64, 3) and one["trimap"].shape == (48, 64)
        cut = one["alpha"]
        np.testing.assert_array_equal(one["foreground"][..., 1], cut)
        expected = compose(one["foreground"], cut, one["background"])
        np.testing.assert_array_equal(one["image"], expected)
        for value in (0, 255):
            assert (cut[one["trimap"] == value] == value).all()
        assert (one["trimap"] == 128).sum() > 40


def test_two_foregrounds_let_through_what_both_do():
    half = np.full((64, 64), 128, np.uint8)
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    draw = Compose((32, 32), (1.0, 1.0), (1, 1), flip=False, photometric=False)
    layers = [Layer(colours, Image.fromarray(half)) for colours in (red, blue)]
    found = draw(*layers, picture(64, 64), np.random.default_rng(1))
    assert found["alpha"][16, 16] == round(255 * (1 - (1 - 128 / 255) ** 2))
    np.testing.assert_allclose(found["foreground"][16, 16], [170, 0, 85], atol=1)  # 2 : 1


def test_batches_do_not_depend_on_shards_and_continue(tmp_path):
    prepare_fabricated("matting_folder/mine", tmp_path)
    source, backgrounds = (
        data.open_source("matting_folder/mine", split, tmp_path) for split in ("train", "background")
    )

    def batches(size, shard=(0, 1)):
        return data.matting_train_batches(
            source, backgrounds, batch_size=size, crop_size=(32, 32), seed=3, shard=shard
        )

    whole = batches(4)
    first, second = next(whole), next(whole)
    for i in range(2):
        part = batches(2, (i, 2))
        part.set_state({"examples": 4})
        cut = next(part)
        for name in first:
            np.testing.assert_array_equal(cut[name], second[name][2 * i : 2 * i + 2])
        part.close()
    whole.close()
    assert (first["image"] != second["image"]).any()


def test_composition_1k_in_the_official_layout(tmp_path):
    raw = fabricate("composition_1k", tmp_path / "raw", examples=3, size=(48, 64))
    data.prepare("composition_1k", tmp_path, manual_dir=raw)
    train, backgrounds, validation = (
        data.open_source("composition_1k", split, tmp_path)
        for split in ("train", "background", "validation")
    )
    assert (len(train), len(backgrounds), len(validation)) == (3, 3, 4)
    batches = data.matting_eval_batches(
        validation, data.dataset_info("composition_1k"), batch_size=5, pad_to=(64, 64)
    )
    (batch,) = batches
    assert batch["size"].tolist() == [[48, 64]] * 4 + [[0, 0]]
    first, again = (list(batch["id"]).index(f"boy-0_1920_{k}".encode()) for k in (0, 1))
    assert (batch["alpha"][first] == batch["alpha"][again]).all()  # one matte, two backgrounds
    unknown = batch["trimap"][:, :48] == 128
    assert (unknown == ((batch["alpha"][:, :48] > 0) & (batch["alpha"][:, :48] < 255)))[:4].all()
    assert not batch["trimap"][:, 48:].any() and batch["image"][:4, 48:].any()
    with pytest.raises(FileNotFoundError, match="Composition-1K is not downloaded for you"):
        data.prepare("composition_1k", tmp_path / "none")


@pytest.fixture
def folders(tmp_path):
    """Five foregrounds with alphas and trimaps, and two backgrounds."""
    alpha = disc(40, 50, 12)
    for name in "abcde":
        for kind, content in dict(
            foregrounds=picture(40, 50),
            alphas=Image.fromarray(alpha),
            trimaps=Image.fromarray(draw_trimap(alpha, 3, 3)),
        ).items():
            (tmp_path / kind).mkdir(exist_ok=True)
            content.save(tmp_path / kind / f"{name}.png")
    (tmp_path / "backgrounds").mkdir()
    for i in range(2):
        picture(30, 90).save(tmp_path / f"backgrounds/{i}.jpg")
    return tmp_path


def prepare(folders, *names):
    own = data.OwnMattes(**{name: folders / name for name in names})
    data.prepare("matting_folder/mine", folders / "data", own=own)


ALL = ("foregrounds", "alphas", "backgrounds", "trimaps")


def test_own_mattes(folders):
    prepare(folders, *ALL)
    info = data.dataset_info("matting_folder/mine", folders / "data")
    assert info.mattes and info.examples == (4, 1)
    assert "matting_folder/mine" in data.list_datasets(folders / "data")
    source = data.open_source("matting_folder/mine", "validation", folders / "data")
    batch = next(iter(data.matting_eval_batches(source, info, batch_size=1)))
    np.testing.assert_array_equal(batch["trimap"][0, :40, :50], draw_trimap(disc(40, 50, 12), 3, 3))
    assert batch["image"].shape == (1, 48, 64, 3)
    with pytest.raises(ValueError, match="'train', 'background' and 'validation'"):
        data.open_source("matting_folder/mine", "test", folders / "data")


def resized(path):
    Image.open(path).resize((20, 20)).save(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: resized(d / "alphas/c.png"), r"alphas/c.png is 20x20 .* its image 50x40"),
        (lambda d: (d / "foregrounds/c.png").unlink(), "foregrounds lacks 1 foreground .*: c.png"),
        (lambda d: (d / "alphas/c.png").unlink(), "alphas lacks 1 alpha matte of images .*: c.png"),
        (lambda d: Image.new("L", (50, 40), 255).save(d / "alphas/c.png"), "it has no edge"),
        (lambda d: (d / "alphas/c.png").write_bytes(b"?"), "alphas/c.png: cannot be read"),
        (
            lambda d: [Image.new("L", (50, 40)).save(p) for p in (d / "trimaps").iterdir()],
            r"trimaps/.\.png has no unknown pixel \(value 128\)",
        ),
        (
            lambda d: [Image.new("L", (50, 40), 102).save(p) for p in (d / "trimaps").iterdir()],
            r"trimaps/.\.png holds the values \[102\]; a trimap has 0",
        ),
        (lambda d: [p.unlink() for p in (d / "backgrounds").iterdir()], "holds no images"),
    ],
)
def test_what_is_wrong_with_mattes_is_named(folders, spoil, message):
    spoil(folders)
    with pytest.raises((data.DataError, FileNotFoundError), match=message):
        prepare(folders, *ALL)
    assert not data.is_prepared("matting_folder/mine", folders / "data")


def test_folders_that_are_not_given(folders):
    with pytest.raises(ValueError, match="go together; alphas, backgrounds is missing"):
        prepare(folders, "foregrounds")
    with pytest.raises(data.DatasetNotPrepared, match="--foregrounds DIR --alphas DIR"):
        data.open_source("matting_folder/other", "train", folders)
    with pytest.raises(ValueError, match="yours are matting_folder/NAME"):
        data.prepare("voc", own=data.OwnMattes(*(folders / n for n in ALL[:3])))


def test_soft_shapes_are_soft():
    """Hair is thin, glass lets the same share through, defocus is wide."""
    mattes = {kind: draw_matte(np.random.default_rng(5), kind, 96) for kind in KINDS}
    solid = {kind: (alpha == 255).sum() for kind, alpha in mattes.items()}
    partly = {kind: ((alpha > 0) & (alpha < 255)).sum() for kind, alpha in mattes.items()}
    assert min(solid["hair"], partly["hair"]) > 300
    values, counts = np.unique(mattes["glass"][mattes["glass"] > 0], return_counts=True)
    assert counts.max() > 0.4 * counts.sum() and 30 < values[counts.argmax()] < 140
    steps = np.abs(np.diff(mattes["defocus"].astype(int), axis=0)).max()
    assert steps < 120 < np.abs(np.diff(mattes["hair"].astype(int), axis=0)).max()
