"""Checkpoints of a run: the newest and the best by mIoU, each complete enough to resume from.

A checkpoint holds the whole training state (a pytree of arrays) and the position of the data
iterator; neither depends on the number of devices and processes, so a run may continue on others.
Orbax writes it beside the older ones and renames it when it is complete, so a process that is
killed at any moment leaves a checkpoint to continue from.

Before it is renamed, the SHA-256 of its files go into its `SHA256SUMS` (`sha256sum --check` reads
it, too), and whoever reads a checkpoint compares them first: a disk, a copy that was cut off, or a
flipped bit may have damaged it since. A run that continues puts damaged checkpoints aside, into
`damaged/`, and takes the newest intact one.
"""

import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from resfu_jax._files import local_path, write_whole
from resfu_jax.training.devices import is_main_process

Path = str | os.PathLike[str]

SUMS = "SHA256SUMS"
_SCORE = "score"  # its name in a file
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that is being written

# No reason to warn: being told to read only.
logging.get_absl_logger().addFilter(lambda r: "directory is read only" not in str(r.msg))


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, does not fit the model, or cannot be written; it says which."""


@runtime_checkable
class Positioned(Protocol):
    """An iterator whose position can be kept, as that of `resfu_jax.data.train_batches`."""

    def get_state(self) -> Any:
        """The position, for JSON."""

    def set_state(self, state: Any) -> None:
        """Goes there."""

    def start_prefetch(self) -> None:
        """Begins to read."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: where they are; made if missing.
      keep: number of newest checkpoints kept, beside the best.
      read_only: change nothing in the directory: a run may be writing there. Otherwise
        checkpoints that are damaged and newer than the newest intact one go into `damaged/`.

    Raises:
      CheckpointError: all checkpoints are damaged, or the directory cannot be used.
    """

    def __init__(self, directory: Path, *, keep: int = 1, read_only: bool = False):
        self.directory = local_path(directory, "directory").resolve()
        self._keep = keep
        self._intact: set[int] = set()  # their sums were compared
        self._saving: int | None = None
        if not read_only:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(f"{self.directory} cannot be used: {error}") from error
            self._together(self._mend)
        scores = {step: self._read_score(step) for step in _steps(self.directory)}
        self._scores = {k: v for k, v in scores.items() if v is not None and math.isfinite(v)}
        self._alias = _without_patterns(self.directory)
        self._remove_alias = lambda: None
        if self._alias != self.directory:
            folder = self._alias.parent
            self._remove_alias = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._manager = ocp.CheckpointManager(
            self._alias,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                # All processes are at the same position: the main one's is enough for any number.
                "data": ocp.JsonCheckpointHandler("iterator.json"),
            },
            options=ocp.CheckpointManagerOptions(
                create=not read_only,
                save_interval_steps=0 if read_only else 1,
                read_only=read_only,
                preservation_policy=_Preserved(self._kept),
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_sums),
            ),
        )

    def find(self, which: str) -> int | None:
        """Step of a checkpoint: `which` is "latest", "best" by mIoU, or a number.

        "best" falls back to the latest where none has been evaluated.

        Raises:
          CheckpointError: no checkpoint has that number.
        """
        steps = sorted(self._manager.all_steps())
        if which == "latest" or which == "best" and not self._scores:
            return steps[-1] if steps else None
        if which == "best":
            return self._best(steps)
        if not (which.isascii() and which.isdigit()) or int(which) not in steps:
            raise CheckpointError(
                f"no checkpoint {which!r} in {self.directory}; there are: best, latest, "
                f"{', '.join(map(str, steps)) or '(none yet)'}"
            )
        return int(which)

    def check_space(self, state: Any) -> None:
        """Checks that the disk holds all checkpoints of a run, before the run starts.

        Raises:
          CheckpointError: naming the space that is needed and the space there is.
        """
        one = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        # The newest, the best, and the one being written, less those that are there already.
        need = (self._keep + 2 - len(self._manager.all_steps())) * one
        free = shutil.disk_usage(self.directory).free
        if free < need:
            raise CheckpointError(
                f"no room on disk for checkpoints of {one / 1e6:.1f} MB each: "
                f"{need / 1e6:.1f} MB are needed in {self.directory}, {free / 1e6:.1f} are free; "
                "free some space or choose another --workdir"
            )

    def save(
        self,
        step: int,
        state: Any,
        data: Positioned,
        score: float | None = None,
    ) -> None:
        """Starts to save in the background; an existing checkpoint of the same step stays.

        Args:
          step: number of steps done.
          state: pytree of arrays. It may be donated as soon as this returns.
          data: iterator whose position belongs to the state.
          score: for `score`, where it is known already.

        Raises:
          CheckpointError: this checkpoint, or the one before it, could not be written.
        """
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data.get_state())
        )
        with self._writing():
            self._manager.wait_until_finished()
            self._saving = step
            self._manager.save(step, args=items)
        if score is not None:
            self.score(step, score)

    def score(self, step: int, score: float) -> None:
        """Records the evaluation of a checkpoint, which decides whether it is the best.

        Checkpoints that are then neither the best nor among the newest are removed.

        Args:
          step: of the checkpoint.
          score: how good it is; the largest is best.

        Raises:
          CheckpointError: it could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()
            if math.isfinite(score):
                self._scores[step] = float(score)
                if is_main_process():
                    path = self._score_file(step)
                    path.parent.mkdir(exist_ok=True)
                    write_whole(path, json.dumps({_SCORE: self._scores[step]}))
            steps = self._manager.all_steps()
            for old in sorted(set(steps) - self._kept(steps)):
                self._manager.delete(old)

    def restore(self, step: int, state: Any, data: Positioned | None = None) -> Any:
        """Reads a checkpoint.

        Args:
          step: one that `find` returned.
          state: the wanted structure, shapes, types and shardings (`jax.ShapeDtypeStruct`s).
          data: iterator that is moved to the saved position; None reads the state only.

        Raises:
          CheckpointError: it is damaged, naming the file and the newest intact checkpoint; or
            the saved state has other entries or shapes, naming all of them.
        """
        with self._reading(step):
            self._compare(step, self._manager.item_metadata(step)["state"], state)
            items = {"state": ocp.args.StandardRestore(state)}
            if data is not None:
                items["data"] = ocp.args.JsonRestore()
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
            if data is not None:
                data.set_state(restored["data"])
                data.start_prefetch()
            return restored["state"]

    def restore_weights(self, step: int, weights: dict[str, Any]) -> dict[str, Any]:
        """Reads what a model needs to run, without the optimizer's moments and averages.

        Args:
          step: one that `find` returned.
          weights: the wanted `params` and `rest`, as for `restore`.

        Returns:
          Both; `params` are the averaged parameters if the run kept them, as in evaluation.

        Raises:
          CheckpointError: as `restore`.
        """
        with self._reading(step):
            saved = self._manager.item_metadata(step)["state"]
            params = "ema" if "ema" in saved else "params"
            wanted = {params: weights["params"], "rest": weights["rest"]}
            self._compare(step, {name: saved.get(name, {}) for name in wanted}, wanted)
            restored = self._restore_part(
                step, wanted, ocp.checkpoint_utils.construct_restore_args(wanted)
            )
            return {"params": restored[params], "rest": restored["rest"]}

    def read_weights(self, step: int) -> dict[str, np.ndarray]:
        """Weights and statistics of whatever model it is, by name: `"backbone.norm.scale"`.

        They are averaged if the run kept averages, as in `restore_weights`.

        Args:
          step: one that `find` returned.

        Raises:
          CheckpointError: it is damaged, as `restore`.
        """
        with self._reading(step):
            saved = self._manager.item_metadata(step)["state"]
            params = "ema" if "ema" in saved else "params"
            wanted = {name: saved[name] for name in (params, "rest") if name in saved}
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            restored = self._restore_part(step, wanted, as_numpy)
        arrays = {}
        for path, leaf in jax.tree_util.tree_flatten_with_path(restored)[0]:
            if jax.numpy.issubdtype(leaf.dtype, np.floating):  # the others are of random numbers
                arrays[".".join(_keys(path)[1:])] = leaf
        return arrays

    def _restore_part(self, step: int, wanted: Any, restore_args: Any) -> Any:
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore(
                self._alias / str(step) / "state",
                args=ocp.args.PyTreeRestore(
                    item=wanted, restore_args=restore_args, partial_restore=True
                ),
            )

    def close(self) -> None:
        """Waits until everything is on disk.

        Raises:
          CheckpointError: the last checkpoint could not be written.
        """
        try:
            with self._writing():
                self._manager.close()
        finally:
            self._remove_alias()

    # ------------------------------------------------------------------------------ what is kept
    def _kept(self, steps: Sequence[int]) -> set[int]:
        """The newest and the best of them."""
        newest = sorted(steps)[-self._keep :]
        return {step for step in (*newest, self._best(steps)) if step is not None}

    def _best(self, steps: Sequence[int]) -> int | None:
        """Of equally good ones the last."""
        scored = [step for step in steps if step in self._scores]
        return max(scored, key=lambda step: (self._scores[step], step), default=None)

    def _score_file(self, step: int) -> pathlib.Path:
        """Where Orbax would write metrics, if they were known when it saves."""
        return self.directory / str(step) / "metrics" / "metrics"

    def _read_score(self, step: int) -> float | None:
        """Of a checkpoint that was evaluated."""
        path = self._score_file(step)
        try:
            scores = json.loads(path.read_bytes())
            return float(scores[_SCORE if _SCORE in scores else "miou"])  # older versions
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{path} is damaged; without the folder {path.parent}, the checkpoint counts as "
                "one that has not been evaluated"
            ) from error

    # ---------------------------------------------------------------------------------- checksums
    def _write_sums(self) -> None:
        """Orbax calls it in its thread, just before the checkpoint gets its final name."""
        (folder,) = (
            path
            for path in self.directory.iterdir()
            if path.name.split(_UNFINISHED)[0] == str(self._saving)
        )
        paths = sorted(
            path for item in ("data", "state") for path in (folder / item).rglob("*")
            if path.is_file()
        )  # fmt: skip
        lines = [f"{_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths]
        write_whole(folder / SUMS, "".join(lines))

    def _damage(self, step: int) -> str:
        """The first file of a checkpoint that is not what was written; "" if all are.

        Checkpoints of older versions have no sums: of them, only what is missing is seen.
        """
        folder = self.directory / str(step)
        try:
            if not (folder / SUMS).exists():
                for name in ("state/_METADATA", "data/iterator.json"):
                    json.loads((folder / name).read_bytes())
                return ""
            lines = (folder / SUMS).read_text().splitlines()
            for line in lines:
                digest, name = line.split("  ", 1)
                if _sha256(folder / name) != digest:
                    return f"{folder / name} is not as it was written"
            return "" if lines else f"{folder / SUMS} is empty"
        except FileNotFoundError as error:
            return f"{error.filename} is missing"
        except (OSError, ValueError) as error:
            return f"a file in {folder} cannot be read: {error}"

    def _is_intact(self, step: int) -> bool:
        if step not in self._intact and not self._damage(step):
            self._intact.add(step)
        return step in self._intact

    def _mend(self) -> str:
        """Puts aside what is newer than the newest intact checkpoint; a message if none is intact.

        What a killed run has not finished writing is removed, and a score that cannot be read.
        """
        # Orbax's own removal is a thread that goes on, and fails, while a stopped process ends.
        for path in self.directory.glob(f"*{_UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)
        damaged = {}
        for step in sorted(_steps(self.directory), reverse=True):
            if self._is_intact(step):
                break
            damaged[step] = self._damage(step)
        else:
            if damaged:
                reasons = "\n".join(f"  {step}: {damage}" for step, damage in damaged.items())
                return (
                    f"all checkpoints in {self.directory} are damaged:\n{reasons}\n"
                    "restore them from a copy, or choose another --workdir"
                )
        aside = self.directory / "damaged"
        for old, damage in damaged.items():
            aside.mkdir(exist_ok=True)
            again = len(list(aside.glob(f"{old}*")))
            there = aside / (f"{old}_{again}" if again else str(old))
            (self.directory / str(old)).rename(there)
            logging.warning("checkpoint %d is damaged: %s", old, damage)
            logging.warning("it is now in %s; the newest intact checkpoint is %d", there, step)
        for step in _steps(self.directory):
            try:
                self._read_score(step)
            except CheckpointError as error:
                logging.warning("%s", error)
                shutil.rmtree(self._score_file(step).parent)
        return ""

    def _together(self, check: Callable[[], str]) -> None:
        """Raises what the main process finds, in all processes."""
        message = check() if is_main_process() else ""
        failed = bool(message)
        if jax.process_count() > 1:
            failed = bool(multihost_utils.broadcast_one_to_all(np.int32(failed)))
        if failed:
            raise CheckpointError(message or f"a checkpoint in {self.directory} is damaged")

    # ------------------------------------------------------------------------------------- errors
    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        def check() -> str:
            if self._is_intact(step):
                return ""
            return f"checkpoint {step} is damaged: {self._damage(step)}{self._instead_of(step)}"

        self._together(check)
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:400]
            reason = reason.replace(str(self._alias), str(self.directory))
            raise CheckpointError(
                f"checkpoint {step} in {self.directory} cannot be read ({reason})"
                f"{self._instead_of(step)}"
            ) from error

    def _instead_of(self, step: int) -> str:
        others = sorted(set(_steps(self.directory)) - {step}, reverse=True)
        other = next((s for s in others if self._is_intact(s)), None)
        if other is None:
            return ". There is no other intact checkpoint"
        return (
            f". The newest other one that is intact is {other}: evaluate it with --checkpoint "
            f"{other} (resfu: --which {other}); to continue from it, move "
            f"{self.directory / str(step)} away"
        )

    def _compare(self, step: int, saved: Any, wanted: Any) -> None:
        saved, wanted = _shapes(saved), _shapes(wanted)
        lines = [
            f"  {path}: saved {saved.get(path, 'nothing')}, the model has "
            f"{wanted.get(path, 'nothing')}"
            for path in sorted(saved.keys() | wanted.keys())
            if saved.get(path) != wanted.get(path)
        ]
        if lines:
            shown = lines[:20] + ([f"  and {len(lines) - 20} more"] if len(lines) > 20 else [])
            raise CheckpointError(
                f"checkpoint {step} in {self.directory} is of another architecture:\n"
                + "\n".join(shown)
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            reason = "no room on disk" if full else f"{type(error).__name__}: {error}"
            raise CheckpointError(
                f"could not write a checkpoint to {self.directory}: {reason}. The checkpoints "
                f"before it are intact (latest complete step: {self._manager.latest_step()})"
            ) from error


class _Preserved(ocp.checkpoint_managers.PreservationPolicy):
    """Asks a function for the steps that are kept."""

    def __init__(self, kept: Callable[[Sequence[int]], set[int]]):
        self._kept = kept

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kept = self._kept([info.step for info in checkpoints])
        return [info.step in kept for info in checkpoints]


def _without_patterns(directory: pathlib.Path) -> pathlib.Path:
    """The directory under a name without `[`, `*` and `?`.

    Orbax finds its own files by a pattern that begins with the directory, and those are part of
    the pattern then: it finds nothing, and what it has written cannot be read.
    """
    if glob.escape(str(directory)) == str(directory):
        return directory
    alias = pathlib.Path(tempfile.mkdtemp(prefix="resfu_checkpoints_")) / "link"
    alias.symlink_to(directory, target_is_directory=True)
    return alias


def _steps(directory: pathlib.Path) -> list[int]:
    """Those that there are checkpoints of, damaged or not."""
    paths = directory.iterdir() if directory.is_dir() else ()
    return [int(p.name) for p in paths if re.fullmatch("0|[1-9][0-9]*", p.name) and p.is_dir()]


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Path -> shape of all arrays; paths are spelled the same for saved and live trees."""
    shapes = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)  # Keys are saved as plain integers.
        shapes["/".join(_keys(path))] = tuple(leaf.shape)
    return shapes


def _keys(path: tuple) -> list[str]:
    """Steps of a path into a pytree, as text."""
    return [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", None)))) for k in path]
