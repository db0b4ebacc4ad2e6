"""UPLiFT against the official module, and what is its own."""

import functools

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from resfu_jax import create_upsampler, from_torch
from resfu_jax.convert._state import StateDict
from resfu_jax.convert.uplift import set_attender, set_decoder, set_group, without_counters
from resfu_jax.upsamplers import uplift

OFFICIAL = "mwalmer-umd/UPLiFT:UPLiFT"
PARTS = {"attender": 3, "decoder": 1, "encoder": 1}
WHOLE = [n for n in goldens.names("uplift") if n.split("_")[1] not in PARTS]


def by_form(names):
    """In float32 by the form that is chosen; in float64, where no mistake hides, by all."""
    cases = [(name, None, x64) for name in names for x64 in (False, True)]
    cases += [(name, form, True) for name in names for form in ("reference", "xla", "cpu")]
    return pytest.mark.parametrize(("name", "implementation", "x64"), cases, indirect=["x64"])


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


@by_form(WHOLE)
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


@by_form(goldens.names("uplift_attender"))
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


# ------------------------------------------------------------------------------------- its own
SMALL = dict(encoder=((6,), (8,)), decoder=((10,), (12,)))
C = 5


@functools.cache
def build(scale=4, **options):
    return create_upsampler("uplift", features=C, scale=scale, **SMALL | options)


def inputs(size=(3, 4), image=(9, 14), batch=2, dtype=jnp.float32):
    x = jax.random.normal(jax.random.key(0), (batch, *size, C), dtype)
    return x, jax.random.normal(jax.random.key(1), (batch, *image, 3), dtype)


@functools.partial(jax.jit, static_argnames="output_size")
def run(up, x, image, output_size=None, **keywords):
    return up(x, image, output_size, **keywords)


@pytest.mark.parametrize(
    ("size", "image", "output", "options"),
    [
        ((3, 5), (7, 13), (9, 31), {}),
        ((1, 1), (2, 1), None, dict(patch=14)),
        ((2, 1), (32, 5), (8, 4), dict(scale=2)),
    ],
)
def test_any_sizes(size, image, output, options):
    y = run(build(**options), *inputs(size, image), output_size=output)
    assert y.shape == (2, *(output or image), C)
    assert np.isfinite(y).all()


def test_outputs_are_means():
    """At borders, too, and after the resizing."""
    up, (x, image) = build(), inputs()
    y = run(up, x, image)
    assert (y >= x.min((1, 2), keepdims=True) - 1e-5).all()
    assert (y <= x.max((1, 2), keepdims=True) + 1e-5).all()
    np.testing.assert_allclose(run(up, jnp.full_like(x, 2.5), image), 2.5, rtol=1e-5)
    np.testing.assert_allclose(run(up, x, image, values=x), y, rtol=1e-6)
    one = run(up, x, image, values=x[..., :1])
    np.testing.assert_allclose(one, y[..., :1], rtol=1e-5, atol=1e-6)
    low = [a.astype(jnp.bfloat16) for a in (x, image)]
    y_low = run(up, *low)
    assert y_low.dtype == jnp.bfloat16
    np.testing.assert_allclose(y_low.astype(jnp.float32), y, atol=0.1 * np.abs(y).max())


def test_exports_with_symbolic_sizes():
    up = build(scale=2, patch=14)
    b, h, w = export.symbolic_shape("b, h, w", constraints=["h >= 2", "w >= 2"])
    shapes = (b, h, w, C), (b, 3 * h, 3 * w, 3)
    exported = export.export(jax.jit(up.__call__), platforms=["cpu", "tpu"])(
        *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
    )
    arrays = inputs((3, 4), (9, 12))
    y = export.deserialize(exported.serialize()).call(*arrays)
    np.testing.assert_allclose(y, run(up, *arrays), atol=2e-5)


def test_noise():
    """The draws of a key, and always the same without one."""
    up = build(scale=2, norm="layer", noise=2, refiner=(7,))
    assert up.mixes and not up.weights_are_convex
    x, image = inputs(batch=1)
    y = run(up, x, image)
    np.testing.assert_array_equal(run(up, x, image, noise=jax.random.key(0)), y)
    key = jax.random.key(3)
    shapes = [(1, 3, 4, 2), (1, 6, 8, 2), (1, 6, 8, 2)]
    draws = [jax.random.normal(jax.random.fold_in(key, i), s) for i, s in enumerate(shapes)]
    drawn = run(up, x, image, noise=key)
    np.testing.assert_allclose(run(up, x, image, noise=draws), drawn, rtol=1e-4, atol=1e-5)
    assert np.abs(drawn - y).max() > 1e-4
    with pytest.raises(ValueError, match="values must not be given: the refiner"):
        up(x, image, values=x)
    with pytest.raises(ValueError, match="noise must not be given"):
        build()(x, image, noise=key)


def test_training_is_asked_for():
    """BatchNorm's statistics stay as they are until a view says otherwise."""
    up = build(scale=2)
    before = jax.tree.leaves(nnx.state(up, nnx.BatchStat))
    for view, changed in ((up, False), (nnx.view(up, use_running_average=False), True)):
        graphdef, state = nnx.split(view)

        @jax.jit
        def statistics(state, x, image, graphdef=graphdef):
            up = nnx.merge(graphdef, state, copy=True)
            up(x, image)
            return nnx.state(up, nnx.BatchStat)

        after = jax.tree.leaves(statistics(state, *inputs()))
        for a, b in zip(before, after, strict=True):
            assert np.array_equal(a, b) != changed


def test_initial_weights():
    """PyTorch's: uniform within 1 / sqrt(fan in), biases, too."""
    up = create_upsampler("uplift", features=64)
    block = up.decoder.group_0.blocks[0]
    for parameter, fan in [
        (block.convs[0].kernel, 9 * (64 + 128)),
        (block.last.kernel, 64),
        (block.last.bias, 64),
        (up.decoder.double.kernel, 4 * 64),
        (up.decoder.double.bias, 4 * 64),
        (up.attender.kernel, 64),
        (up.attender.bias, 64),
    ]:
        bound = fan**-0.5
        assert 0.6 * bound < np.abs(parameter[...]).max() <= bound
        assert abs(parameter[...].mean()) < 4 * bound / (3 * parameter.size) ** 0.5
    assert block.convs[0].bias is None


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (dict(features=384), 789_521),
        (
            dict(
                features=4,
                encoder=tuple((n, n) for n in (64, 128, 256, 512, 512)),
                decoder=((512,), (512, 512)),
                decoder_convs=1,
                norm="layer",
                noise=4,
                refiner=(512,) * 12,
            ),
            53_487_445,
        ),
    ],
)
def test_parameter_counts_as_published(options, count):
    up = nnx.eval_shape(lambda: create_upsampler("uplift", scale=16, **options))
    assert sum(p.size for p in jax.tree.leaves(nnx.state(up, nnx.Param))) == count


# tests/conftest.py switches it off, in versions that can.
AS_IN_USE = {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else {}


def test_memory():
    """28 x 28 to 448 x 448, 384 channels, in outputs; what the official module pools is 17."""
    up = nnx.eval_shape(lambda: create_upsampler("uplift", features=384, scale=16))
    graphdef, state = nnx.split(up)
    x, image = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 28, 28, 384), (1, 448, 448, 3)))
    f = jax.jit(lambda state, *arrays: nnx.merge(graphdef, state)(*arrays))
    memory = f.lower(state, x, image).compile(AS_IN_USE).memory_analysis()
    assert memory.temp_size_in_bytes <= 1.3 * memory.output_size_in_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(scale=3), "scale must be a power of two"),
        (dict(scale=1), "scale must be a power of two"),
        (dict(attender=16), "attender must be one of"),
        (dict(norm="group"), "norm must be one of"),
        (dict(encoder=((8,),)), "encoder must be groups of widths, two or more"),
        (dict(decoder=((8,), (0,))), "decoder must be groups of widths|decoder must be positive"),
        (dict(decoder_convs=3), "convs must be one of"),
        (dict(noise=-1), "noise must be a whole number"),
        (dict(implementation="cuda"), "implementation must be one of"),
    ],
)
def test_wrong_options_are_named(options, message, as_users_call):
    with pytest.raises(ValueError, match=message):
        create_upsampler("uplift", **dict(features=4, scale=4) | options)


def test_wrong_inputs_are_named(as_users_call):
    up, (x, image) = build(), inputs()
    for args, message in [
        ((x[..., :2], image), "features must be"),
        ((x, image[..., :2]), "image must be"),
        ((x, image[:1]), "image must have the features' batch size"),
        ((x, image, (0, 3)), "output_size must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            up(*args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(enc_share=False), "cfg is read with enc_share=True only, got False"),
        (dict(attender=7), "attender must be one of"),
        (dict(decoder=dict(up_steps=2)), "cfg.decoder is read with up_steps=1 only, got 2"),
        (dict(encoder=dict(block_1=dict(norm="layer"))), "norm='batch' only, got 'layer'"),
        (dict(encoder=dict(block_1=dict(block="Other"))), "one of SingleConv, DoubleConv"),
        (dict(encoder=dict(block_1=dict(hc=[7]))), "has shape"),
    ],
)
def test_from_torch_tells_what_is_wrong(change, message):
    g = goldens.load("uplift_p16_x2")

    def changed(cfg, change):
        nested = {k: changed(cfg[k], v) for k, v in change.items() if isinstance(v, dict)}
        return cfg | change | nested

    args = g.args | dict(cfg=changed(g.args["cfg"], change))
    with pytest.raises(ValueError, match=message):
        from_torch(OFFICIAL, g.group("param"), **args)
