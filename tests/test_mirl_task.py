"""train.py with task = "mirl": a ViT learned from images alone, and what starts from it."""

import copy
import json

import jax
import numpy as np
import pytest
from flax import nnx
from own_images import photos
from PIL import Image
from tiny_run import losses

from resfu_jax import FeaturePipeline, Predictor, data, tasks, training
from resfu_jax.data.image_folder import OwnImages

SIZE = 32
BACKBONE = dict(width=16, depth=4, heads=2, patch_size=8, mlp_ratio=2)


def config_of(segments=2, **options):
    return training.Config(
        task="mirl",
        steps=6,
        batch_size=16,
        log_every=1,
        model=training.ModelConfig(
            backbone=training.BackboneConfig(name="vit", variant="s54", options=BACKBONE | options)
        ),
        data=training.DataConfig(
            name="image_folder/photos",
            crop_size=(SIZE, SIZE),
            scale_range=(1.0, 1.0),
            area_range=(0.2, 1.0),
            photometric=False,
        ),
        mirl=training.MIRLConfig(segments=segments, decoder_width=8, decoder_heads=2),
        optimizer=training.OptimizerConfig(
            learning_rate=1e-2, head_learning_rate_multiple=1.0, warmup_steps=0, decay="cosine"
        ),
        eval=training.EvalConfig(every=3, batch_size=8, pictures=1),
        checkpoint=training.CheckpointConfig(every=2),
    )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Twelve photos without label maps, of three sizes; and the embedded shapes, for labels."""
    sizes, how = [(40, 48), (32, 32), (50, 36)], Image.Resampling.BICUBIC
    folder = photos(tmp_path_factory.mktemp("photos"), sizes, 4, how)
    directory = tmp_path_factory.mktemp("data")
    data.prepare("image_folder/photos", directory, own=OwnImages(images=folder))
    return directory


def test_a_run_learns_scores_draws_and_is_started_from(train_here, tmp_path, capfd):
    config = config_of()
    whole = train_here(tmp_path / "whole", config)
    assert "image_folder/photos, 2 segments" in capfd.readouterr().out
    held_out = {line["step"]: line for line in whole if "val/loss" in line}
    assert list(held_out) == [3, 6]
    assert held_out[6]["val/loss"] == held_out[6]["val/pair_0"] < held_out[3]["val/loss"]
    with Image.open(tmp_path / "whole/predictions/step0000006_0.png") as picture:
        panels = np.split(np.asarray(picture, np.int16), 4, axis=1)
    patches = [p.reshape(4, 8, 4, 8, 3).swapaxes(1, 2) for p in panels]
    same = [(abs(p - patches[0]).max(axis=(2, 3, 4)) <= 1).sum() for p in patches]
    assert same == [16, 4, 4, 4]  # of 16 patches 4 are visible, and shown as they are

    kept = training.Checkpoints(tmp_path / "whole" / "checkpoints", read_only=True)
    assert kept.find("best") == 6
    kept.close()
    train_here(tmp_path / "whole", config_of(), mode="eval")
    saved = json.loads((tmp_path / "whole" / "eval_6.json").read_text())
    assert saved["loss"] == held_out[6]["val/loss"]
    its_encoder_starts_another_run(tmp_path / "whole")
    for load in (Predictor, FeaturePipeline):
        with pytest.raises(ValueError, match=r"task='mirl'.*--config.init_from"):
            load.from_checkpoint(tmp_path / "whole")


def its_encoder_starts_another_run(workdir):
    """Of segmentation, whether it keeps the blocks in one array or one by one."""
    checkpoints = training.Checkpoints(workdir / "checkpoints", read_only=True)
    arrays = checkpoints.read_weights(6)
    checkpoints.close()
    for scan in (True, False):
        config = config_of(scan=scan)
        config.task, config.mirl = "segmentation", training.MIRLConfig()
        config.data = training.DataConfig(name="shapes", crop_size=(SIZE, SIZE))
        config.model.head = training.HeadConfig(name="linear", upsampler="bilinear", scale=2)
        config.init_from, config.init_skip = str(workdir), ("head",)
        training.validate(config)
        weights, said = tasks.create_task(config).initial_weights()
        assert "starting from checkpoint 6" in said and "not in this model: head." in said
        flat = {".".join(map(str, p)): v[...] for p, v in nnx.to_flat_state(weights)}
        names = ["attention.query.kernel", "ffn_norm.bias"]
        for name in names:
            stacked = np.asarray(arrays[f"backbone.blocks.{name}"])
            found = (
                flat[f"backbone.blocks.{name}"]
                if scan
                else np.stack([flat[f"backbone.blocks.{i}.{name}"] for i in range(4)])
            )
            np.testing.assert_array_equal(found, stacked)
        np.testing.assert_array_equal(
            flat["backbone.embed.kernel"], arrays["backbone.embed.kernel"]
        )
    config.model.backbone.options["depth"] = 3
    with pytest.raises(training.ConfigError, match="does not fit the model"):
        tasks.create_task(config).initial_weights()


def test_a_stopped_run_continues_bit_for_bit_with_dropped_paths(train_here, tmp_path):
    """As a run that is killed does: the length, hence the schedule, is the same."""
    config = config_of(segments=1, drop_path=0.3)
    config.optimizer.decay = "polynomial"
    config.optimizer.final_learning_rate = config.optimizer.learning_rate
    config.steps = 4
    whole = train_here(tmp_path / "whole", copy.deepcopy(config))
    config.steps = 2
    train_here(tmp_path / "parts", copy.deepcopy(config))
    config.steps = 4
    assert losses(train_here(tmp_path / "parts", config)) == losses(whole)


def test_parts_of_a_batch_give_the_gradient_of_the_whole(train_here, tmp_path):
    config = config_of()
    config.steps = config.eval.every = 1
    whole = train_here(tmp_path / "whole", copy.deepcopy(config))[0]
    config.optimizer.accumulate = 2
    parts = train_here(tmp_path / "parts", config)[0]
    for name in ("loss", "gradient_norm"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5)


def task_of(data_dir, config):
    config.data.dir = str(data_dir)
    training.validate(config)
    return tasks.create_task(config)


def test_masks_follow_from_the_seed_and_the_step(data_dir, monkeypatch):
    config = config_of()
    task = task_of(data_dir, config)
    batch = task.blank_batch()
    drawn = task.draw(batch, 3)
    both = np.sort(np.concatenate([drawn["visible"], drawn["masked"]], axis=1), axis=1)
    assert drawn["visible"].shape == (16, 4) and (both == np.arange(16)).all()
    assert "label" not in drawn
    assert (task.draw(batch, 3)["masked"] == drawn["masked"]).all()
    assert (task.draw(batch, 4)["masked"] != drawn["masked"]).any()
    assert len(np.unique(drawn["masked"], axis=0)) == 16
    config.seed = 1
    assert (task.draw(batch, 3)["masked"] != drawn["masked"]).any()
    # Two processes draw the halves of what one draws.
    config.seed = 0
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    half = {name: x[:8] for name, x in batch.items()}
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        rows = slice(8 * process, 8 * process + 8)
        assert (task.draw(half, 3)["masked"] == drawn["masked"][rows]).all()


def test_masks_of_an_evaluation_follow_from_the_image(data_dir):
    task = task_of(data_dir, config_of())
    source = data.open_source("image_folder/photos", "validation", data_dir)
    masks = []
    for size in (1, 8):
        found = {}
        for batch in data.eval_batches(source, task.info, batch_size=size):
            drawn = task.draw_for_evaluation(batch)
            assert drawn["image"].shape == (size, SIZE, SIZE, 3)
            there = drawn["there"]
            assert (there == (batch["size"][:, 0] > 0)).all()
            found |= dict(zip(batch["id"][there], map(tuple, drawn["masked"][there]), strict=True))
        masks.append(found)
    assert masks[0] == masks[1] and len(masks[0]) == len(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c.mirl, "segments", 3), "segments is 3; it has to be even, or 1"),
        (lambda c: setattr(c.mirl, "mask_ratio", 1.0), "mask_ratio is 1.0; it has to be between"),
        (lambda c: setattr(c.mirl, "mask_ratio", 0.99), "masks 16 of the 16 patches"),
        (lambda c: setattr(c.mirl, "decoder_width", 6), "a multiple of 4 and of config.mirl.dec"),
        (lambda c: setattr(c.mirl, "decoder_depth", 0), "decoder_depth is 0; it has to be at"),
        (lambda c: setattr(c.model.backbone, "frozen", True), "frozen is True; it has to be False"),
        (lambda c: setattr(c.model.backbone, "name", "mit"), "name is 'mit'; it has to be 'vit'"),
        (lambda c: c.model.backbone.options.update(layers=(1,)), "options holds 'layers'"),
        (lambda c: setattr(c.model.head, "width", 8), "config.model.head is"),
        (lambda c: setattr(c.loss, "class_balance", 0.5), "config.loss is"),
        (lambda c: setattr(c.data, "area_range", (0.0, 1.0)), "area_range is .*share of an image"),
        (lambda c: setattr(c.data, "aspect_range", (2.0, 1.0)), "aspect_range is .*smallest"),
        (lambda c: setattr(c.data, "scale_range", (0.5, 1.0)), "where config.data.area_range is"),
        (lambda c: setattr(c.optimizer, "decay", "step"), "'polynomial' or 'cosine'"),
        (
            lambda c: setattr(c, "task", "features"),
            "config.mirl is .* unless config.task is 'mirl'",
        ),
    ],
)
def test_configs_that_cannot_be(data_dir, change, message):
    config = config_of()
    config.model.backbone.options = dict(BACKBONE)
    config.data.dir = str(data_dir)
    change(config)
    with pytest.raises(training.ConfigError, match=message):
        training.validate(config)


def test_segments_that_do_not_divide_the_blocks_end_before_anything_is_read(train_here, tmp_path):
    with pytest.raises(training.ConfigError, match="config.mirl.segments must divide the 4 blocks"):
        train_here(tmp_path / "run", config_of(segments=6))


def test_parameters_that_are_spread_over_devices_learn_the_same(train_here, tmp_path):
    """With the blocks in one array, of which every device holds a part."""
    found = []
    for shard in (False, True):
        config = config_of()
        config.steps = config.eval.every = 2
        config.parallel = training.ParallelConfig(shard_parameters=shard, shard_at_least=64)
        found.append(train_here(tmp_path / str(shard), config))
    one, spread = (losses(lines) for lines in found)
    assert len(one) == 2 and one.keys() == spread.keys()
    np.testing.assert_allclose(list(spread.values()), list(one.values()), rtol=1e-4)
    held_out = [lines[-1]["val/loss"] for lines in found]
    np.testing.assert_allclose(*held_out, rtol=1e-4)
