"""What Python adds to a call of a compiled upsampler, by the way it is called."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.workloads import Workload, create, input_shapes

_TINY = Workload(8, (2, 2), 2, 8)  # little to compute: a call is nearly all Python


def overhead(name: str, calls: int = 2000) -> dict[str, float]:
    """Microseconds of a call, in turn: the leaves alone are the floor.

    Args:
      name: of the upsampler.
      calls: of each way.
    """
    up = create(name, _TINY)
    graphdef, params = nnx.split(up)
    leaves, tree = jax.tree.flatten(params)
    inputs = [jnp.ones(shape) for shape in input_shapes(name, _TINY)]

    def flat(leaves, *inputs):
        return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))(*inputs)

    def state(params, *inputs):
        return nnx.merge(graphdef, params)(*inputs)

    def module(up, *inputs):
        return up(*inputs)

    ways: dict[str, tuple[Callable, Any]] = {
        "flat leaves through jax.jit": (jax.jit(flat), leaves),
        "state through jax.jit (split, merge)": (jax.jit(state), params),
        "module through jax.jit": (jax.jit(module), up),
        "nnx.jit": (nnx.jit(module), up),
    }
    bound = nnx.jit_partial(module, up, graph=False)
    times: dict[str, list[float]] = {}
    for turn in range(10):
        for way, (f, first) in {**ways, "nnx.jit_partial(graph=False)": (bound, None)}.items():
            args = inputs if first is None else (first, *inputs)
            jax.block_until_ready(f(*args))
            start = time.perf_counter()
            for _ in range(calls // 10):
                y = f(*args)
            jax.block_until_ready(y)
            if turn:
                times.setdefault(way, []).append(1e6 * (time.perf_counter() - start))
    return {way: statistics.median(t) / (calls // 10) for way, t in times.items()}
