"""Counts over the labels of a dataset."""

import functools
import io
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from resfu_jax.data.info import DatasetInfo
from resfu_jax.data.load import Source


def label_counts(source: Source, info: DatasetInfo) -> Int[np.ndarray, " k"]:
    """Pixels of every class in all label maps of a source."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        counts = pool.map(functools.partial(_histogram, source), range(len(source)))
        return sum(counts, np.zeros(256, np.int64))[: info.num_classes]


def balanced_weights(counts: Int[np.ndarray, " k"], exponent: float) -> Float[np.ndarray, " k"]:
    """(median frequency / frequency)^exponent of every class; 1 for classes that do not occur.

    With the exponent 1 every class has the same share in the loss (Eigen and Fergus, ICCV 2015,
    who count only images that hold the class).

    Raises:
      ValueError: the exponent is not finite, or a count is negative.
    """
    if not np.isfinite(exponent):
        raise ValueError(f"exponent must be finite, got {exponent}.")
    if np.any(counts < 0):
        raise ValueError(f"counts must not be negative, got {counts}.")
    counts = counts.astype(np.float64)
    present = counts > 0
    return np.where(
        present, (np.median(counts[present]) / np.where(present, counts, 1.0)) ** exponent, 1.0
    )


def _histogram(source: Source, index: int) -> np.ndarray:
    with Image.open(io.BytesIO(source[index]["label"])) as label:
        return np.array(label.histogram(), np.int64)
