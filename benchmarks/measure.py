"""Times the forms of one upsampler on one workload, in turn, in one process.

Forms: `ours`, what a user gets; `literal`, the same operator as its formulas stand
(`implementation="reference"`); `torch` and `torch.compile`, the official module; `torch.plain`, it
with the plain stand-in for its CUDA operator instead of the fastest. All share weights and inputs,
and what they return is compared before anything is timed.

A turn is up to eight calls, timed but for the first (`ms_first`): when the other framework's
threads go to sleep, a call of some milliseconds finds both of its own on one core.

Forward gives y; forward+backward gives y and the gradients to the parameters, the features and the
guide. Temporary memory is what a call needs beyond its arguments and these results: for XLA its
own exact plan, for PyTorch the peak of the tensors allocated. In bfloat16 the inputs and the
computation are; our parameters stay float32, PyTorch's follow.
"""

import contextlib
import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.call import Call
from benchmarks.workloads import (
    Skip,
    Workload,
    create,
    fit,
    function,
    has_literal_form,
    input_shapes,
    is_guided,
)
from resfu_jax.training.flops import count_flops

DTYPES = ("float32", "bfloat16")
DIRECTIONS = ("forward", "forward+backward")
FORMS = ("ours", "literal", "torch", "torch.compile", "torch.plain")

# Between turns: the thread pools of both frameworks keep cores busy for a moment after a call.
_PAUSE = 0.02
# A turn: calls at most, and seconds after which none starts. At least two are made.
_CALLS, _TURN = 8, 1.0
# Relative to the norm of the array, in float32. GPUs multiply in TensorFloat-32.
_TOLERANCE = {"cpu": 1e-3, "gpu": 1e-2}


def compare(
    name: str,
    workload_name: str,
    workload: Workload,
    *,
    dtype: str = "float32",
    direction: str = "forward",
    forms: tuple[str, ...] = ("ours", "literal"),
    peer_root: str | None = None,
    runs: int = 7,
    seconds: float = 30.0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One row for each form; a form that cannot be measured has its reason under `skipped`.

    Args:
      name: of the upsampler.
      workload_name: for the rows.
      workload: sizes.
      dtype: one of `DTYPES`.
      direction: one of `DIRECTIONS`.
      forms: some of `FORMS`, `ours` first.
      peer_root: directory of the official repositories, as owner/repository.
      runs: turns of each form.
      seconds: no further round of turns starts after that long.
      seed: of the inputs.
    """
    head = dict(upsampler=name, workload=workload_name, dtype=dtype, direction=direction)
    try:
        workload, note = fit(name, workload)
    except Skip as skip:
        return [head | dict(form="ours", skipped=str(skip))]
    head |= dataclasses.asdict(workload) | dict(guided=is_guided(name), note=note)
    rows = {form: head | dict(form=form) for form in forms}
    inputs, cotangent = _arrays(name, workload, dtype, direction, seed)

    peer, params, no_peer = None, None, ""
    if any(form.startswith("torch") for form in forms):
        # By default its threads wait for each other in busy loops, which next to other work on
        # the machine makes PyTorch many times slower.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        from benchmarks import peers_torch

        try:
            with foreign_code():
                peer = peers_torch.build(name, workload, peer_root)
            params = peer.parameters()
        except Skip as skip:
            no_peer = str(skip)

    def ready(form: str) -> tuple[Call, list[np.ndarray]]:
        """The form and what it computes."""
        if form.startswith("torch"):
            if peer is None:
                raise Skip(no_peer)
            with foreign_code():
                module = peer
                if form == "torch.plain":
                    module = peers_torch.build(name, workload, peer_root, plain=True)
                call = module.call(inputs, cotangent, dtype, compiled=form == "torch.compile")
                return call, call.arrays(call.run())
        if form == "literal" and not has_literal_form(name):
            raise Skip("it has only one form")
        options = dict(implementation="reference") if form == "literal" else {}
        up = create(name, workload, dtype=jnp.dtype(dtype), **options)
        call = _jax_call(up, params, inputs, cotangent)
        return call, call.arrays(call.run())

    calls, expected = {}, None
    for form in forms:
        row = rows[form]
        try:
            call, arrays = ready(form)
            if expected is not None:
                row["error"] = error = max(map(difference, arrays, expected))
                if dtype == "float32" and not error <= _TOLERANCE.get(jax.default_backend(), 1e-2):
                    row["wrong"] = True  # the command fails
                    raise Skip(f"differs from ours by {error:.1e}")
        except Skip as skip:
            row["skipped"] = str(skip)
            continue
        expected = arrays if form == "ours" else expected
        calls[form] = call
    del expected
    gc.collect()

    turns = time_in_turn({form: call.run for form, call in calls.items()}, runs, seconds)
    ours = rows.get("ours", {})
    for form, call in calls.items():
        row = rows[form]
        first = [turn[0] for turn in turns[form]]
        warm = [ms for turn in turns[form] for ms in turn[1:]]
        row.update(ms=statistics.median(warm), ms_min=min(warm), ms_first=statistics.median(first))
        row.update(runs=len(warm), compile_s=call.compile_s)
        row["temporary_mb"] = call.temporary / 1e6
        row["gflop"] = None if call.flops is None else call.flops / 1e9
        if form != "ours" and "ms" in ours:
            row["time_ratio"] = row["ms"] / ours["ms"]
            if ours["temporary_mb"]:
                row["memory_ratio"] = row["temporary_mb"] / ours["temporary_mb"]
    return list(rows.values())


def time_in_turn(
    calls: dict[str, Callable[[], Any]], runs: int, seconds: float
) -> dict[str, list[list[float]]]:
    """Milliseconds of every call of every turn; turns go A B A B.

    What else the machine does hits all alike.
    """
    turns: dict[str, list[list[float]]] = {form: [] for form in calls}
    end = time.perf_counter() + seconds
    for done in range(runs):
        if done and time.perf_counter() > end:
            break
        for form, run in calls.items():
            time.sleep(_PAUSE)
            turns[form].append(_turn(run))
    return turns


def _turn(run: Callable[[], Any]) -> list[float]:
    times: list[float] = []
    while len(times) < 2 or len(times) < _CALLS and sum(times) < 1e3 * _TURN:
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """||a - b|| / ||b||, row by row of the image, as the whole may be gigabytes."""
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
    above = below = 0.0
    for p, q in zip(a.swapaxes(0, 1), b.swapaxes(0, 1), strict=True):
        p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
        above, below = above + np.sum((p - q) ** 2), below + np.sum(q**2)
    return float(np.sqrt(above / below)) if below else float(above > 0)


def _arrays(
    name: str, w: Workload, dtype: str, direction: str, seed: int
) -> tuple[list, jax.Array | None]:
    keys = jax.random.split(jax.random.key(seed), 3)
    inputs = [
        jax.random.normal(key, shape, jnp.float32).astype(dtype)
        for key, shape in zip(keys, input_shapes(name, w), strict=False)
    ]
    if direction == "forward":
        return inputs, None
    shape = (1, *w.output_size, w.channels)
    return inputs, jax.random.normal(keys[2], shape, jnp.float32).astype(dtype)


def _jax_call(up: nnx.Module, params: Any, inputs: list, cotangent: jax.Array | None) -> Call:
    """Our upsampler as one compiled function.

    Raises:
      Skip: it needs more memory than there is.
    """
    graphdef, own = nnx.split(up)
    params = own if params is None else params

    f = function(graphdef, "forward" if cotangent is None else "forward+backward")
    args = (params, *inputs) if cotangent is None else (params, cotangent, *inputs)
    flops = count_flops(f, *args)
    start = time.perf_counter()
    compiled = jax.jit(f).lower(*args).compile()
    compile_s = time.perf_counter() - start
    memory = compiled.memory_analysis()
    need, there = memory.temp_size_in_bytes + memory.output_size_in_bytes, _free_memory()
    if need > there:
        raise Skip(f"needs {need / 1e9:.1f} GB of memory, {there / 1e9:.1f} are free")

    def arrays(result) -> list[np.ndarray]:
        y, *gradients = [result] if cotangent is None else result
        return [np.asarray(a) for a in (y, *gradients[1:])]

    return Call(
        run=lambda: jax.block_until_ready(compiled(*args)),
        arrays=arrays,
        compile_s=compile_s,
        temporary=memory.temp_size_in_bytes,
        flops=flops,
    )


def _free_memory() -> float:
    """Bytes that a call can still have on the device."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return _proc("meminfo", "MemAvailable")


def _proc(file: str, field: str) -> float:
    """A size, in bytes, from Linux's /proc; infinite elsewhere."""
    try:
        with open(f"/proc/{file}") as lines:
            return next(1024 * float(s.split()[1]) for s in lines if s.startswith(f"{field}:"))
    except (OSError, StopIteration):
        return float("inf")


@contextlib.contextmanager
def foreign_code() -> Iterator[None]:
    """Turns what goes wrong in PyTorch into a `Skip`.

    Running out of memory, too, before the system kills the process: what PyTorch needs is not known
    beforehand, as it is of XLA.
    """
    limit = 0.95 * _proc("meminfo", "MemAvailable") + _proc("self/status", "VmData")
    with contextlib.ExitStack() as stack:
        if limit < float("inf"):
            import resource

            old = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (int(limit), old[1]))
            stack.callback(resource.setrlimit, resource.RLIMIT_DATA, old)
        try:
            yield
        except Skip:
            raise
        except Exception as error:
            text = (str(error).strip().splitlines() or [""])[0]
            raise Skip(f"{type(error).__name__}: {text[:200]}") from error
