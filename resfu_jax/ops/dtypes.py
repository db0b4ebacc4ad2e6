"""Dtypes of computations. NumPy's promotion, unlike JAX's, is not affected by its strict mode."""

import functools

import numpy as np
from jax.typing import DTypeLike


def promote(*dtypes: DTypeLike) -> np.dtype:
    """The dtype that holds all of these."""
    return functools.reduce(np.promote_types, dtypes)


def at_least_float32(dtype: DTypeLike) -> np.dtype:
    """For sums, statistics and softmax: float32, or `dtype` if it is wider."""
    return np.promote_types(dtype, np.float32)
