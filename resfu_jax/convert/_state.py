"""Reads a PyTorch state dict entry by entry and reports all that is wrong with it at once."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

T = TypeVar("T", bound=nnx.Module)


def unfilled(cls: type[T], *args: Any, **options: Any) -> T:
    """The module with the shapes of its weights only: all of them are to be set."""
    return nnx.eval_shape(lambda: cls(*args, rngs=nnx.Rngs(0), **options))


class StateDict:
    """A state dict being consumed: `take` every entry, then call `done`.

    Problems are collected, and `done` raises one error that names them all.

    Args:
      state: official state dict; values may be anything that `np.asarray` reads.
      owner: the official class, for the error message.
    """

    def __init__(self, state: Mapping[str, Any], owner: str):
        self._state = dict(state)
        self._owner = owner
        self._problems: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self._state

    def take(self, key: str, shape: tuple[int, ...]) -> np.ndarray:
        """The entry `key`, which must have `shape`; zeros of that shape if it is not usable."""
        if key not in self._state:
            self._problems.append(f"missing {key!r} {shape}")
            return np.zeros(shape, np.float32)
        value = np.asarray(self._state.pop(key))
        if value.shape != tuple(shape):
            self._problems.append(f"{key!r} has shape {value.shape}, expected {tuple(shape)}")
            return np.zeros(shape, np.float32)
        return value

    def set(self, variable: nnx.Variable, key: str, *, layout: str = "") -> None:
        """Store entry `key` into `variable`, changing PyTorch's axis order to ours.

        `layout` names the official one: `"OIHW"` (convolution), `"IOHW"` (transposed convolution),
        `"C1HW"` (depthwise convolution, ours `(H, W, C)`), `"OI11"` (1x1 convolution, ours
        `(in, out)`), `"1C11"` (ours `(C,)`), `"OI"` (linear, ours `(in, out)`), `"1N1TD"` (ours
        `(N, T, D)`), or nothing when both agree.
        """
        ours = variable.get_value()
        s = ours.shape
        official = {
            "": lambda: s,
            "OIHW": lambda: (s[3], s[2], s[0], s[1]),
            "IOHW": lambda: (s[2], s[3], s[0], s[1]),
            "C1HW": lambda: (s[2], 1, s[0], s[1]),
            "1N1TD": lambda: (1, s[0], 1, s[1], s[2]),
            "OI11": lambda: (s[1], s[0], 1, 1),
            "1C11": lambda: (1, s[0], 1, 1),
            "OI": lambda: (s[1], s[0]),
        }[layout]()
        value = self.take(key, official)
        if layout == "OIHW":
            value = value.transpose(2, 3, 1, 0)
        elif layout == "IOHW":
            value = value.transpose(2, 3, 0, 1)
        elif layout in ("OI11", "OI"):
            value = value.reshape(official[:2]).T
        elif layout == "C1HW":
            value = value.transpose(2, 3, 0, 1).reshape(s)
        elif layout in ("1C11", "1N1TD"):
            value = value.reshape(s)
        # Double precision is kept only where JAX itself runs in it.
        dtype = jax.dtypes.canonicalize_dtype(value.dtype)
        variable.set_value(jnp.asarray(value, dtype if dtype == jnp.float64 else ours.dtype))

    def set_layer(self, layer: nnx.Module | None, key: str, *, layout: str = "") -> None:
        """Store `key.weight`, in `layout`, and `key.bias` into a layer; nothing without a layer.

        The weight is the layer's `kernel` or, of a norm, its `scale`.
        """
        if layer is None:
            return
        weight = layer.kernel if hasattr(layer, "kernel") else layer.scale
        self.set(weight, f"{key}.weight", layout=layout)
        if layer.bias is not None:
            self.set(layer.bias, f"{key}.bias")

    def problem(self, text: str) -> None:
        """Something else that is wrong."""
        self._problems.append(text)

    def done(self) -> None:
        """Raise a `ValueError` naming all missing, misshapen and unexpected entries, if any."""
        problems = self._problems + [f"unexpected {key!r}" for key in self._state]
        if problems:
            raise ValueError(f"state_dict does not fit {self._owner}: " + "; ".join(problems))
