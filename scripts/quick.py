"""Settings for processes that trace and compile much and compute little: tests and dry runs."""

import gc
import os

import jax
from jax._src.interpreters.partial_eval import DynamicJaxprTracer

# XLA's emitters that go through MLIR, where they can be switched off.
_HAS_SWITCH = jax.__version_info__ < (0, 11)

# What `compile_quickly` switches off, as users have it.
AS_IN_USE = {"xla_backend_optimization_level": 3}
if _HAS_SWITCH:
    AS_IN_USE["xla_cpu_use_fusion_emitters"] = True


def compile_quickly() -> None:
    """Makes this process, and those that it starts, compile in a fraction of the time.

    To be called before anything is computed.
    """
    flags = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    if _HAS_SWITCH:
        flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"

    # Each operation notes where in the source it was made, with all callers: a tenth of the time
    # from tracing to machine code.
    os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
    jax.config.update("jax_traceback_in_locations_limit", 0)

    # Flax's random streams ask traced arrays for their sharding. JAX answers with an error, and to
    # say where the array came from it walks the whole program so far, each time: most of the time
    # that tracing the initialisers of a large network takes.
    DynamicJaxprTracer._origin_msg = lambda self: ""

    # Tracing makes and drops many objects while JAX's caches hold many more, through which Python's
    # collector would go again and again.
    gc.set_threshold(100_000, 20, 100)
