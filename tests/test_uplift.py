"""UPLiFT against the official module, and what is its own."""

import functools

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from resfu_jax import create_upsampler, from_torch
from resfu_jax.convert._state import StateDict
from resfu_jax.convert.uplift import set_attender, set_decoder, set_group, without_counters
from resfu_jax.upsamplers import uplift

OFFICIAL = "mwalmer-umd/UPLiFT:UPLiFT"
PARTS = {"attender": 3, "decoder": 1, "encoder": 1}
WHOLE = [n for n in goldens.names("uplift") if n.split("_")[1] not in PARTS]


@pytest.fixture(params=[False, True], ids=["float32", "x64"])
def x64(request):
    with jax.enable_x64(request.param):
        yield request.param


def maps(g, prefix="in"):
    return {k: jnp.asarray(goldens.nhwc(v)) for k, v in g.group(prefix).items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(call, graphdef, params, rest, arrays, cotangent):
    """Of `call(module, arrays)`, and the statistics after it."""

    def f(params, arrays):
        module = nnx.merge(graphdef, params, rest, copy=True)
        return call(module, arrays), nnx.state(module, nnx.BatchStat)

    out, vjp, after = jax.vjp(f, params, arrays, has_aux=True)
    return out, after, vjp(cotangent)


def check(g, module, gradients, call, **arrays):
    """Output and gradients, to inputs and to parameters; the statistics after the call."""
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    cotangent = maps(g)["cotangent"]
    y, after, (d_params, d_arrays) = value_and_gradients(
        call, graphdef, params, rest, arrays, cotangent
    )
    goldens.assert_close(y, goldens.nhwc(g.arrays["out/y"]), g.tol_out, "y")
    for name in d_arrays.keys() - {n for n in d_arrays if n.startswith("noise")}:
        d = d_arrays[name]
        goldens.assert_close(d, goldens.nhwc(g.arrays[f"grad/in/{name}"]), g.tol_grad, name)
    leaves = jax.tree_util.tree_leaves_with_path(d_params)
    wanted = jax.tree.leaves(nnx.state(gradients, nnx.Param))
    for (path, a), b in zip(leaves, wanted, strict=True):
        goldens.assert_close(a, b, g.tol_grad, jax.tree_util.keystr(path))
        assert np.any(b)
    return after


def upsampled(outsize, up, arrays):
    noise = [v for k, v in arrays.items() if k.startswith("noise")] or None
    x, passes = arrays["features"], up.passes
    size = outsize or tuple(2**passes * n for n in x.shape[1:3])
    return up(x, arrays["image"], size, noise=noise)


CALLS = {size: functools.partial(upsampled, size) for size in (None, (14, 19))}


# `test_attender` has all forms at both precisions; each whole module takes seconds to compile.
@pytest.mark.parametrize(
    ("name", "implementation", "x64"),
    [(name, None, x64) for name in WHOLE for x64 in (False, True)]
    + [("uplift_p16_x2", form, True) for form in ("reference", "xla", "cpu")],
    indirect=["x64"],
)
def test_module(name, implementation, x64):
    g = goldens.load(name, x64=x64)
    args = g.args | dict(iters=g.meta["iters"])
    state = g.group("param")
    up = from_torch(OFFICIAL, state, **args)
    assert up.attender.implementation is None
    up.attender.implementation = implementation
    if g.meta["train_mode"]:
        up = nnx.view(up, use_running_average=False)
    gradients = from_torch(OFFICIAL, state | g.group("grad/param"), **args)
    arrays = maps(g)
    del arrays["cotangent"]
    outsize = g.meta["outsize"] and tuple(g.meta["outsize"])
    after = check(g, up, gradients, CALLS[outsize], **arrays)
    if g.meta["train_mode"]:
        wanted = from_torch(OFFICIAL, state | g.group("out/after"), **args)
        wanted = jax.tree.leaves(nnx.state(wanted, nnx.BatchStat))
        for a, b in zip(jax.tree.leaves(after), wanted, strict=True):
            goldens.assert_close(a, b, g.tol_out, "statistics")


def guided(module, arrays):
    return module(arrays["guide"], arrays["value"])


@pytest.mark.parametrize("implementation", ["reference", "xla", "cpu", None])
@pytest.mark.parametrize("name", goldens.names("uplift_attender"))
def test_attender(name, implementation, x64):
    g = goldens.load(name, x64=x64)

    def build(prefix):
        attender = uplift.LocalAttender(
            g.args["in_channels"],
            g.args["num_connected"],
            skip=g.args["conv_res"],
            implementation=implementation,
            param_dtype=jnp.float32,
            rngs=nnx.Rngs(0),
        )
        s = StateDict(g.group(prefix), "LocalAttender")
        set_attender(s, attender, "")
        s.done()
        return attender

    arrays = {k: v for k, v in maps(g).items() if k != "cotangent"}
    check(g, build("param"), build("grad/param"), guided, **arrays)


def decoded(decoder, arrays):
    return decoder(arrays["x"], [arrays["enc_0"], arrays["enc_1"]])


def test_decoder(x64):
    g = goldens.load("uplift_decoder_tconv", x64=x64)

    def build(state):
        widths = [g.args["cfg"][f"block_{i}"]["hc"] for i in range(2)]
        n, (outer, deepest) = g.args["in_channels"], g.args["enc_channels"]
        decoder = uplift.Decoder(
            (n + deepest, outer),
            widths,
            convs=2,
            norm="batch",
            param_dtype=jnp.float32,
            rngs=nnx.Rngs(0),
        )
        s = StateDict(without_counters(state), "UPLiFTDecoder")
        set_decoder(s, decoder, "")
        s.done()
        return decoder

    state = g.group("param")
    arrays = {k: v for k, v in maps(g).items() if k != "cotangent"}
    check(g, build(state), build(state | g.group("grad/param")), decoded, **arrays)


def encoded(up, arrays):
    return jnp.concatenate(up.encode(arrays["image"]), axis=-1)


def test_encoder(x64):
    g = goldens.load("uplift_encoder_batchnorm", x64=x64)

    def build(state):
        groups = tuple(tuple(g.args[f"block_{i}"]["hc"]) for i in range(g.args["down_steps"] + 1))
        up = create_upsampler("uplift", features=4, scale=2, encoder=groups)
        s = StateDict(without_counters(state), "UPLiFTEncoder")
        for i, group in enumerate(up.encoder):
            set_group(s, group, f"block_{i}")
        s.done()
        del up.decoder, up.attender
        return up

    state = g.group("param")
    image = maps(g)["image"]
    check(g, build(state), build(state | g.group("grad/param")), encoded, image=image)


def test_every_golden_is_compared():
    assert len(WHOLE) == 5
    assert len(goldens.names("uplift")) == len(WHOLE) + sum(PARTS.values())
