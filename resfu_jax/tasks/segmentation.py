"""Semantic segmentation: images and label maps to a class for every pixel."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, UInt8

from resfu_jax.data import DatasetInfo
from resfu_jax.inference import Inference
from resfu_jax.model import create_model
from resfu_jax.tasks.task import Arrays, Batch, Task
from resfu_jax.training.config import Config, create_inference, model_arguments
from resfu_jax.training.devices import local_rows
from resfu_jax.training.losses import class_weights, cross_entropy, pixel_weights
from resfu_jax.training.metrics import SegmentationCounts, count
from resfu_jax.training.pretrained import initial_weights
from resfu_jax.training.reporting import print_table
from resfu_jax.visualize import side_by_side


class Segmentation(Task):
    """Cross-entropy of every pixel; mIoU and boundary IoU, and the best checkpoint by mIoU."""

    metric = "miou"
    summary = dict(miou="mIoU", boundary_iou="boundary IoU", pixel_accuracy="pixel accuracy")

    def __init__(self, config: Config):
        super().__init__(config)
        self._infer = create_inference(config)
        self.sees_whole_images = self._infer.plain
        self._class_weights: tuple[float, ...] | None = None

    def create_model(self, rngs: nnx.Rngs) -> Any:
        """A `SegmentationModel`."""
        return self._model(self.info.num_classes, rngs)

    def _model(self, num_classes: int, rngs: nnx.Rngs) -> Any:
        return create_model(
            **model_arguments(self.config.model), num_classes=num_classes, rngs=rngs
        )

    def initial_weights(self) -> tuple[Any, str]:
        """Of `init_from`, then of `model.backbone.pretrained`."""
        return initial_weights(self.config, self.info.num_classes, self._model)

    def open(self) -> None:
        """Opens the dataset, and counts the classes if their weights follow from it."""
        super().open()
        self._class_weights = class_weights(self.config.loss, self.train_source, self.info)

    @property
    def _pixels(self) -> dict[str, Any]:
        return dict(ignore_label=self.info.ignore_label, class_weights=self._class_weights)

    def weight(self, batch: Arrays) -> jax.Array:
        """Of all labelled pixels."""
        return pixel_weights(batch["label"], **self._pixels).sum()

    def loss(self, model: Any, batch: Arrays, weight: jax.Array) -> jax.Array:
        """Cross-entropy."""
        return cross_entropy(
            model(batch["image"], batch.get("features")),
            batch["label"],
            label_smoothing=self.config.loss.label_smoothing,
            normalizer=weight,
            **self._pixels,
        )

    def evaluate(self, model: Any, batch: Arrays) -> tuple[SegmentationCounts, jax.Array]:
        """Counts and predicted classes."""
        ratio = self.config.eval.dilation_ratio
        return evaluate_batch(model, self._infer, batch, self.info, dilation_ratio=ratio)

    def no_counts(self) -> SegmentationCounts:
        """Of no pixels."""
        return SegmentationCounts.zeros(self.info.num_classes)

    def metrics(self, counts: SegmentationCounts) -> dict[str, float]:
        """Over the whole split, and of every class."""
        return counts.compute(self.info.class_names)

    def draw_pictures(self, batch: Batch, drawn: Any, most: int) -> list[np.ndarray]:
        """Image, labels and predictions side by side; rows that fill up a batch are no images."""
        rows = min(most, np.count_nonzero(batch["size"][:, 0]))
        pictures = []
        for i, classes in enumerate(local_rows(drawn)[:rows] if rows else []):
            height, width = batch["size"][i]
            pictures.append(
                side_by_side(
                    batch["image"][i, :height, :width],
                    batch["label"][i, :height, :width],
                    classes[:height, :width],
                    self.info.palette,
                    ignore_label=self.info.ignore_label,
                )
            )
        return pictures

    def score(self, metrics: Mapping[str, float]) -> float:
        """MIoU."""
        return metrics["miou"]

    def print_table(
        self, title: str, metrics: Mapping[str, float], facts: Mapping[str, str]
    ) -> None:
        """IoU per class."""
        print_table(title, metrics, self.info.class_names, facts)


def evaluate_batch(
    model: nnx.Module,
    infer: Inference,
    batch: Arrays,
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
