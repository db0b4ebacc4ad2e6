"""Results in large pages are those in small ones, wherever the program runs."""

import functools
import math
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from resfu_jax.ops import _large_pages, _row_blocks
from resfu_jax.upsamplers import create_upsampler

NAMES = ["resfu", "sapa", "fade", "carafe", "dysample", "lda_aqu"]
TARGET = "resfu_jax_large_pages"


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(_row_blocks, "BLOCK_VALUES", dict(cpu=500))


@pytest.fixture
def every_size(monkeypatch):
    """No result is too small."""
    monkeypatch.setattr(_large_pages, "LARGE", 1)
    if not _large_pages._available():
        pytest.skip("this system gives no large pages")


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def example(name, batch=1):
    module = create_upsampler(
        name, features=16, guide_features=16, scale=4, rngs=nnx.Rngs(params=0)
    )
    # Weights that are not nearly zero, as some are at first.
    module = nnx.clone(module)
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [
        a + 0.1 * jax.random.normal(k, a.shape, a.dtype) for a, k in zip(leaves, keys, strict=True)
    ]
    module = nnx.merge(graph, jax.tree.unflatten(tree, leaves), rest)
    shapes = [(batch, 6, 5, 16)] + [(batch, 24, 20, 16)] * (module.guide != "none")
    keys = jax.random.split(jax.random.key(2), 2)
    return module, [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=False)]


def fresh(module):
    """A function that JAX has not traced."""
    return lambda *arrays: module(*arrays)


def compiled(f, *arrays):
    return jax.jit(f).lower(*arrays).compile()


def values_and_gradients(module, arrays):
    @jax.jit
    def run(*arrays):
        y, vjp = jax.vjp(fresh(module), *arrays)
        return y, vjp(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    return run(*arrays)


def check_alike(got, expected, **tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **{"rtol": 1e-5, "atol": 1e-5, **tolerance})


@pytest.mark.parametrize("name", NAMES)
def test_same_values_and_gradients(name, monkeypatch, request):
    module, arrays = example(name)
    expected = values_and_gradients(module, arrays)
    request.getfixturevalue("every_size")
    check_alike(values_and_gradients(module, arrays), expected)


@pytest.mark.parametrize("name", NAMES)
def test_same_in_a_batch_of_calls(name, request, float64):
    """In float64: of float32, programs for one call and for several round points differently."""
    module, arrays = example(name, batch=3)
    graph, rest = nnx.split(module)
    wide = jax.tree.map(lambda a: a.astype(jnp.float64), (rest, arrays))
    module, arrays = nnx.merge(graph, wide[0]), wide[1]
    one_by_one = [np.asarray(module(*[a[i : i + 1] for a in arrays])) for i in range(3)]
    request.getfixturevalue("every_size")
    got = jax.jit(jax.vmap(fresh(module)))(*[a[:, None] for a in arrays])
    check_alike(got, np.stack(one_by_one))


@pytest.mark.parametrize("name", ["carafe", "sapa", "dysample"])
def test_same_in_bfloat16(name, request):
    module, arrays = example(name)
    arrays = [a.astype(jnp.bfloat16) for a in arrays]
    expected = jax.jit(fresh(module))(*arrays)
    request.getfixturevalue("every_size")
    program = compiled(fresh(module), *arrays)
    assert TARGET in program.as_text()
    got = program(*arrays)
    assert got.dtype == jnp.bfloat16
    check_alike(got.astype(jnp.float32), expected.astype(jnp.float32), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["carafe", "dysample"])
def test_asks_for_the_pages_of_the_result(name, every_size, monkeypatch):
    asked = []
    monkeypatch.setattr(_large_pages, "_madvise", lambda *call: asked.append(call))
    module, _ = example(name)
    x = jax.random.normal(jax.random.key(0), (1, 24, 16, 16))
    run = compiled(fresh(module), x)
    assert TARGET in run.as_text()
    y = run(x).block_until_ready()
    start, length, advice = max(asked, key=lambda call: call[1])
    first, size = y.unsafe_buffer_pointer(), y.nbytes
    assert first <= start < first + _large_pages.mmap.PAGESIZE
    assert first + size - 2 * _large_pages.mmap.PAGESIZE < start + length <= first + size
    assert advice == _large_pages.mmap.MADV_HUGEPAGE


def test_only_large_results_are_asked_for():
    module, arrays = example("dysample")
    assert TARGET not in compiled(fresh(module), *arrays).as_text()
    assert math.prod((1, 448, 448, 384)) * 4 > _large_pages.LARGE


@pytest.mark.parametrize("name", ["carafe", "dysample"])
def test_sharded_programs_do_without(name, every_size):
    module, arrays = example(name, batch=8)
    mesh = jax.make_mesh((8,), ("b",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("b"))
    expected = module(*arrays)
    there = [jax.device_put(a, rows) for a in arrays]
    run = compiled(fresh(module), *there)
    assert TARGET not in run.as_text()
    check_alike(run(*there), expected)


@pytest.mark.parametrize("name", ["carafe", "dysample"])
def test_exported_programs_do_without(name, every_size):
    module, arrays = example(name)
    exported = jax.export.export(jax.jit(fresh(module)))(*arrays)
    assert TARGET not in exported.mlir_module()
    again = jax.export.deserialize(exported.serialize())
    check_alike(again.call(*arrays), module(*arrays))


@pytest.mark.parametrize("name", NAMES)
def test_everything_is_written(name, monkeypatch):
    module, arrays = example(name)
    expected = values_and_gradients(module, arrays)

    def of_nan(shape, dtype, done=None):
        return jnp.full(shape, jnp.nan, dtype)

    for user in ("_row_blocks", "deformable_sample"):
        monkeypatch.setattr(sys.modules[f"resfu_jax.ops.{user}"], "empty", of_nan)
    check_alike(values_and_gradients(module, arrays), expected)
    check_alike(jax.jit(fresh(module))(*arrays), expected[0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
def test_empty_arrays_hold_what_is_put_there(dtype, every_size):
    with jax.enable_x64(dtype == jnp.float64):
        rows = jnp.arange(3, dtype=jnp.int32)

        @jax.jit
        def f(done):
            def body(i, out):
                return out.at[i].set(rows[i].astype(dtype))

            return jax.lax.fori_loop(0, 3, body, _large_pages.empty((3, 4), dtype, done))

        got = f(jnp.ones((1, 2)))
        assert got.dtype == dtype
        np.testing.assert_array_equal(got.astype(jnp.float32), np.arange(3)[:, None] * np.ones(4))


def test_symbolic_sizes_are_not_large(every_size):
    (n,) = jax.export.symbolic_shape("n")
    assert not _large_pages._is_large((n, 4), jnp.float32)


SCRIPT = """
    import threading
    import jax
    from flax import nnx
    from resfu_jax import create_upsampler
    from resfu_jax.ops import _large_pages

    _large_pages.LARGE = 1
    up = create_upsampler("dysample", features=64, scale=8, rngs=nnx.Rngs(params=0))
    x = jax.numpy.ones((1, 32, 32, 64))
    run = jax.jit(lambda x: up(x)).lower(x).compile()
    print("resfu_jax_large_pages" in run.as_text())
    call = lambda: [run(x) for _ in range(30)] and None
    {call}
"""


def script(call, **environment):
    # Without the tests' eight devices.
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT).format(call=call)]
    environment = {**os.environ, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "call", ["call()", "thread = threading.Thread(target=call); thread.start(); thread.join()"]
)
def test_the_interpreter_ends_with_calls_under_way(call, every_size):
    done = script(call)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"]


def test_can_be_switched_off():
    done = script("call()", RESFU_LARGE_PAGES="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False"]


def test_systems_without_them_get_zeros(monkeypatch):
    available = functools.cache(_large_pages._available.__wrapped__)
    monkeypatch.setattr(_large_pages, "LARGE", 1)
    monkeypatch.setattr(_large_pages, "_available", available)

    class Never:
        def read_text(self):
            return "always madvise [never]"

    monkeypatch.setattr(_large_pages, "_SETTING", Never())
    np.testing.assert_array_equal(_large_pages.empty((2, 3), jnp.float32), np.zeros((2, 3)))
    assert not available()
