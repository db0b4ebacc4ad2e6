"""Which form of an op runs: the one that is asked for, or the best of the platform.

An op has a literal form and fast ones, which give the same values and gradients:

    "reference"   as the formulas stand; the oracle of the others
    "xla"         portable: for accelerators, from products and slices
    "cpu"         for CPUs, block of rows by block of rows
    "pallas"      kernels for TPUs

All of them take the same arguments: arrays, or tuples of them, by position, everything else by
keyword. What is best is decided when a program is *lowered*, for the platform that it is lowered
for: a program that is exported for several platforms holds one form for each, and one that is
compiled ahead of time for a TPU is the TPU's, on whatever machine.
"""

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
from jaxtyping import Array

from resfu_jax.ops.sizes import whole_ratio

Implementation = Literal["reference", "xla", "cpu", "pallas"]

Refusal = str | None


def _applies(*arrays: Any, **options: Any) -> Refusal:
    return None


class Form(NamedTuple):
    """One way to compute an op.

    Attributes:
      function: of the op's arrays and options; differentiable.
      refusal: of the same arguments, why the form does not apply to them, or None if it does.
      chosen: what runs instead where nobody asked for the form by its name; `function` if not
        given.
    """

    function: Callable[..., Array]
    refusal: Callable[..., Refusal] = _applies
    chosen: Callable[..., Array] | None = None


# Best first. Another platform (a GPU's are "cuda" and "rocm") takes "gpu"'s.
_PREFERENCE: dict[str, tuple[Implementation, ...]] = {
    "cpu": ("cpu", "xla", "reference"),
    "tpu": ("pallas", "xla", "reference"),
    "gpu": ("xla", "reference"),
}


class Forms:
    """The forms of one op.

    Args:
      name: of the op, for messages.
      reference: the literal form, which applies to everything.
      xla, cpu, pallas: the others, as far as there are any.
      preferred: what a platform takes, best first, where it is not what most ops are best by.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Array],
        *,
        xla: Form | Callable[..., Array] | None = None,
        cpu: Form | Callable[..., Array] | None = None,
        pallas: Form | Callable[..., Array] | None = None,
        preferred: Mapping[str, tuple[Implementation, ...]] | None = None,
    ):
        given = {"reference": reference, "xla": xla, "cpu": cpu, "pallas": pallas}
        self._name = name
        self._forms = {
            key: form if isinstance(form, Form) else Form(form)
            for key, form in given.items()
            if form is not None
        }
        self._preference = _PREFERENCE | dict(preferred or {})

    def __call__(
        self, implementation: Implementation | None, *arrays: Any, **options: Hashable
    ) -> Array:
        """The op's result, by the form asked for or, for None, by the best of the platform.

        Raises:
          ValueError: there is no such form, or it does not apply; says why.
        """
        if implementation is not None:
            return self._named(implementation, *arrays, **options)
        best = {platform: self._best(platform, *arrays, **options) for platform in _PREFERENCE}
        if len(set(best.values())) == 1:
            return best["gpu"](*arrays, **options)
        return _by_platform(tuple(best.items()), tuple(options.items()), *arrays)

    def _named(self, name: str, *arrays: Any, **options: Hashable) -> Array:
        if name not in self._forms:
            known = "no such form" if name in get_args(Implementation) else "unknown"
            raise ValueError(
                f"implementation must be None or one of {', '.join(self._forms)} for "
                f"{self._name}, got {name!r} ({known})"
            )
        form = self._forms[name]
        if reason := form.refusal(*arrays, **options):
            raise ValueError(f"implementation={name!r} does not apply: {reason}; use None")
        return form.function(*arrays, **options)

    def _best(self, platform: str, *arrays: Any, **options: Hashable) -> Callable:
        for name in (*self._preference[platform], "reference"):
            form = self._forms.get(name)
            if form is not None and form.refusal(*arrays, **options) is None:
                return form.chosen or form.function
        raise AssertionError(f"the reference of {self._name} applies to everything")


# Compiled, so that calls outside of `jit` compile once for all equal arguments.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _by_platform(functions: tuple, options: tuple, *arrays: Any) -> Array:
    return _lowered(functions, options, *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _lowered(functions: tuple, options: tuple, *arrays: Any) -> Array:
    return _switch(functions, options, lambda f: f, *arrays)


def _lowered_fwd(functions, options, *arrays):
    return _lowered(functions, options, *arrays), arrays


def _lowered_bwd(functions, options, arrays, g):
    # From the arguments: differentiated by JAX, the choice would keep what every form keeps.
    def gradient(f):
        return lambda g, *arrays: jax.vjp(f, *arrays)[1](g)

    return _switch(functions, options, gradient, g, *arrays)


_lowered.defvjp(_lowered_fwd, _lowered_bwd)


def _switch(functions: tuple, options: tuple, make: Callable, *arrays: Any) -> Any:
    branches = {platform: make(functools.partial(f, **dict(options))) for platform, f in functions}
    return jax.lax.platform_dependent(
        *arrays, cpu=branches["cpu"], tpu=branches["tpu"], default=branches["gpu"]
    )


def needs_whole_ratio(out: Array, *others: Array | None, **options: Hashable) -> Refusal:
    """A form's refusal: the first array has to be a whole multiple of the last one's size."""
    size, out_size = others[-1].shape[1:3], out.shape[1:3]
    if whole_ratio(size, out_size) is None:
        return f"it needs whole ratios, got {size} to {out_size}"
    return None
