"""Compiles for TPUs and GPUs on a machine that has neither, and counts what the programs do.

XLA's compilers for TPUs (the package `libtpu`) and NVIDIA GPUs (JAX's CUDA plugin) need no device,
only a description of one. Nothing runs: all figures are the compiler's plan, made at compile time.
They show what is badly shaped (padding, copies, loops, scatters), not how fast a device is.

    from benchmarks.targets import compile_for
    figures = compile_for("v5e", f, jax.ShapeDtypeStruct((1, 32, 32, 384), "bfloat16"))
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks import hlo
from benchmarks.workloads import Skip, Workload, abstract_call, fit, has_literal_form, is_guided

# Read by libtpu when it is loaded. What is set already is kept.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a lock file keeps a second process out
    "TPU_SKIP_MDS_QUERY": "1",  # no cloud to ask which TPU this is
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # of the host; the topology says what is compiled for
}

# stream_executor.GpuTargetConfigProto as text.
_H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 patch: 0 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """Something to compile for.

    Attributes:
      platform: as JAX calls it when it lowers, "tpu" or "cuda".
      packages: one of which has the compiler.
      install: the command that installs one.
      topology: arguments of JAX's `get_topology_desc`.
      hertz: the clock that turns a TPU compiler's cycles into seconds.
    """

    platform: str
    packages: tuple[str, ...]
    install: str
    topology: dict[str, str]
    hertz: float | None = None


def _tpu(topology: str, hertz: float) -> Target:
    topology_name = dict(topology_name=topology)
    return Target("tpu", ("libtpu",), "pip install -e '.[tpu]'", topology_name, hertz)


def _gpu(description: str) -> Target:
    packages = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    topology = dict(topology_name="", target_config=description, topology="1x1x1")
    return Target("cuda", packages, "pip install -e '.[cuda]'", topology)


TARGETS = {
    "v5e": _tpu("v5e:2x2", 1.5e9),
    "v6e": _tpu("v6e:2x2", 1.75e9),
    "h100": _gpu(_H100),
}


class Missing(Exception):
    """The target's compiler is not installed, or does not start; says what to do."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """The compiler's plan of one program; bytes where nothing else is said.

    Attributes:
      temporaries: memory beside arguments and results that the program will allocate.
      arguments: memory of the arguments.
      results: memory of the results.
      hbm: read from and written to main memory (`benchmarks.hlo`).
      xla: the compiler's own "bytes accessed", which includes a TPU's VMEM. None for a GPU.
      flops: operations, of a TPU's compiled program, or of a GPU's before it is optimised.
      estimate_ms: the TPU compiler's estimates of cycles, at the target's clock. It has none for
        kernels in Pallas and some other operations. None for a GPU.
      kernels: operations by kind, each once.
      loops: turns of each loop; 1 where the program does not tell.
      compile_s: seconds that compiling took.
      compiled: the program.
    """

    temporaries: int
    arguments: int
    results: int
    hbm: int
    xla: float | None
    flops: float
    estimate_ms: float | None
    kernels: dict[str, int]
    loops: tuple[int, ...]
    compile_s: float
    compiled: jax.stages.Compiled = dataclasses.field(repr=False)


def check_installed(name: str) -> None:
    """Finds the target's compiler, without loading it.

    Raises:
      Missing: it is not installed.
    """
    target = TARGETS[name]
    if not any(importlib.util.find_spec(package) for package in target.packages):
        packages = " or ".join(package.replace("_", "-") for package in target.packages)
        raise Missing(f"compiling for {name} needs {packages}: {target.install}")


@functools.cache
def device(name: str) -> Any:
    """A device that can be compiled for.

    From then on the process computes on its CPU, if it has not computed on anything yet: else JAX
    would look for the TPU or GPU whose library it now finds.

    Raises:
      Missing: the compiler is not installed or does not start.
    """
    check_installed(name)
    target = TARGETS[name]
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")
    logger = logging.getLogger("jax")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # the CUDA plugin says at length that it finds no driver
    try:
        topology = topologies.get_topology_desc(platform=target.platform, **target.topology)
    except Exception as error:
        versions = ", ".join(f"{k} {v}" for k, v in compiler_versions(name).items())
        reason = str(error).strip().splitlines()[0]
        raise Missing(
            f"the compiler for {name} ({versions}) does not start: {reason}; if JAX has computed "
            "something before, set JAX_PLATFORMS=cpu"
        ) from error
    finally:
        logger.setLevel(level)
    return topology.devices[0]


def compiler_versions(name: str) -> dict[str, str]:
    """Of JAX, which brings XLA, and the target's package."""
    versions = {}
    for package in ("jax", "jaxlib", *TARGETS[name].packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def compile_for(target: str, f: Callable[..., Any], *args: Any) -> Figures:
    """Compiles `f(*args)` for one device of a target.

    Args:
      target: one of `TARGETS`.
      f: a function of arrays, not yet jitted.
      args: pytrees of arrays or `jax.ShapeDtypeStruct`; only shapes and dtypes are read.

    Raises:
      Missing: the target's compiler is not installed or does not start.
    """
    sharding = jax.sharding.SingleDeviceSharding(device(target))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
    lowered = jax.jit(f, in_shardings=sharding, out_shardings=sharding).lower(*shapes)
    start = time.perf_counter()
    compiled = lowered.compile()
    compile_s = time.perf_counter() - start
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    if not cost:  # the compiler for GPUs tells nothing of its program
        plain = jax.jit(f).trace(*shapes).lower(lowering_platforms=(TARGETS[target].platform,))
        cost = {"flops": (plain.cost_analysis() or {}).get("flops")}
    counts = hlo.count(compiled.as_text())
    hertz = TARGETS[target].hertz
    return Figures(
        temporaries=memory.temp_size_in_bytes,
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes,
        hbm=counts.bytes,
        xla=cost.get("bytes accessed"),
        flops=cost.get("flops") or 0.0,  # left out where there are none
        estimate_ms=1e3 * counts.cycles / hertz if hertz else None,
        kernels=dict(counts.kernels.most_common()),
        loops=counts.loops,
        compile_s=compile_s,
        compiled=compiled,
    )


def gradient(f: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of the sum of f's squares to all arguments, to compile ad hoc."""

    def loss(args):
        leaves = jax.tree.leaves(f(*args))
        return sum(jnp.sum(jnp.square(y.astype(jnp.float32))) for y in leaves)

    return lambda *args: jax.grad(loss)(args)


def measure(
    target: str,
    name: str,
    workload_name: str,
    workload: Workload,
    *,
    dtype: str = "bfloat16",
    direction: str = "forward",
    form: str = "ours",
) -> dict[str, Any]:
    """One row of figures; what cannot be compiled has its reason under `skipped`.

    Args:
      target: one of `TARGETS`.
      name: of the upsampler.
      workload_name: for the row.
      workload: sizes.
      dtype: of inputs and computation; parameters are float32.
      direction: "forward", or "forward+backward" for y and the gradients to all arguments.
      form: "ours", what a user gets, or "literal", the one of `implementation="reference"`.
    """
    device(target)  # before the upsampler is made, for which JAX looks for its platforms
    row = head(target, name, workload_name, dtype, direction, form)
    try:
        workload, note = fit(name, workload)
        row |= dataclasses.asdict(workload) | dict(guided=is_guided(name), note=note)
        if form == "literal" and not has_literal_form(name):
            raise Skip("it has only one form")
        options = dict(implementation="reference") if form == "literal" else {}
        f, args = abstract_call(name, workload, direction, dtype, **options)
        figures = compile_for(target, f, *args)
    except (Skip, jax.errors.JaxRuntimeError) as error:  # such as more memory than there is
        return row | dict(skipped=str(error).strip().splitlines()[0][:200])
    h, w = workload.output_size
    return row | dict(
        output_mb=h * w * workload.channels * jnp.dtype(dtype).itemsize / 1e6,
        temporary_mb=figures.temporaries / 1e6,
        hbm_mb=figures.hbm / 1e6,
        xla_mb=None if figures.xla is None else figures.xla / 1e6,
        gflop=figures.flops / 1e9,
        estimate_ms=figures.estimate_ms,
        kernels=sum(figures.kernels.values()),
        loops=figures.loops,
        compile_s=figures.compile_s,
    )


def head(
    target: str, name: str, workload: str, dtype: str, direction: str, form: str
) -> dict[str, Any]:
    """What a row is about."""
    return dict(
        target=target,
        upsampler=name,
        workload=workload,
        dtype=dtype,
        direction=direction,
        form=form,
    )
