"""What a person sees of a run: progress, `metrics.jsonl`, TensorBoard events, the final table."""

import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence

import tensorboardX
import tqdm
from rich.console import Console
from rich.table import Table

Path = str | os.PathLike[str]


class Reporter:
    """Writes the metrics of a run to `metrics.jsonl`, to TensorBoard, and to stderr.

    On a terminal there is a progress bar with loss, images per second and remaining time;
    elsewhere (a log file) each report is one line.

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
        kept = [line for line in read_metrics(self._path) if line["step"] <= start]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(self._path)  # In one move: a killed process loses no line.
        self._file = self._path.open("a")
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


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Lines of a `metrics.jsonl`; a last line that a killed process left unfinished is dropped."""
    path = pathlib.Path(path)
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def print_table(
    title: str, metrics: Mapping[str, float], class_names: Sequence[str], facts: Mapping[str, str]
) -> None:
    """Prints IoU per class, their means, and facts about the run."""
    table = Table(title=title, title_justify="left")
    table.add_column("class")
    table.add_column("IoU", justify="right")
    table.add_column("boundary IoU", justify="right")
    for name in class_names:
        cells = (metrics.get(f"{kind}/{name}") for kind in ("iou", "boundary_iou"))
        table.add_row(name, *("-" if cell is None else f"{cell:.4f}" for cell in cells))
    table.add_section()
    table.add_row("mean", f"{metrics['miou']:.4f}", f"{metrics['boundary_iou']:.4f}")
    table.add_row("pixel accuracy", f"{metrics['pixel_accuracy']:.4f}", "")
    console = Console()
    console.print(table)
    for name, value in facts.items():
        console.print(f"{name}: {value}", highlight=False)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
