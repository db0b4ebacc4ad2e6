import dataclasses
import pathlib

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from resfu_jax import training
from resfu_jax.ops._rows import Rows, block_rows, map_row_blocks
from resfu_jax.training import ConfigError, OptimizerConfig, ParallelConfig, ProfileConfig


# ----------------------------------------------------------------------------------------- layout
@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((64, 64), ("data",)),  # the first of equal axes
        ((3, 3, 16, 32), (None, None, None, "data")),
        ((128, 10), ("data",)),
        ((1000, 16), ("data",)),
        ((1001, 16), (None, "data")),  # the longest axis that 8 divides
        ((1001, 17), ()),  # none does
        ((8, 16), ()),  # too small
        ((), ()),
        ((0, 8), ()),
    ],
)
def test_large_arrays_are_cut_along_their_longest_axis_that_divides(shape, spec):
    layout = training.Layout(ParallelConfig(shard_parameters=True, shard_at_least=256))
    array = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert tuple(layout.sharding(array).spec) == spec
    whole = training.Layout(ParallelConfig(shard_at_least=256))
    assert whole.sharding(array).is_fully_replicated


def test_rows_of_a_batch_come_back_in_order():
    layout = training.Layout(ParallelConfig())
    batch = {"image": np.arange(48).reshape(16, 3), "id": np.array([b"a"] * 16)}
    there = layout.to_devices(batch)
    assert there.keys() == {"image"}
    assert {shard.data.shape for shard in there["image"].addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(training.local_rows(there["image"]), batch["image"])
    one = training.Layout(ParallelConfig(), jax.devices()[:1]).to_devices(batch)
    np.testing.assert_array_equal(training.local_rows(one["image"]), batch["image"])


class Net(nnx.Module):
    def __init__(self, dtype, rngs):
        self.stem = nnx.Conv(3, 16, (3, 3), dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.hidden = nnx.Linear(16, 64, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(64, 4, dtype=dtype, rngs=rngs)

    def __call__(self, image):
        x = self.stem(image.astype(jnp.float32) / 255)
        x = self.norm(x.astype(jnp.float32))
        return self.head(nnx.relu(self.hidden(self.dropout(x))))


class Run:
    """What train.py does with a state, on some devices."""

    def __init__(self, *, shard, dtype="float32", accumulate=None):
        parallel = ParallelConfig(shard_parameters=shard, shard_at_least=64)
        self.layout = layout = training.Layout(parallel)
        config = OptimizerConfig(learning_rate=1e-3, warmup_steps=1, clip_norm=1.0)
        optimizer = training.create_optimizer(config, 10)

        def init():
            graphdef, params, rest = nnx.split(Net(jnp.dtype(dtype), nnx.Rngs(0)), nnx.Param, ...)
            params, rest = nnx.as_pure(params), nnx.as_pure(rest)
            state = {"params": params, "rest": rest, "optimizer": optimizer.init(params)}
            return graphdef, state | {"ema": jax.tree.map(jnp.copy, params)}

        graphdef, abstract = jax.eval_shape(init)
        self.abstract = layout.abstract(abstract)

        def step(state, batch):
            def loss_fn(params, rest, part):
                model = nnx.merge(graphdef, layout.gather(params), rest, copy=True)
                pixels = jnp.float32(batch["label"].size)
                logits = model(part["image"])
                loss = training.cross_entropy(logits, part["label"], normalizer=pixels)
                return loss, nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param)))

            grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
            args = state["params"], state["rest"], batch
            if accumulate is None:
                (loss, rest), grads = grad_fn(*args)
            else:
                loss, rest, grads = training.accumulate_gradients(grad_fn, *args, parts=accumulate)
            params = state["params"]
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax
                updates, moments = optimizer.update(grads, state["optimizer"], params)
                params = optax.apply_updates(params, updates)
            ema = training.update_ema(state["ema"], params, jnp.float32(1), 0.9)
            return {"params": params, "rest": rest, "optimizer": moments, "ema": ema}, loss

        shardings = layout.of(abstract)
        self.init = jax.jit(lambda: init()[1], out_shardings=shardings)
        self.step = jax.jit(
            step,
            in_shardings=(shardings, layout.over_batch),
            out_shardings=(shardings, layout.replicated),
            donate_argnums=0,
        )

    def losses(self, steps=2):
        rng = np.random.default_rng(0)
        batch = {
            "image": rng.integers(0, 256, (16, 8, 8, 3), np.uint8),
            "label": rng.integers(0, 4, (16, 8, 8), np.uint8),
        }
        self.state, losses = self.init(), []
        for _ in range(steps):
            self.state, loss = self.step(self.state, self.layout.to_devices(batch))
            losses.append(float(loss))
        return losses


@pytest.fixture(scope="module")
def sharded():
    run = Run(shard=True)
    return run, run.losses()


def test_sharded_parameters_train_alike(sharded):
    whole = Run(shard=False)
    losses = whole.losses()
    np.testing.assert_allclose(sharded[1], losses, rtol=1e-6)
    assert losses[0] != losses[1]
    for a, b in zip(
        jax.tree.leaves(sharded[0].state["params"]),
        jax.tree.leaves(whole.state["params"]),
        strict=True,
    ):
        # Adam's first steps divide by the gradient's own size, rounding included.
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=0)


def test_sharded_parameters_train_alike_in_bfloat16_and_in_parts():
    a, b = (Run(shard=s, dtype="bfloat16", accumulate=2).losses() for s in (True, False))
    np.testing.assert_allclose(a, b, rtol=2e-3)


@pytest.mark.parametrize("part", ["params", "optimizer", "ema"])
def test_every_device_has_its_part_of_the_state(sharded, part):
    leaves = jax.tree.leaves(sharded[0].state[part])
    total = sum(leaf.nbytes for leaf in leaves)
    small = sum(leaf.nbytes for leaf in leaves if leaf.sharding.is_fully_replicated)
    assert small < 0.1 * total
    there = {device: 0 for device in jax.devices()}
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            there[shard.device] += shard.data.nbytes
    assert set(there.values()) == {(total - small) // 8 + small}


@pytest.mark.parametrize(("devices", "shard"), [(1, False), (4, True), (8, False)])
def test_a_run_continues_on_other_devices(sharded, tmp_path, devices, shard):
    data = iter(grain.MapDataset.range(100).seed(0).shuffle().repeat(None).to_iter_dataset())
    next(data)
    checkpoints = training.Checkpoints(tmp_path)
    checkpoints.save(2, sharded[0].state, data)
    checkpoints.close()
    parallel = ParallelConfig(shard_parameters=shard, shard_at_least=64)
    layout = training.Layout(parallel, jax.devices()[:devices])
    again = training.Checkpoints(tmp_path)
    state = again.restore(2, layout.abstract(sharded[0].abstract))
    again.close()
    for before, after in zip(
        jax.tree.leaves(sharded[0].state), jax.tree.leaves(state), strict=True
    ):
        assert after.sharding.is_equivalent_to(layout.sharding(before), before.ndim)
        if jax.dtypes.issubdtype(before.dtype, jax.dtypes.prng_key):
            before, after = jax.random.key_data(before), jax.random.key_data(after)
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)


# -------------------------------------------------------------------------------------- processes
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("h:1", None, None), "--num_processes and --process_id missing"),
        ((None, 2, 0), "--coordinator_address missing"),
        (("h:1", 2, None), "--process_id missing"),
        (("h", 2, 0), "host:port"),
        (("h:port", 2, 0), "host:port"),
        (("h:1", 2, 2), r"--process_id is 2.*0 \.\. 1"),
        (("h:1", 2, -1), "--process_id is -1"),
    ],
)
def test_half_given_flags_are_named(arguments, message):
    names = ("coordinator_address", "num_processes", "process_id")
    with pytest.raises(ConfigError, match=message):
        training.initialize_distributed(**dict(zip(names, arguments, strict=True)))


def test_flags_of_both_kinds_or_of_none():
    with pytest.raises(ConfigError, match="the one or the others"):
        training.initialize_distributed(detect=True, num_processes=2)
    training.initialize_distributed()
    assert jax.process_count() == 1 and training.is_main_process()


def test_nothing_to_ask_is_explained(monkeypatch):
    def initialize(*args, **kwargs):
        assert args == (None, None, None)
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ConfigError, match="neither a TPU pod nor Slurm.*--coordinator_address"):
        training.initialize_distributed(detect=True)


def test_one_process_needs_no_agreement(tmp_path):
    training.check_together(tmp_path / "new" / "run", training.Config())
    assert list((tmp_path / "new" / "run").iterdir()) == []
    assert training.agreed_stop(15, ask=False) == 15 and training.agreed_stop(0, ask=True) == 0
    calls = []
    training.one_after_another(lambda: calls.append(1))
    assert calls == [1]


# ------------------------------------------------------------------------------------ utilisation
def test_flops_of_a_product_and_of_blocks_of_rows():
    a, b = jnp.ones((16, 32)), jnp.ones((32, 8))
    assert training.count_flops(lambda a, b: a @ b, a, b) == 2 * 16 * 32 * 8

    def blocks(a, b):
        rows = block_rows(16, 2**16)
        row = Rows(axis=0, step=rows, length=rows)
        (y,) = map_row_blocks(lambda b, x: (x @ b,), 16 // rows, (None, row), (row,), b, a)
        return y

    assert "while" in jax.jit(blocks).lower(a, b).as_text()
    assert training.count_flops(blocks, a, b) == 2 * 16 * 32 * 8


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("TPU v4", 275),
        ("TPU v4 lite", None),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("cpu", None),
    ],
)
def test_peaks(monkeypatch, kind, tflops):
    @dataclasses.dataclass
    class Device:
        device_kind: str

    monkeypatch.setattr(jax, "devices", lambda: [Device(kind)])
    expected = None if tflops is None else tflops * 1e12 * 8
    assert training.peak_flops(ParallelConfig()) == expected
    assert training.peak_flops(ParallelConfig(peak_tflops=0.5)) == 0.5e12 * 8


def test_memory_of_the_fullest_device(monkeypatch):
    assert training.peak_memory() == {}  # CPUs do not tell

    @dataclasses.dataclass
    class Device:
        peak: int

        def memory_stats(self):
            return {"peak_bytes_in_use": self.peak}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(10**9), Device(3 * 10**9)])
    assert training.peak_memory() == {"peak_memory_gb": 3.0}


# ---------------------------------------------------------------------------------------- profile
def traces(directory):
    return list(pathlib.Path(directory).rglob("*.xplane.pb"))


def test_a_profile_of_the_steps_asked_for(tmp_path):
    profile = training.Profile(ProfileConfig(start=2, steps=2), tmp_path)
    state = jnp.zeros(())
    for step in range(1, 6):
        profile.before(step, state)
        state = state + 1
        assert bool(traces(tmp_path)) == (step >= 4)
    profile.close()
    assert len(traces(tmp_path)) == 1


def test_a_run_that_ends_within_its_profile_still_writes_it(tmp_path):
    profile = training.Profile(ProfileConfig(start=1, steps=9), tmp_path)
    profile.before(5, jnp.zeros(()))  # continued within
    profile.close()
    profile.close()
    assert len(traces(tmp_path)) == 1


def test_no_profile(tmp_path):
    profile = training.Profile(ProfileConfig(), tmp_path)
    profile.before(10, jnp.zeros(()))
    profile.close()
    assert list(tmp_path.iterdir()) == []
