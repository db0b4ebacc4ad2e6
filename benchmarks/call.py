"""What is timed: a form of an upsampler, of ours or of a peer."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass
class Call:
    """A form of an upsampler, ready to be called again and again.

    Attributes:
      run: calls it, waits until it has finished, and returns what it computed.
      arrays: of what `run` returned, the output and the gradients to the inputs, NHWC, NumPy.
      temporary: bytes that `run` needs beyond its arguments and its results.
      compile_s: seconds it took to trace and compile, where it is compiled.
      flops: operations, counted on the trace.
    """

    run: Callable[[], Any]
    arrays: Callable[[Any], list[np.ndarray]]
    temporary: int
    compile_s: float | None = None
    flops: float | None = None
