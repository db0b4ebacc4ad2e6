"""`image_folder/NAME`: one's own images."""

import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from resfu_jax.data import (
    DataError,
    DatasetNotPrepared,
    dataset_info,
    eval_batches,
    is_prepared,
    list_datasets,
    open_source,
    prepare,
)
from resfu_jax.data.__main__ import main
from resfu_jax.data.fabricate import fabricate
from resfu_jax.data.image_folder import read_classes

NAME = "image_folder/mine"


@pytest.fixture
def raw(tmp_path):
    """A folder with subfolders train and validation."""
    return fabricate(NAME, tmp_path / "raw", examples=2, size=(16, 24))


def _flat(folder, names, suffix=".jpg"):
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for name in names:
        Image.new("RGB", (12, 8)).save(folder / "images" / f"{name}{suffix}")
        Image.new("L", (12, 8), 1).save(folder / "labels" / f"{name}.png")
    (folder / "classes.txt").write_text("a\nb\n")
    return folder


def _ids(split, folder, name=NAME):
    return sorted(example["id"].decode() for example in open_source(name, split, folder))


def test_subfolders_are_the_splits(raw, tmp_path):
    prepare(NAME, tmp_path, raw)
    assert _ids("train", tmp_path) == ["train_0", "train_1"]
    assert _ids("validation", tmp_path) == ["validation_0", "validation_1"]


def test_classes_and_colours_come_from_the_prepared_dataset(raw, tmp_path):
    prepare(NAME, tmp_path, raw)
    shutil.rmtree(raw)
    info = dataset_info(NAME, tmp_path)
    assert info.name == NAME and info.class_names == ("ground", "road", "sky")
    assert info.palette == ((0, 0, 0), (128, 64, 128), (0, 128, 0))
    assert info.ignore_label == 255 and info.examples == (2, 2)
    (batch,) = eval_batches(open_source(NAME, "train", tmp_path), info, batch_size=2, pad_to=8)
    assert batch["image"].shape == (2, 16, 24, 3)
    assert set(np.unique(batch["label"])) == {0, 1, 2, 255}
    source = open_source(NAME, "validation", tmp_path)
    assert list(pickle.loads(pickle.dumps(source))) == list(source)


def test_the_default_data_dir(raw, tmp_path, monkeypatch):
    monkeypatch.setenv("RESFU_DATA_DIR", str(tmp_path))
    prepare(NAME, manual_dir=raw)
    assert dataset_info(NAME).num_classes == 3 and is_prepared(NAME)


def test_two_folders_do_not_mix_and_are_listed(raw, tmp_path):
    prepare(NAME, tmp_path, raw)
    prepare("image_folder/other-2", tmp_path, _flat(tmp_path / "flat", "xy"))
    assert dataset_info("image_folder/other-2", tmp_path).class_names == ("a", "b")
    assert dataset_info(NAME, tmp_path).num_classes == 3
    own = [name for name in list_datasets(tmp_path) if name.startswith("image_folder")]
    assert own == [NAME, "image_folder/other-2"]


def test_preparing_again_keeps_what_is_there(raw, tmp_path):
    prepare(NAME, tmp_path, raw)
    (raw / "classes.txt").write_text("x\ny\nz\n")
    prepare(NAME, tmp_path, raw)
    assert dataset_info(NAME, tmp_path).class_names[0] == "ground"


@pytest.mark.parametrize("count, validation", [(2, 1), (10, 2), (23, 5)])
def test_a_fifth_is_for_validation(count, validation, tmp_path):
    names = [f"img_{index}" for index in range(count)]
    prepare(NAME, tmp_path, _flat(tmp_path / "raw", names, ".PNG"))
    held_out = _ids("validation", tmp_path)
    assert len(held_out) == validation
    assert sorted(held_out + _ids("train", tmp_path)) == sorted(names)
    if count == 10:
        assert held_out == ["img_2", "img_6"]  # on every machine


def test_one_image_is_not_enough(tmp_path):
    with pytest.raises(DataError, match="holds no image of the validation split"):
        prepare(NAME, tmp_path, _flat(tmp_path / "raw", ["x"]))


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("missing", ["images", "labels", "classes.txt", "labels/train"])
def test_missing_folders(missing, raw, tmp_path):
    path = raw / missing
    path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(FileNotFoundError, match=f"(?s)no (folder|file) {missing}.*DIR/images"):
        prepare(NAME, tmp_path, raw)


def test_no_manual_dir(tmp_path):
    with pytest.raises(FileNotFoundError, match="Put your images into DIR/images"):
        prepare(NAME, tmp_path)


def test_a_missing_label_map(raw, tmp_path):
    (raw / "labels/train/train_1.png").unlink()
    with pytest.raises(FileNotFoundError, match="(?s)lacks 1 .*train_1.png.*Every image needs"):
        prepare(NAME, tmp_path, raw)


@pytest.mark.parametrize(
    "label, message",
    [
        (Image.new("L", (24, 15)), "differ in size: 24x16 against 24x15"),
        (
            Image.new("L", (24, 16), 3),
            "holds the label 3; those of image_folder are 0 to 2 and",
        ),
        (Image.new("RGB", (24, 16)), "has PIL mode 'RGB'"),
        (Image.new("I;16", (24, 16)), "has PIL mode 'I;16'"),
    ],
)
def test_label_maps_that_cannot_be_used(label, message, raw, tmp_path):
    label.save(raw / "labels/validation/validation_0.png")
    with pytest.raises(DataError, match=f"(?s)validation_0.png.*{message}.*A label map is a PNG"):
        prepare(NAME, tmp_path, raw)
    assert not is_prepared(NAME, tmp_path)


@pytest.mark.parametrize("file", ["images/train/train_0.jpg", "labels/train/train_0.png"])
def test_files_that_cannot_be_decoded(file, raw, tmp_path):
    (raw / file).write_bytes(b"nothing")
    with pytest.raises(DataError, match=f"Cannot decode the (image|label map) .*{file}"):
        prepare(NAME, tmp_path, raw)


def test_two_images_with_one_label_map(tmp_path):
    folder = _flat(tmp_path / "raw", "xyz")
    Image.new("RGB", (12, 8)).save(folder / "images" / "y.png")
    with pytest.raises(DataError, match=r"y.jpg and .*y.png share the label map .*y.png; remove"):
        prepare(NAME, tmp_path, folder)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a\nb, 1, 2\n", r"line 2: 'b, 1, 2' is neither 'name' nor 'name, R, G, B'"),
        ("a\nb, 1, 2, 256\n", "line 2"),
        ("a\n, 1, 2, 3\n", "line 2"),
        ("a\nb\n\na\n", "line 4: the class 'a' is there twice"),
        ("a\n", "has 1 classes; it needs 2 to 255"),
        ("".join(f"c{k}\n" for k in range(256)), "has 256 classes"),
    ],
)
def test_class_files_that_cannot_be_used(text, message, tmp_path):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=f"classes.txt.*{message}"):
        read_classes(tmp_path / "classes.txt")


def test_class_files(tmp_path):
    text = "# mine\nfar away,  1,2 ,3\n\n  near \n".encode("utf-8-sig")
    (tmp_path / "classes.txt").write_bytes(text)
    names, colours = read_classes(tmp_path / "classes.txt")
    assert names == ["far away", "near"] and colours == [(1, 2, 3), (128, 0, 0)]


@pytest.mark.parametrize(
    "name", ["image_folder", "image_folder/", "image_folder/a/b", "image_folder/ä"]
)
def test_names_that_cannot_be_used(name, tmp_path):
    with pytest.raises(ValueError, match="Your own images are image_folder/NAME"):
        dataset_info(name, tmp_path)


def test_a_folder_that_is_not_prepared_tells_the_command(tmp_path):
    command = f"prepare {NAME} --manual-dir DIR --data-dir {tmp_path}"
    for function in (dataset_info, lambda *a: open_source(a[0], "train", a[1])):
        with pytest.raises(DatasetNotPrepared, match=f"{command}$"):
            function(NAME, tmp_path)


def test_command_line(raw, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["data", "--data-dir", str(tmp_path), *arguments])
        main()
        return capsys.readouterr()

    done = run("prepare", NAME, "--manual-dir", str(raw))
    assert f"{NAME}: 2 train, 2 validation" in done.out and "warning" not in done.out
    assert "WARNING" not in done.err
    (line,) = [line for line in run("list").out.splitlines() if line.startswith(NAME)]
    assert line.split()[1:5] == ["3", "2", "2", "yes"]
    (raw / "classes.txt").unlink()
    with pytest.raises(SystemExit, match="(?s)^error: .*no file classes.txt"):
        run("prepare", "image_folder/new", "--manual-dir", str(raw))
