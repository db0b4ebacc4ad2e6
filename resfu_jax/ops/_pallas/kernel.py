"""How a kernel is called: where it is lowered, under `vmap`, and its gradient.

What platform a call is lowered for, and on how many devices, only a lowering rule knows. So a call
that nobody asked for by name is a primitive of JAX:

* On a TPU it is the kernel. Programs that XLA splits over several devices have the portable form
  instead, as XLA cannot split a kernel; in `jax.shard_map` each device's part is a program of one.
* Elsewhere it is the portable form, too: one export for several platforms lowers all branches of a
  choice for each of them.
* `vmap` makes one batch of all.

Asked for by name it is the kernel, and Pallas says what it needs; on a CPU,
`pltpu.force_tpu_interpret_mode()`. The gradient is that of the portable form, from the arguments.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array

from resfu_jax.ops._forms import Form, Refusal


def kernel_form(
    kernel: Callable[..., Array], portable: Callable[..., Array], refusal: Callable[..., Refusal]
) -> Form:
    """The form of an op whose arrays all have the batch as their first axis.

    Args:
      kernel: of the arguments of a form; calls Pallas.
      portable: the form that serves where the kernel does not.
      refusal: as of a form.
    """

    def named(*arrays: Any, **options) -> Array:
        return _differentiable(kernel, portable, tuple(options.items()), *arrays)

    def chosen(*arrays: Any, **options) -> Array:
        return _differentiable(bind, portable, tuple(options.items()), *arrays)

    def bind(*arrays: Any, **options) -> Array:
        return _bind(kernel, portable, tuple(options.items()), *arrays)

    return Form(named, refusal, chosen)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _differentiable(forward: Callable, portable: Callable, options: tuple, *arrays: Any) -> Array:
    return forward(*arrays, **dict(options))


def _fwd(forward, portable, options, *arrays):
    return forward(*arrays, **dict(options)), arrays


def _bwd(forward, portable, options, arrays, g):
    return jax.vjp(functools.partial(portable, **dict(options)), *arrays)[1](g)


_differentiable.defvjp(_fwd, _bwd)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _bind(kernel: Callable, portable: Callable, options: tuple, *arrays: Any) -> Array:
    leaves, tree = jax.tree.flatten(arrays)
    return _kernel_p.bind(*leaves, kernel=kernel, portable=portable, options=options, tree=tree)


_kernel_p = Primitive("tpu_kernel")


def _of_leaves(f: Callable, options: tuple, tree: Any) -> Callable[..., Array]:
    return lambda *leaves: f(*jax.tree.unflatten(tree, leaves), **dict(options))


@_kernel_p.def_abstract_eval
def _abstract(*leaves, kernel, portable, options, tree):
    # With the types of the leaves, which in `jax.shard_map` say along which axes they vary.
    (out,) = jax.make_jaxpr(_of_leaves(portable, options, tree))(*leaves).out_avals
    return out


def _batched(leaves, axes, **params):
    (count,) = {a.shape[i] for a, i in zip(leaves, axes, strict=True) if i is not None}
    leaves = [
        jnp.broadcast_to(a[None], (count, *a.shape)) if i is None else jnp.moveaxis(a, i, 0)
        for a, i in zip(leaves, axes, strict=True)
    ]
    out = _kernel_p.bind(*(a.reshape(count * a.shape[1], *a.shape[2:]) for a in leaves), **params)
    return out.reshape(count, leaves[0].shape[1], *out.shape[1:]), 0


def _lower(ctx, *leaves, kernel, portable, options, tree, whole=False):
    f = _of_leaves(kernel if whole else portable, options, tree)
    return mlir.lower_fun(f, multiple_results=False)(ctx, *leaves)


def _lower_for_tpu(ctx, *leaves, **params):
    """The kernel where XLA will not split the program: on one device, and in `jax.shard_map`."""
    context = ctx.module_context.axis_context
    if (mesh := getattr(context, "mesh", None)) is not None:
        whole = mesh.size == 1 or set(context.manual_axes) == set(mesh.axis_names)
    else:
        whole = getattr(context, "num_devices", 1) == 1
    return _lower(ctx, *leaves, whole=whole, **params)


batching.primitive_batchers[_kernel_p] = _batched
mlir.register_lowering(_kernel_p, _lower)
mlir.register_lowering(_kernel_p, _lower_for_tpu, platform="tpu")
