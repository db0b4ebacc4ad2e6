"""LoftUp and FeatUp: goldens, and what is particular to them."""

import functools

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from resfu_jax import create_upsampler, from_torch, ops
from resfu_jax._layers import LayerNorm
from resfu_jax.ops import _rows
from resfu_jax.ops.adaptive_filter import reflected
from resfu_jax.upsamplers.loftup import FourierFeatures, coordinates, scaled

# tests/conftest.py switches it off, in versions that can.
AS_IN_USE = {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else {}

NAMES = ("loftup", "featup", "featup_jbu")
every = pytest.mark.parametrize("name", NAMES)


def last(a):
    return jnp.asarray(goldens.nhwc(a))


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(graphdef, params, others, inputs, cotangent):
    def f(params, inputs):
        up = nnx.merge(graphdef, params, others, copy=True)
        return up(*inputs), nnx.state(up, nnx.BatchStat)

    y, vjp, statistics = jax.vjp(f, params, inputs, has_aux=True)
    return y, statistics, vjp(cotangent)


def compare(g, names, module, wanted, tol_out, tol_grad):
    """Output, statistics after the call, and gradients, where they have a tolerance."""
    inputs = [last(g.arrays[f"in/{n}"]) for n in names]
    cotangent = last(g.arrays["in/cotangent"])
    y, statistics, (d_params, d_inputs) = value_and_gradients(
        *nnx.split(module, nnx.Param, ...), inputs, cotangent
    )
    goldens.assert_close(y, goldens.nhwc(g.arrays["out/y"]), tol_out, "y")
    if tol_grad is None:
        return statistics
    for n, d in zip(names, d_inputs, strict=True):
        if f"in/{n}" in g.meta["unused"]:
            np.testing.assert_array_equal(d, 0)
        else:
            goldens.assert_close(d, goldens.nhwc(g.arrays[f"grad/in/{n}"]), tol_grad, f"d_{n}")
    leaves = jax.tree_util.tree_leaves_with_path(d_params)
    for (path, a), b in zip(leaves, jax.tree.leaves(wanted), strict=True):
        if np.any(b):
            goldens.assert_close(a, b, tol_grad, jax.tree_util.keystr(path))
        else:
            assert np.abs(a).max() <= 1e-4 * g.meta["grad_scale"], path
    return statistics


def with_gradients(g, **options):
    """The module that has the gradients as its parameters."""
    cls = f"{g.meta['repo']}:{g.meta['official_class'].split()[0]}"
    buffers = {k: g.arrays[f"param/{k}"] for k in g.meta["buffers"]}
    grads = g.group("grad/param") | buffers
    return from_torch(cls, g.group("param"), **g.args, **options), nnx.state(
        from_torch(cls, grads, **g.args), nnx.Param
    )


LONG = [("featup_jbu_stack", form) for form in ("reference", "xla", None)]
LONG += [("featup_jbu_r2_stages", form) for form in ("reference", "xla")]


@goldens.forms
@pytest.mark.parametrize("name", goldens.names("featup_jbu"))
def test_featup(name, implementation, x64):
    """Every form in float64, the best in float32, too; the stack is four of the others."""
    if (implementation is not None and not x64) or (name, implementation) in LONG:
        pytest.skip("another case compares it")
    g = goldens.load(name, x64=x64)
    module, wanted = with_gradients(g, implementation=implementation)
    compare(g, ("source", "guidance"), module, wanted, g.tol_out, g.tol_grad)


@pytest.mark.parametrize("name", goldens.names("loftup_d"))
def test_loftup(name, x64):
    """In float32, the phases of the high frequencies are known to a few thousandths."""
    g = goldens.load(name, x64=x64)
    module, wanted = with_gradients(g)
    if g.meta["train_mode"]:
        module.train()
    tight = x64 or name.endswith("lowfreq")
    statistics = compare(
        g,
        ("lr_feats", "image"),
        module,
        wanted,
        g.tol_out if tight else 5e-3,
        g.tol_grad if tight else None,
    )
    if g.meta["train_mode"]:
        for i, bn in ((2, "bn1"), (5, "bn2")):
            for ours, official in (("mean", "running_mean"), ("var", "running_var")):
                a, b = statistics["queries"][bn][ours], f"out/after/first_conv.{i}.{official}"
                goldens.assert_close(a[...], g.arrays[b], 1e-6 if x64 else 2e-3, b)


def test_stages_of_featup(x64):
    g = goldens.load("featup_jbu_r2_stages", x64=x64)
    up, _ = with_gradients(g)
    image, x = last(g.arrays["in/guidance"]), last(g.arrays["in/source"])
    stage = {k: v for k, v in g.group("stage").items()}
    temperature = jnp.exp(up.log_temperature[...])
    kernel = jax.nn.softmax(up.scores(image) * temperature)
    goldens.assert_close(kernel, goldens.nhwc(stage["range_kernel"]), g.tol_out, "range_kernel")
    combined = stage["combined_kernel"].reshape(1, 8, 10, 25)
    goldens.assert_close(up.weights(image), combined, g.tol_out, "combined_kernel")
    padded = ops.resize(x, (8, 10), method="bicubic")
    for axis in (1, 2):
        padded = reflected(padded, 2, axis)
    wanted = goldens.nhwc(stage["hr_source_padded"])
    goldens.assert_close(padded, wanted, g.tol_out, "hr_source_padded")


def test_stages_of_loftup(x64):
    g = goldens.load("loftup_d12_stages", x64=x64)
    up, _ = with_gradients(g)
    x, image = last(g.arrays["in/lr_feats"]), last(g.arrays["in/image"])
    tol = 5e-7 if x64 else 1e-2
    stage = {k: goldens.nhwc(v) for k, v in g.group("stage").items()}
    image = scaled(image, per_image=False)
    goldens.assert_close(image, stage["minmax"], tol, "minmax")
    goldens.assert_close(up.queries(image, image.dtype), stage["first_conv"], tol, "first_conv")
    goldens.assert_close(up.tokens(x)[..., 12:], stage["lr_pe"], tol, "lr_pe")


@pytest.mark.parametrize("name", goldens.names("loftup_fourier"))
def test_fourier_features(name):
    with jax.enable_x64(True):
        g = goldens.load(name, x64=True)
        colors, biases = g.args["color_feats"], g.group("param").get("biases")
        up = FourierFeatures(
            5 if colors else 2, g.args["n_freqs"], param_dtype=jnp.float64, rngs=nnx.Rngs(0)
        )

        graphdef, state = nnx.split(up)

        def f(x, phases):
            up = nnx.merge(graphdef, jax.tree.map(lambda _: phases, state))
            rows, columns = coordinates(x.shape[1:3], x.dtype)
            parts = [jnp.broadcast_to(a, (*x.shape[:3], 1)) for a in (rows, columns)]
            parts = [*parts, *([x] if colors else [])]
            y = up(jnp.concatenate(parts, axis=-1))
            return jnp.concatenate([y, x], axis=-1) if colors else y

        phases = jnp.zeros_like(up.phases[...])
        if biases is not None:
            phases = jnp.asarray(biases).reshape(phases.shape)
        y, vjp = jax.vjp(f, last(g.arrays["in/x"]), phases)
        goldens.assert_close(y, goldens.nhwc(g.arrays["out/y"]), 5e-7, "y")
        dx, d_phases = vjp(last(g.arrays["in/cotangent"]))
        if colors:
            goldens.assert_close(dx, goldens.nhwc(g.arrays["grad/in/x"]), 5e-7, "dx")
        if biases is not None:
            wanted = g.arrays["grad/param/biases"].reshape(phases.shape)
            goldens.assert_close(d_phases, wanted, 5e-7, "d_biases")


def test_scaled_colours(x64):
    g = goldens.load("loftup_minmax", x64=x64)
    y, vjp = jax.vjp(functools.partial(scaled, per_image=False), last(g.arrays["in/x"]))
    goldens.assert_close(y, goldens.nhwc(g.arrays["out/y"]), g.tol_out, "y")
    (dx,) = vjp(last(g.arrays["in/cotangent"]))
    goldens.assert_close(dx, goldens.nhwc(g.arrays["grad/in/x"]), g.tol_grad, "dx")


def test_channel_norm(x64):
    g = goldens.load("featup_channelnorm", x64=x64)
    norm = LayerNorm(6, param_dtype=jnp.float32)
    norm.scale.set_value(jnp.asarray(g.arrays["param/norm.weight"]))
    norm.bias.set_value(jnp.asarray(g.arrays["param/norm.bias"]))
    y, vjp = jax.vjp(norm, last(g.arrays["in/x"]))
    goldens.assert_close(y, goldens.nhwc(g.arrays["out/y"]), g.tol_out, "y")
    (dx,) = vjp(last(g.arrays["in/cotangent"]))
    goldens.assert_close(dx, goldens.nhwc(g.arrays["grad/in/x"]), g.tol_grad, "dx")


@goldens.forms
@pytest.mark.parametrize("op", [ops.adaptive_filter, None], ids=["filter", "reassembly"])
def test_adaptive_convolution(op, implementation, x64):
    """The official operator, of a map with a border: of the whole map, where borders weigh 0."""
    g = goldens.load("featup_adaptive_conv", x64=x64)

    def f(x, filters):
        weights = ops.pad(filters.reshape(2, 5, 6, 25), (2, 2))
        run = op or (lambda x, w, **o: ops.local_reassembly(w, x, **o))
        return run(x, weights, implementation=implementation)[:, 2:-2, 2:-2]

    @jax.jit
    def run(x, filters, cotangent):
        y, vjp = jax.vjp(f, x, filters)
        return y, *vjp(cotangent)

    y, dx, d_filters = run(
        last(g.arrays["in/x"]), jnp.asarray(g.arrays["in/filters"]), last(g.arrays["in/cotangent"])
    )
    goldens.assert_close(y, goldens.nhwc(g.arrays["out/y"]), g.tol_out, "y")
    goldens.assert_close(dx, goldens.nhwc(g.arrays["grad/in/x"]), g.tol_grad, "dx")
    goldens.assert_close(d_filters, g.arrays["grad/in/filters"], g.tol_grad, "d_filters")


@pytest.mark.parametrize("implementation", ["xla", "cpu"])
@pytest.mark.parametrize(
    ("size", "out", "kernel"),
    [
        ((24, 3), (48, 6), 3),  # several blocks
        ((6, 5), (6, 5), 7),  # nothing to resize; a map smaller than the window
        ((1, 1), (2, 2), 7),
        ((4, 5), (13, 11), 3),
        ((3, 20), (12, 37), 5),
        ((8, 8), (4, 4), 3),
    ],
)
def test_forms_of_adaptive_filter(size, out, kernel, implementation, monkeypatch):
    monkeypatch.setattr(_rows, "BLOCK_VALUES", 100)
    keys = jax.random.split(jax.random.key(0), 3)
    x, weights, cotangent = (
        jax.random.normal(k, (2, *s, c))
        for k, s, c in zip(keys, (size, out, out), (4, kernel**2, 4), strict=True)
    )

    def run(implementation):
        f = functools.partial(ops.adaptive_filter, implementation=implementation)
        y, vjp = jax.vjp(f, x, weights)
        return y, *vjp(cotangent)

    ours, wanted = (jax.jit(run, static_argnums=0)(i) for i in (implementation, "reference"))
    for a, b in zip(ours, wanted, strict=True):
        goldens.assert_close(a, b, 2e-6, implementation)


def test_adaptive_filter_says_what_is_wrong(as_users_call):
    x = jnp.ones((1, 4, 4, 3))
    with pytest.raises(ValueError, match="must have 4 axes and the same batch size"):
        ops.adaptive_filter(x, jnp.ones((2, 8, 8, 9)))
    for taps in (4, 10):
        with pytest.raises(ValueError, match="K\\*K channels for an odd K"):
            ops.adaptive_filter(x, jnp.ones((1, 8, 8, taps)))
    with pytest.raises(ValueError, match="no such form"):
        ops.adaptive_filter(x, jnp.ones((1, 8, 8, 9)), implementation="pallas")


def test_map_rows_with_a_halo(monkeypatch):
    """A sum of three rows, in blocks that overlap: zeros beyond the border."""
    monkeypatch.setattr(_rows, "BLOCK_VALUES", 40)
    x = jax.random.normal(jax.random.key(0), (2, 24, 5, 4))

    def f(x, weight):
        return weight * (x[:, :-2] + x[:, 1:-1] ** 2 - x[:, 2:])

    def whole(x, weight):
        return f(ops.pad(x, (1, 0)), weight)

    def mapped(x, weight):
        return ops.map_rows(f, x, shared=weight, values=4, halo=1)

    results = []
    for g in (whole, mapped):
        y, vjp = jax.vjp(jax.jit(g), x, jnp.float32(3))
        results.append((y, *vjp(jnp.cos(y))))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# What every upsampler must do.


@functools.cache
def build(name, scale=2, **options):
    small = dict(n_freqs=1, num_layers=1) if name == "loftup" else {}
    return create_upsampler(name, features=12, scale=scale, **small | options)


def arrays(batch=2, size=(3, 5), image=(6, 10)):
    x = jax.random.normal(jax.random.key(1), (batch, *size, 12))
    return x, jax.random.normal(jax.random.key(2), (batch, *image, 3))


@every
def test_sizes(name):
    """A single token, no image at all, and images and outputs of other sizes."""
    up = build(name)
    x, image = arrays(batch=1, size=(1, 1), image=(2, 2))
    assert np.isfinite(jax.jit(up)(x, image)).all()
    assert up(x[:0], image[:0]).shape == (0, 2, 2, 12)
    x, image = arrays(batch=1, size=(2, 3), image=(7, 9))
    if name == "featup":
        assert jax.jit(up)(x, image).shape == (1, 4, 6, 12)
        with pytest.raises(ValueError, match="featup of scale 2 turns"):
            up(x, image, (7, 9))
        return
    assert jax.jit(up)(x, image).shape == (1, 7, 9, 12)
    y = jax.jit(lambda x, image: up(x, image, (5, 11)))(x, image)
    assert y.shape == (1, 5, 11, 12)
    if name == "loftup":  # the image is resized
        np.testing.assert_allclose(y, up(x, ops.resize(image, (5, 11))), atol=1e-4)


@every
def test_gradients_in_tree_mode(name):
    """Under `jax.checkpoint`; every parameter and input has one."""
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        graphdef, state = nnx.split(build(name))
        inputs = arrays(batch=1)

        def loss(state, inputs):
            y = jax.checkpoint(lambda s, a: nnx.merge(graphdef, s)(*a))(state, inputs)
            return (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype).reshape(y.shape))).sum()

        gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(state, inputs)
    for path, g in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(g).all() and np.abs(g).max() > 1e-8, path


@every
def test_initial_weights(name):
    up = create_upsampler(name, features=60, scale=2)
    bounds = dict(range1=3, range2=32, fixup1=52, fixup2=49, fixup=60)
    bounds |= dict(project=80, up=80, down=60, conv1=9 * 203, conv2=9 * 80, out=80)
    drawn = 0
    for path, value in nnx.to_flat_state(nnx.state(up, nnx.Param)):
        layer, what = ("", *map(str, path))[-2:]
        value = np.asarray(value[...])
        if what == "kernel":
            bound = (1.5 / 80) ** 0.5 if layer in "qkv" else bounds[layer] ** -0.5
            assert 0.9 * bound < np.abs(value).max() <= bound, path
        elif what == "bias" and (layer in "qkv" or layer == "out" or "norm" in layer):
            np.testing.assert_array_equal(value, 0)
        elif what == "bias" and "bn" not in layer:
            assert 0.7 * bounds[layer] ** -0.5 < np.abs(value).max() <= bounds[layer] ** -0.5, path
        elif what in ("phases", "table"):
            assert 0.7 < value.std() < 1.3
        elif what == "log_temperature":
            assert value == 0
        elif what == "sigma":
            assert value == 1
        drawn += what == "kernel"
    assert drawn == {"loftup": 15, "featup": 5, "featup_jbu": 4}[name]


@pytest.mark.parametrize(
    ("name", "direction", "limit"),
    [
        ("loftup", "forward", 1.2),
        ("loftup", "both", 2.5),
        ("featup", "forward", 1.0),  # with backward, 2.6, which takes long to compile
        ("featup_jbu", "both", 1.5),
    ],
)
def test_memory(name, direction, limit):
    """28 x 28 to 448 x 448, 384 channels: beside the output, at most so many of it."""
    up = nnx.eval_shape(lambda: create_upsampler(name, features=384, scale=16))
    graphdef, state = nnx.split(up)
    x, image, y = (
        jax.ShapeDtypeStruct((1, n, n, c), jnp.float32)
        for n, c in ((28, 384), (448, 3), (448, 384))
    )

    def forward(state, x, image):
        return nnx.merge(graphdef, state)(x, image)

    def both(state, x, image, y):
        return jax.vjp(forward, state, x, image)[1](y)

    f, inputs = (forward, (x, image)) if direction == "forward" else (both, (x, image, y))
    memory = jax.jit(f).lower(state, *inputs).compile(AS_IN_USE).memory_analysis()
    assert memory.temp_size_in_bytes <= limit * 4 * y.size


# What is particular.


def test_loftup_scales_colours_of_an_image_or_of_the_batch():
    _, image = arrays()
    image = image.at[1].multiply(3)
    own, shared = scaled(image, per_image=True), scaled(image, per_image=False)
    for i in range(2):
        alone = scaled(image[i : i + 1], per_image=False)
        np.testing.assert_array_equal(own[i : i + 1], alone)
        assert alone.min() == -0.5 and alone.max() == 0.5
    assert shared[0].max() < 0.4
    x, up = arrays()[0], build("loftup")
    run = jax.jit(lambda image: up(x, image))
    np.testing.assert_allclose(run(image), run(image.at[1].multiply(2)), atol=1e-4)


def test_loftup_learnable_places_of_any_shape():
    """A table of as many tokens is added as it is; of another number, resized."""
    up = build("loftup", lr_pe_type="learnable", lr_size=4)
    x = jnp.zeros((1, 2, 8, 12))
    np.testing.assert_array_equal(up.tokens(x)[0], up.table[...].reshape(2, 8, 12))
    assert up.tokens(jnp.zeros((1, 3, 5, 12))).shape == (1, 3, 5, 12)


def test_dropout_is_asked_for():
    """Whole channels, in a view for training, with keys that the call is given."""
    for name in ("featup", "featup_jbu"):
        up, inputs = build(name), arrays(batch=1)
        training = nnx.view(up, deterministic=False)
        with pytest.raises(ValueError, match="no `rngs` argument was provided"):
            training(*inputs)
        a, b, c = (training(*inputs, rngs=nnx.Rngs(dropout=n)) for n in (0, 0, 1))
        np.testing.assert_array_equal(a, b)
        assert np.abs(a - c).max() > 1e-4
        np.testing.assert_array_equal(up(*inputs, rngs=nnx.Rngs(0)), up(*inputs))


def wrapped(g, dim, norm):
    """A golden's weights in a checkpoint as the repositories save them."""
    n = {"weight": np.full(dim, 1.5, np.float32), "bias": np.full(dim, -0.25, np.float32)}
    return {f"upsampler.{k}": v for k, v in g.group("param").items()} | {
        f"{norm}.norm.{k}": v for k, v in n.items()
    }


def test_checkpoints_with_a_norm_and_a_backbone():
    g = goldens.load("featup_jbu_stack")
    state = wrapped(g, 4, "model.1") | {
        "model.0.cls_token": np.ones(3, np.float32),
        "downsampler.w": np.ones(3, np.float32),
        "scale_net.net.0.bias": np.ones(3, np.float32),
    }
    up = from_torch("mhamilton723/FeatUp:JBUStack", {"state_dict": state, "epoch": 1}, feat_dim=4)
    plain = from_torch("JBUStack", g.group("param"), **g.args)
    assert plain.norm_features is None
    np.testing.assert_array_equal(up.norm_features.scale[...], 1.5)
    np.testing.assert_array_equal(up.fixup.kernel[...], plain.fixup.kernel[...])

    g = goldens.load("loftup_d12_sine")
    for norm in ("channelnorm", "model.1"):
        up = from_torch("UpsamplerwithChannelNorm", wrapped(g, 12, norm), **g.args)
        np.testing.assert_array_equal(up.norm_features.scale[...], 1.5)
    assert not up.scale_per_image
    assert from_torch("LoftUp", g.group("param"), **g.args, scale_per_image=True).scale_per_image


def test_from_torch_says_what_is_wrong():
    g = goldens.load("loftup_d12_nocolor")
    state = g.group("param")
    state.pop("first_conv.5.running_var")
    with pytest.raises(ValueError, match="missing 'first_conv.5.running_var'"):
        from_torch("LoftUp", state, **g.args)
    with pytest.raises(ValueError, match="of another shape"):
        from_torch("LoftUp", g.group("param"), **g.args | dict(n_freqs=4))
    with pytest.raises(ValueError, match="needs dim"):
        from_torch("LoftUp", g.group("param"))
    g = goldens.load("featup_jbu_r3")
    with pytest.raises(ValueError, match="unexpected 'extra'"):
        from_torch("JBULearnedRange", g.group("param") | {"extra": np.ones(1)}, **g.args)


def test_wrong_options_are_named(as_users_call):
    for options, message in (
        (dict(num_heads=5), "num_heads must divide the attention's width 32"),
        (dict(lr_pe_type="cosine"), "lr_pe_type must be one of"),
        (dict(n_freqs=0), "n_freqs must be a positive whole number"),
        (dict(norm=1), "norm must be True or False"),
    ):
        with pytest.raises(ValueError, match=message):
            create_upsampler("loftup", features=12, **options)
    with pytest.raises(ValueError, match="scale must be a power of 2, got 6"):
        create_upsampler("featup", features=12, scale=6)
    with pytest.raises(ValueError, match="radius must be a positive whole number"):
        create_upsampler("featup_jbu", features=12, radius=0)
    for name in NAMES:
        x, image = arrays(batch=1)
        with pytest.raises(ValueError, match="features must be"):
            build(name)(x[..., :5], image)
        with pytest.raises(ValueError, match="image must be"):
            build(name)(x, image[..., :2])
        with pytest.raises(ValueError, match="image must have the features' batch size"):
            build(name)(x, jnp.concatenate([image, image]))
