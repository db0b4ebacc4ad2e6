"""train.py as a person runs it: real processes, killed and continued."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
import tiny_config
from PIL import Image

import train
from resfu_jax import data, training

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ROOT / "tests" / "tiny_config.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def start(data_dir, workdir, *arguments, devices=1):
    environment = os.environ | {
        "RESFU_DATA_DIR": str(data_dir),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "train.py", f"--config={CONFIG}", f"--workdir={workdir}"]
    return subprocess.Popen(
        [*command, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(data_dir, workdir, *arguments, code=0, devices=1):
    process = start(data_dir, workdir, *arguments, devices=devices)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(workdir):
    return [(line["step"], line["loss"]) for line in lines(workdir) if "loss" in line]


def interrupt(process, workdir, number, at_step):
    """Sends a signal as soon as a step has been reported."""
    deadline = time.monotonic() + 300
    while not any(step >= at_step for step, _ in losses(workdir)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """An uninterrupted run: (workdir, output)."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run(data_dir, workdir)


def test_a_run_leaves_all_its_files(whole):
    workdir, output = whole
    assert "building the dataset shapes" in output
    assert [step for step, _ in losses(workdir)] == list(range(1, 9))
    assert all(np.isfinite(loss) for _, loss in losses(workdir))
    evaluations = [line for line in lines(workdir) if "val/miou" in line]
    assert [line["step"] for line in evaluations] == [4, 8]
    for line in evaluations:
        assert {"val/boundary_iou", "val/pixel_accuracy", "val/iou/background"} <= line.keys()
    assert json.loads((workdir / "config.json").read_text())["steps"] == 8
    assert list(workdir.glob("events.out.tfevents.*"))
    best = max(evaluations, key=lambda line: (line["val/miou"], line["step"]))["step"]
    kept = {int(path.name) for path in (workdir / "checkpoints").iterdir()}
    assert kept == {best, 8}
    for step in (4, 8):
        for i in range(2):
            with Image.open(workdir / "predictions" / f"step{step:07d}_{i}.png") as picture:
                assert picture.size == (3 * 32 + 2 * 4, 32)
    assert "boundary IoU" in output and "pixel accuracy" in output


def test_the_embedded_dataset_is_built_as_published(whole, data_dir):
    command = [sys.executable, "-m", "resfu_jax.data", "prepare", "shapes", "--data-dir", data_dir]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "shapes: 2000 train, 200 validation" in done.stdout, done.stderr
    source = data.open_source("shapes", "validation", data_dir)
    info = data.dataset_info("shapes")
    batches = list(data.eval_batches(source, info, batch_size=64, pad_to=32))
    assert len(batches) == 4 and batches[0]["image"].shape == (64, 128, 128, 3)
    counts = sum(np.bincount(batch["label"].ravel(), minlength=256) for batch in batches)
    assert np.all(counts[: info.num_classes] > 0.008 * counts[: info.num_classes].sum())
    assert counts[255] == 56 * 128 * 128  # the padded rows of the last batch, and nothing else


def test_killed_and_stopped_runs_continue_bit_for_bit(whole, data_dir, tmp_path):
    process = start(data_dir, tmp_path)
    code, output = interrupt(process, tmp_path, signal.SIGKILL, at_step=5)
    assert code == -signal.SIGKILL, output
    process = start(data_dir, tmp_path)
    seen = len(losses(tmp_path))
    code, output = interrupt(process, tmp_path, signal.SIGTERM, at_step=max(seen, 6))
    if code != 0:  # it may have been at its last step
        assert code == 128 + signal.SIGTERM, output
        assert "the same command continues" in output
    output = run(data_dir, tmp_path)
    assert losses(tmp_path) == losses(whole[0])
    values = [{k: v for k, v in line.items() if k.startswith("val/")} for line in lines(tmp_path)]
    expected = [{k: v for k, v in line.items() if k.startswith("val/")} for line in lines(whole[0])]
    assert values == expected
    assert "continuing from step" in output


# With SIGINT at the start: test_workdir.py, where `StopSignals` answers both.
@pytest.mark.parametrize(
    ("moment", "number"),
    [("imports", signal.SIGINT), ("imports", signal.SIGTERM), ("start", signal.SIGTERM)],
)
def test_a_signal_while_a_run_starts_ends_it_at_once(data_dir, tmp_path, moment, number):
    workdir = tmp_path / "run"
    process = start(data_dir, workdir)
    if moment == "imports":
        time.sleep(1)
    else:
        while not workdir.exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert output.splitlines()[-1].startswith("stopped") and "Traceback" not in output
    assert losses(workdir) == []


def test_eight_devices_and_two_workers_give_the_same_trajectory(data_dir, tmp_path):
    # Adam divides gradients that are all rounding by their own size; SGD leaves them small.
    sgd = ["--config.optimizer.name=sgd", "--config.optimizer.learning_rate=0.01"]
    sgd += ["--config.eval.every=8"]
    one, eight = tmp_path / "one", tmp_path / "eight"
    run(data_dir, one, *sgd)
    run(data_dir, eight, *sgd, "--config.data.num_workers=2", devices=8)
    (steps, values), (expected_steps, expected) = (
        zip(*losses(workdir), strict=True) for workdir in (eight, one)
    )
    assert steps == expected_steps and values[-1] < 0.8 * values[0]
    np.testing.assert_allclose(values, expected, rtol=2e-5)


def test_evaluation_of_a_checkpoint_repeats_the_numbers_of_the_run(whole, data_dir):
    workdir, _ = whole
    output = run(data_dir, workdir, "--mode=eval", "--checkpoint=latest")
    assert "boundary IoU" in output
    metrics = json.loads((workdir / "eval_8.json").read_text())
    last = [line for line in lines(workdir) if "val/miou" in line][-1]
    assert {f"val/{k}": v for k, v in metrics.items() if k != "step"} == {
        k: v for k, v in last.items() if k != "step"
    }


def test_every_option_together(data_dir, tmp_path):
    output = run(
        data_dir,
        tmp_path,
        "--config.steps=4",
        "--config.model.dtype=bfloat16",
        "--config.model.remat",
        "--config.optimizer.accumulate=2",
        "--config.optimizer.ema_decay=0.9",
        "--config.loss.label_smoothing=0.1",
        "--config.data.crop_size=(64, 32)",
        "--config.data.on_corrupt=skip",
        "--config.model.head.upsampler_options={}",
        "--config.eval.mode=slide",
        "--config.eval.crop=(32, 32)",
        "--config.eval.stride=(32, 16)",
        "--config.eval.scales=(2.0,)",
        "--config.eval.flip",
    )
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3, 4]
    assert all(np.isfinite(loss) for _, loss in losses(tmp_path))
    assert "corrupt images skipped: 0" in output


def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(data_dir, tmp_path):
    output = run(
        data_dir,
        tmp_path,
        "--config.steps=40",
        "--config.optimizer.learning_rate=1e30",
        "--config.optimizer.warmup_start=1e-33",
        "--config.checkpoint.every=1",
        "--config.log_every=3",
        code=1,
    )
    assert "error: " in output and "at step" in output and "shapes" in output
    assert "Traceback" not in output
    bad = int(output.split("at step ")[1].split(",")[0])
    (kept,) = (int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert f"checkpoint is {kept}," in output
    assert kept < bad


@pytest.fixture
def answer(data_dir, monkeypatch):
    """What train.py ends with, run in this process: it has imported everything already.

    (A run that diverges shows that a process prints it and no traceback.)
    """
    config, stop = tiny_config.get_config(), training.StopSignals()
    config.data.dir = str(data_dir)
    monkeypatch.setattr(training, "StopSignals", lambda: stop)

    def answer(workdir, *, mode="train", checkpoint="best"):
        given = dict(CONFIG=config, WORKDIR=str(workdir), MODE=mode, CHECKPOINT=checkpoint)
        given |= dict(DRY_RUN=False, DISTRIBUTED=False, WITH_CHANGES=False)
        given |= dict(COORDINATOR=None, NUM_PROCESSES=None, PROCESS_ID=None)
        for name, value in given.items():
            monkeypatch.setattr(train, name, types.SimpleNamespace(value=value))
        with pytest.raises(SystemExit) as end:
            train.main(["train.py"])
        return end.value.code

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield config, answer
    stop.close()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("data.name", "camvid", "python -m resfu_jax.data prepare camvid"),
        ("model.backbone.variant", "b9", "config.model: variant must be one of b0"),
        ("model.head.name", "linear", "config.model: features must be maps of one size"),
    ],
)
def test_mistakes_end_in_one_message(answer, tmp_path, place, value, message):
    """Those that come out after the config was checked; tests/test_config.py has the others."""
    config, answer = answer
    *parents, field = place.split(".")
    setattr(functools.reduce(getattr, parents, config), field, value)
    said = answer(tmp_path)
    assert said.startswith("error: ") and message in said


def test_another_architecture_is_refused(whole, answer):
    config, answer = answer
    config.model.head.width = 16
    assert "config.model.head.width: was 8, is 16" in answer(whole[0])


def test_a_checkpoint_that_is_not_there_is_named(whole, answer):
    _, answer = answer
    assert "there are: best, latest" in answer(whole[0], mode="eval", checkpoint="5")
