"""Test-wide settings: strict numerics, eight fake CPU devices, and where the golden tensors are."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import numpy as np
import pytest
from absl import flags
from jax._src import compiler
from jax._src.interpreters.partial_eval import DynamicJaxprTracer

# The suite compiles much and computes little: without LLVM's optimisations, and without the
# emitters that go through MLIR where they can be switched off, it takes a fraction of the time.
# Processes that tests start inherit it.
quick = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):
    quick += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{quick} {os.environ.get('XLA_FLAGS', '')}"

# The defaults again, for tests that are marked `optimized`.
AS_IN_USE = {"xla_backend_optimization_level": 3}
if jax.__version_info__ < (0, 11):
    AS_IN_USE["xla_cpu_use_fusion_emitters"] = True

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# Flax's random streams ask traced arrays for their sharding. JAX answers with an error, and to say
# where the array came from it walks the whole program so far, each time: most of the time that
# tracing the initialisers of a large network takes.
DynamicJaxprTracer._origin_msg = lambda self: ""

# A function without annotations has nothing to be checked. Most are closures, for which a checker
# would be written and compiled each time the function around them runs.
check_types = jaxtyping.jaxtyped


def check_annotated_types(*, typechecker):
    check = check_types(typechecker=typechecker)
    return lambda f: check(f) if isinstance(f, type) or f.__annotations__ else f


jaxtyping.jaxtyped = check_annotated_types

# grain's multiprocess prefetch reads absl flags, which nobody parses under pytest.
flags.FLAGS.mark_as_parsed()


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
