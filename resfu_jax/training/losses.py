"""Pixel-wise cross-entropy with an ignore label, label smoothing and class weights."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from resfu_jax import data
from resfu_jax._checks import is_number
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
    """Weight of each pixel in the loss: 0 where ignored, else its class's weight, or 1.

    Raises:
      ValueError: labels that are not whole numbers, or weights that are negative, not finite or
        all zero.
    """
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be whole numbers, got {labels.dtype}")
    valid = labels != ignore_label
    if class_weights is None:
        return valid.astype(jnp.float32)
    table = _table(class_weights)
    return jnp.where(valid, table[jnp.where(valid, labels, 0)], 0.0)


def _table(class_weights: Sequence[float]) -> Float[Array, "k"]:
    """The weights as an array, checked unless they are traced."""
    if not isinstance(class_weights, jax.core.Tracer):
        values = np.asarray(class_weights, np.float32)
        if values.ndim != 1 or not (np.isfinite(values) & (values >= 0)).all() or not values.any():
            raise ValueError(
                "class_weights must be one number per class, finite, none negative and not all "
                f"zero, got {class_weights}"
            )
    return jnp.asarray(class_weights, jnp.float32)


def cross_entropy(
    logits: Float[Array, "*b h w k"],
    labels: Integer[Array, "..."],
    *,
    ignore_label: int = 255,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
    normalizer: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Mean over pixels of −(1 − s) w_y log p_y − s/K Σ_k w_k log p_k, in float32.

    Equal to PyTorch's `cross_entropy`, values and gradients: each class's share of the smoothed
    target is weighed by that class's own weight, and the mean is over Σ w_y, the weights of the
    labels.

    Args:
      logits: unnormalised class scores.
      labels: class of each pixel, or `ignore_label`; of the logits' shape without classes.
      ignore_label: pixels with this label count neither in the sum nor in the mean.
      label_smoothing: s, the share of the target spread evenly over the K classes.
      class_weights: w, one weight per class, finite and not negative; 1 by default.
      normalizer: divides the sum instead of the sum of weights. A part of a batch passes the
        weight of the whole, so that the parts' losses and gradients add up to the batch's.

    Returns:
      The loss; 0 if no pixel has weight, where PyTorch divides by zero.

    Raises:
      ValueError: logits and labels do not have the same leading shape or are not of floating
        point and whole numbers, or an option is out of range.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels have shape {labels.shape}; logits {logits.shape} need {logits.shape[:-1]}"
        )
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits must be floating point, got {logits.dtype}")
    if not (is_number(label_smoothing) and 0 <= label_smoothing <= 1):
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing!r}")
    classes = logits.shape[-1]
    if class_weights is not None and len(class_weights) != classes:
        raise ValueError(
            f"class_weights must be {classes} numbers, one per class, got {len(class_weights)}"
        )
    weights = pixel_weights(labels, ignore_label=ignore_label, class_weights=class_weights)
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    valid = labels != ignore_label
    # Ignored labels may be out of range: read class 0 there and let the weight remove it.
    safe = jnp.where(valid, labels, 0).astype(jnp.int32)
    loss = -weights * jnp.take_along_axis(log_p, safe[..., None], axis=-1)[..., 0]
    if label_smoothing:
        if class_weights is not None:
            log_p = log_p * jnp.expand_dims(_table(class_weights), range(log_p.ndim - 1))
        spread = -log_p.mean(axis=-1)
        loss = (1.0 - label_smoothing) * loss + label_smoothing * jnp.where(valid, spread, 0.0)
    if normalizer is None:
        normalizer = weights.sum()
    return jnp.where(normalizer > 0, loss.sum() / jnp.where(normalizer > 0, normalizer, 1.0), 0.0)
