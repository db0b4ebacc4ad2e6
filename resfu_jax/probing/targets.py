"""What a probe's linear layer has to tell of a pixel: its class, or its depth.

With y the outputs of the layer at a pixel,

    Classes   the class is the largest of the K logits y           cross-entropy
    Depths    w_k = relu(y_k) + 0.1,                               the sig loss
              the depth is sum_k c_k w_k / sum_k w_k
              with the centres c_k of K bins

as the heads `linear` and `bins` have it. All else that a probe does is the same for both.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Num

from resfu_jax import data, training
from resfu_jax._checks import need
from resfu_jax.heads.depth import depth_of_bins
from resfu_jax.probing.settings import ProbeSettings
from resfu_jax.training.depth import Crop, DepthSums, depth_metrics, sig_loss, valid_pixels


@runtime_checkable
class Target(Protocol):
    """What is told of a pixel; hashable, as functions that are compiled for it take it."""

    def __hash__(self) -> int: ...

    @property
    def channels(self) -> int:
        """Outputs of the linear layer."""
        ...

    @property
    def answers(self) -> int:
        """Numbers of an answer."""
        ...

    def known(self, labels: Num[np.ndarray, "*s"]) -> Bool[np.ndarray, "*s"]:
        """Which pixels count."""
        ...

    def loss(self, scores: Float[Array, "b n k"], labels: Num[Array, "b n"]) -> Float[Array, ""]:
        """Of outputs at some pixels of each image."""
        ...

    def read(self, scores: Float[Array, "*s k"]) -> Float[Array, "*s _r"]:
        """What is resized to the labels and scored."""
        ...

    def answer(self, scores: Float[Array, "*s k"]) -> Float[Array, "*s a"]:
        """What can be upsampled in place of features, and is scored then."""
        ...

    def count(self, maps: Float[Array, "b h w r"], labels: Num[Array, "b h w"]) -> Any:
        """Counts of maps of the labels' size; inside `jit`."""
        ...

    def no_counts(self) -> Any:
        """Counts of no image, with `merge`."""
        ...

    def metrics(self, counts: Any) -> dict[str, float]:
        """The scores of all images."""
        ...


@dataclasses.dataclass(frozen=True)
class Classes:
    """The class of a pixel.

    Attributes:
      names: of the K classes.
      ignore_label: of pixels that do not count.
      weights: of each class in the loss; None: all alike.
      dilation_ratio: width of the boundary of boundary IoU over the image's diagonal.
    """

    names: tuple[str, ...]
    ignore_label: int = 255
    weights: tuple[float, ...] | None = None
    dilation_ratio: float = 0.02

    @property
    def channels(self) -> int:
        """K logits."""
        return len(self.names)

    @property
    def answers(self) -> int:
        """K probabilities."""
        return len(self.names)

    def known(self, labels: Num[np.ndarray, "*s"]) -> Bool[np.ndarray, "*s"]:
        """All that are labelled."""
        return labels != self.ignore_label

    def loss(self, scores: Float[Array, "b n k"], labels: Num[Array, "b n"]) -> Float[Array, ""]:
        """Cross-entropy, the mean over labelled pixels."""
        return training.cross_entropy(
            scores, labels, ignore_label=self.ignore_label, class_weights=self.weights
        )

    def read(self, scores: Float[Array, "*s k"]) -> Float[Array, "*s k"]:
        """Logits."""
        return scores

    def answer(self, scores: Float[Array, "*s k"]) -> Float[Array, "*s k"]:
        """Probabilities."""
        return jax.nn.softmax(scores)

    def count(self, maps: Float[Array, "b h w k"], labels: Num[Array, "b h w"]) -> Any:
        """Of the largest of logits or probabilities."""
        return training.count(
            jax.numpy.argmax(maps, axis=-1).astype(jax.numpy.uint8),
            labels,
            num_classes=self.channels,
            ignore_label=self.ignore_label,
            dilation_ratio=self.dilation_ratio,
        )

    def no_counts(self) -> Any:
        """Of no pixels."""
        return training.SegmentationCounts.zeros(self.channels)

    def metrics(self, counts: Any) -> dict[str, float]:
        """What `SegmentationCounts.compute` has."""
        return counts.compute(self.names)


@dataclasses.dataclass(frozen=True)
class Depths:
    """The depth of a pixel.

    Attributes:
      bins: number K of bins.
      min_depth: of the first bin's centre; smaller depths do not count.
      max_depth: of the last bin's centre; larger depths do not count.
      crop: of `depth_metrics`.
    """

    bins: int = 256
    min_depth: float = 1e-3
    max_depth: float = 10.0
    crop: Crop = "none"

    @property
    def channels(self) -> int:
        """A weight for each bin."""
        return self.bins

    @property
    def answers(self) -> int:
        """A depth."""
        return 1

    def known(self, labels: Num[np.ndarray, "*s"]) -> Bool[np.ndarray, "*s"]:
        """All within the range."""
        return (labels > self.min_depth) & (labels < self.max_depth)

    def loss(self, scores: Float[Array, "b n k"], labels: Num[Array, "b n"]) -> Float[Array, ""]:
        """`sig_loss` over the pixels of all images together."""
        depth = self.read(scores)[:, None, :, 0]  # as a map of one row
        labels = labels[:, None]
        valid = valid_pixels(labels, min_depth=self.min_depth, max_depth=self.max_depth)
        return sig_loss(depth, labels, valid)

    def read(self, scores: Float[Array, "*s k"]) -> Float[Array, "*s 1"]:
        """Depths."""
        return depth_of_bins(scores, self.min_depth, self.max_depth)[..., None]

    def answer(self, scores: Float[Array, "*s k"]) -> Float[Array, "*s 1"]:
        """Depths."""
        return self.read(scores)

    def count(self, maps: Float[Array, "b h w 1"], labels: Num[Array, "b h w"]) -> DepthSums:
        """`depth_metrics`."""
        return depth_metrics(
            maps[..., 0],
            labels,
            min_depth=self.min_depth,
            max_depth=self.max_depth,
            crop=self.crop,
        )

    def no_counts(self) -> DepthSums:
        """Of no images."""
        return DepthSums.zeros()

    def metrics(self, counts: DepthSums) -> dict[str, float]:
        """Means over the images."""
        return counts.compute()


def target_of(info: data.DatasetInfo, source: data.Source, settings: ProbeSettings) -> Target:
    """What a dataset's label maps hold.

    Args:
      info: of the dataset.
      source: its examples for training, whose classes are counted if the settings need that.
      settings: of the probe.

    Raises:
      ValueError: the dataset has neither classes nor depths, or a setting is for the other kind.
    """
    if info.depth is not None:
        need(
            not settings.class_balance,
            f"class_balance is for classes, and {info.name!r} has depths: it has to be 0, got "
            f"{settings.class_balance:g}",
        )
        return Depths(settings.bins, settings.min_depth, settings.max_depth, settings.depth_crop)
    need(
        info.num_classes > 0 and not info.mattes,
        f"dataset must have classes or depth maps, and {info.name!r} has neither",
    )
    weights = None
    if settings.class_balance:
        counts = data.label_counts(source, info)
        weights = tuple(data.balanced_weights(counts, settings.class_balance).tolist())
    return Classes(info.class_names, info.ignore_label, weights, float(settings.dilation_ratio))
