"""The registry: names -> upsamplers, so that heads and configs choose one by name."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from flax import nnx

from resfu_jax._names import lookup
from resfu_jax.ops.checks import takes_maps
from resfu_jax.upsamplers._upsampler import Upsampler

_MAPS = ("features", "guide", "image", "values")  # what an upsampler is called with

T = TypeVar("T", bound=type[nnx.Module])


@dataclasses.dataclass(frozen=True)
class Entry:
    """A registered upsampler: its class and the options that its published name fixes."""

    cls: Any  # of an `Upsampler`, or of a module with its attributes
    options: dict[str, Any]


_ENTRIES: dict[str, Entry] = {}


def register(name: str, **options: Any) -> Callable[[T], T]:
    """Class decorator: make `create_upsampler(name)` build the class with `options`.

    The class is built as `cls(features, guide_features, scale=..., rngs=..., **options)` and says
    what it can do by the attributes of `Upsampler`; one that does not derive from it gets the
    defaults of those that it lacks. One whose output is linear in what it reassembles also takes
    `values`, which then stand in for the features: those only decide the weights.

    The call then checks its arrays and answers an empty batch, as `ops.checks.takes_maps` says.
    """

    def add(cls: T) -> T:
        if name in _ENTRIES:
            raise ValueError(f"upsampler {name!r} is registered twice")
        for attribute in Upsampler.__annotations__:
            if not hasattr(cls, attribute):
                setattr(cls, attribute, getattr(Upsampler, attribute))
        _ENTRIES[name] = Entry(cls, options)
        if not hasattr(cls.__call__, "maps"):  # not yet, under another name
            maps = [n for n in inspect.signature(cls.__call__).parameters if n in _MAPS]
            setattr(cls, "__call__", takes_maps(*maps)(cls.__call__))  # noqa: B010
        return cls

    return add


def list_upsamplers() -> list[str]:
    """Names that `create_upsampler` takes, sorted."""
    return sorted(_ENTRIES)


def upsampler_entry(name: str) -> Entry:
    """The registry's entry for `name`; a `ValueError` that names near matches if there is none."""
    return lookup("upsampler", _ENTRIES, name)


def create_upsampler(
    name: str,
    *,
    features: int,
    guide_features: int | None = None,
    scale: int = 4,
    rngs: nnx.Rngs | None = None,
    **options: Any,
) -> nnx.Module:
    """Build an upsampler by name.

    Args:
      name: one of `list_upsamplers()`.
      features: channels C of the low-resolution features, `(B, h, w, C)`.
      guide_features: channels of the high-resolution guide, `(B, H, W, Cg)`. Upsamplers without a
        guide accept and ignore it, so that a head can pass it to all.
      scale: upsampling ratio.
      rngs: source of the initial weights; `nnx.Rngs(0)` if not given.
      **options: options of the class, over those that the name fixes.

    Raises:
      ValueError: unknown name (near matches are named), unknown option, or a value that the
        upsampler does not support.
    """
    entry = upsampler_entry(name)
    rngs = nnx.Rngs(0) if rngs is None else rngs
    parameters = inspect.signature(entry.cls.__init__).parameters
    known = {key: p for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    for option in options:
        lookup(f"option of upsampler {name!r}:", known, option)
    return entry.cls(features, guide_features, scale=scale, rngs=rngs, **(entry.options | options))
