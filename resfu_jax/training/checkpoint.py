"""Checkpoints of a run: the newest and the best by mIoU, each complete enough to resume from.

A checkpoint holds the whole training state (a pytree of arrays) and the position of the data
iterator; neither depends on the number of devices and processes, so a run may continue on others.
Orbax writes it beside the older ones and renames it when it is complete, so a process that is
killed at any moment leaves a checkpoint to continue from.
"""

import errno
import os
import shutil
from collections.abc import Mapping
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

Path = str | os.PathLike[str]


# No reasons to warn: checkpoints between evaluations without metrics; being told to read only.
_HARMLESS = ("tracked_metric", "directory is read only")
logging.get_absl_logger().addFilter(lambda r: not any(text in str(r.msg) for text in _HARMLESS))


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or does not fit the model. The message says why."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: where they are; made if missing.
        keep: number of newest checkpoints kept, beside the best.
        read_only: change nothing in the directory, which has to exist: a run may be writing there.
    """

    def __init__(self, directory: Path, *, keep: int = 1, read_only: bool = False):
        self.directory = epath.Path(directory).resolve()  # Orbax fails late on relative paths.
        self._keep = keep
        policies = ocp.checkpoint_managers
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                # All processes are at the same position: the main one's is enough for any number.
                "data": ocp.JsonCheckpointHandler("iterator.json"),
            },
            options=ocp.CheckpointManagerOptions(
                create=not read_only,
                cleanup_tmp_directories=not read_only,
                save_interval_steps=0 if read_only else 1,
                read_only=read_only,
                best_fn=lambda metrics: metrics["miou"],
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(keep),
                        policies.BestN(
                            get_metric_fn=lambda metrics: metrics["miou"],
                            n=1,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
            ),
        )

    def find(self, which: str) -> int | None:
        """Step of a checkpoint: `which` is "latest", "best" or a number.

        "best" falls back to the latest where none has been evaluated.

        Raises:
            CheckpointError: no checkpoint has that number.
        """
        if which == "latest":
            return self._manager.latest_step()
        if which == "best":
            best = self._manager.best_step()
            return self._manager.latest_step() if best is None else best
        steps = sorted(self._manager.all_steps())
        if not which.isdigit() or int(which) not in steps:
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
        data: grain.DatasetIterator,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts to save in the background; an existing checkpoint of the same step stays.

        Args:
            step: number of steps done.
            state: pytree of arrays. It may be donated as soon as this returns.
            data: iterator whose position belongs to the state.
            metrics: those of an evaluation of this state, with `miou`.

        Raises:
            CheckpointError: this checkpoint, or the one before it, could not be written.
        """
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data.get_state())
        )
        metrics = None if metrics is None else {"miou": float(metrics["miou"])}
        try:
            self._manager.save(step, args=items, metrics=metrics)
        except Exception as error:
            raise self._explained(error) from error

    def restore(self, step: int, state: Any, data: grain.DatasetIterator | None = None) -> Any:
        """Reads a checkpoint.

        Args:
            step: one that `find` returned.
            state: the wanted structure, shapes, types and shardings (`jax.ShapeDtypeStruct`s).
            data: iterator that is moved to the saved position; None reads the state only.

        Raises:
            CheckpointError: the saved state has other entries or shapes; naming all of them.
        """
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
            CheckpointError: the saved weights have other entries or shapes; naming all of them.
        """
        saved = self._manager.item_metadata(step)["state"]
        params = "ema" if "ema" in saved else "params"
        wanted = {params: weights["params"], "rest": weights["rest"]}
        self._compare(step, {name: saved.get(name, {}) for name in wanted}, wanted)
        with ocp.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore(
                self.directory / str(step) / "state",
                args=ocp.args.PyTreeRestore(
                    item=wanted,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                    partial_restore=True,
                ),
            )
        return {"params": restored[params], "rest": restored["rest"]}

    def close(self) -> None:
        """Waits until everything is on disk.

        Raises:
            CheckpointError: the last checkpoint could not be written.
        """
        try:
            self._manager.close()
        except Exception as error:
            raise self._explained(error) from error

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

    def _explained(self, error: Exception) -> Exception:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        reason = "no room on disk" if full else f"{type(error).__name__}: {error}"
        return CheckpointError(
            f"could not write a checkpoint to {self.directory}: {reason}. The checkpoints before "
            f"it are intact (latest complete step: {self._manager.latest_step()})"
        )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Path -> shape of all arrays; paths are spelled the same for saved and live trees."""
    shapes = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        keys = (getattr(k, "key", getattr(k, "name", getattr(k, "idx", None))) for k in path)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)  # Keys are saved as plain integers.
        shapes["/".join(map(str, keys))] = tuple(leaf.shape)
    return shapes
