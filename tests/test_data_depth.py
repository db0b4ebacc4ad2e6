"""Datasets with depth maps: official layouts, fabricated, and folders of one's own."""

import h5py
import numpy as np
import pytest
from PIL import Image

from resfu_jax import data
from resfu_jax.data.__main__ import main
from resfu_jax.data.fabricate import fabricate

RNG = np.random.default_rng(0)
SIZE = (16, 24)


def labels_of(name, data_dir, split="train"):
    """Image and depth of every example by its id."""
    info = data.dataset_info(name, data_dir)
    source = data.open_source(name, split, data_dir)
    (batch,) = data.eval_batches(source, info, batch_size=len(source), pad_to=8)
    assert batch["label"].dtype == np.float32
    rows = zip(batch["id"], batch["image"], batch["label"], strict=True)
    return {key.decode(): (image, depth) for key, image, depth in rows}


def test_the_labelled_matlab_file_in_both_configurations(tmp_path):
    raw = fabricate("nyu_depth_v2", tmp_path / "raw", examples=2, size=SIZE)
    with h5py.File(raw / "nyu_depth_v2_labeled.mat") as file:
        images = file["images"][:].transpose(0, 3, 2, 1)
        measured = file["rawDepths"][:].transpose(0, 2, 1)
    for name, low in (("nyu_depth_v2", 0.0), ("nyu_depth_v2/filled", 0.5)):
        data.prepare(name, tmp_path / "data", manual_dir=raw)
        for split, first in (("train", 0), ("validation", 2)):
            found = labels_of(name, tmp_path / "data", split)
            assert list(found) == [f"{first + 1:04d}", f"{first + 2:04d}"]
            for i, (image, depth) in enumerate(found.values(), first):
                np.testing.assert_array_equal(image, images[i])
                np.testing.assert_allclose(depth, np.maximum(measured[i], low), rtol=1e-6)


def test_the_layout_of_fastdepth(tmp_path):
    raw, written = tmp_path / "raw" / "nyudepthv2", {}
    for folder, key in (("train/attic_1", "attic_1_00001"), ("val/official", "official_00001")):
        (raw / folder).mkdir(parents=True)
        image = RNG.integers(0, 256, (3, *SIZE), np.uint8)
        depth = RNG.uniform(0.5, 9, SIZE).astype(np.float32)
        depth[:4] = 0
        with h5py.File(raw / folder / "00001.h5", "w") as file:
            file["rgb"], file["depth"] = image, depth
        written[key] = image.transpose(1, 2, 0), depth
    data.prepare("nyu_depth_v2", tmp_path / "data", manual_dir=tmp_path / "raw")
    found = labels_of("nyu_depth_v2", tmp_path / "data")
    found |= labels_of("nyu_depth_v2", tmp_path / "data", "validation")
    assert found.keys() == written.keys()
    for key, (image, depth) in written.items():
        np.testing.assert_array_equal(found[key][0], image)
        np.testing.assert_allclose(found[key][1], depth, atol=5.1e-4)
    with pytest.raises(FileNotFoundError, match="no file nyu_depth_v2_labeled.mat"):
        data.prepare("nyu_depth_v2/filled", tmp_path / "data", manual_dir=tmp_path / "raw")


def write(path, numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, numbers)
    elif path.suffix == ".npz":
        np.savez(path, depth=numbers, confidence=numbers)
    else:
        Image.fromarray(numbers).save(path)


def test_own_depth_maps_of_every_kind_have_the_same_depths(tmp_path, capsys):
    metres = RNG.integers(1, 9000, (4, *SIZE)) / 1000
    metres[:, :5, 7:] = 0
    for i, suffix in enumerate((".png", ".tiff", ".npy", ".npz")):
        picture = RNG.integers(0, 256, (*SIZE, 3), np.uint8)
        write(tmp_path / "photos" / f"{i}.png", picture)
        numbers = np.rint(1000 * metres[i]).astype(np.uint16 if suffix == ".png" else np.float32)
        if suffix != ".png":
            numbers[0, 0] = np.nan
        metres[i, 0, 0] = 0 if suffix != ".png" else metres[i, 0, 0]
        write(tmp_path / "depths" / f"{i}{'_depth' if i else ''}{suffix}", numbers)
    folders = ["--images", tmp_path / "photos", "--depth", tmp_path / "depths"]
    command = ["--data-dir", tmp_path / "data", "prepare", "depth_folder/mine", *folders]
    main([str(part) for part in (*command, "--scale", 0.001)])
    assert "depths from 0.0" in capsys.readouterr().out
    found = labels_of("depth_folder/mine", tmp_path / "data")
    found |= labels_of("depth_folder/mine", tmp_path / "data", "validation")
    assert len(found) == 4 and "depth_folder/mine" in data.list_datasets(tmp_path / "data")
    for i, (_, depth) in enumerate(found[str(i)] for i in range(4)):
        np.testing.assert_allclose(depth, metres[i], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("numbers", "options", "message"),
    [
        (np.zeros(SIZE, np.float32), {}, "No pixel of the 1 depth maps has a depth"),
        (np.full(SIZE, 7.0, np.float32), {"invalid": 7}, "No pixel of the 1 depth maps has a d"),
        (np.ones((*SIZE, 3), np.float32), {}, r"shape \(16, 24, 3\); a depth map has numbers"),
        (np.ones((8, 8), np.float32), {}, "differ in size: 24x16 against 8x8"),
        (np.ones(SIZE, np.float32), {"scale": 0.0}, "scale must be a positive number, got 0.0"),
        (np.ones(SIZE, np.float32), {"depth": None}, "images and depth go together, got only im"),
    ],
)
def test_depth_maps_that_cannot_be_used(tmp_path, numbers, options, message):
    for split in ("train", "validation"):
        write(tmp_path / "i" / split / "a.png", np.zeros((*SIZE, 3), np.uint8))
        write(tmp_path / "d" / split / "a.npy", numbers)
    message = message.replace("the 1 depth", "the 2 depth")
    with pytest.raises(ValueError, match=message):
        options = dict(images=tmp_path / "i", depth=tmp_path / "d") | options
        data.prepare("depth_folder/x", tmp_path / "data", own=data.OwnDepth(**options))
    assert not data.is_prepared("depth_folder/x", tmp_path / "data")


def test_an_option_of_the_other_kind_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="--depth is no option of image_folder/x"):
        main(["prepare", "image_folder/x", "--depth", str(tmp_path)])
