"""Folders of images and label maps, as people have them, for the tests of `image_folder`."""

import numpy as np
from PIL import Image

from resfu_jax.data import OwnImages, dataset_info, open_source, transforms

NAME = "image_folder/mine"
COLOURS = np.array([(0, 0, 0), (0, 200, 0), (250, 0, 0), (9, 9, 200)], np.uint8)


def flat(folder, names, suffix=".jpg"):
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for name in names:
        Image.new("RGB", (12, 8)).save(folder / "images" / f"{name}{suffix}")
        Image.new("L", (12, 8), 1).save(folder / "labels" / f"{name}.png")
    (folder / "classes.txt").write_text("a\nb\n")
    return folder


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(path, **options)


def photos_and_masks(folder, kind, ending="", numbers=(0, 7, 3, 255), suffix=".JPG"):
    """Five photos and masks of four classes; numbers, and colours in the same order."""
    rng = np.random.default_rng(0)
    classes = {}
    for index in range(5):
        name = f"IMG {index}"
        classes[name] = label = rng.permutation(np.arange(8 * 12).reshape(8, 12) % 4)
        save(folder / "photos" / f"{name}{suffix}", np.zeros((8, 12, 3), np.uint8))
        if kind == "rgb":
            mask = Image.fromarray(COLOURS[label])
        elif kind == "palettes":  # of each file in another order, as tools that count colours write
            order = rng.permutation(4)
            mask = Image.fromarray(np.argsort(order)[label].astype(np.uint8))
            mask.putpalette(COLOURS[order].ravel())
        else:
            mask = Image.fromarray(np.array(numbers, np.uint8)[label])
            if kind == "palette":
                table = np.full((256, 3), 77, np.uint8)
                table[list(numbers)] = COLOURS
                mask.putpalette(table.ravel())
        (folder / "masks").mkdir(exist_ok=True)
        mask.save(folder / "masks" / f"{name}{ending}.PNG")
    return classes


def both_folders(folder, **options):
    return OwnImages(folder / "photos", folder / "masks", **options)


def examples(folder, name=NAME):
    sources = (open_source(name, split, folder) for split in ("train", "validation"))
    return {e["id"].decode(): e for source in sources for e in source}


def decoded(folder, example_id, name=NAME):
    example, info = examples(folder, name)[example_id], dataset_info(name, folder)
    image, label = transforms.decode(example, info, example_id)
    return np.asarray(image), np.asarray(label)


def photos(folder, sizes, cells, resample):
    """Twelve photos, of these sizes in turn, each of `cells` x `cells` random colours, resized."""
    rng = np.random.default_rng(0)
    for i in range(12):
        height, width = sizes[i % len(sizes)]
        picture = Image.fromarray(rng.integers(0, 256, (cells, cells, 3)).astype(np.uint8))
        picture.resize((width, height), resample).save(folder / f"{i}.png")
    return folder
