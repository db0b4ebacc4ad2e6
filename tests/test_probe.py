"""Probes on pictures of a few patches, whose features are the colours at the patches' centres."""

import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from resfu_jax import create_upsampler, data, training
from resfu_jax.cli import main
from resfu_jax.ops.resize import resize
from resfu_jax.probe import (
    Classes,
    Depths,
    ProbeSettings,
    fit_linear,
    markdown,
    probe,
    read_results,
    record,
)
from resfu_jax.probing import fitting, pixels, scoring
from resfu_jax.probing.images import Encoder, Split
from resfu_jax.training.depth import depth_metrics
from resfu_jax.upsamplers import keeps_space

PATCH, WIDTH = 4, 12
MIX = np.random.default_rng(0).normal(size=(6, WIDTH)).astype(np.float32)
COLOURS = np.array([(20, 40, 220), (200, 60, 30), (90, 200, 70)], np.uint8)
NAME = "image_folder/cells"
THREE = Classes(("sky", "wall", "tree"))
QUICK = ProbeSettings(epochs=3, pixels_per_image=40, learning_rate=0.05)


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        yield


class Pipeline:
    """A backbone without parameters, and a member of the registry."""

    multiple = PATCH

    def __init__(self, name, **options):
        self.name, self.seen = name, []
        options = dict(guide_features=3, scale=PATCH) | options
        self.upsampler = create_upsampler(name, features=WIDTH, **options)
        self.value_groups = self.upsampler.value_groups if keeps_space(self.upsampler) else 0

    def encode(self, images):
        self.seen.append(images.shape)
        b, h, w, _ = images.shape
        x = jnp.asarray(images, jnp.float32) / 255
        x = jnp.concatenate([x, jnp.sin(9 * x)], axis=-1)
        x = x.reshape(b, h // PATCH, PATCH, w // PATCH, PATCH, 6)
        return x[:, :, 1:3, :, 1:3].mean((2, 4)) @ MIX

    def upsample(self, features, images, size, *, values=None):
        options = {} if values is None else {"values": values}
        if self.upsampler.guide == "none":
            return self.upsampler(features, size, **options)
        return self.upsampler(features, jnp.asarray(images, jnp.float32) / 128 - 1, size, **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pictures whose classes are constant in every patch; a few pixels are ignored."""
    root = tmp_path_factory.mktemp("probe")
    rng = np.random.default_rng(1)
    for split, number in (("train", 3), ("validation", 2)):
        for kind in ("images", "labels"):
            (root / "raw" / kind / split).mkdir(parents=True)
        for i in range(number):
            cells = rng.integers(0, 3, (4, 6))
            labels = cells.repeat(PATCH, 0).repeat(PATCH, 1).astype(np.uint8)
            noise = rng.integers(-15, 16, (*labels.shape, 3))
            picture = (COLOURS[labels] + noise).clip(0, 255).astype(np.uint8)
            labels[:PATCH, :PATCH] = 255
            Image.fromarray(picture).save(root / "raw/images" / split / f"{i}.png")
            Image.fromarray(labels).save(root / "raw/labels" / split / f"{i}.png")
    (root / "raw/classes.txt").write_text("sky\nwall\ntree")
    data.prepare(NAME, root / "data", root / "raw")
    return root / "data"


def close(run, other):
    """Two runs of a probe, whose programs may round differently."""
    assert run.keys() == other.keys()
    for name, value in run.items():
        np.testing.assert_allclose(value, other[name], rtol=1e-4, err_msg=name)


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image)


def without_times(entry):
    return {name: value for name, value in entry.items() if name != "seconds"}


# ---------------------------------------------------------------------------------- the classifier
def test_fitting_is_adamw_under_a_cosine():
    """Against NumPy in float64, with ignored pixels, class weights and weight decay."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(4, 9, 5)).astype(np.float32)
    y = rng.integers(0, 3, (4, 9)).astype(np.uint8)
    y[0, :5] = 255
    weights = (0.5, 1.0, 2.0)
    settings = ProbeSettings(
        epochs=12, batch_size=4, learning_rate=0.1, weight_decay=0.2, flip=False
    )
    rows = lambda views: (x[views], y[views])  # noqa: E731
    target = Classes(THREE.names, weights=weights)
    fit = fit_linear(rows, 4, target, settings, seed=3)
    fitted, losses = jax.device_get(fit)

    start = fitting._initial(3, 5, 3)
    params = np.concatenate([start["kernel"], start["bias"][None]]).astype(np.float64)
    assert np.abs(params).max() <= 5**-0.5
    flat = np.concatenate([x.reshape(-1, 5), np.ones((36, 1))], axis=1)[y.ravel() != 255]
    labels = y[y != 255].astype(int)
    share = np.array(weights)[labels] / np.array(weights)[labels].sum()
    m = v = 0.0
    for t in range(12):
        logits = flat @ params
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        loss = -(share * np.log(p[np.arange(len(labels)), labels])).sum()
        np.testing.assert_allclose(losses[t], loss, rtol=1e-5)
        g = flat.T @ (share[:, None] * (p - np.eye(3)[labels]))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = m / (1 - 0.9 ** (t + 1)) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)
        params = params - 0.1 * (1 + np.cos(np.pi * t / 12)) / 2 * (step + 0.2 * params)
    np.testing.assert_allclose(fitted["kernel"], params[:5], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fitted["bias"], params[5], rtol=1e-4, atol=1e-5)


def test_features_of_ignored_pixels_do_not_count():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(2, 8, WIDTH)).astype(np.float32)
    y = rng.integers(0, 3, (2, 8)).astype(np.uint8)
    y[:, ::3] = 255
    other = np.where(y[..., None] == 255, np.float32(100), x)
    settings = ProbeSettings(epochs=2, flip=False)
    one, two = (
        fit_linear(lambda views, a=a: (a[views], y[views]), 2, THREE, settings, seed=0)
        for a in (x, other)
    )
    assert one[1] == two[1]
    np.testing.assert_array_equal(one[0]["kernel"], two[0]["kernel"])


def test_a_loss_that_is_not_finite_ends_the_fit():
    rows = lambda views: (np.full((2, 3, 4), np.inf, np.float32), np.zeros((2, 3), np.uint8))  # noqa: E731
    with pytest.raises(ValueError, match="the loss is nan in epoch 1: lower learning_rate"):
        fit_linear(rows, 2, THREE, ProbeSettings(), seed=0)


def test_mirrored_views_are_chosen_by_chance():
    seen = []

    def rows(views):
        seen.extend(views.tolist())
        return np.zeros((len(views), 1, 2), np.float32), np.zeros((len(views), 1), np.uint8)

    fit_linear(rows, 5, THREE, ProbeSettings(epochs=8), seed=0)
    epochs = np.array(seen).reshape(8, 5)
    assert all(sorted(epoch // 2) == list(range(5)) for epoch in epochs)
    assert 10 < (epochs % 2).sum() < 30
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 8


# ------------------------------------------------------------------------------------ the protocols
def test_all_protocols_with_seeds(place):
    settings = ProbeSettings(
        protocols=("features", "preserved", "probabilities"),
        seeds=(0, 5),
        epochs=30,
        pixels_per_image=40,
        learning_rate=0.05,
        class_balance=0.5,
    )
    entry = probe(Pipeline("bilinear"), NAME, settings, data_dir=place, facts={"backbone": "b"})
    assert json.loads(json.dumps(entry)) == entry
    assert list(entry["protocols"]) == list(settings.protocols)
    assert entry["upsampler"] == "bilinear" and entry["backbone"] == "b"
    assert entry["images"] == [3, 2] and entry["settings"]["seeds"] == [0, 5]
    for result in entry["protocols"].values():
        assert [run["seed"] for run in result["runs"]] == [0, 5]
        one, two = result["runs"]
        assert one["loss"] != two["loss"] and len(one["loss"]) == 30
        assert one["loss"][-1] < 0.5 * one["loss"][0]
        assert {"miou", "boundary_iou", "pixel_accuracy", "iou/sky", "iou/tree"} < set(one)
        for name, mean in result["mean"].items():
            assert mean == pytest.approx((one[name] + two[name]) / 2)
            assert result["std"][name] == pytest.approx(abs(one[name] - two[name]) / 2**0.5)
        assert 0.5 < result["mean"]["miou"] < 1


def test_colours_that_tell_the_class_are_told(place):
    """Nearest features of classes that are constant in a cell: all can be right."""
    settings = ProbeSettings(epochs=60, pixels_per_image=60, learning_rate=0.1)
    entry = probe(Pipeline("nearest"), NAME, settings, data_dir=place)
    (run,) = entry["protocols"]["features"]["runs"]
    assert run["miou"] == run["boundary_iou"] == run["pixel_accuracy"] == 1
    assert "std" not in entry["protocols"]["features"]


def test_repeats_exactly_and_not_with_another_seed(place):
    one, two = (probe(Pipeline("bilinear"), NAME, QUICK, data_dir=place) for _ in range(2))
    assert without_times(one) == without_times(two)
    other = ProbeSettings(epochs=3, pixels_per_image=40, learning_rate=0.05, seeds=(1,))
    three = probe(Pipeline("bilinear"), NAME, other, data_dir=place)
    assert one["protocols"]["features"]["mean"] != three["protocols"]["features"]["mean"]


@pytest.mark.parametrize(
    "options",
    [
        dict(pixels_per_image=30),  # the same pixels with the same features
        dict(pixels_per_image=None),
        dict(pixels_per_image=None, cell_labels="centre"),  # a cell's pixels all have its label
    ],
)
def test_preserved_is_features_where_upsampling_repeats_cells(place, options):
    settings = ProbeSettings(
        protocols=("features", "preserved"), epochs=5, batch_size=3, learning_rate=0.05, **options
    )
    entry = probe(Pipeline("nearest"), NAME, settings, data_dir=place)
    (one,), (two,) = (entry["protocols"][m]["runs"] for m in settings.protocols)
    close(one, two)
    assert one["loss"][-1] < 0.8 * one["loss"][0]


def test_all_pixels_are_those_that_samples_are_of(place):
    """With as many samples as there are pixels, both ways see the same."""
    runs = []
    for number in (None, 4 * 6 * PATCH**2):
        settings = ProbeSettings(epochs=3, pixels_per_image=number, learning_rate=0.05)
        entry = probe(Pipeline("bilinear"), NAME, settings, data_dir=place)
        runs += entry["protocols"]["features"]["runs"]
    close(*runs)


def test_probabilities_are_upsampled_by_the_weights_of_the_features():
    rng = np.random.default_rng(6)
    low = jnp.asarray(rng.normal(size=(2, 3, 4, WIDTH)), jnp.float32)
    shapes = {"kernel": (3, WIDTH, 5), "bias": (3, 5)}
    classifiers = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}
    images = rng.integers(0, 256, (2, 9, 16, 3)).astype(np.uint8)
    softmax = [
        jax.nn.softmax(low @ kernel + bias[None, None, None])
        for kernel, bias in zip(classifiers["kernel"], classifiers["bias"], strict=True)
    ]
    bilinear = Pipeline("bilinear")
    five = Classes(tuple("abcde"))
    values = scoring.answers(five, classifiers, low, 1)
    got = scoring.by_seed(bilinear.upsample(low, images, (9, 16), values=values), 3, 1)
    for i in range(3):
        expected = resize(softmax[i], (9, 16), method="bilinear")
        np.testing.assert_allclose(got[i], expected, atol=1e-6)

    # Groups of channels with weights of their own: the mean of their results.
    groups = Pipeline("dysample", groups=4)
    assert scoring.value_groups(groups) == 4
    values = scoring.answers(five, classifiers, low, 4)
    got = scoring.by_seed(groups.upsample(low, images, (12, 16), values=values), 3, 4)
    for i in range(3):
        parts = groups.upsample(low, images, (12, 16), values=jnp.tile(softmax[i], 4))
        np.testing.assert_allclose(got[i], parts.reshape(2, 12, 16, 4, 5).mean(3), atol=1e-5)
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-5)


def test_scores_are_those_of_training(place):
    """Resized logits, ignored pixels, boundaries: `training.count` of the largest."""
    rng = np.random.default_rng(7)
    logits = jnp.asarray(rng.normal(size=(2, 1, 8, 12, 3)), jnp.float32)
    labels = jnp.asarray(rng.choice(np.array([0, 1, 2, 255], np.uint8), (1, 16, 24)))
    got = scoring.count(Classes(THREE.names, dilation_ratio=0.1), logits, labels)
    for i in range(2):
        predicted = jnp.argmax(resize(logits[i], (16, 24)), axis=-1)
        expected = training.count(predicted, labels, num_classes=3, dilation_ratio=0.1)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), got, expected)


# ------------------------------------------------------------------------------------- the pictures
def test_sizes_of_input_output_and_crop(place):
    pipeline = Pipeline("bilinear")
    settings = ProbeSettings(crop=32, scale=0.5, output_stride=2)
    source = data.open_source(NAME, "train", place)
    split = Split(source, data.dataset_info(NAME, place), pipeline, settings)
    first, mirrored = (split.read(0, mirrored) for mirrored in (False, True))
    assert [a.shape for a in first] == [(16, 16, 3), (32, 32, 3), (32, 32)]
    for a, b in zip(first, mirrored, strict=True):
        np.testing.assert_array_equal(a, b[:, ::-1])
    # The square in the middle, of 16 pixels of 24: columns 4 .. 19.
    image, label = (
        pixels_of(place.parent / "raw" / k / "train/0.png") for k in ("images", "labels")
    )
    np.testing.assert_array_equal(first[0], image[:, 4:20])
    np.testing.assert_array_equal(first[2], label[:, 4:20].repeat(2, 0).repeat(2, 1))
    large = Image.fromarray(image).resize((48, 32), Image.Resampling.BILINEAR)
    assert np.abs(first[1] - np.asarray(large)[:, 8:40].astype(int)).max() <= 1
    batches = list(split.batches(2, flip=True))
    assert [batch.filled for batch in batches] == [2, 2, 2]
    assert batches[0].size == (8, 8)

    whole = Split(source, split.info, pipeline, ProbeSettings())
    (batch,) = whole.batches(4, flip=False)
    assert batch.filled == 3 and batch.size == (16, 24)
    assert (batch.labels[3] == 255).all() and (batch.images[3] == batch.images[2]).all()


def test_samples_are_labelled_pixels_and_their_features(place):
    source, info = data.open_source(NAME, "train", place), data.dataset_info(NAME, place)
    pipeline = Pipeline("bilinear")
    split = Split(source, info, pipeline, ProbeSettings(pixels_per_image=365))
    encode = Encoder(split, 2, None)
    found = pixels.sampled(split, encode, THREE, ["cells", "upsampled"], 2, None)
    batch = split.batch(range(6))
    low = pipeline.encode(batch.inputs)
    maps = {
        "upsampled": pipeline.upsample(low, None, batch.size),
        "cells": resize(low, batch.size, method="nearest"),
    }
    for kind, high in maps.items():
        x, y = found[kind]
        assert x.shape == (6, 365, WIDTH) and (y[:, :364] != 255).any()
        labelled = (batch.labels != 255).sum((1, 2))
        np.testing.assert_array_equal((y != 255).sum(1), np.minimum(labelled, 365))
        for i in range(6):  # each row of features is one of the map's pixels of that class
            for k in range(3):
                of_class = np.asarray(high[i])[batch.labels[i] == k]
                chosen = x[i][y[i] == k]
                distance = np.abs(chosen[:, None] - of_class[None]).max(-1).min(1)
                assert distance.max(initial=0) < 1e-5


# ------------------------------------------------------------------------------------------- depth
def test_depths_are_weighed_and_lost_as_the_head_does(as_users_call):
    """One step of the fit, and what is read off, against NumPy in float64."""
    rng = np.random.default_rng(9)
    x = rng.normal(size=(2, 7, 5)).astype(np.float32)
    depth = rng.uniform(1, 9, (2, 7)).astype(np.float32)
    depth[0, :2] = 0, 12
    target = Depths(bins=6, min_depth=1.0, max_depth=11.0)
    settings = ProbeSettings(epochs=1, batch_size=2, flip=False)
    rows = lambda views: (x[views], depth[views])  # noqa: E731
    fitted, (loss,) = fit_linear(rows, 2, target, settings, seed=3)
    start = jax.tree.map(lambda a: np.asarray(a, np.float64), fitting._initial(3, 5, 6))
    weights = np.maximum(x @ start["kernel"] + start["bias"], 0) + 0.1
    p = (weights * np.linspace(1, 11, 6)).sum(-1) / weights.sum(-1)
    valid = (depth > 1) & (depth < 11)
    d = np.log(p[valid] + 1e-3) - np.log(depth[valid] + 1e-3)
    assert loss == pytest.approx(np.sqrt(d.var(ddof=1) + 0.15 * d.mean() ** 2), rel=1e-4)
    assert {k: v.shape for k, v in fitted.items()} == {"kernel": (5, 6), "bias": (6,)}
    both = jax.tree.map(lambda a: jnp.stack([jnp.asarray(a, jnp.float32)] * 2), start)
    maps = scoring.read_off(target, both, jnp.asarray(x)[:, None])
    assert maps.shape == (2, 2, 1, 7, 1)
    np.testing.assert_allclose(maps[1, :, 0, :, 0], p, rtol=1e-5)
    counts = scoring.count(target, maps, jnp.asarray(depth)[:, None])
    one = depth_metrics(maps[0, ..., 0], depth[:, None], min_depth=1.0, max_depth=11.0)
    np.testing.assert_allclose(counts.metrics["abs_rel"], [one.metrics["abs_rel"]] * 2, rtol=1e-6)


@pytest.fixture(scope="module")
def depths(tmp_path_factory):
    """Pictures whose colour is the depth of a cell; a few pixels are unknown."""
    root = tmp_path_factory.mktemp("depths")
    rng = np.random.default_rng(3)
    for split, number in (("train", 4), ("validation", 2)):
        for kind in ("images", "depth"):
            (root / "raw" / kind / split).mkdir(parents=True)
        for i in range(number):
            metres = rng.uniform(1, 9, (4, 6)).repeat(PATCH, 0).repeat(PATCH, 1)
            grey = (25 * metres).round().astype(np.uint8)
            picture = np.stack([grey, 255 - grey, grey // 2], axis=-1)
            metres[:2] = 0
            Image.fromarray(picture).save(root / "raw/images" / split / f"{i}.png")
            millimetres = Image.fromarray((1000 * metres).astype(np.uint16))
            millimetres.save(root / "raw/depth" / split / f"{i}.png")
    data.prepare("depth_folder/cells", root / "data", root / "raw")
    return root / "data"


def test_depth_by_all_protocols(depths, monkeypatch, capsys, tmp_path):
    module = types.SimpleNamespace(FeaturePipeline=lambda backbone, name, **_: Pipeline(name))
    monkeypatch.setitem(sys.modules, "resfu_jax.features", module)
    words = "--backbone b --epochs 60 --pixels-per-image 60 --learning-rate 0.05 --bins 32"
    files = ["--out", str(tmp_path / "p.json"), "--data-dir", str(depths)]
    methods = ["--protocols", "features", "preserved", "probabilities", "--seeds", "0", "1"]
    command = ["probe", "depth_folder/cells", *words.split(), *files, *methods]
    assert main([*command, "--upsampler", "nearest", "bilinear"]) == 0
    nearest, bilinear = read_results(tmp_path / "p.json")
    for result in nearest["protocols"].values():
        for run in result["runs"]:
            assert run["loss"][-1] < 0.5 * run["loss"][0]
            assert 0.9 < run["delta1"] <= 1 and run["abs_rel"] < 0.12
    # Cells are constant: the three are one for `nearest`, and blurring them is worse.
    means = [result["mean"]["abs_rel"] for result in nearest["protocols"].values()]
    assert means == pytest.approx([means[0]] * 3, rel=1e-3)
    assert bilinear["protocols"]["features"]["mean"]["abs_rel"] > means[0]
    table = capsys.readouterr().out.splitlines()
    start = "| upsampler | dataset | protocol | delta1 | AbsRel | RMSE | log10 | seeds |"
    assert table[0] == start and len(table) == 2 + 6
    for options, message in (
        (dict(class_balance=0.5), "class_balance is for classes, and 'depth_folder/cells'"),
        (dict(min_depth=20.0, max_depth=30.0), "no pixel of 'depth_folder/cells' counts"),
    ):
        with pytest.raises(ValueError, match=message):
            settings = ProbeSettings(epochs=1, **options)
            probe(Pipeline("nearest"), "depth_folder/cells", settings, data_dir=depths)


def test_tables_of_classes_and_of_depths_stand_apart():
    depth = {"runs": [{}], "mean": {"delta1": 0.5, "abs_rel": 0.25, "rmse": 1.0, "log10": 0.1}}
    entry = entry_of("jbu", 0.5) | {"protocols": {"features": depth}}
    classes, depths = markdown([entry_of("naf", 0.5), entry]).split("\n\n")
    assert "mIoU" in classes and "naf" in classes and "jbu" not in classes
    assert depths.splitlines()[2] == "| jbu | d | features | 0.500 | 0.250 | 1.000 | 0.100 | 1 |"


# ---------------------------------------------------------------------------------- kept on disk
def test_features_are_kept(place, tmp_path):
    kept = dict(data_dir=place, cache_dir=tmp_path / "cache")
    first, second, other = Pipeline("bilinear"), Pipeline("bilinear"), Pipeline("nearest")
    entries = [probe(pipeline, NAME, QUICK, **kept) for pipeline in (first, second)]
    alone = Pipeline("bilinear")
    entries.append(probe(alone, NAME, QUICK, data_dir=place))
    assert without_times(entries[0]) == without_times(entries[1]) == without_times(entries[2])
    # Two to know the backbone; three batches of six views, one of validation.
    assert len(first.seen) == 2 + 3 + 1
    assert second.seen == first.seen[:2]
    assert len(alone.seen) == 1 + 3 + 1  # the first batch is tried
    nearest = probe(other, NAME, QUICK, **kept)
    assert other.seen == first.seen[:2]
    assert nearest["protocols"] != entries[0]["protocols"]
    # Another backbone finds nothing.
    changed = Pipeline("bilinear")
    encode = changed.encode
    changed.encode = lambda images: 2 * encode(images)
    probe(changed, NAME, QUICK, **kept)
    assert len(changed.seen) == len(first.seen)
    names = sorted(path.name.split("_")[0] for path in (tmp_path / "cache").iterdir())
    assert names == ["encoded"] * 4 + ["sampled"] * 3


def entry_of(name, miou, std=None):
    result = {
        "runs": [{"seed": 0}],
        "mean": {"miou": miou, "boundary_iou": 0.1, "pixel_accuracy": 0.9, "iou/sky": 0.25},
    }
    if std is not None:
        result |= {"runs": [{}] * 3, "std": {"miou": std}}
    return {
        "upsampler": name,
        "dataset": "d",
        "settings": {"epochs": 1},
        "protocols": {"features": result},
        "seconds": {},
    }


def test_results_in_one_file_and_table(tmp_path):
    path = tmp_path / "new" / "results.json"
    record(path, entry_of("jbu", 0.5))
    record(path, entry_of("naf", 0.75, std=0.0125))
    record(path, entry_of("jbu", 0.625))  # replaces
    assert read_results(path) == [entry_of("naf", 0.75, std=0.0125), entry_of("jbu", 0.625)]
    assert markdown(read_results(path), ["sky"]).splitlines() == [
        "| upsampler | dataset | protocol | mIoU | boundary IoU | accuracy | sky | seeds |",
        "|---|---|---|---|---|---|---|---|",
        "| naf | d | features | 0.750 ± 0.013 | 0.100 | 0.900 | 0.250 | 3 |",
        "| jbu | d | features | 0.625 | 0.100 | 0.900 | 0.250 | 1 |",
    ]
    with pytest.raises(ValueError, match="classes must be names of classes"):
        markdown(read_results(path), ["sea"])
    path.write_text('{"steps": 1}')
    with pytest.raises(ValueError, match="does not hold results of a probe"):
        record(path, entry_of("jbu", 0.5))


# ------------------------------------------------------------------------------- the command line
@pytest.fixture
def command(place, monkeypatch, capsys):
    """`resfu probe`, with the pipeline of this file."""

    def create(backbone, name, *, weights, normalisation, dtype):
        assert (backbone, weights, normalisation, dtype) == ("owner/net", None, "half", None)
        return Pipeline(name)

    module = types.SimpleNamespace(FeaturePipeline=create)
    monkeypatch.setitem(sys.modules, "resfu_jax.features", module)

    def run(*arguments):
        status = main(["probe", NAME, "--data-dir", str(place), *map(str, arguments)])
        return status, capsys.readouterr()

    return run


def test_command_adds_to_a_file_and_a_table(command, tmp_path):
    backbone = ["--backbone", "owner/net", "--normalisation", "half"]
    quick = ["--epochs", 2, "--pixels-per-image", 20, "--seeds", 0, 1, "--classes", "tree"]
    files = ["--out", tmp_path / "probes.json", "--table", tmp_path / "probes.md"]
    status, output = command(*backbone, *quick, *files, "--upsampler", "nearest", "bilinear")
    assert status == 0, output.err
    protocols = ["--protocols", "preserved", "probabilities"]
    status, output = command(*backbone, *quick, *files, "--upsampler", "jbu", *protocols)
    assert status == 0, output.err
    probes = read_results(tmp_path / "probes.json")
    assert [entry["upsampler"] for entry in probes] == ["nearest", "bilinear", "jbu"]
    assert {entry["backbone"] for entry in probes} == {"owner/net"}
    assert probes[2]["settings"]["epochs"] == 2
    text = (tmp_path / "probes.md").read_text()
    assert text == output.out == markdown(probes, ["tree"])
    assert text.count(" ± ") == 4 * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--backbone or --run must be given"),
        (["--backbone", "b", "--run", "r"], "and not both"),
        (["--backbone", "b", "--weights", "w", "--upsampler", "naf", "jbu"], "those of one --up"),
        (["--backbone", "b", "--classes", "sea"], "--classes must be some of sky, wall, tree"),
        (["--backbone", "b", "--out", "gs://b/x.json"], "has to be a folder or file of this"),
    ],
)
def test_mistakes_end_in_one_line(command, arguments, message):
    status, output = command(*arguments)
    assert status == 1
    (line,) = output.err.splitlines()
    assert line.startswith("error: ") and message in line


# ------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(protocols=()), "protocols must be one or more"),
        (dict(protocols=("features", "features")), "none twice"),
        (dict(protocols=("feature",)), "protocols must be one of"),
        (dict(seeds=(-1,)), "seeds must be whole numbers from 0"),
        (dict(crop=0), "crop must be a positive whole number"),
        (dict(pixels_per_image=1.5), "pixels_per_image must be a positive whole"),
        (dict(output_stride=0), "output_stride must be a positive whole"),
        (dict(scale=float("nan")), "scale must be a positive number"),
        (dict(epochs=0), "epochs must be a positive whole"),
        (dict(learning_rate=0), "learning_rate must be a positive"),
        (dict(weight_decay=-1), "weight_decay must be a number, 0 or more"),
        (dict(class_balance=float("inf")), "class_balance must be a number"),
        (dict(flip=1), "flip must be True or False"),
        (dict(cell_labels="mean"), "cell_labels must be one of"),
        (dict(bins=0), "bins must be a positive whole"),
        (dict(min_depth=20.0), "min_depth must be below max_depth"),
        (dict(depth_crop="nyu"), "depth_crop must be one of"),
    ],
)
def test_settings_are_checked(as_users_call, options, message):
    with pytest.raises(ValueError, match=message):
        ProbeSettings(**options)


def test_what_cannot_be_is_said_before_anything_is_computed(place, monkeypatch):
    settings = ProbeSettings(protocols=("probabilities",))
    deconv = Pipeline("deconv")
    with pytest.raises(ValueError, match="'probabilities' for 'deconv'.*bilinear.*carafe.*jbu"):
        probe(deconv, NAME, settings, data_dir=place)
    pipeline = Pipeline("bilinear")
    with pytest.raises(data.DatasetNotPrepared, match="prepare camvid"):
        probe(pipeline, "camvid", QUICK, data_dir=place)
    with pytest.raises(ValueError, match="images_at_once must be a positive"):
        probe(pipeline, NAME, QUICK, data_dir=place, images_at_once=0)
    assert deconv.seen == pipeline.seen == []
    monkeypatch.setattr(pixels.os, "sysconf", lambda name: 10)
    with pytest.raises(ValueError, match="pixels_per_image=40 of 6 views"):
        probe(pipeline, NAME, QUICK, data_dir=place)
    assert len(pipeline.seen) == 2  # the trial and the first batch


def test_images_of_several_sizes(tmp_path):
    rng = np.random.default_rng(8)
    for split in ("train", "validation"):
        for kind in ("images", "labels"):
            (tmp_path / "raw" / kind / split).mkdir(parents=True)
        for i, size in enumerate([(8, 12), (12, 8), (12, 8)]):
            picture = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
            Image.fromarray(picture).save(tmp_path / "raw/images" / split / f"{i}.png")
            labels = rng.integers(0, 2, size).astype(np.uint8)
            Image.fromarray(labels).save(tmp_path / "raw/labels" / split / f"{i}.png")
    (tmp_path / "raw/classes.txt").write_text("a\nb")
    data.prepare("image_folder/sizes", tmp_path, tmp_path / "raw")
    arguments = dict(data_dir=tmp_path)
    entry = probe(Pipeline("bilinear"), "image_folder/sizes", QUICK, **arguments)
    assert entry["images"] == [3, 3]
    for options, message in (
        (dict(pixels_per_image=None, batch_size=3), "of one size at once, and there are 8x12 and"),
        (dict(protocols=("preserved",), cell_labels="centre", crop=None), None),
    ):
        settings = ProbeSettings(epochs=1, **options)
        if message is None:  # as many cells, whichever way up
            probe(Pipeline("bilinear"), "image_folder/sizes", settings, **arguments)
            continue
        with pytest.raises(ValueError, match=message):
            probe(Pipeline("bilinear"), "image_folder/sizes", settings, **arguments)
