"""Preprocessing is stated once, and the config, the model and its parts agree on it."""

import math

import numpy as np
import pytest
from flax import nnx

from resfu_jax import training
from resfu_jax.backbones import BACKBONES, backbone_strides, create_backbone, resnet, vit
from resfu_jax.model import create_model
from resfu_jax.preprocess import Preprocess, preprocess_of

OPTIONS = [
    ("mit", {}),
    *(("resnet", dict(variant=variant)) for variant in resnet.VARIANTS),
    ("resnet", dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))),
    *(("vit", dict(variant=variant)) for variant in vit.VARIANTS if "small" in variant),
    ("vit", dict(patch_size=8, image_size=64, layers=(1, 3))),
]


@pytest.mark.parametrize("name, options", OPTIONS)
def test_strides_are_known_without_the_backbone(name, options):
    built = []
    nnx.eval_shape(lambda: built.append(create_backbone(name, **options, rngs=nnx.Rngs(0))))
    assert backbone_strides(name, **options) == built[0].strides


def test_every_family_is_among_them():
    assert {name for name, _ in OPTIONS} == set(BACKBONES)


@pytest.mark.parametrize(
    "name, options, multiple",
    [
        ("mit", {}, 32),
        ("resnet", {}, 32),
        ("resnet", dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)), 8),
        ("vit", {}, 16),
        ("vit", dict(patch_size=14, image_size=28), 14),
    ],
)
def test_config_and_model_agree(name, options, multiple):
    config = training.Config()
    variant = {"mit": "b0", "resnet": "18", "vit": "tiny"}[name]
    config.model.backbone = training.BackboneConfig(name=name, variant=variant, options=options)
    config.model.head.name = "linear"
    config.model.mean, config.model.std = (127.5, 120, 0), (127.5, 1, 60)
    config.data.resize_scale, config.data.resize_to = 0.5, (64, 100)
    preprocess = training.create_preprocess(config)
    assert preprocess == Preprocess(0.5, (64, 100), (127.5, 120, 0), (127.5, 1, 60), multiple)
    assert preprocess.pad_color == (128, 120, 0)
    arguments = training.model_arguments(config.model)
    built = []
    nnx.eval_shape(lambda: built.append(create_model(**arguments, num_classes=2, rngs=nnx.Rngs(0))))
    assert preprocess_of(built[0], scale=0.5, resize_to=(64, 100)) == preprocess


def test_the_colour_of_imagenet_is_what_it_was():
    assert Preprocess().pad_color == (124, 116, 104)


@pytest.mark.parametrize("growth", [1, 1.25, 2.0])
@pytest.mark.parametrize("multiple", [1, 14, 32])
def test_padded_sides(multiple, growth):
    preprocess = Preprocess(multiple=multiple, growth=growth)
    sides = [multiple]
    while sides[-1] < 2000:
        least = max(math.ceil(growth * sides[-1] / multiple), sides[-1] // multiple + 1)
        sides.append(multiple * least)
    for n in (*range(1, 200), 1024, 1999):
        assert preprocess.padded_side(n) == min(side for side in sides if side >= n)


def test_a_side_of_any_length_is_padded_at_once():
    assert Preprocess(growth=1, multiple=1).padded_side(10**12) == 10**12


def test_images_are_resized_and_maps_brought_back():
    preprocess = Preprocess(scale=0.5, resize_to=(30, 60))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 3), np.uint8)
    assert preprocess.resize_scale(20, 28) == 0.75
    assert preprocess.resize(pixels).shape == (15, 21, 3)
    assert preprocess.resized_size(8, 64) == (4, 30)  # 3.75
    constant = np.full((15, 21, 2), 0.25, np.float32)
    np.testing.assert_array_equal(preprocess.resize_back(constant, (20, 28)), 0.25)
    assert Preprocess().resize(pixels) is pixels
