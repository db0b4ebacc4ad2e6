import errno
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
        checkpoints.save(step, make_state(), data, None if miou is None else {"miou": miou})
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
    assert again.find("latest") == 1
    assert again.restore(1, abstract(make_state()))["step"] == 1
    again.close()
    assert not cut_off.exists()


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
