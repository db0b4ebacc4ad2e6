"""Pixel-wise cross-entropy with an ignore label, label smoothing and class weights."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from resfu_jax import data
from resfu_jax.training.config import LossConfig


def class_weights(
    config: LossConfig, source: data.Source, info: data.DatasetInfo
) -> tuple[float, ...] | None:
    """The weights that a config asks for, counted on the labels of `source` if need be."""
    if not config.class_balance:
        return config.class_weights
    weights = data.balanced_weights(data.label_counts(source, info), config.class_balance)
    if config.class_weights is not None:
        weights = weights * np.array(config.class_weights)
    return tuple(weights.tolist())


def pixel_weights(
    labels: Integer[Array, "*b h w"],
    *,
    ignore_label: int = 255,
    class_weights: Sequence[float] | None = None,
) -> Float[Array, "*b h w"]:
    """Weight of each pixel in the loss: 0 where ignored, else its class's weight, or 1."""
    valid = labels != ignore_label
    if class_weights is None:
        return valid.astype(jnp.float32)
    table = jnp.asarray(class_weights, jnp.float32)
    return jnp.where(valid, table[jnp.where(valid, labels, 0)], 0.0)


def cross_entropy(
    logits: Float[Array, "*b h w k"],
    labels: Integer[Array, "..."],
    *,
    ignore_label: int = 255,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
    normalizer: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Mean over pixels of w_y · (−(1 − s) log p_y − s/K Σ_k log p_k), in float32.

    Args:
        logits: unnormalised class scores.
        labels: class of each pixel, or `ignore_label`; of the logits' shape without classes.
        ignore_label: pixels with this label count neither in the sum nor in the mean.
        label_smoothing: s, the share of the target spread evenly over the K classes.
        class_weights: w, one weight per class; the mean is over the sum of weights, as in PyTorch.
        normalizer: divides the sum instead of the sum of weights. A part of a batch passes the
            weight of the whole, so that the parts' losses and gradients add up to the batch's.

    Returns:
        The loss; 0 if every pixel is ignored.

    Raises:
        ValueError: logits and labels do not have the same leading shape.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels have shape {labels.shape}; logits {logits.shape} need {logits.shape[:-1]}"
        )
    weights = pixel_weights(labels, ignore_label=ignore_label, class_weights=class_weights)
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    # Ignored labels may be out of range: read class 0 there and let the weight remove it.
    safe = jnp.where(labels == ignore_label, 0, labels).astype(jnp.int32)
    loss = -jnp.take_along_axis(log_p, safe[..., None], axis=-1)[..., 0]
    if label_smoothing:
        loss = (1.0 - label_smoothing) * loss - label_smoothing * log_p.mean(axis=-1)
    if normalizer is None:
        normalizer = weights.sum()
    return (weights * loss).sum() / jnp.where(normalizer > 0, normalizer, 1.0)
