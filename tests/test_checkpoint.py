import errno
import hashlib
import json
import logging
import pathlib
import shutil
import types

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from resfu_jax.training import CheckpointError, Checkpoints

# Orbax reads many arrays at once: of a damaged checkpoint the first error ends its loop, the others
# find it closed, perhaps while the next test runs already.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Net(nnx.Module):
    def __init__(self, width, rngs):
        self.layers = nnx.List([nnx.Linear(3, width, rngs=rngs), nnx.Linear(width, 2, rngs=rngs)])
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


def make_state(width=4, step=0):
    _, params, rest = nnx.split(Net(width, nnx.Rngs(step)), nnx.Param, ...)
    params, rest = nnx.as_pure(params), nnx.as_pure(rest)
    return {
        "step": jnp.int32(step),
        "params": params,
        "rest": rest,
        "optimizer": optax.adamw(1e-3).init(params),
    }


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def iterator():
    dataset = grain.MapDataset.range(100).seed(0).shuffle().repeat(None).batch(2)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1)))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


def test_state_and_data_position_come_back_exactly(tmp_path):
    data, state = iterator(), make_state(step=3)
    for _ in range(3):
        next(data)
    checkpoints = Checkpoints(tmp_path / "new" / "checkpoints")
    assert checkpoints.find("latest") is None and checkpoints.find("best") is None
    checkpoints.save(3, state, data)
    checkpoints.close()
    following = [next(data) for _ in range(4)]

    again, other = Checkpoints(tmp_path / "new" / "checkpoints"), iterator()
    assert again.find("latest") == 3
    assert_equal(again.restore(3, abstract(make_state()), other), state)
    np.testing.assert_array_equal([next(other) for _ in range(4)], following)
    assert_equal(again.restore(3, abstract(make_state())), state)  # without the data
    again.close()


def test_newest_and_best_are_kept(tmp_path):
    checkpoints, data = Checkpoints(tmp_path, keep=1), iterator()
    for step, miou in ((1, 10.0), (2, None), (3, 30.0), (4, 20.0), (5, None), (6, 25.0), (7, None)):
        checkpoints.save(step, make_state(), data, miou)
    checkpoints.close()
    again = Checkpoints(tmp_path)
    assert {int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()} == {3, 7}
    assert (again.find("latest"), again.find("best"), again.find("3")) == (7, 3, 3)
    with pytest.raises(CheckpointError, match="there are: best, latest, 3, 7"):
        again.find("5")
    again.close()


def test_best_is_the_latest_when_none_was_evaluated(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(), iterator())
    assert checkpoints.find("best") == 1
    checkpoints.close()


def test_saving_a_step_again_keeps_what_is_there(tmp_path):
    checkpoints, data = Checkpoints(tmp_path), iterator()
    checkpoints.save(1, make_state(step=1), data)
    checkpoints.save(1, make_state(step=2), data)
    checkpoints.close()
    again = Checkpoints(tmp_path)
    assert again.restore(1, abstract(make_state()))["step"] == 1
    again.close()


def test_a_write_that_was_cut_off_is_cleaned_up_and_the_one_before_it_restored(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(step=1), iterator())
    checkpoints.close()
    (path,) = (path for path in tmp_path.iterdir() if path.name.isdigit())
    cut_off = tmp_path / f"2{'.orbax-checkpoint-tmp'}"
    shutil.copytree(path, cut_off)
    shutil.rmtree(cut_off / "state")
    again = Checkpoints(tmp_path)
    assert not cut_off.exists()  # already: no thread of Orbax's is left that does it later
    assert again.find("latest") == 1
    assert again.restore(1, abstract(make_state()))["step"] == 1
    again.close()


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    checkpoints, data = Checkpoints(tmp_path), iterator()
    overwrite = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros((512, 512))
    for _ in range(3):
        checkpoints.save(int(x[0, 0]), {"x": x}, data)
        x = overwrite(x)
    checkpoints.close()
    again = Checkpoints(tmp_path)
    target = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)}
    np.testing.assert_array_equal(again.restore(2, target)["x"], 2)
    again.close()


def test_another_architecture_is_refused_naming_the_paths(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(width=4), iterator())
    other = abstract(make_state(width=6))
    other["ema"] = other["params"]
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore(1, other)
    message = str(error.value)
    assert "params/layers/0/kernel: saved (3, 4), the model has (3, 6)" in message
    assert "ema/layers/0/kernel: saved nothing, the model has (3, 6)" in message
    assert "params/layers/1/bias" not in message
    checkpoints.close()


def test_no_room_is_noticed_before_the_start(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=2)
    state = abstract({"x": jnp.zeros(250_000)})
    checkpoints.check_space(state)
    usage = types.SimpleNamespace(free=3_500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"1\.0 MB each: 4\.0 MB are needed .* 3\.5 are free"):
        checkpoints.check_space(state)
    checkpoints.close()


def test_a_disk_that_fills_up_while_saving_is_named(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(), iterator())
    checkpoints._manager.wait_until_finished()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(CheckpointError, match=r"no room on disk.*latest complete step: 1"):
        checkpoints.save(2, make_state(), iterator())
    checkpoints.close()


# ------------------------------------------------------------------------------------------ scores
def folders(directory):
    return {int(path.name) for path in directory.iterdir() if path.name.isdigit()}


def test_a_checkpoint_that_is_evaluated_after_it_was_saved_may_be_the_best(tmp_path):
    checkpoints, data = Checkpoints(tmp_path), iterator()
    for step, miou in ((1, 10.0), (2, 30.0), (3, 20.0), (4, float("nan")), (5, None)):
        checkpoints.save(step, make_state(step=step), data)
        if miou is not None:
            checkpoints.score(step, miou)
        best = 1 if step == 1 else 2
        assert checkpoints.find("best") == best
        if miou is not None:
            assert folders(tmp_path) == {best, step}
    checkpoints.close()
    assert folders(tmp_path) == {2, 5}
    again = Checkpoints(tmp_path, read_only=True)  # the scores are on disk
    assert (again.find("best"), again.find("latest")) == (2, 5)
    again.close()


def test_a_checkpoint_whose_evaluation_failed_is_kept_as_the_newest(tmp_path):
    checkpoints, data = Checkpoints(tmp_path), iterator()
    checkpoints.save(1, make_state(), data, 1.0)
    checkpoints.save(2, make_state(), data)
    checkpoints.close()
    again = Checkpoints(tmp_path)
    assert (again.find("best"), again.find("latest")) == (1, 2)
    again.close()


# ------------------------------------------------------------------------------------------ damage
def saved(directory, steps=(1, 2)):
    checkpoints = Checkpoints(directory, keep=len(steps))
    for step in steps:
        checkpoints.save(step, make_state(step=step), iterator(), float(step))
    checkpoints.close()
    return directory


def largest(folder):
    paths = (path for path in (folder / "state").rglob("*") if path.is_file())
    return max(paths, key=lambda path: path.stat().st_size)


def flip(folder):
    path = largest(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(folder):
    path = largest(folder)
    path.write_bytes(path.read_bytes()[:-1])


def lose(folder):
    largest(folder).unlink()


def lose_all(folder):
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def lose_position(folder):
    shutil.rmtree(folder / "data")


def empty_sums(folder):
    (folder / "SHA256SUMS").write_bytes(b"")


DAMAGE = (flip, cut, lose, lose_all, lose_position, empty_sums)


def test_sums_are_those_of_all_files_that_hold_values(tmp_path):
    folder = saved(tmp_path, [1]) / "1"
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    inside = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for item in ("state", "data")
        for path in (folder / item).rglob("*")
        if path.is_file()
    }
    assert sums == inside and "data/iterator.json" in sums


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_with_the_newest_intact_one(tmp_path, damage):
    damage(saved(tmp_path) / "2")
    checkpoints = Checkpoints(tmp_path, read_only=True)
    state = abstract(make_state())
    weights = {name: state[name] for name in ("params", "rest")}
    for read in (
        lambda: checkpoints.restore(2, state),
        lambda: checkpoints.restore_weights(2, weights),
    ):
        with pytest.raises(CheckpointError) as error:
            read()
        message = str(error.value)
        assert f"checkpoint 2 is damaged: {tmp_path / '2'}" in message
        assert "intact is 1: evaluate it with --checkpoint 1 (resfu: --which 1)" in message
    assert_equal(checkpoints.restore(1, state), make_state(step=1))
    checkpoints.close()
    assert folders(tmp_path) == {1, 2} and not (tmp_path / "damaged").exists()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_continues_from_the_newest_intact_checkpoint(tmp_path, damage, caplog):
    damage(saved(tmp_path) / "2")
    with caplog.at_level(logging.WARNING):
        checkpoints = Checkpoints(tmp_path)
    assert "checkpoint 2 is damaged" in caplog.text and "intact checkpoint is 1" in caplog.text
    assert checkpoints.find("latest") == checkpoints.find("best") == 1
    data = iterator()
    assert_equal(checkpoints.restore(1, abstract(make_state()), data), make_state(step=1))
    checkpoints.save(2, make_state(step=2), data)  # the run comes there again
    checkpoints.close()
    assert folders(tmp_path) == {1, 2} and (tmp_path / "damaged" / "2").is_dir()
    damage(tmp_path / "2")
    Checkpoints(tmp_path).close()
    assert folders(tmp_path) == {1} and len(list((tmp_path / "damaged").iterdir())) == 2


def test_nothing_is_put_aside_when_no_checkpoint_is_intact(tmp_path):
    for step in (1, 2):
        cut(saved(tmp_path) / str(step))
    with pytest.raises(CheckpointError, match="(?s)are damaged:.* 2: .* 1: .*another --workdir"):
        Checkpoints(tmp_path)
    assert folders(tmp_path) == {1, 2}


def test_checkpoints_of_older_versions_have_no_sums(tmp_path):
    for step in (1, 2):
        (saved(tmp_path) / str(step) / "SHA256SUMS").unlink()
    checkpoints = Checkpoints(tmp_path)
    assert_equal(checkpoints.restore(2, abstract(make_state())), make_state(step=2))
    shutil.rmtree(tmp_path / "2" / "state" / "d")
    with pytest.raises(CheckpointError, match="checkpoint 2 .* cannot be read .* is 1: evaluate"):
        checkpoints.restore(2, abstract(make_state()))
    checkpoints.close()


@pytest.mark.parametrize("content", ["", '{"mi', "[]", '{"loss": 1}', "\0\0"])
def test_a_damaged_score_counts_as_none(tmp_path, content, caplog):
    path = saved(tmp_path) / "2" / "metrics" / "metrics"
    path.write_text(content)
    with pytest.raises(CheckpointError, match="metrics is damaged; without the folder"):
        Checkpoints(tmp_path, read_only=True)
    with caplog.at_level(logging.WARNING):
        checkpoints = Checkpoints(tmp_path)
    assert "has not been evaluated" in caplog.text
    assert (checkpoints.find("best"), checkpoints.find("latest")) == (1, 2)
    checkpoints.score(2, 2.0)
    assert checkpoints.find("best") == 2 and json.loads(path.read_text()) == {"score": 2.0}
    checkpoints.close()


def test_a_copy_that_was_cut_off_is_as_damage(tmp_path):
    """Folders of other names, and files of such names, are nobody's checkpoint."""
    saved(tmp_path)
    shutil.copytree(tmp_path / "2", tmp_path / "2 (copy)")
    (tmp_path / "3").write_text("a file")
    (tmp_path / "4").mkdir()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.find("latest") == 2
    checkpoints.close()
    assert (tmp_path / "damaged" / "4").is_dir()


# ------------------------------------------------------------------------------------------- paths
@pytest.mark.parametrize("name", ["[a] b:c", "x*?", "[/bold]", "{1} % ~", "é"])
def test_any_name_of_a_folder(tmp_path, name):
    for part in name.split("/"):
        tmp_path /= part
    saved(tmp_path)
    checkpoints, data = Checkpoints(tmp_path), iterator()
    assert_equal(checkpoints.restore(2, abstract(make_state()), data), make_state(step=2))
    state = abstract(make_state())
    weights = checkpoints.restore_weights(1, {name: state[name] for name in ("params", "rest")})
    assert_equal(weights["params"], make_state(step=1)["params"])
    checkpoints.close()
    assert not pathlib.Path(checkpoints._alias).exists() or checkpoints._alias == tmp_path


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved("~/checkpoints")
    assert folders(tmp_path / "checkpoints") == {1, 2}
