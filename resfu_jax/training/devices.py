"""Devices and processes of a run: start-up, layout of the state, agreement, profile, utilisation.

All devices form one mesh with one axis, "data": every device has its part of each batch. The
training state is whole on every device, or (`config.parallel.shard_parameters`) each device keeps
its part of the large arrays, and a step gathers them (ZeRO, Rajbhandari et al. 2020; FSDP, Zhao et
al. 2023). XLA inserts the communication.
"""

import functools
import json
import os
import pathlib
import re
import signal
import tempfile
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from resfu_jax._files import local_path
from resfu_jax.training.config import (
    Config,
    ConfigError,
    ParallelConfig,
    ProfileConfig,
    flatten,
    to_dict,
)


# -------------------------------------------------------------------------------------- processes
def initialize_distributed(
    *,
    detect: bool = False,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the processes of a run; without arguments, there is one. Before any other use of JAX.

    Args:
      detect: ask the TPU pod, Slurm or Open MPI, as `jax.distributed.initialize()` does.
      coordinator_address: by hand: host:port of process 0, as all processes reach it.
      num_processes: by hand: how many there are.
      process_id: by hand: which one this is, from 0.

    Raises:
      ConfigError: some but not all of the three are given, or they make no sense, or there is
        nothing to ask.
    """
    by_hand = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [flag for flag, value in by_hand.items() if value is None]
    if not detect and len(missing) == 3:
        return
    if detect and len(missing) < 3:
        raise ConfigError(
            f"--distributed finds out what {', '.join(by_hand)} say by hand: give the one or the "
            "others"
        )
    if not detect:
        if coordinator_address is None or num_processes is None or process_id is None:
            raise ConfigError(f"{' and '.join(missing)} missing: the three flags go together")
        if not re.fullmatch(r".+:\d+", coordinator_address):
            raise ConfigError(
                f"--coordinator_address is {coordinator_address!r}; it has to be host:port of "
                "process 0, for instance 10.0.0.1:1234"
            )
        if not 0 <= process_id < num_processes:
            raise ConfigError(
                f"--process_id is {process_id}; with --num_processes={num_processes} it has to be "
                f"in 0 .. {num_processes - 1}"
            )
    # Its handler would swallow the signals that `StopSignals` waits for.
    jax.config.update("jax_enable_preemption_service", False)
    # It waits for the others, minutes if need be, where Python's own handlers are not called.
    handlers = {n: signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            # How long a process that fails alone waits for the others, which wait for it.
            shutdown_timeout_seconds=60,
        )
    except ValueError as error:
        raise ConfigError(
            f"--distributed found neither a TPU pod nor Slurm nor Open MPI ({error}); say it by "
            f"hand with {', '.join(by_hand)}"
        ) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def one_after_another(function: Callable[[], Any]) -> None:
    """Calls the function in every process, in turn: they may share a disk."""
    for index in range(jax.process_count()):
        if index == jax.process_index():
            function()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"turn {index}")


def check_together(workdir: pathlib.Path, config: Config) -> None:
    """Makes the directory; checks that all processes have the same config and directory.

    Raises:
      ConfigError: a directory is not one of this machine, or cannot be made or written to; or, in
        all processes: one has another config, but for the place of the dataset, or does not
        see what process 0 writes.
    """
    try:
        if config.data.dir is not None:
            local_path(config.data.dir, "config.data.dir")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise ConfigError(f"--workdir={workdir} cannot be used: {error.strerror}") from error
    if jax.process_count() == 1:
        return
    fields = {name: value for name, value in flatten(to_dict(config)).items() if name != "data.dir"}
    path, mine = workdir / ".together", zlib.crc32(json.dumps(fields).encode())
    mark = multihost_utils.broadcast_one_to_all(
        np.array([mine, int.from_bytes(os.urandom(4))], np.uint32)
    )
    if is_main_process():
        path.write_text(str(mark[1]))
    multihost_utils.sync_global_devices("written")
    seen = path.exists() and path.read_text() == str(mark[1])
    same, sees = multihost_utils.process_allgather(np.bool_([mine == mark[0], seen])).T
    if is_main_process():
        path.unlink()
    if not same.all():
        raise ConfigError(
            "all processes have to be given the same config; another one than process 0 have: "
            f"{', '.join(map(str, np.flatnonzero(~same)))}"
        )
    if not sees.all():
        raise ConfigError(
            f"--workdir={workdir} has to be on a file system that all hosts share, for the "
            "checkpoints; what process 0 writes there is not seen by: "
            f"{', '.join(map(str, np.flatnonzero(~sees)))}"
        )


def agreed_stop(received: int, *, ask: bool) -> int:
    """The signal that any process has received, or 0; the same in all processes.

    Args:
      received: the signal that this process has received, or 0.
      ask: whether this is a step at which the processes ask each other, which waits for the
        slowest. At other steps the answer of several processes is 0.
    """
    if jax.process_count() == 1:
        return received
    return int(multihost_utils.process_allgather(np.int32(received)).max()) if ask else 0


# ----------------------------------------------------------------------------------------- layout
class Layout:
    """Which device has what.

    Args:
      config: whether, and from which size on, arrays are sharded.
      devices: those of the mesh; None means all.

    Attributes:
      mesh: all devices, along the axis "data".
      replicated: the sharding of arrays that are whole on every device.
      over_batch: the sharding of arrays with the batch axis first.
    """

    def __init__(self, config: ParallelConfig, devices: list[jax.Device] | None = None):
        count = len(devices or jax.devices())
        # With Explicit axes, which are the default, some gathers do not differentiate.
        self.mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.over_batch = NamedSharding(self.mesh, PartitionSpec("data"))
        self._shard_from = config.shard_at_least if config.shard_parameters else None

    def sharding(self, array: Any) -> NamedSharding:
        """Of an array of the state (or its `jax.ShapeDtypeStruct`), by its shape alone.

        A large enough array is cut along the longest axis that the number of devices divides, so
        that parameters and their moments and averages lie alike.
        """
        axes = [i for i, side in enumerate(array.shape) if side and side % self.mesh.size == 0]
        if self._shard_from is None or array.size < self._shard_from or not axes:
            return self.replicated
        longest = max(axes, key=lambda i: array.shape[i])
        return NamedSharding(self.mesh, PartitionSpec(*[None] * longest, "data"))

    def of(self, state: Any) -> Any:
        """The sharding of every array of a pytree."""
        return jax.tree.map(self.sharding, state)

    def abstract(self, state: Any) -> Any:
        """Shapes, types and shardings of every array of a pytree."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.sharding(x)), state
        )

    def gather(self, params: Any) -> Any:
        """Inside jit: whole parameters for a forward pass; their gradients come back in parts.

        Without it XLA may cut the features along their channels rather than along the batch.
        """

        @jax.custom_vjp
        def whole(x: jax.Array) -> jax.Array:
            return jax.lax.with_sharding_constraint(x, self.replicated)

        def backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
            return (jax.lax.with_sharding_constraint(gradient, self.sharding(gradient)),)

        whole.defvjp(lambda x: (whole(x), None), backward)
        return params if self._shard_from is None else jax.tree.map(whole, params)

    def to_devices(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of all processes from this process's rows; the ids of images stay behind."""
        arrays = {key: value for key, value in batch.items() if key != "id"}
        place = functools.partial(jax.make_array_from_process_local_data, self.over_batch)
        return jax.tree.map(place, arrays)


def local_rows(array: jax.Array) -> np.ndarray:
    """The rows of this process, of an array that is sharded over the batch."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


# ------------------------------------------------------------------------------------ utilisation
# Dense bfloat16 peak of one device in Tflop/s, by the start of its name; the first match counts.
_PEAK_TFLOPS = {
    "TPU v4 lite": None,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,  # v5p calls itself both
    "TPU v6": 918.0,
    "NVIDIA A100": 312.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H100": 989.0,
    "NVIDIA H200": 989.0,
}


def peak_flops(config: ParallelConfig) -> float | None:
    """Peak rate of all devices in flop/s; None where it is neither known nor configured."""
    tflops = config.peak_tflops
    if tflops is None:
        kind = jax.devices()[0].device_kind
        tflops = next((peak for name, peak in _PEAK_TFLOPS.items() if kind.startswith(name)), None)
    return None if tflops is None else tflops * 1e12 * jax.device_count()


def peak_memory() -> dict[str, float]:
    """Most memory that a device of this process has used so far, where devices tell it."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return {"peak_memory_gb": max(peaks) / 1e9} if peaks else {}


class Profile:
    """Traces a few steps of the main process, for XProf, TensorBoard or Perfetto.

    Args:
      config: which steps.
      directory: where the trace goes.
    """

    def __init__(self, config: ProfileConfig, directory: str | os.PathLike[str]):
        wanted = config.steps > 0 and is_main_process()
        self._steps = range(config.start, config.start + config.steps) if wanted else range(0)
        self._directory = directory
        self._running = False

    def before(self, step: int, state: Any) -> None:
        """Starts or ends the trace where it has to; called before each step.

        Args:
          step: the step that comes next.
          state: what the step before it computes; waited for, so that a trace has whole steps.
        """
        if self._running != (step in self._steps):
            jax.block_until_ready(state)
            if self._running:
                self.close()
            else:
                jax.profiler.start_trace(self._directory)
                self._running = True

    def close(self) -> None:
        """Ends the trace, if one is running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            logging.info("trace written to %s", self._directory)
