"""FreqFusion against the official module, and what is its own."""

import functools

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from resfu_jax import from_torch

NAMES = goldens.names("freqfusion")
OFFICIAL = "Linwei-Chen/FreqFusion:FreqFusion"


@pytest.fixture(params=[False, True], ids=["float32", "x64"])
def x64(request):
    with jax.enable_x64(request.param):
        yield request.param


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(graphdef, params, x, y, cotangents):
    def fuse(params, x, y):
        return nnx.merge(graphdef, params).fuse(x, y)

    out, vjp = jax.vjp(fuse, params, x, y)
    return out, nnx.merge(graphdef, params).attention(x, y), vjp(cotangents)


@pytest.mark.parametrize("implementation", ["reference", "xla", "cpu", None])
@pytest.mark.parametrize("name", NAMES)
def test_module(name, implementation, x64):
    g = goldens.load(name, x64=x64)
    up = from_torch(OFFICIAL, g.group("param"), **g.args)
    y, x, cotangent = (
        jnp.asarray(goldens.nhwc(g.arrays[f"in/{n}"])) for n in ("hr_feat", "lr_feat", "cotangent")
    )
    if implementation == "cpu" and g.meta["scale"] is None and "nosemi" not in name:
        pytest.skip("the CPU's form needs whole ratios")
    up.implementation = implementation
    buffers = {k: g.arrays[k] for k in g.meta["buffers"]}
    buffers = {k.removeprefix("param/"): v for k, v in buffers.items()}
    wanted = nnx.state(from_torch(OFFICIAL, g.group("grad/param") | buffers, **g.args), nnx.Param)
    cg = y.shape[3]
    cotangents = cotangent[..., cg:], cotangent[..., :cg]
    (low, high), mask, (d_params, dx, dy) = value_and_gradients(*nnx.split(up), x, y, cotangents)
    out = jnp.concatenate([high, low], axis=-1)
    goldens.assert_close(out, goldens.nhwc(g.arrays["out/y"]), g.tol_out, "y")
    goldens.assert_close(mask, goldens.nhwc(g.arrays["stage/mask_lr"]), g.tol_out, "mask_lr")
    goldens.assert_close(dx, goldens.nhwc(g.arrays["grad/in/lr_feat"]), g.tol_grad, "d_x")
    goldens.assert_close(dy, goldens.nhwc(g.arrays["grad/in/hr_feat"]), g.tol_grad, "d_y")
    leaves = jax.tree_util.tree_leaves_with_path(d_params)
    for (path, a), b in zip(leaves, jax.tree.leaves(wanted), strict=True):
        goldens.assert_close(a, b, g.tol_grad, jax.tree_util.keystr(path))
        assert np.any(b)


def test_every_golden_is_compared():
    assert len(NAMES) == 8
