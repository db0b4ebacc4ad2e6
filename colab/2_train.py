# %% [markdown]
# # Train a segmentation network, then on your own images
#
# The same small network with bilinear upsampling and with ReSFU, on the dataset `shapes`, which is drawn on
# the spot; then a folder of your own images and label maps.
#
# **Run time**: about 9 minutes on two CPU cores (18 minutes of processor time), after the installation.

# %% tags=["active-ipynb"]
# # Install. Where resfu_jax is there already, this only says so.
# SOURCE = ""  # a clone, a wheel, or "git+https://..."; empty: what is installed, or beside this notebook
#
# from importlib.metadata import version
# from importlib.util import find_spec
# from pathlib import Path
#
# package = find_spec("resfu_jax")
# wheels = sorted(Path().glob("resfu_jax*.whl"), reverse=True)
# folders = [*Path().glob("resfu_jax*"), Path("..")]
# clones = [folder for folder in folders if (folder / "resfu_jax" / "__init__.py").is_file()]
# if not SOURCE and package and package.origin:  # a clone's folder is a package of no origin
#     found = "installed"
# elif not (found := SOURCE or next(iter(wheels + clones), "")):
#     raise FileNotFoundError("no resfu_jax: put a clone or a wheel of it beside this notebook, or name one in SOURCE")
# else:
#     # This Colab's JAX may be too old. Keep its kind of accelerator when it is replaced.
#     plugins = {"jax_cuda13_plugin": "cuda13", "jax_cuda12_plugin": "cuda12", "libtpu": "tpu"}
#     accelerator = next((extra for name, extra in plugins.items() if find_spec(name)), "")
#     address = Path(found).resolve().as_uri() if Path(found).exists() else found
#     %pip install --quiet "jax[{accelerator}]>=0.10" "resfu_jax[notebooks] @ {address}"
#     # If Colab then asks to restart the session: do so, and go on with the next cell.
# print(f"resfu_jax {version('resfu_jax')}: {found}")

# %%
import os
import pathlib
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

import resfu_jax
from resfu_jax import data
from resfu_jax.training import read_metrics
from resfu_jax.visualize import colorize, overlay

SMALL = "RESFU_NOTEBOOK_SMALL" in os.environ  # a test of this notebook: a few steps only
# train.py and configs/ are no part of the installed package.
places = [
    pathlib.Path(resfu_jax.__file__).parents[1],
    *pathlib.Path().glob("resfu_jax*"),
    pathlib.Path(".."),
]
REPOSITORY = next((place for place in places if (place / "train.py").is_file()), None)
if REPOSITORY is None:
    raise FileNotFoundError("no train.py: put a clone of the repository beside this notebook")
RUNS = pathlib.Path("runs").resolve()

# %% [markdown]
# ## Train on `shapes`
#
# This is `python train.py --config configs/shapes_direct.py:resfu --workdir runs/shapes_resfu`, as in a shell.
# A flag `--config.FIELD=VALUE` changes any field of the config. Here half of the config's 600 steps.
# Interrupt and run the cell again: it continues.


# %%
def train(config, workdir, *flags):
    command = [sys.executable, "train.py", f"--config={config}", f"--workdir={workdir}", *flags]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            print(line, end="")
    if process.returncode:
        raise RuntimeError(f"train.py ended with status {process.returncode}")


flags = ["--config.steps=300", "--config.eval.every=100", "--config.log_every=10"]
upsamplers = ["bilinear", "resfu"]
if SMALL:
    flags = [
        "--config.steps=4",
        "--config.eval.every=2",
        "--config.log_every=1",
        "--config.batch_size=4",
    ]
    flags += ["--config.data.resize_scale=0.25", "--config.data.crop_size=(32, 32)"]
    upsamplers = ["bilinear"]

data.prepare("shapes")  # draws it, once
for name in upsamplers:
    train(f"configs/shapes_direct.py:{name}", RUNS / f"shapes_{name}", *flags)

# %% [markdown]
# The workdir has `metrics.jsonl` (and the same for TensorBoard), checkpoints, and pictures of predictions.

# %%
_, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
for name in upsamplers:
    lines = read_metrics(RUNS / f"shapes_{name}" / "metrics.jsonl")
    for axis, key in zip(axes, ("loss", "val/miou", "val/boundary_iou"), strict=True):
        points = [(line["step"], line[key]) for line in lines if key in line]
        axis.plot(
            *zip(*points, strict=True), ".-", markersize=3 if key == "loss" else 8, label=name
        )
        axis.set(title=key, xlabel="step")
axes[0].set_ylim(0)
axes[0].legend()
plt.show()

# %% [markdown]
# Validation images, the truth, and each network's prediction. Thin strokes and corners are where the
# upsampler counts.

# %%
rows = 2 if SMALL else 4


def panels(path):
    """Image, truth and prediction of a picture, which has gaps of 4 pixels between them."""
    picture = np.asarray(Image.open(path))
    width = (picture.shape[1] - 2 * 4) // 3
    return [picture[:, i * (width + 4) :][:, :width] for i in range(3)]


pictures = {}
for name in upsamplers:
    newest = sorted((RUNS / f"shapes_{name}" / "predictions").glob("*.png"))[-rows:]
    pictures[name] = [panels(path) for path in newest]

_, axes = plt.subplots(
    rows,
    2 + len(upsamplers),
    figsize=(1.9 * (2 + len(upsamplers)), 1.9 * rows),
    layout="constrained",
)
for i, row in enumerate(axes):
    shown = [*pictures[upsamplers[0]][i][:2], *(pictures[name][i][2] for name in upsamplers)]
    for axis, picture in zip(row, shown, strict=True):
        axis.imshow(picture)
        axis.set_axis_off()
for axis, title in zip(axes[0], ["image", "truth", *upsamplers], strict=True):
    axis.set_title(title)
plt.show()

# %% [markdown]
# ## Your own folder
#
# ```
# FOLDER/images/*.jpg or .png    any size
# FOLDER/labels/*.png            of the same names and sizes: one 8-bit channel of class indices, 255 is ignored
# FOLDER/classes.txt             the class of index 0, 1, ... on each line; a colour if you like
# ```
#
# Put the path of yours here and choose a name (on Colab: upload a zip file in the file browser and unpack it with
# `!unzip`). Without one, the next cell draws a village. When the files change, choose another name.

# %%
FOLDER = ""
NAME = "village"


def draw_village(rng, height=128, width=160):
    """A picture of houses and trees, and its classes: 0 sky, 1 ground, 2 house, 3 tree."""
    picture, label = Image.new("RGB", (width, height)), Image.new("L", (width, height))
    draws = ImageDraw.Draw(picture), ImageDraw.Draw(label)

    def tone(*color):
        return tuple(int(np.clip(c + rng.normal(0, 12), 0, 255)) for c in color)

    def polygon(points, color, index):
        for draw, fill in zip(draws, (color, index), strict=True):
            draw.polygon(points, fill=fill)

    def ellipse(x, y, rx, ry, color, index):
        for draw, fill in zip(draws, (color, index), strict=True):
            draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)

    horizon = height * rng.uniform(0.45, 0.65)
    polygon([(0, 0), (width, 0), (width, height), (0, height)], tone(150, 195, 235), 0)
    hills = [
        (x, horizon + 6 * np.sin(x / 25 + rng.uniform(0, 0.5))) for x in range(0, width + 9, 8)
    ]
    polygon([*hills, (width, height), (0, height)], tone(125, 165, 85), 1)
    for y in np.sort(rng.uniform(horizon, 0.95 * height, rng.integers(3, 8))):
        x, size = rng.uniform(0, width), (0.15 + 0.25 * (y - horizon) / height) * height
        if rng.random() < 0.5:
            half, wall = 0.6 * size, 0.8 * size
            box = [(x - half, y - wall), (x + half, y - wall), (x + half, y), (x - half, y)]
            polygon(box, tone(225, 205, 170), 2)
            roof = [(x - 1.2 * half, y - wall), (x, y - 1.6 * wall), (x + 1.2 * half, y - wall)]
            polygon(roof, tone(165, 70, 55), 2)
            for side in (-0.5, 0.3):
                window = x + side * half
                box = [(window, y - 0.6 * wall), (window + 0.3 * half, y - 0.6 * wall)]
                box += [(window + 0.3 * half, y - 0.3 * wall), (window, y - 0.3 * wall)]
                polygon(box, tone(70, 85, 105), 2)
        else:
            trunk = max(1.0, 0.06 * size)
            box = [(x - trunk, y - size), (x + trunk, y - size), (x + trunk, y), (x - trunk, y)]
            polygon(box, tone(95, 70, 50), 3)
            for _ in range(5):
                a, b = rng.normal(0, 0.18 * size, 2)
                ellipse(x + a, y - size + b, 0.3 * size, 0.28 * size, tone(60, 110, 55), 3)
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.7)), np.float32)
    pixels = pixels + rng.normal(0, 6, pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8), np.asarray(label)


drawn = not FOLDER
if drawn:
    FOLDER = RUNS / "drawn_village"
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (FOLDER / kind).mkdir(parents=True, exist_ok=True)
    for i in range(8 if SMALL else 60):
        pixels, label = draw_village(rng)
        Image.fromarray(pixels).save(FOLDER / "images" / f"{i:03}.jpg", quality=95)
        Image.fromarray(label).save(FOLDER / "labels" / f"{i:03}.png")
    (FOLDER / "classes.txt").write_text(
        "sky, 130, 180, 230\nground, 150, 190, 90\nhouse, 220, 60, 50\ntree, 20, 100, 40\n"
    )

# %% [markdown]
# `prepare` checks every file, and copies them to where training reads them. A fifth of the images is for
# validation, unless there are subfolders `train` and `validation`.

# %%
DATASET = f"image_folder/{NAME}"
DATA = RUNS / "data"
data.prepare(DATASET, DATA, manual_dir=FOLDER)
info = data.dataset_info(DATASET, DATA)
print(info.class_names, info.examples)

# %% [markdown]
# The config is that of `shapes`, with ReSFU. For photographs start from pretrained weights
# (`configs/camvid_segformer_b0_resfu.py`), with a GPU.

# %%
own = [f"--config.data.name={DATASET}", f"--config.data.dir={DATA}"]
steps = ["--config.steps=200", "--config.eval.every=100", "--config.log_every=20"]
train(f"configs/shapes_direct.py:{upsamplers[-1]}", RUNS / NAME, *own, *(flags if SMALL else steps))

# %% [markdown]
# ## Predict
#
# The predictor takes files, folders and arrays of any size. These pictures are new, and larger than those of the
# training.

# %%
predictor = resfu_jax.Predictor.from_checkpoint(RUNS / NAME)
if drawn:
    rng = np.random.default_rng(1)
    images = [draw_village(rng, 160, 208)[0] for _ in range(3)]
else:
    files = sorted((pathlib.Path(FOLDER) / "images").rglob("*.*"))[:3]
    images = [predictor.read_image(file) for file in files]
results = predictor.predict(images)

_, axes = plt.subplots(2, len(images), figsize=(3 * len(images), 5), layout="constrained")
for column, image, result in zip(axes.T, images, results, strict=True):
    column[0].imshow(overlay(image, result.labels, predictor.palette))
    column[1].imshow(colorize(result.labels, predictor.palette))
    for axis in column:
        axis.set_axis_off()
patches = [
    plt.Rectangle((0, 0), 1, 1, color=np.asarray(color) / 255, label=name)
    for name, color in zip(predictor.class_names, predictor.palette, strict=True)
]
axes[0, 0].figure.legend(handles=patches, loc="outside lower center", ncols=6)
plt.show()

# %% [markdown]
# In a shell: `resfu predict photos/ --checkpoint runs/village --out results`. More:
# [datasets](../docs/datasets.md),
# [training](../docs/training.md),
# [inference](../docs/inference.md).
