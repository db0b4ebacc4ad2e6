"""JAFAR and AnyUp: against the official modules, and what the common suite does not know of them."""

import functools

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from resfu_jax import from_torch

FORMS = ["reference", "xla"]  # the latter is what None takes on every platform
OFFICIAL = {"jafar": "PaulCouairon/JAFAR:JAFAR", "anyup": "wimmerth/anyup:AnyUp"}
MODULES = goldens.names("jafar_q16", "anyup_q16")
BLOCKS = goldens.names("anyup_natten_block")


@pytest.fixture(params=[False, True], ids=["float32", "x64"])
def x64(request):
    with jax.enable_x64(request.param):
        yield request.param


@functools.partial(jax.jit, static_argnums=(0, 4))
def value_and_gradients(graphdef, params, inputs, cotangent, keywords=()):
    y, vjp = jax.vjp(lambda p, i: nnx.merge(graphdef, p)(*i, **dict(keywords)), params, inputs)
    return y, vjp(cotangent)


def last(a):
    return jnp.asarray(goldens.nhwc(a))


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("name", MODULES + BLOCKS)
def test_golden(name, implementation, x64):
    g = goldens.load(name, x64=x64)
    block = name in BLOCKS
    cls = "NATTENCrossAttentionBlock" if block else OFFICIAL[name.partition("_")[0]]
    args = g.args | g.meta.get("call_kwargs", {})  # AnyUp's q_chunk_size, which changes nothing
    module = from_torch(cls, g.group("param"), **args)
    wanted = nnx.state(from_torch(cls, g.group("grad/param"), **args), nnx.Param)
    names = ("q", "k", "v") if block else ("features", "image")
    inputs = [last(g.arrays[f"in/{n}"]) for n in names]
    keywords = {}
    if block:
        keywords["implementation"] = implementation
    else:
        module.implementation = implementation
        keywords["output_size"] = tuple(g.meta["output_size"])
    y, (d_params, d_inputs) = value_and_gradients(
        *nnx.split(module), inputs, last(g.arrays["in/cotangent"]), tuple(keywords.items())
    )
    goldens.assert_close(y, goldens.nhwc(g.arrays["out/y"]), g.tol_out, "y")
    for n, d in zip(names, d_inputs, strict=True):
        goldens.assert_close(d, goldens.nhwc(g.arrays[f"grad/in/{n}"]), g.tol_grad, f"d_{n}")
    leaves = jax.tree_util.tree_leaves_with_path(d_params)
    for (path, a), b in zip(leaves, jax.tree.leaves(wanted), strict=True):
        goldens.assert_close(a, b, g.tol_grad, jax.tree_util.keystr(path))
        assert np.any(b)


def test_what_conversion_drops_has_no_gradient():
    for name in MODULES + BLOCKS:
        g = goldens.load(name)
        for key, d in g.group("grad/param").items():
            n = len(d) // 3
            unused = f"param/{key}" in g.meta["unused"] + g.meta["zero_grads"]
            if key.endswith("in_proj_bias"):  # its keys' and values' thirds
                d, unused = d[n:], True
            elif key.endswith("in_proj_weight"):  # its values' third
                d, unused = d[2 * n :], True
            assert unused == (np.abs(d).max() <= 1e-6 * g.meta["grad_scale"]), (name, key)
