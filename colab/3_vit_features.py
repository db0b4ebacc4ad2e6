# %% [markdown]
# # Features of a frozen ViT, upsampled
#
# A Vision Transformer sees your photo in patches of 16 x 16 pixels. The upsamplers that are part of a
# network are fitted to this one photo, without labels, and bring its features to four times their resolution. (Those
# that come trained for frozen encoders, such as `anyup`, are in docs/upsamplers.md.)
#
# **Run time**: 5 minutes on two CPU cores, after the installation; most of it is the fits.

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
import time

import jax
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from matplotlib.cbook import get_sample_data

import resfu_jax
from resfu_jax.backbones import ViT
from resfu_jax.convert import load_pretrained
from resfu_jax.images import read_image
from resfu_jax.self_supervised import GuidedUpsampler, extractor, fit, fitted
from resfu_jax.upsamplers import upsampler_entry
from resfu_jax.visualize import PCA

SMALL = "RESFU_NOTEBOOK_SMALL" in os.environ  # a test of this notebook: three members, two steps
print("JAX", jax.__version__, "on", jax.devices())

# %% [markdown]
# ## The photo
#
# Name a file, or write `"upload"` on Colab. The default is a photo that comes with matplotlib. Its sides become
# multiples of 16, the patches. It is turned as its EXIF data say, so as viewers show it, unless `ORIENTATION` is False.

# %%
PHOTO = ""
ORIENTATION = True

if PHOTO == "upload":
    from google.colab import files

    PHOTO = next(iter(files.upload()))
default = get_sample_data("grace_hopper.jpg", asfileobj=False)
photo = read_image(PHOTO or default, orientation=ORIENTATION)
image = fitted(photo, side=128 if SMALL else 320, multiple=16)
print(photo.shape, "->", image.shape)

# %% [markdown]
# ## The features
#
# ViT-Ti/16 (Steiner et al., "How to train your ViT?", 2021), 23 MB from the Hugging Face hub. The environment variable
# `RESFU_VIT_WEIGHTS` names a file or another repository instead; if it is empty, the weights are random.

# %%
WEIGHTS = os.environ.get("RESFU_VIT_WEIGHTS", "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k")

vit = ViT("tiny", rngs=nnx.Rngs(0))
if WEIGHTS:
    load_pretrained(WEIGHTS, vit)
extract = extractor(vit, mean=(127.5,) * 3, std=(127.5,) * 3)  # as these weights were trained
features = extract(image[None])
print("features", features.shape)

# %% [markdown]
# ## Fit
#
# The ViT itself is the teacher: its features of the photo, shifted by fractions of a patch and interleaved, are
# four times as fine. That takes 16 passes; the upsampler learns to get there from one. The loss is the share of
# the teacher's variance that is not explained. A fit to one photo shows what an upsampler *can* do; it says nothing
# about other photos.

# %%
names = ["nearest", "bilinear", "bicubic"]
for name in resfu_jax.list_upsamplers():
    by_image = upsampler_entry(name).cls.guide == "image"  # an encoder of images is long to fit
    if not by_image and name not in (*names, "resfu_segformer", "resfu_segmenter"):
        names.append(name)  # the others of ReSFU are settings of a few of its options
if SMALL:
    names = ["bilinear", "dysample", "sapa"]

modules, losses = {}, {}
for name in names:
    started = time.perf_counter()
    modules[name] = GuidedUpsampler(name, features=192, scale=4, rngs=nnx.Rngs(0))
    losses[name] = fit(modules[name], extract, [image], steps=2 if SMALL else 100)
    seconds = time.perf_counter() - started
    print(f"{name:16} loss {losses[name][0]:.3f} -> {losses[name][-1]:.3f}, {seconds:.0f} s")

# %% [markdown]
# ## Compare
#
# Each picture shows three directions of the features as colours, the same three in all of them: those along which
# the ViT's own features, at the top, vary most. The numbers are the losses of the fit.


# %%
@nnx.jit
def upsample(module, features, image):
    return module(features, image)


colors = PCA.fit(np.asarray(features[0]))
pictures = {"photo": image, "features": colors(np.asarray(features[0]))}
for name, module in modules.items():
    upsampled = np.asarray(upsample(module, features, image[None].astype(np.float32))[0])
    pictures[f"{name} {losses[name][-1]:.2f}"] = colors(upsampled)

columns = 5
height = image.shape[0] / image.shape[1]
rows = -(-len(pictures) // columns)
_, axes = plt.subplots(
    rows, columns, figsize=(2.4 * columns, rows * (2.4 * height + 0.25)), layout="constrained"
)
for axis in axes.flat:
    axis.set_axis_off()
for axis, (title, picture) in zip(axes.flat, pictures.items(), strict=False):
    axis.imshow(picture, interpolation="nearest")
    axis.set_title(title, fontsize=10)
plt.show()

# %% [markdown]
# ## What one pixel looks at
#
# Most members, among them these, reassemble: an output pixel is a weighted mean of input pixels. `weights` gives
# these weights, exactly. Here is one pixel (the cross) at an outline, and its weights on the part of the photo around
# it. `nearest` to `lda_aqu` know the features only; `fade`, `sapa` and `resfu` see the photo, too. `sapa` takes from
# the patches along the outline; `resfu`, after so short a fit, stays near the bilinear weights that it refines; `fade`
# takes one patch, and what the photo shows there.

# %%
PIXEL = (0.609, 0.8)  # row and column, as shares of height and width: the shoulder, at its outline

h, w = features.shape[1:3]
pixel = int(PIXEL[0] * 4 * h), int(PIXEL[1] * 4 * w)
shown = ["nearest", "bilinear", "carafe", "dysample", "lda_aqu", "fade", "sapa", "resfu"]
shown = [name for name in shown if name in modules]


@nnx.jit
def weights(module, features, image):
    return module.weights(features, image, pixel)


columns = 4
rows = -(-len(shown) // columns)
reach = 5.5  # patches
center = (pixel[1] + 0.5) * 4, (pixel[0] + 0.5) * 4  # x and y in the photo
_, axes = plt.subplots(rows, columns, figsize=(2.4 * columns, 2.6 * rows), layout="constrained")
for axis in axes.flat:
    axis.set_axis_off()
for axis, name in zip(axes.flat, shown, strict=False):
    given = np.asarray(weights(modules[name], features, image[None].astype(np.float32))[0])
    axis.imshow(image, alpha=0.6)
    alpha = np.clip(np.abs(given) / np.abs(given).max(), 0, 1)
    extent = (0, image.shape[1], image.shape[0], 0)
    axis.imshow(given, cmap="autumn", alpha=0.8 * alpha, extent=extent, interpolation="nearest")
    axis.plot(*center, "c+", markersize=12, markeredgewidth=2)
    axis.set(xlim=(center[0] - 16 * reach, center[0] + 16 * reach))
    axis.set(ylim=(center[1] + 16 * reach, center[1] - 16 * reach))
    axis.set_title(name, fontsize=10)
plt.show()

# %% [markdown]
# For a network that is trained with labels behind such features, see `configs/camvid_vit_frozen.py` and
# [the results](../docs/results.md).
