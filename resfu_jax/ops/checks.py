"""What every op and every upsampler asks of its arrays, and what it makes of an empty batch."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from resfu_jax.ops.dtypes import at_least_float32

_NARROW = {jnp.dtype(jnp.float16), jnp.dtype(jnp.bfloat16)}  # neither holds the other


def takes_maps(*names: str, others: tuple[str, ...] = (), real: bool = True) -> Callable:
    """Decorator of a function that makes one result an image of some arrays, the named arguments.

    * A map that is not real, or empty but for its batch, is refused by its name.
    * float16 maps with bfloat16 ones are made float32, the narrowest type that holds both, which
      then is the result's. (All other types hold each other: each function says what it does.)
    * No image gives no result, `(0, ...)`, of the shape and dtype that one image gives. The
      function never sees an empty batch, nor does any form or kernel of it.

    Args:
      names: the arguments that have the batch as their first axis. One that is None is not looked
        at.
      others: arguments that must be real, too, but are the same for all images, like a kernel.
      real: whether the maps must be; False for a function that only moves values.
    """

    def decorate(f: Callable) -> Callable:
        signature = inspect.signature(f)

        @functools.wraps(f)
        def checked(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs)
            given = {name: a for name, a in call.arguments.items() if a is not None}
            for name in others:
                if name in given:
                    check_real(name, given[name])
            maps = {name: _as_map(name, given[name], real) for name in names if name in given}
            if {a.dtype for a in maps.values()} >= _NARROW:
                maps = {n: a.astype(at_least_float32(a.dtype)) for n, a in maps.items()}

            def run(maps: dict[str, Array]) -> Any:
                call.arguments.update(maps)
                return f(*call.args, **call.kwargs)

            if not maps or not all(_has_no_image(a) for a in maps.values()):
                return run(maps)
            one = {n: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype) for n, a in maps.items()}
            result = jax.eval_shape(run, one)
            return jnp.zeros((0, *result.shape[1:]), result.dtype)

        checked.maps = names
        return checked

    return decorate


def _has_no_image(a: Array) -> bool:
    return isinstance(a.shape[0], int) and a.shape[0] == 0


def _as_map(name: str, a: Any, real: bool) -> Any:
    if isinstance(a, np.ndarray):
        a = jnp.asarray(a)
    if real:
        check_real(name, a)
    check_not_empty(name, a)
    return a


def check_real(name: str, a: Any) -> None:
    """A `ValueError` that names the array unless its values are floating-point numbers."""
    dtype = getattr(a, "dtype", None)
    if dtype is None:
        raise ValueError(f"{name} must be an array, got {type(a).__name__}")
    if not jnp.issubdtype(dtype, jnp.floating):
        hint = f"take its parts or its magnitude: jnp.abs({name})"
        if not jnp.issubdtype(dtype, jnp.complexfloating):
            hint = f"cast it: {name}.astype(jnp.float32)"
        raise ValueError(f"{name} must be floating point, got {dtype}; {hint}")


def check_not_empty(name: str, a: Any) -> None:
    """A `ValueError` that names the array if it has no rows, columns or channels."""
    if not getattr(a, "shape", ()):
        raise ValueError(f"{name} must be a batch of maps, got {a!r}")
    if any(isinstance(n, int) and n < 1 for n in a.shape[1:]):
        raise ValueError(
            f"{name} must have no axis of length 0 but that of the batch, got shape {a.shape}"
        )


def check_floating(**dtypes: DTypeLike | None) -> None:
    """A `ValueError` naming the first argument that is a dtype, but not of real numbers."""
    for name, dtype in dtypes.items():
        try:
            right = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
        except TypeError:  # not a dtype at all
            right = False
        if not right:
            shown = getattr(dtype, "__name__", repr(dtype))
            raise ValueError(
                f"{name} must be a floating-point dtype, such as jnp.float32 or jnp.bfloat16, "
                f"got {shown}"
            )
