"""Reads a PyTorch state dict entry by entry and reports all that is wrong with it at once."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

T = TypeVar("T", bound=nnx.Module)

_SCREEN = 1200  # characters up to which a message names every entry


def unfilled(cls: type[T], *args: Any, **options: Any) -> T:
    """The module with the shapes of its weights only: all of them are to be set."""
    return nnx.eval_shape(lambda: cls(*args, rngs=nnx.Rngs(0), **options))


def entries_of(state: Any) -> dict[str, Any]:
    """The entries of a state dict by name, whatever holds it.

    Args:
      state: a mapping of names to arrays; a checkpoint, that is a mapping with such mappings in it,
        whose entries are then named `"state_dict.conv.weight"`; or a module with a `state_dict()`.

    Raises:
      ValueError: anything else.
    """
    entries: dict[str, Any] = {}

    def walk(value: Any, name: str, depth: int) -> None:
        if not has_entries(value):
            entries[name] = value
            return
        value = value if isinstance(value, Mapping) else value.state_dict()
        # Dictionaries from files may hold themselves, or each other many times.
        if depth > 6 or len(entries) > 1_000_000:
            raise ValueError("state_dict is nested too deeply, or too large, for a checkpoint")
        for key, inner in value.items():
            walk(inner, f"{name}.{key}" if name else str(key), depth + 1)

    if not has_entries(state):
        raise ValueError(
            "state_dict must be a mapping of names to arrays (a module's state_dict()), the module "
            f"itself, or the path of a file with one; got {type(state).__name__}"
        )
    walk(state, "", 0)
    return entries


def has_entries(value: Any) -> bool:
    """Whether it is a mapping, or a module with a `state_dict()`."""
    return isinstance(value, Mapping) or callable(getattr(value, "state_dict", None))


def as_array(value: Any) -> np.ndarray:
    """The numbers of an entry: of a NumPy or JAX array, a tensor in a file, or one of PyTorch.

    PyTorch's may require gradients, be of bfloat16 (which float32 holds exactly), on any device,
    or spread over several.

    Raises:
      ValueError: no array of floating-point numbers.
    """
    try:
        if hasattr(value, "detach"):
            value = value.detach()
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            value = value.cpu()
            try:
                value = value.numpy()
            except TypeError:  # a type that NumPy does not have
                value = value.float().numpy()
        array = np.asarray(value)
    except Exception as error:  # of whatever library the value is from
        what = f"{type(value).__name__} that cannot be read ({type(error).__name__}: {error})"
        raise ValueError(f"is a {what[:200]}") from error
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"holds {array.dtype}, not floating-point numbers")
    return array


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of an entry, without reading it from its file; `()` of what has none."""
    return tuple(getattr(value, "shape", ()))


class Misfit(ValueError):
    """Entries that do not fit a module.

    The message says the likely cause first, then counts, then the entries: all of them while that
    fits a screen, else the first ones of each kind.

    Attributes:
      wanted: names and shapes of what the module needs.
      missing, misshapen, unexpected: what differs, a text each, by name.
      problems: what else is wrong.
      unexpected_names: the unexpected entries as their file names them.
    """

    def __init__(
        self,
        source: str,
        owner: str,
        wanted: Mapping[str, tuple[int, ...]],
        missing: Mapping[str, str],
        misshapen: Mapping[str, str],
        unexpected: Mapping[str, str],
        problems: Iterable[str],
        unexpected_names: Iterable[str],
    ):
        super().__init__(source, owner)
        self.source, self.owner, self.wanted = source, owner, dict(wanted)
        self.missing, self.misshapen, self.unexpected = missing, misshapen, unexpected
        self.problems, self.unexpected_names = list(problems), frozenset(unexpected_names)
        self.causes: list[str] = []

    @property
    def lacks(self) -> int:
        """How many of the entries that the module needs are not there, or of another shape."""
        return len(self.missing) + len(self.misshapen)

    def __str__(self) -> str:
        kinds = [
            ("missing", self.missing),
            ("of another shape", self.misshapen),
            ("unexpected", self.unexpected),
        ]
        counts = ", ".join(f"{len(found)} {kind}" for kind, found in kinds if found)
        if self.missing or self.misshapen:
            counts += f" (of {len(self.wanted)} needed)"
        texts = [list(found.values()) for _, found in kinds]
        if sum(len(text) for found in texts for text in found) > _SCREEN:
            texts = [_first(found) for found in texts]
        listed = "; ".join(text for found in texts for text in found)
        lead = "; ".join([*self.causes, *_first(self.problems), *([counts] if counts else [])])
        return (
            f"{shorten(self.source, 200)} does not fit {self.owner}: {lead}"
            f"{': ' if listed else ''}{listed}"
        )


def shorten(text: str, length: int = 90) -> str:
    """The text, or its beginning and end."""
    return text if len(text) <= length else f"{text[: length // 2]}...{text[-length // 3 :]}"


def _first(texts: list[str]) -> list[str]:
    """The first texts, ten or what has room, and how many more there are."""
    kept: list[str] = []
    for text in texts[:10]:
        if kept and sum(map(len, kept)) + len(text) > _SCREEN // 3:
            break
        kept.append(text)
    more = len(texts) - len(kept)
    return [*kept, f"and {more} more"] if more else kept


class StateDict:
    """A state dict being consumed: `take` every entry, then call `done`.

    Problems are collected, and `done` raises one error for them all.

    Args:
      state: official state dict; values may be anything that `as_array` reads.
      owner: the official class, or ours, for the error message.
      source: where the entries are from, for the error message.
      names: what the file calls the entries that are named otherwise in `state`.
    """

    def __init__(
        self,
        state: Mapping[str, Any],
        owner: str,
        *,
        source: str = "state_dict",
        names: Mapping[str, str] | None = None,
    ):
        self._state = dict(state)
        self._owner, self._source, self._names = owner, source, names or {}
        self._wanted: dict[str, tuple[int, ...]] = {}
        self._missing: dict[str, str] = {}
        self._misshapen: dict[str, str] = {}
        self._problems: list[str] = []
        self._buffers: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._state

    def take(self, key: str, shape: tuple[int, ...]) -> np.ndarray:
        """The entry `key`, which must have `shape`; zeros of that shape if it is not usable."""
        shape = self._wanted[key] = tuple(shape)
        zeros = np.broadcast_to(np.float32(0), shape)
        if key not in self._state:
            self._missing[key] = f"missing {shorten(key)!r} {shape}"
            return zeros
        value = self._state.pop(key)
        # A file's tensor of another shape is not read for nothing.
        found = tuple(value.shape) if hasattr(value, "shape") else np.shape(as_array(value))
        if found != shape:
            self._misshapen[key] = f"{shorten(key)!r} has shape {found}, expected {shape}"
            return zeros
        try:
            return as_array(value)
        except ValueError as error:
            self.problem(f"{shorten(key)!r} {error}")
            return zeros

    def buffer(self, key: str, value: np.ndarray, otherwise: str) -> None:
        """Checks the entry `key`, a constant that the official module keeps among its weights.

        `otherwise` is what to say about another value.
        """
        found = self.take(key, value.shape)
        self._buffers.add(key)
        if key not in self._missing and key not in self._misshapen:
            rounding = 1e-6 if found.itemsize >= 4 else 1e-2
            if not np.allclose(found.astype(np.float64), value, atol=rounding):
                self.problem(f"{key!r} {otherwise}")

    def set(self, variable: nnx.Variable, key: str, *, layout: str = "") -> None:
        """Store entry `key` into `variable`, changing PyTorch's axis order to ours.

        `variable` may hold a shape only. `layout` names the official order: `"OIHW"` (convolution),
        `"IOHW"` (transposed convolution), `"C1HW"` (depthwise convolution, ours `(H, W, C)`),
        `"OI11"` (1x1 convolution, ours `(in, out)`), `"1C11"` (ours `(C,)`), `"OI"` (linear, ours
        `(in, out)`), `"1N1TD"` (ours `(N, T, D)`), or nothing when both agree.
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
        if key in self._missing or key in self._misshapen:
            return
        if layout == "OIHW":
            value = value.transpose(2, 3, 1, 0)
        elif layout == "IOHW":
            value = value.transpose(2, 3, 0, 1)
        elif layout in ("OI11", "OI"):
            value = value.reshape(official[:2]).T
        elif layout == "C1HW":
            value = value.transpose(2, 3, 0, 1)
        store(variable, value)

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
        """Raise a `Misfit` naming missing, misshapen and unexpected entries, if there are any."""
        if self._missing and self._missing.keys() <= self._buffers:
            self.problem(
                "the module's constants are missing: give its state_dict(), not named_parameters()"
            )
        if self._problems or self._missing or self._misshapen or self._state:
            raise Misfit(
                self._source,
                self._owner,
                self._wanted,
                self._missing,
                self._misshapen,
                {key: f"unexpected {shorten(key)!r}" for key in self._state},
                self._problems,
                [self._names.get(key, key) for key in self._state],
            )


def store(variable: nnx.Variable, value: np.ndarray) -> None:
    """Sets a variable, which may hold a shape only, to a copy of as many values."""
    ours = variable.get_value()
    # Double precision is kept only where JAX itself runs in it.
    dtype = jax.dtypes.canonicalize_dtype(value.dtype)
    values = jnp.array(value, dtype if dtype == jnp.float64 else ours.dtype)
    variable.set_value(values.reshape(ours.shape))
