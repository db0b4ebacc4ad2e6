"""What `train.py` and `resfu evaluate` do with a batch of an evaluation."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, UInt8

from resfu_jax.data import DatasetInfo, EvalBatches
from resfu_jax.inference import Inference
from resfu_jax.training.config import Config
from resfu_jax.training.devices import local_rows
from resfu_jax.training.metrics import SegmentationCounts, count
from resfu_jax.visualize import save_png, side_by_side


def evaluate_batch(
    model: nnx.Module,
    infer: Inference,
    batch: dict[str, jax.Array],
    info: DatasetInfo,
    *,
    dilation_ratio: float = 0.02,
) -> tuple[SegmentationCounts, UInt8[Array, "b h w"]]:
    """Counts and predicted classes of a batch of `resfu_jax.data.eval_batches`; works inside `jit`.

    Args:
      model: set to evaluation.
      infer: how images become logits.
      batch: `image`, `label` and `size`; with `features` of the backbone they are used instead
        of computed, for which `infer` has to be plain.
      info: the classes of the labels.
      dilation_ratio: width of the boundary, see `count`.
    """
    if "features" in batch:
        logits = model(batch["image"], batch["features"])
    else:
        logits = infer(model, batch["image"], sizes=batch["size"])
    predictions = jnp.argmax(logits, axis=-1).astype(jnp.uint8)
    counts = count(
        predictions,
        batch["label"],
        num_classes=info.num_classes,
        ignore_label=info.ignore_label,
        dilation_ratio=dilation_ratio,
        sizes=batch["size"],
    )
    return counts, predictions


def evaluation_steps(config: Config, batches: EvalBatches) -> float:
    """How many training steps an evaluation takes, roughly: by its pixels, without backward pass.

    Args:
      config: of the run.
      batches: of the whole validation split.
    """
    protocol = config.eval
    pixels = sum(height * width for _, (height, width) in batches.slots)
    views = sum(scale**2 for scale in protocol.scales) * (1 + protocol.flip)
    if protocol.mode == "slide" and protocol.crop and protocol.stride:
        views *= math.prod(protocol.crop) / math.prod(protocol.stride)  # how windows overlap
    of_a_step = config.batch_size * math.prod(config.data.crop_size)
    return pixels * views / of_a_step / 3


class Pictures:
    """Pictures of the first images of an evaluation, beside their labels and predictions.

    Args:
      directory: where they are saved.
      step: which evaluation it is.
      count: how many.
      info: has the colours of the classes.
    """

    def __init__(self, directory: pathlib.Path, step: int, count: int, info: DatasetInfo):
        self._directory, self._step, self._count, self._info = directory, step, count, info
        self._drawn = 0

    def draw(self, batch: dict[str, np.ndarray], predictions: jax.Array) -> None:
        """As many of a batch as are still missing; rows that fill it up are no images."""
        rows = min(self._count - self._drawn, np.count_nonzero(batch["size"][:, 0]))
        for i, classes in enumerate(local_rows(predictions)[:rows] if rows else []):
            height, width = batch["size"][i]
            picture = side_by_side(
                batch["image"][i, :height, :width],
                batch["label"][i, :height, :width],
                classes[:height, :width],
                self._info.palette,
                ignore_label=self._info.ignore_label,
            )
            save_png(self._directory / f"step{self._step:07d}_{self._drawn}.png", picture)
            self._drawn += 1
