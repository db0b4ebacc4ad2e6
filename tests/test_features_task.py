"""train.py with task = "features": upsamplers learned without labels on a frozen backbone."""

import copy
import json

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from own_images import photos
from PIL import Image
from tiny_run import losses

from resfu_jax import FeaturePipeline, data, tasks, training
from resfu_jax.convert import load_upsampler
from resfu_jax.data.image_folder import OwnImages
from resfu_jax.model import evaluating

SIZE = 64
BACKBONE = dict(patch_size=8, image_size=SIZE, width=32, depth=1, heads=2)


def config_of(**head):
    return training.Config(
        task="features",
        steps=6,
        batch_size=16,
        log_every=1,
        model=training.ModelConfig(
            backbone=training.BackboneConfig(
                name="vit", variant="tiny", frozen=True, options=BACKBONE
            ),
            head=training.HeadConfig(**(dict(upsampler="carafe") | head)),
        ),
        data=training.DataConfig(
            name="image_folder/photos", crop_size=(SIZE, SIZE), scale_range=(1.0, 1.0)
        ),
        optimizer=training.OptimizerConfig(
            learning_rate=3e-3,
            final_learning_rate=3e-3,
            head_learning_rate_multiple=1.0,
            warmup_steps=0,
        ),
        eval=training.EvalConfig(every=3, batch_size=8, pictures=1),
        checkpoint=training.CheckpointConfig(every=2),
    )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Twelve photos without label maps, of three sizes."""
    sizes, how = [(80, 96), (64, 64), (100, 72)], Image.Resampling.NEAREST
    folder = photos(tmp_path_factory.mktemp("photos"), sizes, 8, how)
    directory = tmp_path_factory.mktemp("data")
    data.prepare("image_folder/photos", directory, own=OwnImages(images=folder))
    return directory


def test_loftup_takes_no_depths_for_masks(data_dir):
    config = config_of()
    config.data.dir, config.objective = str(data_dir), training.ObjectiveConfig(name="loftup")
    config.data.name = "shapes"
    training.validate(config)
    for name, holds in (("shapes/depth", "depths"), ("image_folder/photos", "none")):
        config.data.name = name
        message = f"config.data.name is '{name}', whose label maps hold {holds}; .*'loftup'"
        with pytest.raises(training.ConfigError, match=message):
            training.validate(config)


def test_photos_without_label_maps_have_no_classes(data_dir):
    info = data.dataset_info("image_folder/photos", data_dir)
    assert info.num_classes == 0 and "without label maps" in info.notes[1]
    source = data.open_source("image_folder/photos", "train", data_dir)
    batch = next(iter(data.eval_batches(source, info, batch_size=1)))
    height, width = batch["size"][0]
    assert (batch["label"] == 255).all() and batch["image"][0, :height, :width].std() > 10
    config = config_of()
    config.task, config.data.dir = "segmentation", str(data_dir)
    with pytest.raises(training.ConfigError, match="images without label maps; it has to be a"):
        training.validate(config)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"classes": ["a", "b"]}, "classes and ignore_label must be None without labels"),
        ({"ignore_label": 0}, "classes and ignore_label must be None without labels"),
        ({"labels": ".", "validation_images": ".."}, "labels and validation_labels must be given"),
    ],
)
def test_what_cannot_be_said_of_photos_alone(tmp_path, own, message):
    (tmp_path / "images").mkdir()
    places = {name: tmp_path / value for name, value in own.items() if value in (".", "..")}
    with pytest.raises(ValueError, match=message):
        OwnImages(images=tmp_path / "images", **own | places)


def test_a_run_learns_scores_draws_and_continues_bit_for_bit(train_here, tmp_path, capfd):
    config = config_of()
    whole = train_here(tmp_path / "whole", copy.deepcopy(config))
    assert "│ bilinear │ 1." in capfd.readouterr().out
    errors = {line["step"]: line["val/error"] for line in whole if "val/error" in line}
    assert list(errors) == [3, 6] and errors[6] < errors[3]
    assert (tmp_path / "whole/predictions/step0000006_0.png").is_file()
    with Image.open(tmp_path / "whole/predictions/step0000006_0.png") as picture:
        assert picture.size == (4 * SIZE, SIZE)

    first = copy.deepcopy(config)
    first.steps = 4
    train_here(tmp_path / "parts", first)
    assert losses(train_here(tmp_path / "parts", copy.deepcopy(config))) == losses(whole)
    kept = training.Checkpoints(tmp_path / "whole" / "checkpoints", read_only=True)
    assert kept.find("best") == 6
    kept.close()
    train_here(tmp_path / "whole", config_of(), mode="eval")
    saved = json.loads((tmp_path / "whole" / "eval_6.json").read_text())
    assert saved["error"] == errors[6]
    the_run_is_a_pipeline(tmp_path / "whole")


def the_run_is_a_pipeline(workdir):
    """Whose features are those of the model that was trained."""
    task = tasks.create_task(training.read_config(workdir))
    checkpoints = training.Checkpoints(workdir / "checkpoints", read_only=True)
    arrays = checkpoints.read_weights(6)
    checkpoints.close()
    model = task.create_model(nnx.Rngs(0))
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        variable.set_value(jnp.asarray(arrays[".".join(map(str, path))]))
        nnx.update(model, nnx.from_flat_state([(path, variable)]))
    image = np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    with jax.numpy_dtype_promotion("standard"):
        expected = evaluating(model)(jnp.asarray(image[None]))[0]
    pipeline = FeaturePipeline.from_checkpoint(workdir)
    assert (pipeline.name, pipeline.stride, pipeline.channels) == ("carafe", 8, 32)
    np.testing.assert_allclose(pipeline(image, stride=4), expected, atol=2e-5)


def test_parts_of_a_batch_give_the_gradient_of_the_whole(train_here, tmp_path):
    config = config_of()
    config.steps = config.eval.every = 1
    whole = train_here(tmp_path / "whole", copy.deepcopy(config))[0]
    config.optimizer.accumulate = 2
    parts = train_here(tmp_path / "parts", config)[0]
    for name in ("loss", "gradient_norm"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5)


def test_an_upsampler_starts_from_released_weights(tmp_path, data_dir):
    path = str(goldens.index()["anyup_multi_backbone"]["path"])
    config = config_of(upsampler="anyup", pretrained=path)
    config.data.dir = str(data_dir)
    weights, said = tasks.create_task(config).initial_weights()
    expected = nnx.to_flat_state(nnx.state(load_upsampler("anyup", path), nnx.Param))
    found = dict(nnx.to_flat_state(weights))
    assert said == f"anyup starts from {path}: {len(expected)} arrays" and len(expected) > 20
    for key, value in expected:
        np.testing.assert_array_equal(found["head", "upsample", *key], value[...])
    config.model.head.pretrained = str(tmp_path / "none.pth")
    with pytest.raises(training.ConfigError, match="config.model.head.pretrained: .*none.pth"):
        tasks.create_task(config).initial_weights()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c, "task", "depht"), "config.task is 'depht'; it has to be"),
        (
            lambda c: setattr(c.model.backbone, "frozen", False),
            "frozen is False; it has to be True",
        ),
        (lambda c: setattr(c.model.head, "norm", True), "config.model.head.norm is True; it has"),
        (lambda c: setattr(c.loss, "class_balance", 0.5), "config.loss is .*config.objective"),
        (lambda c: setattr(c.objective, "options", {"x": {1}}), "config.objective.options: "),
        (lambda c: setattr(c.model.head, "upsampler", "carafé"), "config.model.head.upsampler: "),
    ],
)
def test_configs_that_cannot_be(data_dir, change, message):
    config = config_of()
    config.data.dir = str(data_dir)
    training.validate(config)
    change(config)
    with pytest.raises(training.ConfigError, match=message):
        training.validate(config)


@pytest.mark.parametrize(
    ("name", "options", "scale", "message"),
    [
        ("nav", {}, 2, "config.objective: unknown objective 'nav'; did you mean 'naf'"),
        ("naf", {"ratio": 1}, 2, "config.objective: unknown option .*'ratios'"),
        ("jafar", {}, 2, "ratios must be one ratio, .* for carafe, which has one scale, 2"),
        ("naf", {}, 4, r"size must be \(16, 16\), 4 times that of the features, for CARAFE"),
        ("loftup", {}, 2, "'loftup' averages over masks: it needs a dataset with classes"),
    ],
)
def test_objectives_that_do_not_fit_end_before_anything_is_read(
    train_here, tmp_path, name, options, scale, message
):
    config = config_of(scale=scale)
    config.objective = training.ObjectiveConfig(name, options)
    with pytest.raises((training.ConfigError, ValueError), match=message):
        train_here(tmp_path / "run", config)
