"""Dtypes of computations. NumPy's promotion, unlike JAX's, is not affected by its strict mode."""

import functools

import numpy as np
from jax.typing import DTypeLike


def promote(*dtypes: DTypeLike) -> np.dtype:
    """The narrowest dtype that holds all of these: float32 for float16 with bfloat16."""
    first, *others = (np.dtype(dtype) for dtype in dtypes)
    if all(dtype == first for dtype in others):
        return first
    # All that holds two different ones has 32 bits. (Of the two above, NumPy knows none that does.)
    return functools.reduce(np.promote_types, [np.dtype(np.float32), first, *others])


def at_least_float32(dtype: DTypeLike) -> np.dtype:
    """For sums, statistics and softmax: float32, or `dtype` if it is wider."""
    return np.promote_types(dtype, np.float32)
