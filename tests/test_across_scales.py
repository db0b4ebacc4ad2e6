"""NAF and RaysUp against the official modules, and what they promise."""

import functools

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from resfu_jax import from_torch

FAMILIES = {"naf": 5}


@pytest.fixture(params=[False, True], ids=["float32", "x64"])
def x64(request):
    with jax.enable_x64(request.param):
        yield request.param


def official(g):
    return f"{g.meta['repo']}:{g.meta['official_class'].split()[0]}"


@functools.partial(jax.jit, static_argnums=(0, 4))
def value_and_gradients(graphdef, params, inputs, cotangent, size, **keywords):
    y, vjp = jax.vjp(lambda p, i: nnx.merge(graphdef, p)(*i, size, **keywords), params, inputs)
    return y, vjp(cotangent)


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas", None])
@pytest.mark.parametrize("name", goldens.names(*FAMILIES))
def test_equals_the_official_module(name, implementation, x64):
    g = goldens.load(name, x64=x64)
    module = from_torch(official(g), g.group("param"), **g.args)
    assert module.implementation is None
    module.implementation = implementation
    arrays = {k: jnp.asarray(v) for k, v in g.group("in").items()}
    features, image, cotangent = (
        jnp.moveaxis(arrays[k], 1, -1) for k in ("features", "image", "cotangent")
    )
    keywords = {}
    if "c2w" in arrays:
        keywords["cameras"] = arrays["c2w"], arrays["fxfycxcy"]
    size = tuple(g.meta["output_size"])
    y, (d_params, (d_features, d_image)) = value_and_gradients(
        *nnx.split(module), (features, image), cotangent, size, **keywords
    )
    goldens.assert_close(y, goldens.nhwc(g.arrays["out/y"]), g.tol_out, "y")
    for what, d in (("features", d_features), ("image", d_image)):
        goldens.assert_close(d, goldens.nhwc(g.arrays[f"grad/in/{what}"]), g.tol_grad, what)
    buffers = {k: g.arrays[f"param/{k}"] for k in g.meta["buffers"]}
    wanted = from_torch(official(g), g.group("grad/param") | buffers, **g.args)
    leaves = jax.tree_util.tree_leaves_with_path(d_params)
    for (path, a), b in zip(leaves, jax.tree.leaves(nnx.state(wanted)), strict=True):
        what = jax.tree_util.keystr(path)
        if np.any(b):
            goldens.assert_close(a, b, g.tol_grad, what)
        else:  # on principle, as the goldens' `zero_grads`
            assert np.abs(a).max() <= 1e-4 * g.meta["grad_scale"], what
    zeros = sum(not np.any(b) for b in jax.tree.leaves(nnx.state(wanted)))
    assert zeros == len(g.zero_grads)
