"""Test-wide settings: strict numerics, eight fake CPU devices, and where the golden tensors are."""

import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import numpy as np
import pytest
from absl import flags
from jax._src import compiler
from jax.experimental.compilation_cache import compilation_cache

from scripts.quick import AS_IN_USE, compile_quickly

compile_quickly()

# The processes that tests start share the programs that they compile (`pytest_configure`). Those of
# pytest itself do not: JAX does not know the memory of a program that comes from a file, and cannot
# read one that was compiled for a TPU. Commands that a test calls leave a folder "" as it is.
jax.config.update("jax_compilation_cache_dir", "")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # for tests that set a folder

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# A function without annotations has nothing to be checked, and for one inside another a checker
# would be written and compiled each time the function around it runs.
check_types = jaxtyping.jaxtyped


def check_annotated_types(*, typechecker):
    check = check_types(typechecker=typechecker)

    def check_if_annotated(f):
        inner = "<locals>" in f.__qualname__
        return check(f) if isinstance(f, type) or (f.__annotations__ and not inner) else f

    return check_if_annotated


jaxtyping.jaxtyped = check_annotated_types

# grain's multiprocess prefetch reads absl flags, which nobody parses under pytest.
flags.FLAGS.mark_as_parsed()


def pytest_configure(config):
    """A new folder for the programs of all processes that this session's tests start."""
    if not hasattr(config, "workerinput"):  # xdist's workers inherit it
        config.programs = tempfile.mkdtemp(prefix="programs")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = config.programs
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def pytest_unconfigure(config):
    """They are of this session only."""
    if hasattr(config, "programs"):
        shutil.rmtree(config.programs, ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def programs_of_this_module_only():
    """Frees a module's compiled programs.

    JAX keeps all, each has mappings of memory, and with 65530 of them (Linux's `vm.max_map_count`)
    a process gets no more and crashes.
    """
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def compiled_as_marked(request, monkeypatch):
    """Under `@pytest.mark.optimized`, all that a test compiles is compiled as users compile it."""
    if request.node.get_closest_marker("optimized") is None:
        yield
        return
    make = compiler.get_compile_options

    def make_optimized(*args, env_options_overrides=None, **options):
        options["env_options_overrides"] = AS_IN_USE | (env_options_overrides or {})
        return make(*args, **options)

    monkeypatch.setattr(compiler, "get_compile_options", make_optimized)
    jax.clear_caches()  # of programs that others compiled
    yield
    jax.clear_caches()


@pytest.fixture
def programs_are_kept():
    """For tests that make the same functions anew, as if they were in several processes."""
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    compilation_cache.reset_cache()  # else JAX keeps to the folder that it had first
    yield
    jax.config.update("jax_compilation_cache_dir", "")
    compilation_cache.reset_cache()


@pytest.fixture(params=[False, True], ids=["float32", "x64"])
def x64(request):
    """Runs a test with the types of use, then with 64 bits."""
    with jax.enable_x64(request.param):
        yield request.param


@pytest.fixture
def train_here(data_dir, programs_are_kept):
    """Runs train.py's loop in this process, on the module's `data_dir`; returns metrics.jsonl."""
    import train
    from resfu_jax import training

    stop = training.StopSignals()

    def run(workdir, config, mode="train"):
        config.data.dir = str(data_dir)
        stop.at_once, stop.received = True, 0
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            train.run(config, workdir, mode, "best" if mode == "eval" else "latest", stop)
        return training.read_metrics(workdir / "metrics.jsonl")

    yield run
    stop.close()


@pytest.fixture
def as_users_call():
    """Switches off jaxtyping's shape checks, which users do not have, to see our own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def same_draws_in_any_order(request, monkeypatch):
    """A test draws from its module's RNG what it draws alone, whichever ran before it."""
    if hasattr(request.module, "RNG"):
        monkeypatch.setattr(request.module, "RNG", np.random.default_rng(0))
