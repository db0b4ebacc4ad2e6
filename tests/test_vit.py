"""ViT against timm and Hugging Face transformers, and on real weights and photographs."""

import os
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from PIL import Image

from resfu_jax.backbones import ViT
from resfu_jax.convert.vit import load_vit

SHARED = pathlib.Path(__file__).resolve().parent.parent.parent / "shared"
if "RESFU_GOLDENS" in os.environ:
    SHARED = pathlib.Path(os.environ["RESFU_GOLDENS"]).parent
WEIGHTS = SHARED / "weights" / "vit_tiny_patch16_224.safetensors"


@jax.jit
def classify(model, x):
    return model.classify(x)


# Place of a photograph's WordNet id among ImageNet's thousand classes.
PHOTOS = {
    "n01514668": 7,
    "n01687978": 42,
    "n01735189": 57,
    "n01847000": 97,
    "n01855032": 98,
    "n02018795": 138,
    "n02025239": 139,
    "n02113978": 268,
    "n02125311": 286,
    "n02127052": 287,
    "n02231487": 313,
    "n02412080": 348,
    "n02493509": 380,
    "n03032252": 498,
    "n03062245": 503,
    "n03240683": 540,
    "n03764736": 653,
}


def photo(path):
    """As timm evaluates the model: 224 / 0.9 for the shorter side, bicubic, centre of 224x224."""
    with Image.open(path) as image:
        image = image.convert("RGB")
        ratio = 248 / min(image.size)
        w, h = (round(n * ratio) for n in image.size)
        image = image.resize((w, h), Image.BICUBIC)
    x, y = (w - 224) // 2, (h - 224) // 2
    return np.asarray(image.crop((x, y, x + 224, y + 224)), np.float32) / 127.5 - 1


@pytest.mark.skipif(not WEIGHTS.is_file(), reason="needs the weights of vit_tiny_patch16_224")
def test_classifies_photographs():
    vit = ViT("tiny", num_classes=1000, rngs=nnx.Rngs(0))
    assert load_vit(safetensors.numpy.load_file(WEIGHTS), vit, WEIGHTS.name) == []
    paths = sorted((SHARED / "data" / "photos" / "imagenet17").glob("*.JPEG"))
    logits = classify(vit, np.stack([photo(path) for path in paths]))
    expected = [PHOTOS[path.name.partition("_")[0]] for path in paths]
    assert len(paths) == 17 and np.argmax(logits, axis=-1).tolist() == expected
