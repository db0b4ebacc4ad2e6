"""Dry runs: what they change, and one as a person starts it."""

import importlib
import os
import pathlib
import subprocess
import sys

import pytest

from resfu_jax import data
from resfu_jax.data.fabricate import prepare_fabricated
from resfu_jax.training import Config, ConfigError, dry_run, validate
from resfu_jax.training.config import flatten, to_dict
from resfu_jax.training.dry_run import shrink

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_shrunk_configs_are_valid_and_have_the_same_model(name, tmp_path):
    config = importlib.import_module(f"configs.{name}").get_config()
    if config.data.name.startswith("image_folder/"):  # known once it is prepared
        config.data.dir = str(tmp_path)
        prepare_fabricated(config.data.name, tmp_path)
    before = flatten(to_dict(config))
    for devices in (1, 8):
        small = shrink(config, devices=devices)
        validate(small, devices=devices)
    assert flatten(to_dict(config)) == before
    after = flatten(to_dict(small))
    changed = {field for field in before if before[field] != after[field]}
    assert {f for f in changed if f.startswith(("model.", "loss.", "parallel."))} <= {
        "model.backbone.pretrained"
    }
    assert small.steps == 2 and max(small.data.crop_size) <= 70


def test_sizes_shrink_together():
    config = importlib.import_module("configs.ade20k_segmenter_s_resfu").get_config()
    small = shrink(config)
    assert (small.data.resize_to, small.eval.crop, small.eval.stride) == (
        (64, 256),
        (64, 64),
        (60, 60),
    )
    config.model.backbone.options["patch_size"] = 14
    assert shrink(config).data.crop_size == shrink(config).eval.crop == (70, 70)
    config.optimizer.accumulate = 3
    assert shrink(config).batch_size == 6 and shrink(config, devices=4).batch_size == 12


@pytest.mark.parametrize("name", ["shapes", "shapes/outline_ignored", "camvid/clean", "ade20k"])
def test_made_up_datasets(name, tmp_path):
    prepare_fabricated(name, tmp_path, examples=3, size=(32, 48))
    for split in ("train", "validation"):
        source = data.open_source(name, split, tmp_path)
        assert 2 <= len(source) <= 6  # camvid/clean distributes what there is
        info = data.dataset_info(name, tmp_path)
        (batch,) = data.eval_batches(source, info, batch_size=len(source), pad_to=16)
        expected = (128, 128) if info.embedded else (32, 48)
        assert batch["image"].shape[1:3] == expected


def test_a_wrong_config_is_told_before_it_is_shrunk():
    config = Config()
    config.data.crop_size = (100, 100)
    with (
        pytest.raises(ConfigError, match=r"config.data.crop_size is \(100, 100\)"),
        dry_run(config),
    ):
        pass


@pytest.mark.slow
def test_a_dry_run_leaves_nothing(tmp_path):
    def train(*arguments):
        return subprocess.run(
            [sys.executable, "train.py", "--config=tests/tiny_config.py", *arguments],
            cwd=ROOT,
            env=os.environ | {"TMPDIR": str(tmp_path), "RESFU_DATA_DIR": str(tmp_path / "data")},
            capture_output=True,
            text=True,
        )

    done = train("--dry_run")
    assert done.returncode == 0, done.stderr
    assert "4 training and 4 validation images" in done.stderr
    assert "step 2/2  validation: mIoU" in done.stderr
    left = [path.name for path in tmp_path.iterdir()]
    assert all(name.endswith("tfds") for name in left)  # tfds's own, empty
    done = train()
    assert done.returncode != 0 and "--workdir has to name" in done.stdout + done.stderr


def test_values_of_another_type_are_told_before_data_are_made(monkeypatch):
    module = sys.modules["resfu_jax.training.dry_run"]
    monkeypatch.setattr(module, "prepare_fabricated", None)
    config = Config()
    config.data.name = None
    with pytest.raises(ConfigError, match="config.data.name is None; it has to be a text"):
        with dry_run(config):
            pass
