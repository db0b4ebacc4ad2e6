"""What numbers and colours in one's own label maps mean."""

import numpy as np
import pytest
from own_images import NAME, both_folders, decoded, flat, photos_and_masks, save
from PIL import Image

from resfu_jax.data import DataError, dataset_info, is_prepared, label_pixels, open_source, prepare
from resfu_jax.data.__main__ import main
from resfu_jax.data.own_classes import read_classes

# ------------------------------------------------------------------------------------- class files


def test_class_files(tmp_path):
    text = "# mine\nfar away,  1,2 ,3\n\n  near \n".encode("utf-8-sig")
    (tmp_path / "classes.txt").write_bytes(text)
    classes = read_classes(tmp_path / "classes.txt")
    assert classes.names == ["far away", "near"]
    assert classes.palette == [(1, 2, 3), (128, 0, 0)] and classes.colours is None


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_class_files_in_other_encodings(encoding, newline, tmp_path):
    (tmp_path / "classes.txt").write_bytes(f"Straße{newline}{newline}Bäume".encode(encoding))
    assert read_classes(tmp_path / "classes.txt")[0] == ["Straße", "Bäume"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a\nb, 1, 2\n", r"line 2: 'b, 1, 2' is neither 'name' nor 'name, R, G, B'"),
        ("a\nb, 1, 2, 256\n", "line 2"),
        ("a\n, 1, 2, 3\n", "line 2"),
        ("a\nb\n\na\n", "line 4: the class 'a' is there twice"),
        ("a\n", "has 1 class; it needs 2 to 255"),
        ("".join(f"c{k}\n" for k in range(256)), "has 256 classes"),
    ],
)
def test_class_files_that_cannot_be_used(text, message, tmp_path):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=f"classes.txt.*{message}"):
        read_classes(tmp_path / "classes.txt")


@pytest.mark.parametrize(
    "data, message",
    [
        ("a\nStraße\n".encode("latin-1"), "line 2: this is not UTF-8.*Save the file as UTF-8"),
        ("a\nb\n".encode("utf-16-le"), "null characters, as UTF-16 without"),
        (b"\xff\xfea\0b", "is not UTF-16"),
        ("café\ncafe\u0301\n".encode(), "line 2: the class 'café' is there twice"),
    ],
)
def test_class_files_in_unknown_encodings_are_named(data, message, tmp_path):
    (tmp_path / "classes.txt").write_bytes(data)
    with pytest.raises(DataError, match=f"classes.txt.*{message}"):
        read_classes(tmp_path / "classes.txt")


# ------------------------------------------------------------------------- what the numbers mean


def _masks(folder, values, classes="background\nobject\n"):
    flat(folder, "abcde")
    rng = np.random.default_rng(0)
    for name in "abcde":
        save(folder / "labels" / f"{name}.png", rng.choice(np.array(values, np.uint8), (8, 12)))
    (folder / "classes.txt").write_text(classes)
    return folder


def test_masks_of_0_and_255_stop(tmp_path):
    raw = _masks(tmp_path / "raw", [0, 255])
    message = (
        "(?s)object never occurs, and [3456][0-9].[0-9]% of .*labels.txt.*255 = object.*ignore"
    )
    with pytest.raises(DataError, match=message):
        prepare(NAME, tmp_path, raw)
    assert not is_prepared(NAME, tmp_path)


@pytest.mark.parametrize(
    "text, values",
    [
        ("0 = background\n255 = object", {0: 0, 255: 1}),
        ("# mine\n\n255=background\r\n0 =ignore\r\n", {0: 255, 255: 0}),
    ],
)
def test_labels_txt_says_what_numbers_mean(text, values, tmp_path):
    raw = _masks(tmp_path / "raw", [0, 255])
    (raw / "labels.txt").write_bytes(text.encode())
    prepare(NAME, tmp_path, raw)
    for name in "abcde":
        before = np.asarray(Image.open(raw / "labels" / f"{name}.png"))
        expected = np.vectorize(values.get)(before)
        np.testing.assert_array_equal(decoded(tmp_path, name)[1], expected)


def test_numbers_that_labels_txt_lacks_stop(tmp_path):
    raw = _masks(tmp_path / "raw", [0, 7, 255])
    (raw / "labels.txt").write_text("0 = background\n255 = object")
    with pytest.raises(DataError, match="holds the label 7; those of image_folder are 0 and 255"):
        prepare(NAME, tmp_path, raw)


@pytest.mark.parametrize(
    "text, message",
    [
        ("255 = car", "line 1: '255 = car' is not 'NUMBER = NAME'.*background, object"),
        ("0 = object\n256 = object", "line 2"),
        ("0 object", "line 1"),
        ("0 = object\n0 = background", "line 2: the number 0 is there twice"),
        ("# nothing\n", "is empty"),
    ],
)
def test_labels_txt_that_cannot_be_used(text, message, tmp_path):
    raw = _masks(tmp_path / "raw", [0, 255])
    (raw / "labels.txt").write_text(text)
    with pytest.raises(DataError, match=f"labels.txt.*{message}"):
        prepare(NAME, tmp_path, raw)


@pytest.mark.parametrize("values", [[0, 1, 255], [0, 1], [0]])
def test_other_masks_do_not_stop(values, tmp_path):
    prepare(NAME, tmp_path, _masks(tmp_path / "raw", values))
    assert is_prepared(NAME, tmp_path)


def test_shares_of_the_classes_are_counted_and_told(tmp_path, capsys):
    raw = _masks(tmp_path / "raw", [0, 0, 2, 255], "a\nb\nc\n")
    main(["prepare", NAME, "--manual-dir", str(raw), "--data-dir", str(tmp_path)])
    labels = np.stack([np.asarray(Image.open(p)) for p in (raw / "labels").iterdir()])
    np.testing.assert_array_equal(
        label_pixels(NAME, tmp_path), np.bincount(labels.ravel(), minlength=256)
    )
    out = capsys.readouterr().out
    labelled = (labels != 255).sum()
    shares = [f"{name} {(labels == k).sum() / labelled:.1%}" for k, name in enumerate("abc")]
    assert f"of the labelled pixels: {', '.join(shares)}\n" in out
    assert f"ignored: {np.mean(labels == 255):.1%} of all pixels\n" in out
    assert "warning: of the classes, never occurs: b\n" in out


# ---------------------------------------------------------------------- what label maps suggest


@pytest.mark.parametrize(
    "kind, lines, meaning",
    [
        ("grey", "0=class_0 3=class_3 7=class_7 255=ignore", (0, 2, 1, 255)),
        (
            "palette",
            "0=class_0,0,0,0 3=class_3,250,0,0 7=class_7,0,200,0 255=ignore",
            (0, 2, 1, 255),
        ),
        ("rgb", "class_0,0,0,0 class_1,0,200,0 class_2,9,9,200 class_3,250,0,0", (0, 1, 3, 2)),
        ("palettes", "class_0,0,0,0 class_1,0,200,0 class_2,9,9,200 class_3,250", (0, 1, 3, 2)),
    ],
)
def test_classes_are_found_and_confirmed(kind, lines, meaning, tmp_path):
    classes = photos_and_masks(tmp_path, kind)
    with pytest.raises(DataError, match=f"(?s)5 label maps hold 4.* 25.00%  .*{lines}.*--yes"):
        prepare(NAME, tmp_path, own=both_folders(tmp_path))
    told = []
    prepare(NAME, tmp_path, own=both_folders(tmp_path, confirm=lambda text: not told.append(text)))
    assert lines in told[0]
    for name, label in classes.items():
        np.testing.assert_array_equal(decoded(tmp_path, name)[1], np.array(meaning)[label])
    info = dataset_info(NAME, tmp_path)
    held_out = open_source(NAME, "validation", tmp_path)[0]["id"].decode()
    assert info.notes[0].startswith("validation: 1 of 5 images, a fifth, by the checksums of their")
    assert info.notes[0].endswith(f": {held_out}")


@pytest.mark.parametrize(
    "file, text",
    [
        ("table.txt", "sky,9,9,200\nroad,0,200,0\nignore,0,0,0\ncar,250,0,0\n"),
        ("t.json", '{"sky": [9,9,200], "road": [0,200,0], "ignore": [0,0,0], "car": [250,0,0]}'),
        ("numbers.json", '{"sky": 255, "road": 7, "ignore": 0, "car": 3}'),
        (None, ["255=sky", "7 = road", "0=ignore", "3=car"]),
        (None, ["255=sky,1,2,3", "7=road", "3=car"]),
    ],
)
def test_classes_of_a_file_have_colours_or_numbers(file, text, tmp_path):
    classes = photos_and_masks(tmp_path, "palette")
    if file:
        (tmp_path / file).write_text(text)
    ignored = 0 if file is None and len(text) == 3 else None
    own = both_folders(tmp_path, classes=tmp_path / file if file else text, ignore_label=ignored)
    prepare(NAME, tmp_path, own=own)
    assert dataset_info(NAME, tmp_path).class_names == ("sky", "road", "car")
    for name, label in classes.items():
        np.testing.assert_array_equal(decoded(tmp_path, name)[1], np.array((255, 1, 2, 0))[label])


def test_colours_that_no_class_has_are_named(tmp_path):
    photos_and_masks(tmp_path, "palettes")
    classes = ["sky,9,9,200", "road,0,200,0"]
    message = r"(?s)IMG 0.PNG holds colours .*as do 4 others: IMG 1.*25.00%  250,0,0\n.*25.*0,0,0"
    with pytest.raises(DataError, match=message):
        prepare(NAME, tmp_path, own=both_folders(tmp_path, classes=classes))
