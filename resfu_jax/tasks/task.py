"""What a task is: all that the loop of `train.py` knows of what it trains."""

import abc
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from resfu_jax import data
from resfu_jax.training.config import Config
from resfu_jax.training.input import (
    blank_batch,
    eval_batches,
    open_sources,
    prepare_embedded,
    train_batches,
)
from resfu_jax.visualize import save_png

Batch = dict[str, np.ndarray]
Arrays = dict[str, jax.Array]


class Task(abc.ABC):
    """What a run learns: its model, batches, loss, metrics and pictures, and what "best" means.

    The methods stand in the order in which a run calls them.

    Args:
      config: of the run; checked by `training.validate`.

    Attributes:
      config: likewise.
      info: what is known of the dataset.
      train_source: the examples for training, once `open` was called.
      val_source: likewise, for validation.
      metric: the metric whose best value is a run's best checkpoint, as it is in `metrics.jsonl`
        under `val/`.
      sees_whole_images: evaluation gives the backbone images as they are in its batches, so that
        cached features serve.
      blamed: fields of the config that are wrong where a step cannot be tried out.
      summary: metrics that a person sees after an evaluation, with their names in words.
    """

    metric: str
    summary: dict[str, str]
    blamed: str = "config.model"
    sees_whole_images: bool = False

    def __init__(self, config: Config):
        self.config = config
        self.info = data.dataset_info(config.data.name, config.data.dir)
        self.train_source: Any = None
        self.val_source: Any = None

    # --------------------------------------------------------------------------------------- model
    @abc.abstractmethod
    def create_model(self, rngs: nnx.Rngs) -> Any:
        """The model to train: images to an output, with a filter `trainable` of its parameters."""

    @abc.abstractmethod
    def initial_weights(self) -> tuple[Any, str]:
        """What a new run starts from, and what to say of it; see `training.initial_weights`."""

    # ---------------------------------------------------------------------------------------- data
    def prepare(self) -> None:
        """Builds an embedded dataset where it is missing."""
        prepare_embedded(self.config, self.info)

    def open(self) -> None:
        """Opens the dataset."""
        self.train_source, self.val_source = open_sources(self.config, self.info)

    def blank_batch(self) -> Batch:
        """What a batch for training is like, but for its content."""
        return blank_batch(self.config, self.info)

    def train_batches(self) -> Any:
        """Batches for training, the rows of this process; an iterator whose place can be saved."""
        return train_batches(self.config, self.train_source, self.info)

    def eval_batches(self) -> Any:
        """Batches for validation, the rows of this process, the same at every evaluation."""
        return eval_batches(self.config, self.val_source, self.info)

    def draw(self, batch: Batch, step: int) -> Batch:
        """A batch for training with what is drawn for it at this step, by this and the seed alone.

        All of it has the batch axis first, so that no result depends on how a batch is spread.
        """
        del step
        return batch

    def draw_for_evaluation(self, batch: Batch) -> Batch:
        """Likewise for a batch of an evaluation, always the same."""
        return batch

    # ---------------------------------------------------------------------------------------- loss
    @abc.abstractmethod
    def weight(self, batch: Arrays) -> jax.Array:
        """What the sum of the batch's losses is divided by. Works inside `jit`, as does `loss`."""

    @abc.abstractmethod
    def loss(self, model: Any, batch: Arrays, weight: jax.Array) -> jax.Array:
        """The loss of a part of a batch, which divides by the weight of the whole."""

    def try_out(self, model: Any, batch: Batch) -> Any:
        """What a step does, to see in shapes whether it works.

        Raises:
          ValueError: it does not.
        """
        arrays = jax.tree.map(jax.numpy.asarray, batch)
        return self.loss(model, arrays, self.weight(arrays))

    # ---------------------------------------------------------------------------------- evaluation
    @abc.abstractmethod
    def evaluate(self, model: Any, batch: Arrays) -> tuple[Any, Any]:
        """Counts of a batch, and what pictures are drawn from; works inside `jit`."""

    def complete(self, counts: Any, batch: Batch, drawn: Any) -> Any:
        """The counts of a batch, with what is counted on the host, from what pictures show."""
        del batch, drawn
        return counts

    @abc.abstractmethod
    def no_counts(self) -> Any:
        """Counts of no batch; has `merge(counts)`."""

    @abc.abstractmethod
    def metrics(self, counts: Any) -> dict[str, float]:
        """The metrics of an evaluation."""

    @abc.abstractmethod
    def draw_pictures(self, batch: Batch, drawn: Any, most: int) -> list[np.ndarray]:
        """At most so many pictures `(h, w, 3)` of a batch, beside what the model made of it."""

    @abc.abstractmethod
    def score(self, metrics: Mapping[str, float]) -> float:
        """How good a checkpoint with these metrics is; the largest is best."""

    @abc.abstractmethod
    def print_table(
        self, title: str, metrics: Mapping[str, float], facts: Mapping[str, str]
    ) -> None:
        """Prints the metrics of an evaluation, and facts about the run."""


class Pictures:
    """Pictures of the first images of an evaluation.

    Args:
      directory: where they are saved.
      step: which evaluation it is.
      count: how many.
      task: draws them.
    """

    def __init__(self, directory: pathlib.Path, step: int, count: int, task: Task):
        self._directory, self._step, self._count, self._task = directory, step, count, task
        self._drawn = 0

    def draw(self, batch: Batch, drawn: Any) -> None:
        """As many of a batch as are still missing."""
        if self._drawn == self._count:
            return
        for picture in self._task.draw_pictures(batch, drawn, self._count - self._drawn):
            save_png(self._directory / f"step{self._step:07d}_{self._drawn}.png", picture)
            self._drawn += 1
