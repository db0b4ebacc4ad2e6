"""`image_folder/NAME`: one's own images."""

import os
import pickle
import re
import shutil
import unicodedata

import numpy as np
import pytest
from own_images import NAME, both_folders, decoded, examples, flat, photos_and_masks, save
from PIL import Image, ImageOps

from resfu_jax.data import (
    DataError,
    DatasetNotPrepared,
    OwnImages,
    Source,
    damaged_datasets,
    dataset_info,
    eval_batches,
    is_prepared,
    list_datasets,
    load,
    open_source,
    prepare,
)
from resfu_jax.data.__main__ import main
from resfu_jax.data.fabricate import fabricate


@pytest.fixture
def raw(tmp_path):
    """A folder with subfolders train and validation."""
    return fabricate(NAME, tmp_path / "raw", examples=2, size=(16, 24))


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
    prepare("image_folder/other-2", tmp_path, flat(tmp_path / "flat", "xy"))
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
    prepare(NAME, tmp_path, flat(tmp_path / "raw", names, ".PNG"))
    held_out = _ids("validation", tmp_path)
    assert len(held_out) == validation
    assert sorted(held_out + _ids("train", tmp_path)) == sorted(names)
    if count == 10:
        assert held_out == ["img_2", "img_6"]  # on every machine


def test_one_image_is_not_enough(tmp_path):
    with pytest.raises(DataError, match="holds no image of the validation split"):
        prepare(NAME, tmp_path, flat(tmp_path / "raw", ["x"]))


# ------------------------------------------------------------------------- files of many kinds


def test_subfolders_and_other_kinds_of_files_are_used(tmp_path):
    raw = flat(tmp_path / "raw", ["top"])
    rng = np.random.default_rng(0)
    colours = {}
    for name in ("day/0.jpg", "day/1.PNG", "night/0.webp", "b.bmp", "c.tif", "d.TIFF", "e.gif"):
        colours[name.partition(".")[0]] = colour = rng.integers(0, 256, 3)
        save(raw / "images" / name, np.broadcast_to(colour.astype(np.uint8), (8, 12, 3)))
        save((raw / "labels" / name).with_suffix(".PNG"), np.eye(8, 12, dtype=np.uint8))
    prepare(NAME, tmp_path, raw)
    assert set(examples(tmp_path)) == {"top", *colours}
    for example_id, colour in colours.items():
        image, label = decoded(tmp_path, example_id)
        assert np.abs(image.astype(int) - colour).max() <= 4, example_id
        np.testing.assert_array_equal(label, np.eye(8, 12))


def test_what_is_left_out_is_named_and_counted(tmp_path, caplog):
    raw = flat(tmp_path / "raw", "ab")
    for name in ("notes.txt", "scan.heic", ".hidden"):
        (raw / "images" / name).touch()
    save(raw / "labels" / "c.png", np.zeros((8, 12), np.uint8))
    prepare(NAME, tmp_path, raw)
    assert "left out 2 files of " in caplog.text and "notes.txt, scan.heic" in caplog.text
    assert "left out 1 file of " in caplog.text and "without an image: c.png" in caplog.text


def test_images_outside_of_the_splits_are_named(raw, tmp_path, caplog):
    save(raw / "images" / "test" / "x.png", np.zeros((8, 12, 3), np.uint8))
    prepare(NAME, tmp_path, raw)
    assert "left out 1 file outside of" in caplog.text and ": x.png" in caplog.text


def test_a_link_in_a_circle_ends(tmp_path):
    raw = flat(tmp_path / "raw", "ab")
    (raw / "images" / "again").symlink_to(raw / "images")
    prepare(NAME, tmp_path, raw)
    assert set(examples(tmp_path)) == {"a", "b"}


def test_names_in_other_normal_forms_and_encodings(tmp_path):
    raw = flat(tmp_path / "raw", ["a"])
    grey, label = np.zeros((8, 12, 3), np.uint8), np.zeros((8, 12), np.uint8)
    save(raw / "images" / unicodedata.normalize("NFD", "café.jpg"), grey)
    save(raw / "labels" / unicodedata.normalize("NFC", "café.png"), label)
    for kind, array in (("images", grey), ("labels", label)):
        save(raw / "x.png", array)
        os.rename(raw / "x.png", os.path.join(os.fsencode(raw / kind), b"caf\xe9.png"))
    prepare(NAME, tmp_path, raw)
    assert set(examples(tmp_path)) == {"a", unicodedata.normalize("NFC", "café"), "caf\\xe9"}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_are_of_what_viewers_show(orientation, tmp_path):
    raw = flat(tmp_path / "raw", "ab")
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.zeros((24, 32, 3), np.uint8)
    stored[:9, :20] = 255
    save(raw / "images" / "phone.png", stored, exif=exif)
    shown = ImageOps.exif_transpose(Image.open(raw / "images" / "phone.png"))
    save(raw / "labels" / "phone.png", np.asarray(shown)[..., 0] // 255)
    prepare(NAME, tmp_path, raw)
    image, label = decoded(tmp_path, "phone")
    np.testing.assert_array_equal(image[..., 0] == 255, label == 1)
    info, source = (
        dataset_info(NAME, tmp_path),
        Source(NAME, "train", [*examples(tmp_path).values()]),
    )
    batches = eval_batches(source, info, batch_size=1, pad_to=1, group_sizes=True)
    shapes = {b["id"][0]: b["label"].shape[1:] for b in batches}
    assert shapes[b"phone"] == ((32, 24) if orientation > 4 else (24, 32))


def test_a_mask_of_the_image_as_it_is_stored_is_named(tmp_path):
    raw = flat(tmp_path / "raw", "ab")
    exif = Image.Exif()
    exif[0x0112] = 6
    save(raw / "images" / "phone.jpg", np.zeros((24, 32, 3), np.uint8), exif=exif)
    save(raw / "labels" / "phone.png", np.zeros((24, 32), np.uint8))
    with pytest.raises(DataError, match="phone.* differ in size: 24x32 against 32x24.*EXIF"):
        prepare(NAME, tmp_path, raw)


def test_16_bit_images_keep_their_values(tmp_path):
    raw = flat(tmp_path / "raw", "ab")
    values = np.linspace(0, 65535, 8 * 12).reshape(8, 12).astype(np.uint16)
    save(raw / "images" / "xray.png", values)
    save(raw / "labels" / "xray.png", np.zeros((8, 12), np.uint8))
    prepare(NAME, tmp_path, raw)
    np.testing.assert_array_equal(decoded(tmp_path, "xray")[0][..., 1], np.rint(values / 257))


# ------------------------------------------------------------------- folders and masks of any kind


def test_one_command_from_folders_of_any_names(tmp_path, capsys, monkeypatch):
    photos_and_masks(tmp_path, "grey", "_mask")
    for kind, ending in (("photos", "_leftImg8bit.png"), ("masks", "_gtFine_labelIds.png")):
        save(tmp_path / "val" / kind / f"x{ending}", np.zeros((8, 12), np.uint8))
    command = ["prepare", NAME, "--data-dir", str(tmp_path)]
    command += [
        f"--{kind}={tmp_path / place}"
        for kind, place in (
            ("images", "photos"),
            ("labels", "masks"),
            ("validation-images", "val/photos"),
            ("validation-labels", "val/masks"),
        )
    ]
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    with pytest.raises(SystemExit, match="(?s)^error: 6 label maps hold 4 numbers.*--yes"):
        main(command)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    answers = iter(["no", "y"])
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    with pytest.raises(SystemExit):
        main([*command, "--ignore-label", "3"])
    main([*command, "--ignore-label", "3"])
    out = capsys.readouterr().out
    assert "3=ignore 7=class_7 255=class_255" in out
    assert f"validation: 1 of 6 images, of {tmp_path / 'val/photos'}: x_leftImg8bit\n" in out
    assert dataset_info(NAME, tmp_path).class_names == ("class_0", "class_7", "class_255")
    main([*command, "--yes"])
    assert "before; --overwrite builds it anew" in capsys.readouterr().out


@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_can_be_ignored(orientation, tmp_path):
    photos_and_masks(tmp_path, "grey", numbers=(0, 1, 2, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    save(tmp_path / "photos" / "IMG 0.JPG", stored, exif=exif)
    before = np.asarray(Image.open(tmp_path / "photos" / "IMG 0.JPG"))
    own = both_folders(tmp_path, classes=["a", "b", "c", "d"], orientation=False)
    prepare(NAME, tmp_path, own=own)
    np.testing.assert_array_equal(decoded(tmp_path, "IMG 0")[0], before)
    untouched = (tmp_path / "photos" / "IMG 1.JPG").read_bytes()
    assert examples(tmp_path)["IMG 1"]["image"] == untouched


def test_all_errors_of_masks_come_first_and_name_files(tmp_path):
    photos_and_masks(tmp_path, "grey")
    for index in (1, 3):
        save(tmp_path / "masks" / f"IMG {index}.PNG", np.zeros((12, 8), np.uint8))
    message = "IMG 1.JPG and .*1.PNG differ in size.*\n1 other label map cannot .*: IMG 3.PNG"
    with pytest.raises(DataError, match=message):
        prepare(NAME, tmp_path, own=both_folders(tmp_path, classes=["a", "b"]))
    assert not is_prepared(NAME, tmp_path)


def test_what_cannot_be_said_of_own_images(tmp_path):
    photos_and_masks(tmp_path, "grey")
    photos, masks = tmp_path / "photos", tmp_path / "masks"
    for options, error, message in (
        ({"labels": masks}, ValueError, "images and labels go together, got only labels"),
        ({"images": photos, "labels": photos}, ValueError, "two folders, got .*photos twice"),
        ({"images": "no", "labels": masks}, FileNotFoundError, "images no is not a folder"),
        ({"classes": "a,b"}, FileNotFoundError, "classes .*a,b is not a file; .* at least two"),
        ({"ignore_label": 256}, ValueError, "ignore_label must be .* got 256"),
    ):
        with pytest.raises(error, match=message):
            OwnImages(**options)
    for name, own, more, message in (
        ("voc", both_folders(tmp_path), {}, "voc has images and classes of its own"),
        (NAME, both_folders(tmp_path), {"manual_dir": photos}, "are two places; give one"),
        (
            NAME,
            both_folders(tmp_path, classes=["a", "1=b"]),
            {},
            "classes, line 2: all lines have a number",
        ),
        (
            NAME,
            both_folders(tmp_path, classes=["a", "b"], ignore_label=1),
            {},
            "number of the class 'b'",
        ),
        (
            *(NAME, both_folders(tmp_path, validation_images=photos, validation_labels=masks), {}),
            "images and validation_images share 5 files, .*IMG 0.JPG first",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(name, tmp_path, own=own, **more)
    photos_and_masks(tmp_path, "rgb")
    with pytest.raises(DataError, match="(?s)ignore_label is 3, but these label maps hold colours"):
        prepare(NAME, tmp_path, own=both_folders(tmp_path, ignore_label=3))
    (tmp_path / "masks" / "IMG 1_mask.png").touch()
    (tmp_path / "masks" / "IMG 1_seg.png").touch()
    (tmp_path / "masks" / "IMG 1.PNG").unlink()
    with pytest.raises(DataError, match="IMG 1_mask.png and .*IMG 1_seg.png are both label maps"):
        prepare(NAME, tmp_path, own=both_folders(tmp_path))


# ------------------------------------------------------------------- damaged datasets, odd places


@pytest.fixture
def two(raw, tmp_path):
    """A folder with two prepared datasets, NAME and `image_folder/other`."""
    for name in (NAME, "image_folder/other"):
        prepare(name, tmp_path / "data", raw)
    return tmp_path / "data"


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _shard(folder):
    (shard,) = folder.glob("*train*")
    return shard


DAMAGE = {
    "no dataset_info.json": lambda folder: (folder / "dataset_info.json").unlink(),
    "dataset_info.json cannot be read": lambda folder: _cut(folder / "dataset_info.json"),
    "dataset_info.json is no JSON object": lambda folder: (folder / "dataset_info.json").write_text(
        "[]"
    ),
    "dataset_info.json cannot be used": lambda folder: (folder / "dataset_info.json").write_text(
        "{}"
    ),
    "no features.json": lambda folder: (folder / "features.json").unlink(),
    "metadata.json cannot be read": lambda folder: _cut(folder / "metadata.json"),
    "no image_folder-train": lambda folder: _shard(folder).unlink(),
    "00001 is empty": lambda folder: _shard(folder).write_bytes(b""),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_datasets_are_named_and_built_anew(what, two, raw, capsys):
    folder = two / NAME / "1.0.0"
    DAMAGE[what](folder)
    advice = f"prepare {NAME} --manual-dir DIR --data-dir {two} --overwrite"
    message = f"(?s){folder}, is damaged: .*{re.escape(what)}.*{advice}"
    for function in (dataset_info, lambda *a: open_source(a[0], "train", a[1]), prepare):
        with pytest.raises(DataError, match=message):
            function(NAME, two)
    assert NAME not in list_datasets(two) and "image_folder/other" in list_datasets(two)
    assert list(damaged_datasets(two)) == [NAME]
    main(["--data-dir", str(two), "list"])
    out = capsys.readouterr().out
    assert f"warning: {NAME} is damaged: " in out and "image_folder/other  " in out
    main(["prepare", NAME, "--manual-dir", str(raw), "--data-dir", str(two), "--overwrite"])
    assert _ids("train", two) == ["train_0", "train_1"] and not damaged_datasets(two)


@pytest.mark.parametrize("at", [70, 300, 700])
def test_a_damaged_shard_is_named(at, two):
    shard = _shard(two / NAME / "1.0.0")
    content = bytearray(shard.read_bytes())
    content[at] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=f"(?s)example [01] cannot.* {shard} is .*--overwrite"):
        list(open_source(NAME, "train", two))


def test_the_right_one_of_several_shards_is_named():
    def broken(index):
        raise RuntimeError("hash mismatch\nand more")

    examples = type("", (), {"__getitem__": lambda self, index: broken(index)})()
    records = load._Records(examples, "x", (("a", 2), ("b", 1), ("c", 3)), "Do.")
    for index, name in enumerate("aabccc"):
        with pytest.raises(DataError, match=rf"example {index} .* {name} is .*mismatch\). Do.$"):
            records[index]
    with pytest.raises(IndexError):
        records[6]


@pytest.mark.parametrize("share", [0.1, 0.4, 0.9])
def test_a_truncated_shard_is_named(share, two):
    shard = _shard(two / NAME / "1.0.0")
    shard.write_bytes(shard.read_bytes()[: int(share * shard.stat().st_size)])
    with pytest.raises(DataError, match=f"(?s)example [01] cannot.* {shard} is .*--overwrite"):
        open_source(NAME, "train", two)


def test_overwriting_that_fails_keeps_what_was_there(two, raw, tmp_path):
    before = examples(two)
    (raw / "labels/train/train_0.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="train_0.png"):
        prepare(NAME, two, raw, overwrite=True)
    assert examples(two) == before


def test_overwriting_takes_the_new_files(two, raw):
    (raw / "classes.txt").write_text("x\ny\nz\n")
    prepare(NAME, two, raw, overwrite=True)
    assert dataset_info(NAME, two).class_names == ("x", "y", "z")
    assert not [path for path in (two / NAME).iterdir() if path.name.startswith(".replaced")]


def test_odd_folders_do_not_hide_the_others(two, capsys):
    for name in ("my pictures", "ä", "a.b", "new"):
        (two / "image_folder" / name).mkdir()
    (two / "image_folder" / "file").touch()
    own = [name for name in list_datasets(two) if name.startswith("image_folder")]
    assert own == [NAME, "image_folder/other"]
    main(["--data-dir", str(two), "list"])
    assert "image_folder/other" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["a [b] c", "x:y@3", "tölt, 'q' {z}", "a*?[0:1]", "[link=x]"])
def test_data_directories_with_odd_names(place, raw, tmp_path, capsys):
    moved = raw.rename(tmp_path / f"raw {place}")
    main(["prepare", NAME, "--manual-dir", str(moved), "--data-dir", str(tmp_path / place)])
    assert _ids("train", tmp_path / place) == ["train_0", "train_1"]
    assert dataset_info(NAME, tmp_path / place).num_classes == 3
    assert NAME in list_datasets(tmp_path / place)


def test_a_tilde_is_the_home_folder(raw, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert prepare(NAME, "~/data", f"~/{raw.name}") == tmp_path / "data" / NAME / "1.0.0"
    assert dataset_info(NAME, "~/data").num_classes == 3 and is_prepared(NAME, "~/data")


def test_a_place_that_cannot_be_written(raw, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Cannot write to .*/file/image_folder.*--data-dir"):
        prepare(NAME, tmp_path / "file", raw)


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
        (Image.new("I;16", (24, 16), 300), "is a 16-bit file .* with numbers up to 300"),
        (Image.new("LA", (24, 16), (3, 0)), "holds the label 3"),
        (Image.new("RGB", (24, 16), (9, 0, 0)), r"holds colours that.*100.00%  9,0,0\n.*R, G, B"),
        (Image.radial_gradient("L").resize((24, 16)).convert("RGB"), "holds the label"),
        (
            Image.merge("RGB", [Image.effect_noise((24, 16), 90) for _ in range(3)]),
            "more than 256 colours",
        ),
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
    with pytest.raises(
        DataError, match=f"the (image|label map) .*{file}: cannot be read as an image"
    ):
        prepare(NAME, tmp_path, raw)


def test_two_images_with_one_label_map(tmp_path):
    folder = flat(tmp_path / "raw", "xyz")
    Image.new("RGB", (12, 8)).save(folder / "images" / "y.png")
    with pytest.raises(DataError, match=r"y.jpg and .*y.png share the label map .*y.png; remove"):
        prepare(NAME, tmp_path, folder)


def test_a_label_map_that_is_no_png_file_is_told(tmp_path):
    raw = flat(tmp_path / "raw", "ab")
    (raw / "labels" / "a.png").rename(raw / "labels" / "a.bmp")
    message = "(?s)lacks 1 label map of images.*: a.png.*a.bmp, but a label map has to be a PNG"
    with pytest.raises(FileNotFoundError, match=message):
        prepare(NAME, tmp_path, raw)


def test_two_label_maps_of_one_image(tmp_path):
    raw = flat(tmp_path / "raw", "ab")
    shutil.copy(raw / "labels" / "a.png", raw / "labels" / "a.PNG")
    with pytest.raises(DataError, match="a.PNG and .*a.png are both label maps of .*a.jpg"):
        prepare(NAME, tmp_path, raw)


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


@pytest.mark.parametrize("place", ["gs://bucket", "~nobody-here/x"])
def test_an_unusable_default_is_told(place, monkeypatch):
    monkeypatch.setenv("RESFU_DATA_DIR", place)
    for arguments in (["list"], ["prepare", NAME]):
        with pytest.raises(SystemExit, match="error: RESFU_DATA_DIR .*" + re.escape(place)):
            main(arguments)


def test_help_in_a_folder_with_a_percent_sign(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RESFU_DATA_DIR", str(tmp_path / "50%s"))
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0 and "50%s" in capsys.readouterr().out.replace("\n", "")


def test_an_interruption_ends_in_one_line(raw, tmp_path, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(load, "_build", interrupted)
    with pytest.raises(SystemExit, match="^interrupted; the same command starts again"):
        main(["prepare", NAME, "--manual-dir", str(raw), "--data-dir", str(tmp_path)])
