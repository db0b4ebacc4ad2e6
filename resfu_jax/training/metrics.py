"""Segmentation metrics from integer counts over a whole dataset.

Batches are counted on the device in int32; the sums over the dataset are int64 on the host, so
that the result is exact and depends neither on the batch size nor on the number of devices.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Integer

from resfu_jax._checks import check_positive, check_whole, need


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SegmentationCounts:
    """What mIoU, pixel accuracy and boundary IoU are computed from; counts of sets add up.

    Attributes:
      confusion: pixels of class i that were predicted as class j, `(K, K)`.
      boundary_intersection: pixels in both the true and the predicted boundary, per class.
      boundary_union: pixels in either boundary, per class.
    """

    confusion: Any
    boundary_intersection: Any
    boundary_union: Any

    @classmethod
    def zeros(cls, num_classes: int) -> "SegmentationCounts":
        """Counts of no images, in int64 on the host."""
        return cls(
            np.zeros((num_classes, num_classes), np.int64),
            np.zeros(num_classes, np.int64),
            np.zeros(num_classes, np.int64),
        )

    def merge(self, other: "SegmentationCounts") -> "SegmentationCounts":
        """Counts of both sets of images, in int64 on the host."""
        return jax.tree.map(lambda a, b: np.asarray(a, np.int64) + np.asarray(b), self, other)

    def compute(self, class_names: Sequence[str]) -> dict[str, float]:
        """The metrics, as fractions in [0, 1].

        Returns:
          `miou` and `boundary_iou` (means over the classes that occur in the labels or the
          predictions), `pixel_accuracy`, and `iou/<class>` and `boundary_iou/<class>` for those
          classes. Without a single labelled pixel there is nothing to measure: all are 0.
        """
        confusion = np.asarray(self.confusion, np.float64)
        intersection = np.diag(confusion)
        union = confusion.sum(0) + confusion.sum(1) - intersection
        boundary = np.asarray(self.boundary_intersection, np.float64)
        boundary_union = np.asarray(self.boundary_union, np.float64)
        present = union > 0
        iou = intersection / np.maximum(union, 1)
        boundary_iou = boundary / np.maximum(boundary_union, 1)
        metrics = {
            "miou": float(iou[present].mean()) if present.any() else 0.0,
            "boundary_iou": float(boundary_iou[present].mean()) if present.any() else 0.0,
            "pixel_accuracy": float(intersection.sum() / max(confusion.sum(), 1)),
        }
        for k, name in enumerate(class_names):
            if present[k]:
                metrics[f"iou/{name}"] = float(iou[k])
                metrics[f"boundary_iou/{name}"] = float(boundary_iou[k])
        return metrics


def boundary(mask: Bool[Array, "b h w"], distance: Integer[Array, "b"]) -> Bool[Array, "b h w"]:
    """Pixels of the mask within `distance` (Chebyshev) of its outside.

    That is mask minus its erosion by a 3×3 square repeated `distance` times, with everything
    beyond the array outside (Cheng et al., Boundary IoU, CVPR 2021). A pixel survives the erosion
    iff the mask fills the (2d+1)×(2d+1) window around it; sums over windows come from running
    sums, so each image may have its own d.
    """

    def fills(mask: Array, d: Array) -> Array:
        sums = mask.astype(jnp.int32)
        for axis in (0, 1):
            size = sums.shape[axis]
            running = jnp.cumulative_sum(sums, axis=axis, include_initial=True)
            i = jnp.arange(size)
            last = jnp.minimum(i + d + 1, size)
            first = jnp.maximum(i - d, 0)
            sums = jnp.take(running, last, axis=axis) - jnp.take(running, first, axis=axis)
        return sums == (2 * d + 1) ** 2

    return mask & ~jax.vmap(fills)(mask, distance)


def count(
    predictions: Integer[Array, "b h w"],
    labels: Integer[Array, "b h w"],
    *,
    num_classes: int,
    ignore_label: int = 255,
    dilation_ratio: float = 0.02,
    sizes: Integer[Array, "b 2"] | None = None,
) -> SegmentationCounts:
    """Counts of one batch, in int32.

    The boundary of a class is what lies within d = max(1, round(ratio · √(H² + W²))) pixels of its
    outside, and beyond the image is outside. Pixels with the ignore label belong to no class, in
    the labels and in the predictions, so that both have the same boundary along ignored regions.

    Args:
      predictions: predicted class of each pixel.
      labels: true class of each pixel, or `ignore_label`.
      num_classes: K.
      ignore_label: pixels with this label count nowhere; padding has it too.
      dilation_ratio: d over the image diagonal.
      sizes: height and width of each image before padding; None means no padding.

    Raises:
      ValueError: shapes that differ, values that are no whole numbers, an option out of range.
    """
    check_whole(num_classes=num_classes)
    check_positive(dilation_ratio=dilation_ratio)
    need(
        predictions.shape == labels.shape and labels.ndim == 3,
        "predictions and labels must both be (batch, height, width), got shapes "
        f"{predictions.shape} and {labels.shape}",
    )
    for name, array in (("predictions", predictions), ("labels", labels)):
        whole = jnp.issubdtype(array.dtype, jnp.integer)
        need(whole, f"{name} must be whole numbers, got {array.dtype}")
    b, h, w = labels.shape
    labels = labels.astype(jnp.int32)
    predictions = predictions.astype(jnp.int32)
    valid = labels != ignore_label
    cells = jnp.where(valid, labels * num_classes + predictions, num_classes**2)
    confusion = jnp.bincount(cells.ravel(), length=num_classes**2 + 1)[:-1].astype(jnp.int32)

    if sizes is None:
        sizes = jnp.broadcast_to(jnp.array([[h, w]]), (b, 2))
    diagonal = jnp.linalg.norm(sizes.astype(jnp.float32), axis=-1)
    distance = jnp.maximum(1, jnp.round(dilation_ratio * diagonal)).astype(jnp.int32)

    def boundary_counts(k: Array) -> tuple[Int[Array, ""], Int[Array, ""]]:
        true = boundary((labels == k) & valid, distance)
        predicted = boundary((predictions == k) & valid, distance)
        return (true & predicted).sum(), (true | predicted).sum()

    # One class at a time: the memory of one mask, however many classes there are.
    intersection, union = jax.lax.map(boundary_counts, jnp.arange(num_classes))
    return SegmentationCounts(confusion.reshape(num_classes, num_classes), intersection, union)
