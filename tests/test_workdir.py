"""A workdir: what is in it survives a stop at any moment, and is checked when a run goes on."""

import dataclasses
import gc
import json
import os
import signal
import sys
import weakref

import jax
import numpy as np
import pytest
import tiny_config
from PIL import Image
from tiny_run import make_run

import train
from resfu_jax import data, tasks, training
from resfu_jax._files import local_path, write_whole
from resfu_jax.training import workdir as workdir_module
from resfu_jax.training.config import flatten, to_dict


# ------------------------------------------------------------------------------------ config.json
def test_a_config_of_an_older_version_has_the_defaults_for_what_it_lacks(tmp_path, monkeypatch):
    config = training.Config(seed=3)
    training.write_config(tmp_path, config)
    tree = json.loads((tmp_path / "config.json").read_text())
    del tree["model"]["remat"], tree["data"]["max_class_share"], tree["optimizer"]["layer_decay"]
    del tree["loss"]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert training.read_config(tmp_path) == config
    training.check_same_run(tmp_path, config)
    config.optimizer.layer_decay = 0.9
    with pytest.raises(training.ConfigError, match=r"layer_decay: was 1\.0, is 0\.9"):
        training.check_same_run(tmp_path, config)

    # A default that is another one now: the run was trained with the one of its time.
    monkeypatch.setitem(workdir_module._IN_EFFECT_BEFORE, "optimizer.layer_decay", 0.9)
    training.check_same_run(tmp_path, config)
    assert training.read_config(tmp_path) == config
    tree["optimizer"]["layer_decay"] = 1.0  # but what is written counts
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert training.read_config(tmp_path).optimizer.layer_decay == 1.0


def test_every_line_of_the_table_of_older_defaults_is_a_field():
    known = flatten(to_dict(training.Config()))
    assert workdir_module._IN_EFFECT_BEFORE.keys() <= known.keys()


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    training.write_config(tmp_path, training.Config(seed=1))
    before = (tmp_path / "config.json").read_bytes()

    def power_loss(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "fsync", power_loss)
        training.write_config(tmp_path, training.Config(seed=2))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_bytes() == before
    write_whole(tmp_path / "config.json", b"new")
    assert (tmp_path / "config.json").read_bytes() == b"new"
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "config.json").stat().st_mode & 0o777 == 0o666 & ~umask


# ------------------------------------------------------------------------------------------ paths
def test_home_is_found_and_addresses_are_not_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert local_path("~/a b/[c]", "x") == tmp_path / "a b" / "[c]"
    assert local_path("run:1", "x") == tmp_path / "run:1"
    assert local_path("a/~/b", "x") == tmp_path / "a" / "~" / "b"
    assert training.find_workdir("~/runs", new=True) == tmp_path / "runs"
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------- signals
@pytest.fixture
def stop():
    stop = training.StopSignals()
    yield stop
    stop.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_the_start_acts_where_it_comes(stop, number):
    with pytest.raises(training.Stopped) as stopped:
        signal.raise_signal(number)
    assert stopped.value.number == number
    for either in (signal.SIGINT, signal.SIGTERM):
        assert signal.getsignal(either) == signal.SIG_DFL  # a second one does not wait for Python


@pytest.mark.parametrize("where", ["garbage collection", "weak reference", "destructor"])
def test_a_signal_that_python_drops_acts_at_the_next_check(stop, where, capfd, monkeypatch):
    # pytest would keep what Python reports; a run's own report is that of Python.
    monkeypatch.setattr(stop, "_report", sys.__unraisablehook__)
    monkeypatch.setattr(sys, "unraisablehook", stop._dropped)

    class Node:
        def __del__(self):
            if where == "destructor":
                os.kill(os.getpid(), signal.SIGINT)

    def callback(*_):
        if not stop.received:
            os.kill(os.getpid(), signal.SIGINT)

    node = Node()
    if where == "garbage collection":
        gc.callbacks.append(callback)
        gc.collect()
        gc.callbacks.remove(callback)
    elif where == "weak reference":
        kept = weakref.ref(node, callback)
        del node
        assert kept() is None
    else:
        del node
    assert stop.received == signal.SIGINT  # and nothing was raised
    with pytest.raises(training.Stopped):
        stop.check()
    assert capfd.readouterr() == ("", "")


def test_while_there_is_something_to_save_a_signal_is_remembered(stop):
    stop.at_once = False
    stop.check()
    signal.raise_signal(signal.SIGTERM)
    assert stop.received == signal.SIGTERM
    with pytest.raises(training.Stopped):
        stop.check()


def test_signals_act_as_before_afterwards():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], sys.unraisablehook
    training.StopSignals().close()
    after = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], sys.unraisablehook
    assert after == before


# ------------------------------------------------------------------------------------------- runs
@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A few small images in CamVid's layout: quicker to make than `shapes`."""
    raw, rng = tmp_path_factory.mktemp("raw"), np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 5)):
        for kind, shape, high in (("", (32, 40, 3), 256), ("annot", (32, 40), 12)):
            (raw / f"{split}{kind}").mkdir()
            for i in range(count):
                pixels = rng.integers(0, high, shape, np.uint8)
                Image.fromarray(pixels).save(raw / f"{split}{kind}" / f"0001TP_{split}{i}.png")
    directory = tmp_path_factory.mktemp("data")
    data.prepare("camvid", directory, raw)
    return directory


def config_of(data_dir, **fields):
    config = tiny_config.get_config()
    config.data.name, config.data.dir, config.data.resize_scale = "camvid", str(data_dir), 1.0
    config.steps = 4
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def lines(workdir, *names):
    read = training.read_metrics(workdir / "metrics.jsonl")
    return [tuple(line[name] for name in names) for line in read if names[-1] in line]


@pytest.mark.slow
def test_an_evaluation_that_fails_or_is_stopped_costs_no_step(
    stop, data_dir, tmp_path, monkeypatch, programs_are_kept, capfd
):
    def run(workdir, with_changes=False, **fields):
        config = config_of(data_dir, **fields)
        config.eval.every, config.checkpoint.every = 2, 100
        stop.at_once, stop.received = True, 0
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            train.run(config, workdir, "train", "latest", stop, with_changes=with_changes)

    def steps(workdir):
        return {int(path.name) for path in (workdir / "checkpoints").iterdir()}

    whole, workdir = tmp_path / "whole", tmp_path / "[a] b:c"
    run(whole)
    evaluate = tasks.Segmentation.evaluate

    def fails(*args, **kwargs):
        raise MemoryError("no memory for the evaluation")

    monkeypatch.setattr(tasks.Segmentation, "evaluate", fails)
    with pytest.raises(MemoryError):
        run(workdir)
    assert steps(workdir) == {2} and lines(workdir, "val/miou") == []

    def stops(*args, **kwargs):
        stop.received = signal.SIGTERM
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(tasks.Segmentation, "evaluate", stops)
    batches = data.eval_batches

    def twice(*args, **options):
        once = batches(*args, **options)
        return dataclasses.replace(once, slots=2 * once.slots)

    with monkeypatch.context() as patch, pytest.raises(training.Stopped):
        patch.setattr(data, "eval_batches", twice)
        run(workdir)
    assert steps(workdir) == {2} and lines(workdir, "val/miou") == []
    monkeypatch.setattr(tasks.Segmentation, "evaluate", evaluate)
    run(workdir)
    names = ("step", "loss")
    assert lines(workdir, *names) == lines(whole, *names)
    names = ("step", "val/miou", "val/boundary_iou")
    assert lines(workdir, *names) == lines(whole, *names)
    assert steps(workdir) == steps(whole)
    checkpoints = [
        training.Checkpoints(w / "checkpoints", read_only=True) for w in (workdir, whole)
    ]
    assert checkpoints[0].find("best") == checkpoints[1].find("best")
    best = max((miou, step) for step, miou, _ in lines(whole, *names))[1]
    assert checkpoints[0].find("best") == best
    for c in checkpoints:
        c.close()

    # The finished run goes on with other batches and another rate, from the 33rd image.
    taken = []
    with monkeypatch.context() as patch:
        add = training.MetricsWindow.add
        patch.setattr(
            training.MetricsWindow,
            "add",
            lambda w, s, ids, m: add(w, s, taken.append(ids) or ids, m),
        )
        run(whole, steps=6, batch_size=16, with_changes=True)
    config = json.loads((whole / "config.json").read_text())
    assert (
        config["history"][0]["was"] == {"batch_size": 8, "steps": 4} and config["batch_size"] == 16
    )
    said = capfd.readouterr().err
    assert "continuing from step 4, to step 6" in said and "config.batch_size: was 8, is 16" in said
    batches = training.train_batches(config_of(data_dir, batch_size=16), *source(data_dir))
    ids = [next(batches)["id"] for _ in range(4)]
    batches.close()
    np.testing.assert_array_equal(taken, ids[2:])
    with pytest.raises(training.CheckpointError, match="there is no checkpoint in"):
        run(tmp_path / "new", with_changes=True)

    # Another run starts with its weights.
    run(tmp_path / "new", init_from=str(whole))
    said = capfd.readouterr().err
    assert f"starting from checkpoint {best} of {whole}: 135 of 135 arrays" in said
    assert lines(tmp_path / "new", "step", "loss")[0] != lines(whole, "step", "loss")[0]
    assert said.index("compiling the training step") < said.index("step 1/4  loss")


def source(data_dir):
    return data.open_source("camvid", "train", data_dir), data.dataset_info("camvid", data_dir)


def test_another_dataset_is_refused_before_it_is_built(stop, data_dir, tmp_path):
    make_run(tmp_path / "run", config_of(data_dir), {2: None})
    config = config_of(tmp_path / "empty")
    config.data.name = "shapes"
    with pytest.raises(
        training.ConfigError, match=r"config\.data\.name: was 'camvid', is 'shapes'"
    ):
        train.run(config, tmp_path / "run", "train", "latest", stop)
    assert not (tmp_path / "empty").exists()


def test_evaluation_changes_nothing_in_a_workdir_that_is_being_written(stop, data_dir, tmp_path):
    workdir = tmp_path / "run"
    make_run(workdir, config_of(data_dir), {2: None})
    writing = workdir / "checkpoints" / "3.orbax-checkpoint-tmp"
    writing.mkdir()
    with pytest.raises(training.CheckpointError, match="there are: best, latest, 2"):
        train.run(config_of(data_dir), workdir, "eval", "7", stop)
    assert writing.exists()


def test_evaluation_of_nothing_makes_no_folder(tmp_path, as_users_call):
    with pytest.raises(training.ConfigError, match="is not a folder: there is no run to evaluate"):
        training.find_workdir(tmp_path / "absent", new=False)
    assert list(tmp_path.iterdir()) == []
