"""train.py with task = "depth": the heads, a run, and what is said before it."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
from flax import nnx
from PIL import Image

import train
from resfu_jax import DepthPipeline, cli, data, tasks, training
from resfu_jax.data import transforms
from resfu_jax.data.fabricate import prepare_fabricated
from resfu_jax.depth import as_numbers, png_scale
from resfu_jax.heads import create_head
from resfu_jax.model import evaluating
from resfu_jax.normals import normals_from_depth, normals_picture
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


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    config = config_of()
    config.data.dir = str(data_dir)
    stop = training.StopSignals()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        train.run(copy.deepcopy(config), workdir, "train", "latest", stop)
    stop.close()
    return workdir


@pytest.fixture(scope="module")
def pipeline(run):
    return DepthPipeline.from_checkpoint(run, devices=jax.devices()[:1])


def photo(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


def test_a_run_scores_draws_and_is_no_segmentation(run):
    lines = training.read_metrics(run / "metrics.jsonl")
    scores = {line["step"]: line for line in lines if "val/abs_rel" in line}
    assert list(scores) == [2, 4] and scores[4]["val/rmse"] > 0
    assert {f"val/delta{k}" for k in (1, 2, 3)} < scores[4].keys()
    with Image.open(run / "predictions/step0000004_0.png") as picture:
        assert picture.width == 4 * 32 + 3 * 4 and picture.height > 32
    message = "path must be a run of segmentation, .*task='depth': DepthPipeline.from_checkpoint"
    with pytest.raises(ValueError, match=message):
        Predictor.from_checkpoint(run)


def test_photos_of_any_size_get_the_depth_that_the_model_gives(pipeline, tmp_path):
    """Padded and resized as the run says (a quarter, here), and turned as EXIF data say."""
    pixels = photo(120, 90)
    depth = pipeline(pixels)
    assert depth.dtype == np.float32 and depth.shape == (120, 90)
    small = np.asarray(Image.fromarray(pixels).resize((22, 30), Image.Resampling.BILINEAR))
    padded = np.empty((1, 32, 32, 3), np.uint8)
    padded[:] = pipeline.preprocess.pad_color
    padded[0, :30, :22] = small
    seen = jax.jit(lambda model, x: model(x))(pipeline.model, padded)
    back = Image.fromarray(np.asarray(seen)[0, :30, :22, 0]).resize((90, 120), Image.BILINEAR)
    np.testing.assert_allclose(depth, np.asarray(back), rtol=1e-4)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    turned = np.rot90(pixels)
    Image.fromarray(turned).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_allclose(pipeline(tmp_path / "a.png"), depth, rtol=1e-5)
    batch = pipeline(np.stack([pixels, pixels]))
    assert batch.shape == (2, 120, 90)
    np.testing.assert_allclose(batch[1], depth, rtol=1e-5)
    (tmp_path / "b.png").write_text("no image")
    found = list(pipeline.stream(tmp_path))
    assert sorted(isinstance(result, Exception) for result in found) == [False, True]
    with pytest.raises(ValueError, match=r"b\.png: cannot be read"):
        pipeline([tmp_path / "a.png", tmp_path / "b.png"])
    with pytest.raises(ValueError, match="an option of DepthPipeline"):
        DepthPipeline(pipeline.model, resize=3)


def test_predict_writes_depths_and_pictures(run, pipeline, tmp_path, programs_are_kept, capsys):
    Image.fromarray(photo(120, 90)).save(tmp_path / "a.png")
    options = ["--checkpoint", str(run), "--out", str(tmp_path / "out")]
    assert cli.main(["predict", str(tmp_path / "a.png"), *options]) == 0
    output = capsys.readouterr()
    assert "a.png: 90x120, depth " in output.out and "1 image in" in output.out
    depth = pipeline(tmp_path / "a.png")
    said = json.loads((tmp_path / "out/depth.json").read_text())
    assert said["scale"] == 0.001 and said["max_depth"] == 10 and said["step"] in (2, 4)
    with Image.open(tmp_path / "out/depth/a.png") as file:
        numbers = np.asarray(file)
    assert numbers.dtype == np.uint16
    np.testing.assert_allclose(numbers * said["scale"], depth, atol=0.0006)
    read = data.DepthMap(scale=0.001).read((tmp_path / "out/depth/a.png").read_bytes(), "a.png")
    np.testing.assert_allclose(np.asarray(read), depth, atol=0.0006)
    with Image.open(tmp_path / "out/pictures/a.png") as picture:
        assert picture.width == 2 * 90 + 4 and picture.height > 120
    assert not (tmp_path / "out/normals").exists()
    more = ["--depth-format", "npy", "--intrinsics", "80", "80", "44.5", "59.5"]
    assert cli.main(["predict", str(tmp_path / "a.png"), *options, *more]) == 0
    with Image.open(tmp_path / "out/normals/a.png") as picture:
        expected = normals_picture(normals_from_depth(depth, (80, 80, 44.5, 59.5)))
        assert np.abs(np.asarray(picture).astype(int) - expected).mean() < 1
    np.testing.assert_allclose(np.load(tmp_path / "out/depth/a.npy"), depth, rtol=1e-5)
    assert cli.main(["predict", str(tmp_path / "a.png"), *options, "--flip", "True"]) == 1
    assert "--flip is for runs that segment; one of depth" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path / "x.zip"), *options[:2]]) == 1
    assert "path must be a run of segmentation" in capsys.readouterr().err


def test_evaluate_repeats_the_numbers_of_the_run(run, tmp_path, programs_are_kept, capsys):
    with jax.numpy_dtype_promotion("standard"):
        command = ["evaluate", "--checkpoint", str(run), "--which", "4"]
        assert cli.main([*command, "--out", str(tmp_path / "n.json")]) == 0
    assert "AbsRel" in capsys.readouterr().out
    (line,) = (
        line
        for line in training.read_metrics(run / "metrics.jsonl")
        if line["step"] == 4 and "val/abs_rel" in line
    )
    found = json.loads((tmp_path / "n.json").read_text())
    assert found.pop("step") == 4
    assert {f"val/{k}": v for k, v in found.items()} == pytest.approx(
        {f"val/{k}": line[f"val/{k}"] for k in found}, rel=1e-3
    )
    assert cli.main([*command, "--dataset", "shapes"]) == 1
    assert "--dataset shapes has no depth maps" in capsys.readouterr().err


def test_files_hold_millimetres_where_the_range_permits():
    assert [png_scale(x) for x in (1.0, 10.0, 65.5, 80.0, 700.0, 9000.0)] == pytest.approx(
        [0.001, 0.001, 0.001, 0.01, 0.1, 1.0]
    )
    depth = np.array([[0.0001, 1.2345, 80.0]], np.float32)
    assert as_numbers(depth, 0.001).tolist() == [[1, 1234, 65535]]


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
