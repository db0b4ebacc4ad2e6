"""train.py with task = "depth": the heads, a run, and what is said before it."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
from flax import nnx
from PIL import Image

import train
from resfu_jax import data, tasks, training
from resfu_jax.data import transforms
from resfu_jax.data.fabricate import prepare_fabricated
from resfu_jax.heads import create_head
from resfu_jax.model import evaluating
from resfu_jax.predictor import Predictor
from resfu_jax.tasks.depth import depth_picture


def config_of(name="shapes/depth"):
    config = tiny_config.get_config()
    config.task, config.steps = "depth", 4
    config.model.head = training.HeadConfig(name="depth_decoder", upsampler="bilinear", width=8)
    config.data.name, config.data.photometric = name, False
    config.depth = training.DepthConfig(min_depth=0.1, warmup_steps=2)
    config.eval = training.EvalConfig(every=2, batch_size=8, pictures=1)
    return config


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    prepare_fabricated("shapes/depth", directory, examples=10)
    return directory


def test_shapes_have_depth_in_metres_and_the_nearer_lie_on_top(data_dir):
    info = data.dataset_info("shapes/depth")
    source = data.open_source("shapes/depth", "validation", data_dir)
    assert info.num_classes == 0 and info.depth is not None
    (batch,) = data.eval_batches(source, info, batch_size=10, pad_to=136)
    label = batch["label"]
    assert label.dtype == np.float32 and label.shape == (10, 136, 136)
    assert not label[:, 128:].any() and not label[:, :, 128:].any()
    depth = label[:, :128, :128]
    assert depth.min() >= 1.0 and depth.max() <= 9.0
    ground = np.linspace(9.0, 5.0, 128)[None, :, None]
    on_ground = np.abs(depth - ground) < 1e-3
    assert 0.2 < on_ground.mean() < 0.95 and depth[~on_ground].max() <= 4.5
    # Fog: what is far differs less from its neighbours.
    contrast = np.abs(np.diff(batch["image"][:, :128, :128].astype(float), axis=2)).mean(axis=-1)
    near = (depth < 3)[:, :, 1:] & (depth < 3)[:, :, :-1]
    assert contrast[near].mean() > contrast[on_ground[:, :, 1:] & on_ground[:, :, :-1]].mean()


def test_a_crop_cuts_image_and_depth_alike(data_dir):
    info = data.dataset_info("shapes/depth")
    source = data.open_source("shapes/depth", "train", data_dir)
    options = dict(batch_size=2, crop_size=(64, 160), scale_range=(1.0, 1.0), photometric=False)
    with_mirror = data.train_batches(source, info, seed=0, **options)
    batch = next(with_mirror)
    with_mirror.close()
    assert batch["label"].dtype == np.float32 and batch["label"].shape == (2, 64, 160)
    known = batch["label"] > 0
    assert known[:, :, :128].all() and not known[:, :, 128:].any()
    whole = {e["id"]: e for e in source}
    for row in range(2):
        image, label = transforms.decode(whole[batch["id"][row]], info, "x")
        pixels, depth = np.asarray(image), np.asarray(label)
        cut = batch["image"][row, :, :128], batch["label"][row, :, :128]
        places = [(top, m) for top in range(65) for m in (1, -1)]
        assert any(
            np.array_equal(pixels[top : top + 64, ::m], cut[0])
            and np.array_equal(depth[top : top + 64, ::m], cut[1])
            for top, m in places
        )


def test_bins_are_weighed_as_the_formula_says():
    rngs = nnx.Rngs(0)
    options = dict(upsampler="bilinear", bins=5, min_depth=1.0, max_depth=9.0, scale=4)
    head = create_head(
        "bins", in_features=(6,), num_classes=1, class_token=True, rngs=rngs, **options
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 2, 6)).astype(np.float32)
    token = rng.normal(size=(2, 1, 1, 6)).astype(np.float32)
    images = np.zeros((2, 12, 8, 3), np.float32)
    depth = head((jnp.asarray(x), jnp.asarray(token)), jnp.asarray(images))
    up = np.asarray(jax.image.resize(x, (2, 12, 8, 6), "linear"))
    token = token / np.linalg.norm(token, axis=-1, keepdims=True)
    both = np.concatenate([up, np.broadcast_to(token, up.shape)], axis=-1)
    matrix = np.concatenate([head.classify.kernel[...], head.token.kernel[...]])
    weights = np.maximum(both @ matrix + np.asarray(head.classify.bias[...]), 0) + 0.1
    expected = (weights * [1, 3, 5, 7, 9]).sum(-1) / weights.sum(-1)
    np.testing.assert_allclose(depth[..., 0], expected, rtol=1e-5)


def test_the_decoder_sees_all_maps_and_keeps_to_its_range():
    head = create_head(
        "depth_decoder",
        in_features=(4, 6, 8),
        num_classes=1,
        upsampler="carafe",
        width=8,
        max_depth=10.0,
        rngs=nnx.Rngs(0),
    )
    rng = np.random.default_rng(0)
    maps = [
        jnp.asarray(rng.normal(size=(2, 8 >> i, 12 >> i, c)), jnp.float32)
        for i, c in enumerate((4, 6, 8))
    ]
    head = evaluating(head)
    depth = head(maps)
    assert depth.shape == (2, 8, 12, 1) and 0 < depth.min() < depth.max() < 10
    slopes = jax.grad(lambda maps: head(maps).sum())(maps)
    assert all(jnp.abs(slope).max() > 0 for slope in slopes)
    with pytest.raises(ValueError, match="num_classes must be 1, the depth"):
        create_head("depth_decoder", in_features=(4, 6), num_classes=3, rngs=nnx.Rngs(0))


def test_a_run_scores_draws_and_is_no_segmentation(data_dir, tmp_path, programs_are_kept):
    config = config_of()
    config.data.dir = str(data_dir)
    stop = training.StopSignals()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        train.run(copy.deepcopy(config), tmp_path / "run", "train", "latest", stop)
    stop.close()
    lines = training.read_metrics(tmp_path / "run/metrics.jsonl")
    scores = {line["step"]: line for line in lines if "val/abs_rel" in line}
    assert list(scores) == [2, 4] and scores[4]["val/rmse"] > 0
    assert {f"val/delta{k}" for k in (1, 2, 3)} < scores[4].keys()
    with Image.open(tmp_path / "run/predictions/step0000004_0.png") as picture:
        assert picture.width == 4 * 32 + 3 * 4 and picture.height > 32
    with pytest.raises(ValueError, match="path must be a run that segments, .*task='depth'"):
        Predictor.from_checkpoint(tmp_path / "run")


def test_the_picture_marks_unknown_depths():
    depth = np.full((30, 40), 2.0, np.float32)
    depth[:10], depth[20:] = 0, 4
    picture = depth_picture(np.zeros((30, 40, 3), np.uint8), depth, depth + 1)
    assert (picture[:10, 44:84] == 128).all() and not (picture[10:30, 44:84] == 128).all()
    assert (picture[:10, 132:172] == 128).all()  # no error either


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (1.0, "0.0% of the known depths are between .* --scale .0.001 for millimetres"),
        (0.0, "no pixel has a depth; is the invalid value right"),
    ],
)
def test_depths_of_another_unit_are_told_before_training(data_dir, scale, message):
    config = config_of()
    config.data.dir = str(data_dir)
    task = tasks.create_task(config)
    task.info = data.DatasetInfo("shapes/depth", depth=data.DepthMap(scale=scale))
    with pytest.raises(data.DataError, match=message):
        task.open()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c.depth, "crop", "eigne"), "config.depth.crop is 'eigne'; it has to be"),
        (lambda c: setattr(c.depth, "max_depth", 0.05), "config.depth.max_depth is 0.05; it has"),
        (lambda c: setattr(c.model.head, "name", "segformer"), "config.model.head.name is 'segf"),
        (lambda c: setattr(c.optimizer, "accumulate", 2), "config.optimizer.accumulate is 2; it"),
        (lambda c: setattr(c.data, "name", "shapes"), "'shapes', which has no depth maps"),
        (
            lambda c: setattr(c, "task", "segmentation"),
            r"config.depth is DepthConfig\(.*unless config.task is 'depth'",
        ),
        (lambda c: setattr(c.depth, "sig", -1.0), "config.depth.sig is -1.0; it has to be 0 or"),
    ],
)
def test_configs_that_cannot_be(change, message):
    config = config_of()
    training.validate(config)
    change(config)
    with pytest.raises(training.ConfigError, match=message):
        training.validate(config)
