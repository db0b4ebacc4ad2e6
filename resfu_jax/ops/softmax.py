"""Softmax over a last axis that is short: the taps of a window."""

import jax
from jaxtyping import Array, Float

from resfu_jax.ops._cpu.softmax import softmax as cpu
from resfu_jax.ops._forms import Forms, Implementation
from resfu_jax.ops.checks import takes_maps
from resfu_jax.ops.dtypes import at_least_float32


@takes_maps("scores")
def softmax(
    scores: Float[Array, "*n taps"], *, implementation: Implementation | None = None
) -> Float[Array, "*n taps"]:
    """Over the last axis, in float32 or better.

    `implementation`: `"reference"`, or `"cpu"` tap by tap; `None` takes the best of the platform.
    """
    return _FORMS(implementation, scores)


def _reference(scores: Array) -> Array:
    return jax.nn.softmax(scores.astype(at_least_float32(scores.dtype)))


_FORMS = Forms("softmax", _reference, cpu=cpu)
