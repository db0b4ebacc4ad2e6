"""What a person sees of a run: progress, metrics in files and on servers, the final table."""

import contextlib
import json
import os
import pathlib
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
import tensorboardX
import tqdm
from absl import logging
from rich.console import Console
from rich.table import Table
from rich.text import Text

from resfu_jax._files import write_whole
from resfu_jax._output import counted
from resfu_jax.training.checkpoint import Checkpoints
from resfu_jax.training.config import Config, ConfigError, to_dict
from resfu_jax.training.timing import Stopwatch

Path = str | os.PathLike[str]


class Writer(Protocol):
    """A place where the metrics of a run go."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds metrics of a step."""

    def close(self) -> None:
        """Nothing comes any more."""


class JsonLines:
    """`metrics.jsonl`: one JSON object a line, with the step.

    Lines of steps that will be done again are removed. What a process or machine that stopped has
    left beside whole lines (a cut line, NUL bytes) moves to `metrics.jsonl.damaged`.

    Args:
      workdir: directory of the run.
      start: step that the run continues from.
      say: called with a text for the person.
    """

    def __init__(self, workdir: pathlib.Path, start: int, say: Callable[[str], None]):
        path = workdir / "metrics.jsonl"
        lines, damaged = _lines(path)
        if damaged:
            aside = path.with_name("metrics.jsonl.damaged")
            with aside.open("ab") as file:
                file.writelines(line + b"\n" for line in damaged)
            say(f"metrics.jsonl had {counted(len(damaged), 'damaged line')}, now in {aside}")
        write_whole(path, "".join(text + "\n" for text, x in lines if x["step"] <= start))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """A line, on disk when this returns."""
        self._file.write(json.dumps({"step": step} | dict(metrics)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard:
    """TensorBoard's events, which hide those of steps that will be done again.

    Args:
      workdir: directory of the run.
      start: step that the run continues from.
    """

    def __init__(self, workdir: pathlib.Path, start: int):
        self._events = tensorboardX.SummaryWriter(str(workdir), purge_step=start + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """A scalar for each."""
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        self._events.close()


class WeightsAndBiases:
    """A run of Weights & Biases; the same one when the run continues (`wandb_id` in the workdir).

    Args:
      workdir: directory of the run.
      config: what is shown as the run's config; `config.wandb` names the project.

    Raises:
      ConfigError: W&B refuses: no key, no connection.
    """

    def __init__(self, workdir: pathlib.Path, config: Config):
        import wandb  # `validate` has said what to install

        path = workdir / "wandb_id"
        if not path.exists():
            write_whole(path, uuid.uuid4().hex)
        try:
            self._run = wandb.init(
                project=config.wandb,
                name=workdir.name,
                dir=str(workdir),
                id=path.read_text(),
                resume="allow",
                config=to_dict(config),
            )
        except Exception as error:  # of W&B's own classes
            raise ConfigError(
                f"config.wandb is {config.wandb!r}, and Weights & Biases refuses: {error}. Log in "
                "with wandb login, or set WANDB_MODE=offline"
            ) from error
        # W&B's own count of steps never goes back, as a run that continues may.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends them."""
        self._run.log({"step": step} | dict(metrics))

    def close(self) -> None:
        """Waits until all is sent."""
        self._run.finish()


class Reporter:
    """Tells a person on stderr how a run goes, and sends its metrics to the writers.

    On a terminal there is a progress bar with loss, images per second and remaining time;
    elsewhere (a log file) each report is one line.

    Args:
      workdir: directory of the run.
      config: of the run.
      start: step that the run continues from.
      utilisation: share of the devices' peak that one step per second would be; with it the
        metrics have `mfu`, the model flop/s over the peak flop/s.
      evaluation_steps: of `Stopwatch`.
      silent: report nothing, as all processes of a run but one do.
    """

    def __init__(
        self,
        workdir: Path,
        config: Config,
        *,
        start: int = 0,
        utilisation: float | None = None,
        evaluation_steps: float = 0.0,
        silent: bool = False,
    ):
        self._config, self._start, self._silent = config, start, silent
        self._watch = Stopwatch(config, start=start, evaluation_steps=evaluation_steps)
        if silent:
            return
        self._utilisation = utilisation
        self._reported = (start, 0.0)  # step, and seconds of all steps until then
        self._shown = ""
        self._bar = tqdm.tqdm(
            total=config.steps,
            initial=start,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )
        workdir = pathlib.Path(workdir)
        self._writers: list[Writer] = []
        if config.wandb is not None:
            self._writers.append(WeightsAndBiases(workdir, config))
        self._writers.append(JsonLines(workdir, start, self.message))
        self._writers.append(TensorBoard(workdir, start))

    def message(self, text: str) -> None:
        """A line for the person, above the bar if there is one."""
        if self._silent:
            return
        self._bar.write(text, file=sys.stderr)

    def aside(self, what: str) -> contextlib.AbstractContextManager[None]:
        """What runs in it is a "checkpoint" or an "evaluation", and no part of the steps."""
        return self._watch.aside(what)

    def announced(self, what: str, function: Any) -> Callable[[Any, dict[str, Any]], Any]:
        """The jitted function of a state and a batch, which says when it is compiled."""
        programs: dict[Any, Any] = {}

        def call(state: Any, batch: dict[str, Any]) -> Any:
            shapes = tuple(x.shape for x in jax.tree.leaves(batch))
            if shapes not in programs:
                size = " x ".join(map(str, batch["image"].shape[:3]))
                self.message(f"compiling the {what} for {size} pixels ...")
                with self._watch.aside("compilation"):
                    programs[shapes] = function.lower(state, batch).compile()
                self.message(f"compiled the {what} in {self._watch.last('compilation'):.1f} s")
            return programs[shapes](state, batch)

        return call

    def advance(self, step: int, metrics: Any) -> None:
        """Moves the bar; what `metrics` are comes with `train`.

        It waits for the first step and the tenth, from which it is known what a step takes.
        """
        if self._silent:
            return
        done = step - self._start
        if done in (1, 10):
            jax.block_until_ready(metrics)
            self._watch.mark(step, first=done == 1)
            if done == 10 and self._bar.disable and step % self._config.log_every:
                self.message(f"step {step}/{self._config.steps}  {self._left(step)}")
        if not self._bar.disable:
            self._bar.set_postfix_str(
                ", ".join(filter(None, [self._left(step), self._shown])), refresh=False
            )
            self._bar.update(step - self._bar.n)

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Reports training metrics, with `loss`, of the steps since the last report."""
        if self._silent:
            return
        self._watch.mark(step)
        before, since = self._reported
        self._reported = step, self._watch.seconds
        seconds = max(self._reported[1] - since, 1e-9)
        rate = (step - before) * self._config.batch_size / seconds
        speed = {"images_per_second": rate, "seconds": seconds}
        self._shown = f"loss {metrics['loss']:.4f}  {rate:.1f} images/s"
        if self._utilisation is not None:
            speed["mfu"] = (step - before) / seconds * self._utilisation
            self._shown += f"  MFU {speed['mfu']:.1%}"
        self._write(step, dict(metrics) | speed)
        if self._bar.disable:
            self.message(f"step {step}/{self._config.steps}  {self._shown}  {self._left(step)}")

    def evaluation(
        self, step: int, metrics: Mapping[str, float], summary: Mapping[str, str]
    ) -> None:
        """Reports validation metrics under `val/`.

        Args:
          step: number of steps done.
          metrics: all of them.
          summary: those that are shown, with their names in words.
        """
        if self._silent:
            return
        self._write(step, {f"val/{name}": value for name, value in metrics.items()})
        shown = "  ".join(f"{words} {metrics[name]:.4f}" for name, words in summary.items())
        self.message(f"step {step}/{self._config.steps}  validation: {shown}")

    def close(self) -> None:
        """Ends the bar and closes the files."""
        if self._silent:
            return
        self._bar.close()
        for writer in self._writers:
            writer.close()

    def _left(self, step: int) -> str:
        return f"{_duration(self._watch.left(step))} left"

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, metrics)


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
        logging.warning("%s: left out %s", path, counted(len(damaged), "damaged line"))
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
    print_with_facts(table, facts)


def print_with_facts(table: Table, facts: Mapping[str, str]) -> None:
    """Prints a table, and a line for each fact."""
    console = Console()
    console.print(table)
    for name, value in facts.items():
        console.print(f"{name}: {value}", highlight=False, markup=False, emoji=False)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
