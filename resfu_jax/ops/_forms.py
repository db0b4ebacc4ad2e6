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

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.extend
from jax.interpreters import batching, mlir
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
        items = tuple(options.items())
        branches = tuple((p, _Branch(f, items)) for p, f in best.items())
        return _by_platform(branches, *_varying_alike(arrays))

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


# What runs on a platform. Equal ones are equal: what JAX has compiled for one serves the other.
@dataclasses.dataclass(frozen=True)
class _Branch:
    """A form with its options."""

    function: Callable[..., Any]
    options: tuple[tuple[str, Hashable], ...]

    def __call__(self, *arrays: Any) -> Any:
        return self.function(*arrays, **dict(self.options))


@dataclasses.dataclass(frozen=True)
class _Gradient:
    """Cotangent and arrays to the gradients of the arrays. Keeps nothing of the forward pass."""

    of: Callable[..., Any]

    def __call__(self, g: Any, *arrays: Any) -> Any:
        return jax.vjp(self.of, *arrays)[1](g)


@dataclasses.dataclass(frozen=True)
class _Flat:
    """With lists of arrays instead of trees."""

    of: Callable[..., Any]
    tree: Any

    def __call__(self, *flat: Array) -> list[Array]:
        return jax.tree.leaves(self.of(*jax.tree.unflatten(self.tree, flat)))


@dataclasses.dataclass(frozen=True)
class _Batched:
    """Mapped over axes of some arrays."""

    of: Callable[..., Any]
    axes: tuple[int | None, ...]

    def __call__(self, *flat: Array) -> list[Array]:
        return jax.vmap(self.of, in_axes=self.axes)(*flat)


Branches = tuple[tuple[str, Callable[..., Any]], ...]  # by platform; the last is any other's too


# Compiled, so that calls outside of `jit` compile once for all equal arguments.
@functools.partial(jax.jit, static_argnums=0)
def _by_platform(branches: Branches, *arrays: Any) -> Any:
    return _differentiable(branches, *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(branches: Branches, *arrays: Any) -> Any:
    return _lowered(branches, jax.eval_shape(branches[-1][1], *arrays), *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(branches: Branches, g: Any, *arrays: Any) -> Any:
    return _lowered(branches, arrays, g, *arrays)


def _bwd(branches: Branches, arrays: tuple, g: Any) -> Any:
    # A choice again, from the arguments: what a form keeps for its gradient depends on the form.
    return _gradients(tuple((p, _Gradient(f)) for p, f in branches), g, *arrays)


_differentiable.defvjp(lambda branches, *a: (_differentiable(branches, *a), a), _bwd)
_gradients.defvjp(lambda branches, *a: (_gradients(branches, *a), a), _bwd)


def _varying_alike(arrays: tuple) -> tuple:
    """In `jax.shard_map`: all of them differ between the devices between which one does."""
    names = {n for a in jax.tree.leaves(arrays) for n in jax.typeof(a).manual_axis_type.varying}

    def vary(a: Array) -> Array:
        missing = names - jax.typeof(a).manual_axis_type.varying
        return jax.lax.pcast(a, tuple(sorted(missing)), to="varying") if missing else a

    return jax.tree.map(vary, arrays) if names else arrays


def _lowered(branches: Branches, like: Any, *arrays: Any) -> Any:
    """The platform's branch, whose result is `like`."""
    flat, tree = jax.tree.flatten(arrays)
    likes, out_tree = jax.tree.flatten(like)
    branches = tuple((p, _Flat(f, tree)) for p, f in branches)
    out = _form.bind(*flat, branches=branches, shapes=tuple((a.shape, a.dtype) for a in likes))
    return jax.tree.unflatten(out_tree, out)


# An operation of JAX that is lowered to its platform's branch: the others are not even traced.
_form = jax.extend.core.Primitive("form")
_form.multiple_results = True


@_form.def_impl
def _run(*flat: Array, branches: Branches, shapes: Any) -> list[Array]:
    (platform,) = {d.platform for a in flat for d in a.devices()}
    return dict(branches).get(platform, branches[-1][1])(*flat)


@_form.def_abstract_eval
def _shapes(*flat: Any, branches: Branches, shapes: Any) -> list[Any]:
    return [flat[0].update(shape=shape, dtype=dtype, weak_type=False) for shape, dtype in shapes]


def _over_batch(flat: Any, axes: Any, *, branches: Branches, shapes: Any) -> tuple[Any, Any]:
    axes = tuple(axis if isinstance(axis, int) else None for axis in axes)
    (size,) = {a.shape[i] for a, i in zip(flat, axes, strict=True) if i is not None}
    branches = tuple((p, _Batched(f, axes)) for p, f in branches)
    shapes = tuple(((size, *shape), dtype) for shape, dtype in shapes)
    return _form.bind(*flat, branches=branches, shapes=shapes), [0] * len(shapes)


batching.primitive_batchers[_form] = _over_batch


def _lower(platform: str | None, context: Any, *flat: Any, branches: Branches, shapes: Any) -> Any:
    branch = dict(branches).get(platform, branches[-1][1])
    return mlir.lower_fun(branch, multiple_results=True)(context, *flat)


for _platform in ("cpu", "tpu"):
    mlir.register_lowering(_form, functools.partial(_lower, _platform), platform=_platform)
mlir.register_lowering(_form, functools.partial(_lower, None))


def needs_whole_ratio(out: Array, *others: Array | None, **options: Hashable) -> Refusal:
    """A form's refusal: the first array has to be a whole multiple of the last one's size."""
    size, out_size = others[-1].shape[1:3], out.shape[1:3]
    if whole_ratio(size, out_size) is None:
        return f"it needs whole ratios, got {size} to {out_size}"
    return None
