"""What a person sees of a run: progress, `metrics.jsonl`, TensorBoard events, the final table."""

import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tensorboardX
import tqdm
from absl import logging
from rich.console import Console
from rich.table import Table
from rich.text import Text

from resfu_jax._files import write_whole
from resfu_jax.training.checkpoint import Checkpoints

Path = str | os.PathLike[str]


class Reporter:
    """Writes the metrics of a run to `metrics.jsonl`, to TensorBoard, and to stderr.

    On a terminal there is a progress bar with loss, images per second and remaining time;
    elsewhere (a log file) each report is one line.

    What a process or machine that stopped has left in `metrics.jsonl` beside whole lines (a cut
    line, NUL bytes) moves to `metrics.jsonl.damaged`.

    Args:
      workdir: directory of the run.
      steps: total number of steps.
      batch_size: images per step, for the images per second.
      start: step that the run continues from. Later lines of `metrics.jsonl` are of steps that
        will be done again, so they are removed.
      utilisation: share of the devices' peak that one step per second would be; with it the
        metrics have `mfu`, the model flop/s over the peak flop/s.
      silent: report nothing, as all processes of a run but one do.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        steps: int,
        batch_size: int,
        start: int = 0,
        utilisation: float | None = None,
        silent: bool = False,
    ):
        self._silent = silent
        if silent:
            return
        self._utilisation = utilisation
        self._path = pathlib.Path(workdir) / "metrics.jsonl"
        lines, damaged = _lines(self._path)
        if damaged:
            aside = self._path.with_name("metrics.jsonl.damaged")
            with aside.open("ab") as file:
                file.writelines(line + b"\n" for line in damaged)
        write_whole(self._path, "".join(text + "\n" for text, x in lines if x["step"] <= start))
        self._file = self._path.open("a", encoding="utf-8")
        self._events = tensorboardX.SummaryWriter(str(workdir), purge_step=start + 1)
        self._steps, self._batch_size = steps, batch_size
        self._step, self._time = start, time.perf_counter()
        self._start = (start, time.perf_counter())
        self._bar = tqdm.tqdm(
            total=steps,
            initial=start,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            smoothing=0.1,
        )
        if damaged:
            self.message(f"metrics.jsonl had {len(damaged)} damaged lines; they are in {aside}")

    def message(self, text: str) -> None:
        """A line for the person, above the bar if there is one."""
        if self._silent:
            return
        self._bar.write(text, file=sys.stderr)

    def advance(self, step: int) -> None:
        """Moves the bar; metrics come with `train`."""
        if self._silent:
            return
        self._bar.update(step - self._bar.n)

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Reports training metrics, with `loss`, of the steps since the last report."""
        if self._silent:
            return
        now = time.perf_counter()
        seconds = max(now - self._time, 1e-9)
        rate = (step - self._step) * self._batch_size / seconds
        speed = {"images_per_second": rate, "seconds": seconds}
        shown = f"{rate:.1f} images/s"
        if self._utilisation is not None:
            speed["mfu"] = (step - self._step) / seconds * self._utilisation
            shown += f"  MFU {speed['mfu']:.1%}"
        self._step, self._time = step, now
        self._write(step, dict(metrics) | speed)
        self._bar.set_postfix_str(f"loss {metrics['loss']:.4f}, {shown}")
        if self._bar.disable:
            first, since = self._start
            left = (now - since) / max(step - first, 1) * (self._steps - step)
            self.message(
                f"step {step}/{self._steps}  loss {metrics['loss']:.4f}  "
                f"{shown}  {_duration(left)} left"
            )

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Reports validation metrics under `val/`."""
        if self._silent:
            return
        self._write(step, {f"val/{name}": value for name, value in metrics.items()})
        self.message(
            f"step {step}/{self._steps}  validation: mIoU {metrics['miou']:.4f}  "
            f"boundary IoU {metrics['boundary_iou']:.4f}  "
            f"pixel accuracy {metrics['pixel_accuracy']:.4f}"
        )
        self._time = time.perf_counter()  # Evaluation does not count in the images per second.

    def close(self) -> None:
        """Ends the bar and closes the files."""
        if self._silent:
            return
        self._bar.close()
        self._file.close()
        self._events.close()

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step} | dict(metrics)) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)


class NonFiniteError(RuntimeError):
    """The loss or its gradient is NaN or infinite. The message names the step and the images."""


class MetricsWindow:
    """The metrics of the steps since the last report, left on the device until they are asked for.

    Args:
      checkpoints: named where a metric is not finite: there it goes on from.
    """

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints
        self._steps: list[tuple[int, np.ndarray, Any]] = []

    def add(self, step: int, ids: np.ndarray, metrics: Any) -> None:
        """Keeps the metrics of a step, and the ids of its images."""
        self._steps.append((step, ids, metrics))

    def means(self) -> dict[str, float]:
        """Means over the window, the newest learning rate; this waits for the device.

        Raises:
          NonFiniteError: the loss or its gradient is not finite at one of the steps.
        """
        steps, ids, metrics = zip(*self._steps, strict=True)
        metrics = jax.device_get(metrics)
        self._steps.clear()
        for i, values in enumerate(metrics):
            for name in ("loss", "gradient_norm"):
                if not np.isfinite(values[name]):
                    raise NonFiniteError(
                        f"{name} is {values[name]} at step {steps[i]}, in the batch of images "
                        f"{', '.join(image_id.decode() for image_id in ids[i])}. The newest good "
                        f"checkpoint is {self._checkpoints.find('latest')}, in "
                        f"{self._checkpoints.directory}"
                    )
        means = {name: float(np.mean([m[name] for m in metrics])) for name in metrics[0]}
        return means | {"learning_rate": float(metrics[-1]["learning_rate"])}


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Lines of a `metrics.jsonl`; those that are not whole are left out, and a warning says so."""
    lines, damaged = _lines(pathlib.Path(path))
    if damaged:
        logging.warning("%s: %d damaged lines are left out", path, len(damaged))
    return [line for _, line in lines]


def _lines(path: pathlib.Path) -> tuple[list[tuple[str, dict[str, float]]], list[bytes]]:
    """Whole lines, as text and read, and what else is in the file but white space and NUL bytes."""
    lines, damaged = [], []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        whole = line.strip(b"\0 \t\r")  # NUL: room that a machine gave the file before it stopped
        try:
            text = whole.decode()
            values = json.loads(text)
            if type(values["step"]) is not int:
                raise TypeError
            lines.append((text, values))
        except (ValueError, TypeError, KeyError, RecursionError):
            if line.strip():
                damaged.append(line)
    return lines, damaged


def print_table(
    title: str, metrics: Mapping[str, float], class_names: Sequence[str], facts: Mapping[str, str]
) -> None:
    """Prints IoU per class, their means, and facts about the run."""
    # As `Text`: brackets in the names of classes and folders are no markup.
    table = Table(title=Text(title), title_justify="left")
    table.add_column("class")
    table.add_column("IoU", justify="right")
    table.add_column("boundary IoU", justify="right")
    for name in class_names:
        cells = (metrics.get(f"{kind}/{name}") for kind in ("iou", "boundary_iou"))
        table.add_row(Text(name), *("-" if cell is None else f"{cell:.4f}" for cell in cells))
    table.add_section()
    table.add_row("mean", f"{metrics['miou']:.4f}", f"{metrics['boundary_iou']:.4f}")
    table.add_row("pixel accuracy", f"{metrics['pixel_accuracy']:.4f}", "")
    console = Console()
    console.print(table)
    for name, value in facts.items():
        console.print(f"{name}: {value}", highlight=False, markup=False, emoji=False)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
