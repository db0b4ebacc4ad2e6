"""The builders of published datasets, on fabricated raw files in the official layouts."""

import fcntl
import gzip
import hashlib
import http.server
import io
import logging
import pickle
import re
import shutil
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from resfu_jax.data import (
    DataError,
    ade20k,
    coco_stuff,
    dataset_info,
    eval_batches,
    is_prepared,
    label_pixels,
    load,
    open_source,
    prepare,
    train_batches,
)
from resfu_jax.data import raw as raw_files
from resfu_jax.data.fabricate import fabricate
from resfu_jax.data.raw import RawFiles, TarPath, map_label, open_archive, read_file

NAMES = [  # from raw files with label maps of classes
    name
    for name, (info, *_) in load._DATASETS.items()
    if not (info.embedded or info.depth or info.mattes)
]
DOWNLOADED = [name for name in NAMES if name != "cityscapes"]
# Sizes of the splits that 3 fabricated images a split give.
SIZES = {"camvid/clean": (2, 4), "voc/train_aug": (9, 3)}


def _builder(name, folder="unused"):
    return load.create_builder(name, folder)


def _pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def _unpack(raw, folder):
    for path in sorted(raw.iterdir()):
        # COCO's label maps and images are in folders of the same names.
        below = "annotations" if path.name.startswith("stuff") else "images"
        inside = below if path.stem.endswith("2017") else ""
        options = {} if path.suffix == ".zip" else {"filter": "data"}
        shutil.unpack_archive(path, folder / inside, **options)
    return folder


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Folder of the fabricated raw files of each dataset."""
    root = tmp_path_factory.mktemp("raw")
    bases = {name.partition("/")[0] for name in NAMES}
    made = {base: fabricate(base, root / base, examples=3, size=(64, 80)) for base in bases}
    return {name: made[name.partition("/")[0]] for name in NAMES}


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    """Where every dataset is prepared from its archives."""
    root = tmp_path_factory.mktemp("data")
    for name in NAMES:
        prepare(name, root, raw[name])
    return root


def _splits(name, folder):
    return {
        split: {example["id"].decode(): example for example in open_source(name, split, folder)}
        for split in ("train", "validation")
    }


# ----------------------------------------------------------------------------------- all datasets


@pytest.mark.parametrize("name", NAMES)
def test_archives_and_folders_give_the_same(name, raw, prepared, tmp_path):
    splits = _splits(name, prepared)
    assert tuple(len(examples) for examples in splits.values()) == SIZES.get(name, (3, 3))
    assert not splits["train"].keys() & splits["validation"].keys()
    prepare(name, tmp_path, _unpack(raw[name], tmp_path / "raw"))
    assert _splits(name, tmp_path) == splits


@pytest.mark.parametrize("name", NAMES)
def test_batches_and_classes(name, prepared):
    info, source = dataset_info(name), open_source(name, "train", prepared)
    (batch,) = eval_batches(source, info, batch_size=len(source), pad_to=8)
    assert batch["size"].tolist() == [[64, 80]] * len(source)
    classes = np.unique(batch["label"])
    assert np.all((classes < info.num_classes) | (classes == info.ignore_label))
    assert classes.size > 0.8 * info.num_classes
    assert (255 in classes) == (name != "oxford_pet")
    next(train_batches(source, info, batch_size=1, crop_size=(16, 16), seed=0)).keys()


@pytest.mark.parametrize("name", NAMES)
def test_pixels_of_the_classes_are_counted(name, prepared):
    labels = [
        _pixels(e["label"]) for split in _splits(name, prepared).values() for e in split.values()
    ]
    expected = np.bincount(np.concatenate(labels, axis=None), minlength=256)
    np.testing.assert_array_equal(label_pixels(name, prepared), expected)


def test_a_dataset_of_an_earlier_version_has_no_count(raw, tmp_path):
    folder = prepare("ade20k", tmp_path, raw["ade20k"])
    (folder / "metadata.json").unlink()
    assert label_pixels("ade20k", tmp_path) is None and is_prepared("ade20k", tmp_path)
    assert len(open_source("ade20k", "train", tmp_path)) == 3


@pytest.mark.parametrize("name", NAMES)
def test_datasets_are_where_tfds_looks_for_them(name, prepared):
    assert load._place(name, prepared)[2] == Path(_builder(name, prepared).data_path)


@pytest.mark.parametrize("name", NAMES)
def test_preparing_twice_does_nothing(name, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "_build", None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "file").touch()
    assert prepare(name, prepared, tmp_path / "empty").is_dir()


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_something_else(name, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "holiday.jpg").touch()
    title = type(_builder(name)).TITLE
    with pytest.raises(FileNotFoundError, match=rf"does not hold {title}'s raw files: no .*\n.*"):
        prepare(name, tmp_path, raw)


@pytest.mark.parametrize("name", DOWNLOADED)
def test_no_network_says_at_once_what_to_do(name, tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", _no_network)
    with pytest.raises(ConnectionError, match="(?s)Cannot download http.*asleep.*--manual-dir DIR"):
        prepare(name, tmp_path)


def _no_network(request, timeout):
    raise OSError("asleep")


def test_what_needs_a_login_is_not_downloaded(tmp_path):
    with pytest.raises(FileNotFoundError, match="Cityscapes is not downloaded for you.*\nRegister"):
        prepare("cityscapes", tmp_path)


@pytest.mark.parametrize(
    "name, archive, lacks",
    [
        ("cityscapes", "gtFine_trainvaltest.zip", "folders gtFine/train and gtFine/val"),
        ("coco_stuff", "stuffthingmaps_trainval2017.zip", r"train2017 with label maps \(.png\)"),
        ("coco_stuff", "val2017.zip", r"val2017 with images \(.jpg\)"),
        ("oxford_pet", "annotations.tar.gz", "folder annotations"),
        ("voc/train_aug", "benchmark.tgz", r"benchmark_RELEASE/dataset with cls \(SBD\)"),
    ],
)
def test_a_missing_archive_is_named(name, archive, lacks, raw, tmp_path):
    shutil.copytree(raw[name], tmp_path / "raw")
    (tmp_path / "raw" / archive).unlink()
    with pytest.raises(FileNotFoundError, match=f"no .*{lacks}"):
        prepare(name, tmp_path, tmp_path / "raw")


@pytest.mark.parametrize(
    "name, file, message",
    [
        ("ade20k", "annotations/training/ADE_train_00000002.png", "lacks 1 label map .*00002.png"),
        ("cityscapes", "bochum_000001_000019_gtFine_labelIds.png", "lacks 1 label map of images"),
        ("voc", "JPEGImages/2007_000001.jpg", "lacks 1 image of train: 2007_000001.jpg"),
        ("voc", "SegmentationClass/2007_001002.png", "lacks 1 label map of validation"),
        ("voc", "ImageSets/Segmentation/val.txt", "no list of images .*Segmentation/val.txt"),
        ("voc/train_aug", "cls/2008_000001.mat", "lacks 1 label map of train: 2008_000001.mat"),
        ("oxford_pet", "annotations/trimaps/beagle_1.png", "lacks 1 trimap of train: beagle_1"),
        ("oxford_pet", "annotations/test.txt", "no list annotations/test.txt"),
    ],
)
def test_a_missing_file_is_named(name, file, message, raw, tmp_path):
    unpacked = _unpack(raw[name], tmp_path / "raw")
    (found,) = [path for path in unpacked.rglob(Path(file).name) if path.match(file)]
    found.unlink()
    with pytest.raises(FileNotFoundError, match=message):
        prepare(name, tmp_path, unpacked)
    assert not is_prepared(name, tmp_path)


@pytest.mark.parametrize("kind", [".zip", ".tar", ".tar.gz"])
def test_a_damaged_archive_is_named(kind, tmp_path):
    path = tmp_path / f"archive{kind}"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("file"))
    data = b"no archive" if kind != ".tar.gz" else gzip.compress(buffer.getvalue())[:-20]
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"archive{kind} cannot be read .*; download it again"):
        RawFiles([tmp_path]).find("images")


def test_a_tar_archive_reads_like_a_folder(tmp_path):
    files = {"./a/b/one.txt": b"1", "a/two.txt": b"22", "three.txt": b""}
    with tarfile.open(tmp_path / "x.tgz", "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        empty = tarfile.TarInfo("./empty/")
        empty.type = tarfile.DIRTYPE
        archive.addfile(empty)
    top = open_archive(tmp_path / "x.tgz")
    assert isinstance(top, TarPath) and top.is_dir()
    assert [child.name for child in top.iterdir()] == ["a", "three.txt", "empty"]
    assert [child.name for child in (top / "a").iterdir()] == ["b", "two.txt"]
    assert not (top / "three.txt").is_dir() and (top / "empty").is_dir()
    assert list((top / "empty").iterdir()) == []
    file = top / "a/b" / "one.txt"
    assert file.is_file() and file.read_bytes() == b"1"
    assert (file.name, file.stem, file.suffix) == ("one.txt", "one", ".txt")
    assert str(file) == f"{tmp_path}/x.tgz/a/b/one.txt"
    assert (top / "a" / "two.txt").read_bytes() == b"22"


def _tar(path, members, mode="w"):
    """Members are (name, content), or (name, type, target) of links."""
    with tarfile.open(path, mode) as archive:
        for name, *content in members:
            member = tarfile.TarInfo(name)
            if len(content) == 2:
                member.type, member.linkname = content
                archive.addfile(member)
            else:
                member.size = len(content[0])
                archive.addfile(member, io.BytesIO(content[0]))
    return path


def _zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/etc/x.png", "a\\..\\..\\x.png"])
@pytest.mark.parametrize("kind", [".tar", ".zip"])
def test_archives_that_lead_out_of_themselves_are_refused(kind, name, tmp_path):
    write = _zip if kind == ".zip" else _tar
    path = write(tmp_path / f"x{kind}", [("a/y.png", b"1"), (name, b"2")])
    with pytest.raises(DataError, match=rf"x{kind} holds the path .*x.png', which leads out of it"):
        open_archive(path)


def test_an_encrypted_archive_is_named(tmp_path):
    path = _zip(tmp_path / "x.zip", [("a.png", b"1")])
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # of the file, of the directory
        data[data.index(signature) + offset] |= 1
    path.write_bytes(data)
    with pytest.raises(
        DataError, match=r"x.zip is encrypted \(a.png needs a password\): unpack it"
    ):
        open_archive(path)


def test_a_damaged_file_of_an_archive_is_named(tmp_path):
    content = np.random.default_rng(0).bytes(2000)
    path = _zip(tmp_path / "x.zip", [("a/b.png", content)])
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"x.zip/a/b.png cannot be read \(.*download .* again"):
        read_file(open_archive(path) / "a/b.png")


def test_an_unknown_compression_is_named(tmp_path):
    path = _zip(tmp_path / "x.zip", [("a.png", b"1" * 99)])
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
        data[data.index(signature) + offset] = 9  # Deflate64
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"x.zip/a.png cannot be read \(.*compression"):
        read_file(open_archive(path) / "a.png")


def test_a_tar_archive_that_ends_early_is_named(tmp_path):
    path = _tar(tmp_path / "x.tar", [("a.png", b"1" * 3000)])
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"x.tar"):
        read_file(open_archive(path) / "a.png")


@pytest.mark.parametrize("kind", [".zip", ".tgz"])
def test_archives_that_unpack_to_far_more_than_their_size_are_refused(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(raw_files, "MAX_UNPACKED", 1 << 20)
    path = tmp_path / f"x{kind}"
    few, many = [("a.png", bytes(1 << 19))], [(f"{k}.png", bytes(1 << 20)) for k in range(8)]
    for members, fits in ((few, True), (many, False)):
        _zip(path, members) if kind == ".zip" else _tar(path, members, "w:gz")
        if fits:
            assert read_file(open_archive(path) / "a.png") == members[0][1]
        else:
            with pytest.raises(DataError, match=f"x{kind} unpacks to .* 200 times its size"):
                open_archive(path)


@pytest.mark.parametrize("kind", [".zip", ".tar"])
def test_a_huge_file_in_an_archive_is_refused(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(raw_files, "MAX_MEMBER", 1000)
    write = _zip if kind == ".zip" else _tar
    archive = open_archive(write(tmp_path / f"x{kind}", [("a", b"1" * 1000), ("b", b"1" * 1001)]))
    assert len(read_file(archive / "a")) == 1000
    with pytest.raises(
        DataError, match=f"x{kind}/b has 1001 bytes; no raw file has more than 1000"
    ):
        read_file(archive / "b")


def test_links_in_archives(tmp_path):
    members = [
        ("a/one.png", b"1"),
        ("b/hard.png", tarfile.LNKTYPE, "a/one.png"),
        ("b/soft.png", tarfile.SYMTYPE, "../a/one.png"),
        ("b/out.png", tarfile.SYMTYPE, "../../etc/passwd"),
    ]
    top = open_archive(_tar(tmp_path / "x.tar", members))
    for name in ("hard.png", "soft.png"):
        assert (top / "b" / name).is_file() and read_file(top / "b" / name) == b"1"
    with pytest.raises(
        DataError, match=r"x.tar/b/out.png is a link to ../etc/passwd, which is not"
    ):
        (top / "b/out.png").is_file()
    link = zipfile.ZipInfo("out.png")
    link.external_attr = 0o120777 << 16
    zipped = open_archive(_zip(tmp_path / "x.zip", [(link, "/etc/passwd")]))
    with pytest.raises(DataError, match="x.zip/out.png is a symbolic link"):
        read_file(zipped / "out.png")


# -------------------------------------------------------------------------------------- downloads


@pytest.fixture
def server(tmp_path):
    """The address of a server without https that has x.zip."""
    _zip(tmp_path / "x.zip", [("a.png", b"1")])

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/x.zip"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("known", ["right", "wrong", "none"])
def test_downloads_are_compared_with_what_was_published(known, server, tmp_path, caplog):
    data = (tmp_path / "x.zip").read_bytes()
    checksum = hashlib.sha256(data if known == "right" else b"").hexdigest()

    class Local(ade20k.Ade20k):
        URLS = (server,)
        SHA256 = {} if known == "none" else {server: (len(data), checksum)}

    builder = Local(data_dir=tmp_path / "data")
    manager = builder._make_download_manager(
        download_dir=None, download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    if known == "wrong":
        with pytest.raises(DataError, match=f"(?s)from {server} is not the file .*SHA-256"):
            builder._download(manager)
    else:
        (archive,) = builder._download(manager)
        assert read_file(archive / "a.png") == b"1"
    unprotected = f"{server}: nothing protects this transfer" in caplog.text
    assert unprotected == (known == "none")


def test_https_is_taken_where_it_answers(monkeypatch):
    asked = []

    def urlopen(request, timeout):
        asked.append(request.full_url)
        return io.BytesIO()

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    builder = _builder("ade20k")
    assert builder._reachable("http://x.org/a.zip") == "https://x.org/a.zip"
    known = next(iter(_builder("voc").SHA256))
    assert _builder("voc")._reachable(known) == known
    assert asked == ["https://x.org/a.zip", known]


@pytest.mark.parametrize("name", ["voc", "coco_stuff", "oxford_pet"])
def test_published_checksums(name):
    builder = _builder(name)
    assert builder.SHA256.keys() <= set(builder.urls)
    for url, (size, checksum) in builder.SHA256.items():
        assert builder.url_infos[url].size == size
        assert (
            re.fullmatch("[0-9a-f]{64}", checksum) and builder.url_infos[url].checksum == checksum
        )


# ----------------------------------------------------------------------------------------- labels


def _cityscapes_classes():
    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    return {raw: 255 for raw in range(256)} | {raw: index for index, raw in enumerate(ids)}


def _coco_classes():
    unlabelled = [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]
    kept = [raw for raw in range(182) if raw not in unlabelled]
    return {255: 255} | dict.fromkeys(unlabelled, 255) | {raw: k for k, raw in enumerate(kept)}


def _coarse_classes():
    # From the ids of things to the positions of their supercategories, as PiCIE has them.
    starts = {0: 9, 1: 11, 9: 8, 15: 7, 25: 6, 33: 10, 43: 5, 51: 2, 61: 3, 71: 0, 77: 1, 83: 4}
    things = {raw: starts[max(s for s in starts if s <= raw)] for raw in range(91)}
    stuff = """
        17 17 22 20 20 22 15 25 16 13 12 12 17 17 23 15 15 17 15 21 15 25 13 13 13 13 13 22 26 14
        14 15 22 21 21 24 20 22 15 17 16 15 22 24 21 17 25 16 21 17 22 16 21 21 25 21 26 21 24 20
        17 14 21 26 15 23 20 21 24 15 24 22 25 15 20 17 17 22 14 18 18 18 18 18 18 18 26 26 19 19
        24"""
    return {255: 255} | things | {91 + k: int(group) for k, group in enumerate(stuff.split())}


CLASSES = {
    "ade20k": {0: 255} | {raw: raw - 1 for raw in range(1, 151)},
    "camvid": {11: 255} | {raw: raw for raw in range(11)},
    "camvid/clean": {11: 255} | {raw: raw for raw in range(11)},
    "cityscapes": _cityscapes_classes(),
    "coco_stuff": _coco_classes(),
    "coco_stuff/27": _coarse_classes(),
    "oxford_pet": {1: 0, 2: 1, 3: 2},
    "voc": {raw: raw for raw in (*range(21), 255)},
    "voc/train_aug": {raw: raw for raw in (*range(21), 255)},
}


@pytest.mark.parametrize("name", NAMES)
def test_every_raw_label(name):
    table, expected = _builder(name).table, CLASSES[name]
    for raw in range(256):
        label = np.full((2, 3), raw, np.uint8)
        if raw in expected:
            classes = map_label(label, table, Path("x.png"), name)
            assert classes.dtype == np.uint8 and np.all(classes == expected[raw]), raw
        else:
            with pytest.raises(DataError, match=f"x.png holds the label {raw}; those of {name}"):
                map_label(label, table, Path("x.png"), name)
    assert {c for c in expected.values() if c != 255} == set(range(dataset_info(name).num_classes))


def test_labels_that_may_occur_are_told_in_short():
    with pytest.raises(DataError, match="holds the label 21; those of voc are 0 to 20 and 255.$"):
        map_label(np.array([[21]]), _builder("voc").table, Path("x.png"), "voc")


@pytest.mark.parametrize(
    "name, classes",
    [
        ("ade20k", {0: "wall", 12: "person", 43: "signboard", 149: "flag"}),
        ("cityscapes", {0: "road", 5: "pole", 11: "person", 18: "bicycle"}),
        ("coco_stuff", {0: "person", 11: "stop sign", 79: "toothbrush", 80: "banner", 170: "wood"}),
        ("coco_stuff/27", {9: "person", 11: "vehicle", 12: "ceiling", 23: "sky", 26: "water"}),
        ("voc", {0: "background", 15: "person", 20: "tvmonitor"}),
    ],
)
def test_names_of_classes(name, classes):
    info = dataset_info(name)
    assert {index: info.class_names[index] for index in classes} == classes


def test_names_of_raw_labels():
    assert len(coco_stuff.RAW_NAMES) == 182
    names = {90: "hair brush", 91: "banner", 105: "clouds", 123: "grass", 168: "tree", 181: "wood"}
    assert {raw: coco_stuff.RAW_NAMES[raw] for raw in names} == names


def test_colours_of_voc():
    first = ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128))
    assert dataset_info("voc").palette[:5] == first
    assert dataset_info("voc").palette[20] == (0, 64, 128)


@pytest.mark.parametrize(
    "name, folder, end",
    [
        ("ade20k", "ADEChallengeData2016/annotations/training", ".png"),
        ("cityscapes", "gtFine/train/aachen", "_gtFine_labelIds.png"),
        ("coco_stuff", "annotations/train2017", ".png"),
        ("coco_stuff/27", "annotations/train2017", ".png"),
        ("oxford_pet", "annotations/trimaps", ".png"),
        ("voc", "VOCdevkit/VOC2012/SegmentationClass", ".png"),
    ],
)
def test_label_maps_are_those_of_the_raw_files(name, folder, end, raw, prepared, tmp_path):
    unpacked = _unpack(raw[name], tmp_path)
    examples = _splits(name, prepared)["train"]
    compared = 0
    for path in (unpacked / folder).iterdir():
        example = examples.get(path.name.removesuffix(end))
        if example is None or not path.name.endswith(end):
            continue
        label = Image.open(io.BytesIO(example["label"]))
        assert label.mode == "L" and label.format == "PNG"
        before = _pixels(path.read_bytes())
        expected = np.vectorize(CLASSES[name].get)(before)
        np.testing.assert_array_equal(np.asarray(label), expected)
        compared += 1
    assert compared >= 2


def test_a_label_of_colours_stops_the_build(raw, tmp_path):
    unpacked = _unpack(raw["ade20k"], tmp_path / "raw")
    path = next(unpacked.rglob("ADE_val_00000001.png"))
    Image.new("RGB", (80, 64)).save(path)
    with pytest.raises(DataError, match=r"ADE_val_00000001.png has PIL mode 'RGB'"):
        prepare("ade20k", tmp_path, unpacked)


def test_sizes_have_to_agree(raw, tmp_path):
    unpacked = _unpack(raw["ade20k"], tmp_path / "raw")
    Image.new("L", (80, 63)).save(next(unpacked.rglob("ADE_val_00000001.png")))
    with pytest.raises(DataError, match="ADE_val_00000001.png differ in size: 80x64 against 80x63"):
        prepare("ade20k", tmp_path, unpacked)
    assert not is_prepared("ade20k", tmp_path)


# ------------------------------------------------------------------------------------- Pascal VOC


def test_train_aug_adds_sbd_without_the_validation_images(prepared):
    plain, more = _splits("voc", prepared), _splits("voc/train_aug", prepared)
    assert set(plain["train"]) == {f"2007_00000{k}" for k in range(3)}
    assert set(plain["validation"]) == {f"2007_00100{k}" for k in range(3)}
    assert set(more["train"]) == set(plain["train"]) | {f"2008_00000{k}" for k in range(6)}
    assert more["validation"] == plain["validation"]
    for name, example in plain["train"].items():
        assert more["train"][name] == example  # VOC's label map, not SBD's
    for name, example in more["train"].items():
        assert (255 in _pixels(example["label"])) == name.startswith("2007")


def test_label_maps_of_sbd(raw, prepared, tmp_path):
    unpacked = _unpack(raw["voc"], tmp_path / "raw")
    builder = _builder("voc/train_aug")
    path = next(unpacked.rglob("2008_000004.mat"))
    example = _splits("voc/train_aug", prepared)["train"]["2008_000004"]
    expected = builder.read_label(path.read_bytes(), path)
    assert expected.shape == (64, 80) and len(np.unique(expected)) == 21
    np.testing.assert_array_equal(_pixels(example["label"]), expected)
    with pytest.raises(DataError, match="Cannot decode the label map .*2008_000004.mat"):
        builder.read_label(path.read_bytes()[:150], path)


# ------------------------------------------------------------------------------------ Oxford pets


def test_images_that_are_no_rgb_jpeg_files_are_converted(tmp_path):
    raw = fabricate("oxford_pet", tmp_path / "raw", examples=4, size=(24, 32))
    prepare("oxford_pet", tmp_path, raw)
    with tarfile.open(raw / "images.tar.gz") as archive:
        before = {
            Path(member.name).stem: archive.extractfile(member).read()
            for member in archive
            if member.name.endswith(".jpg")
        }
    kinds = []
    for name, example in _splits("oxford_pet", tmp_path)["train"].items():
        old, new = (Image.open(io.BytesIO(data)) for data in (before[name], example["image"]))
        kinds.append((old.format, old.mode))
        if kinds[-1] == ("JPEG", "RGB"):
            assert example["image"] == before[name]
        else:
            assert (new.format, new.mode) == ("PNG", "RGB")
            np.testing.assert_array_equal(np.asarray(new), np.asarray(old.convert("RGB")))
    assert sorted(kinds)[:3] == [("GIF", "P"), ("JPEG", "CMYK"), ("JPEG", "RGB")]
    assert sorted(kinds)[3][0] == "PNG"


def test_transparency_is_dropped():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 9, 8, 7])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=b"\x05\x80")
    new = _builder("oxford_pet").read_image(buffer.getvalue(), Path("x.jpg"))
    assert np.all(_pixels(new) == (9, 8, 7))


@pytest.mark.parametrize("damage", ["image", "trimap", "size"])
def test_a_pet_that_cannot_be_used_is_left_out_and_named(damage, raw, tmp_path, caplog):
    unpacked = _unpack(raw["oxford_pet"], tmp_path / "raw")
    image = unpacked / "images" / "beagle_1.jpg"
    trimap = unpacked / "annotations" / "trimaps" / "beagle_1.png"
    if damage == "size":
        Image.new("L", (5, 5), 1).save(trimap)
    else:
        path = image if damage == "image" else trimap
        path.write_bytes(path.read_bytes()[:60])
    with caplog.at_level(logging.WARNING):
        prepare("oxford_pet", tmp_path, unpacked)
    assert "leaving out beagle_1: " in caplog.text
    assert set(_splits("oxford_pet", tmp_path)["train"]) == {"Abyssinian_0", "Abyssinian_2"}


# ------------------------------------------------------------------- several runs and interruptions


def test_what_a_killed_run_left_is_removed(raw, tmp_path):
    left = [
        tmp_path / "voc" / config / "incomplete.ABC_1.0.0" for config in ("default", "train_aug")
    ]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "voc-train.array_record").write_bytes(b"half")
    prepare("voc", tmp_path, raw["voc"])
    assert not left[0].exists() and left[1].exists()  # the other one is not ours


def test_a_second_process_waits_for_the_first(raw, tmp_path):
    folder = tmp_path / "ade20k"
    being_written = folder / "incomplete.ABC_1.0.0"
    being_written.mkdir(parents=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=prepare, args=("ade20k", tmp_path, raw["ade20k"]))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive() and being_written.exists()
    thread.join()
    assert is_prepared("ade20k", tmp_path) and not being_written.exists()


def test_a_file_system_without_locks(raw, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError("not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    left = tmp_path / "ade20k" / "incomplete.ABC_1.0.0"
    left.mkdir(parents=True)
    prepare("ade20k", tmp_path, raw["ade20k"])
    assert left.exists()  # it could be another process's


# -------------------------------------------------------------------------------------- fabricate


def test_fabricated_files_follow_the_seed(tmp_path):
    def content(folder, seed):
        (path,) = fabricate("ade20k", folder, examples=1, size=(16, 24), seed=seed).iterdir()
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    first = content(tmp_path / "a", 0)
    assert first == content(tmp_path / "b", 0) != content(tmp_path / "c", 1)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("shapes", {}, "'shapes' has no raw files to fabricate; ade20k, camvid, .* have"),
        ("nothing", {}, "'nothing' has no raw files"),
        ("voc", {"examples": 0}, "examples and size must be at least 1 and 8, got 0"),
        ("voc", {"size": (4, 100)}, "at least 1 and 8"),
    ],
)
def test_arguments_of_fabricate_are_checked(name, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fabricate(name, tmp_path, **options)


@pytest.mark.parametrize("name", ["voc/train_aug", "ade20k"])
def test_a_source_travels_to_worker_processes(name, prepared):
    source = open_source(name, "train", prepared)
    assert list(pickle.loads(pickle.dumps(source))) == list(source)
