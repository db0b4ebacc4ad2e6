"""ResNet against timm and transformers (goldens_resnet, by scripts/make_resnet_goldens.py)."""

import pathlib

import goldens
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from resfu_jax.backbones import ResNet, create_backbone
from resfu_jax.convert import load_pretrained
from resfu_jax.convert.resnet import load_resnet

GOLDENS = pathlib.Path(__file__).parent / "goldens_resnet"
NETWORKS = {
    "basic": dict(
        variant="18",
        widths=(6, 6, 8, 8),
        depths=(1, 1, 1, 2),
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
    ),
    "bottleneck": dict(
        variant="50",
        widths=(4, 4, 6, 8),
        depths=(2, 1, 2, 2),
        stem="deep",
        stem_width=8,
        strides=(1, 2, 2, 1),
        dilations=(1, 1, 1, 2),
    ),
    "transformers": dict(variant="50", widths=(2, 4, 6, 8), depths=(1, 2, 1, 1), stem_width=8),
}
TINY = dict(variant="18", widths=(4, 4, 6, 8), depths=(1, 1, 1, 1), stem_width=4)


def network(name, **options):
    """Without values, which a checkpoint gives it."""
    return nnx.eval_shape(lambda: ResNet(**(NETWORKS[name] | options), rngs=nnx.Rngs(0)))


def tiny(**options):
    return ResNet(**(TINY | options), rngs=nnx.Rngs(0))


def loaded(name, **options):
    net = network(name, **options)
    load_pretrained(GOLDENS / f"{name}.safetensors", net)
    return net


def entries(name):
    return safetensors.numpy.load_file(GOLDENS / f"{name}.safetensors")


def evaluating(model):
    return nnx.view(model, deterministic=True, use_running_average=True, raise_if_not_found=False)


@jax.jit
def run(model, x):
    return model(x)


@jax.jit
def train(model, x):
    """Maps, and the statistics after it."""
    model = nnx.clone(model)
    return model(x), nnx.state(model, nnx.BatchStat)


def images(*shape):
    return jax.random.normal(jax.random.key(7), shape)


def widened(model):
    """The model with float64 parameters."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(jnp.float64), params), rest)


def golden_image(z, x64):
    return jnp.asarray(goldens.nhwc(z["image"]), jnp.float64 if x64 else jnp.float32)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_values_equal_published(name, x64):
    with np.load(GOLDENS / "outputs.npz") as z, jax.enable_x64(x64):
        net = loaded(name)
        if x64:
            net = widened(net)
        for i, y in enumerate(run(evaluating(net), golden_image(z, x64))):
            expected = goldens.nhwc(z[f"{name}/eval/{i}"])
            goldens.assert_close(y, expected, 5e-7 if x64 else 5e-6, f"map {i}")


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_gradients_equal_published(name, x64):
    with np.load(GOLDENS / "outputs.npz") as z, jax.enable_x64(x64):
        dtype = jnp.float64 if x64 else jnp.float32
        tol = 5e-7 if x64 else 5e-5
        graphdef, params, rest = nnx.split(evaluating(loaded(name)), nnx.Param, ...)
        params = jax.tree.map(lambda p: p.astype(dtype), params)

        def loss(params, x):
            total = 0
            for y in nnx.merge(graphdef, params, rest)(x):
                y = jnp.moveaxis(y, -1, 1)
                seed = np.sin(np.arange(y.size, dtype=np.float64)).reshape(y.shape)
                total += jnp.vdot(y, jnp.asarray(seed, dtype))
            return total

        of_params, of_image = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, golden_image(z, x64))
        prefix = f"{name}/grad/"
        expected = {k.removeprefix(prefix): z[k] for k in z.files if k.startswith(prefix)}
        if "image" in expected:
            goldens.assert_close(of_image, goldens.nhwc(expected.pop("image")), tol, "image")
        # The converter puts each gradient where its parameter is; the other entries become NaN.
        state = {k: np.full(v.shape, np.nan, np.float64) for k, v in entries(name).items()}
        holder = network(name)
        load_resnet(state | expected, holder, "")
        compared = 0
        for (path, g), (_, want) in zip(
            nnx.to_flat_state(of_params),
            nnx.to_flat_state(nnx.state(holder, nnx.Param)),
            strict=True,
        ):
            if not np.any(np.isnan(want[...])):
                goldens.assert_close(g[...], want[...], tol, str(path))
                compared += 1
        assert compared == len(expected) >= 7


@pytest.mark.parametrize("x64", [False, True])
def test_training_equals_published(x64):
    with np.load(GOLDENS / "outputs.npz") as z, jax.enable_x64(x64):
        net = loaded("basic")
        pyramid, stats = train(widened(net) if x64 else net, golden_image(z, x64))
        for i, y in enumerate(pyramid):
            expected = goldens.nhwc(z[f"basic/train/{i}"])
            goldens.assert_close(y, expected, 5e-7 if x64 else 5e-6, f"map {i}")
        prefix = "basic/stat/"
        updated = {k.removeprefix(prefix): z[k] for k in z.files if k.startswith(prefix)}
        holder = network("basic")
        load_resnet(entries("basic") | updated, holder, "")
        for (path, stat), (_, want) in zip(
            nnx.to_flat_state(stats),
            nnx.to_flat_state(nnx.state(holder, nnx.BatchStat)),
            strict=True,
        ):
            goldens.assert_close(stat[...], want[...], 5e-6, str(path))


# Printed by scripts/make_resnet_goldens.py.
@pytest.mark.parametrize(
    "variant, stem, widest, parameters",
    [
        ("18", "standard", 512, 11_176_512),
        ("34", "standard", 512, 21_284_672),
        ("50", "standard", 2048, 23_508_032),
        ("101", "standard", 2048, 42_500_160),
        ("50", "deep", 2048, 23_527_264),
    ],
)
def test_parameter_count(variant, stem, widest, parameters):
    net = nnx.eval_shape(lambda: ResNet(variant, stem=stem, rngs=nnx.Rngs(0)))
    assert sum(p.size for p in jax.tree.leaves(nnx.state(net, nnx.Param))) == parameters
    assert net.features == tuple(widest // n for n in (8, 4, 2, 1))


def test_initial_weights():
    net = nnx.jit(lambda: tiny(variant="50", widths=(2, 2, 64, 2), stem_width=64))()
    stds = {
        (2 / (49 * 64)) ** 0.5: net.stem[0].conv.kernel,
        (2 / (9 * 64)) ** 0.5: net.stages[2][0].layers[1].conv.kernel,
        (2 / 256) ** 0.5: net.stages[2][0].layers[2].conv.kernel,
    }
    for std, kernel in stds.items():
        np.testing.assert_allclose(np.std(np.asarray(kernel)), std, rtol=0.05)
    for path, p in nnx.to_flat_state(nnx.state(net, nnx.Param)):
        if path[-1] in ("bias", "scale"):
            assert np.all(np.asarray(p) == float(path[-1] == "scale")), path


@pytest.mark.parametrize("variant, stem", [("18", "standard"), ("50", "deep")])
@pytest.mark.parametrize(
    "strides, dilations, total",
    [
        ((1, 2, 2, 2), (1, 1, 1, 1), (4, 8, 16, 32)),
        ((1, 2, 2, 1), (1, 1, 1, 2), (4, 8, 16, 16)),
        ((1, 2, 1, 1), (1, 1, 2, 4), (4, 8, 8, 8)),
        ((2, 3, 1, 1), (3, 1, 1, 2), (8, 24, 24, 24)),
    ],
)
def test_sizes_are_rounded_up(variant, stem, strides, dilations, total):
    options = dict(variant=variant, stem=stem, strides=strides, dilations=dilations)
    net = nnx.eval_shape(lambda: tiny(**options))
    assert net.strides == total
    for size in ((61, 47), (96, 5), (1, 1)):
        pyramid = jax.eval_shape(
            run, evaluating(net), jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
        )
        for features, stride, y in zip(net.features, total, pyramid, strict=True):
            assert y.shape == (1, *(-(-n // stride) for n in size), features)


def test_an_image_does_not_depend_on_the_rest_of_its_batch_in_evaluation():
    net, x = loaded("basic"), images(2, 33, 45, 3)
    for y, y1 in zip(run(evaluating(net), x), run(evaluating(net), x[1:2]), strict=True):
        np.testing.assert_allclose(y[1:2], y1, atol=1e-5)


def test_running_statistics():
    x = 2 + images(8, 33, 40, 3)
    net = tiny()
    _, stats = train(net, x)
    for (path, after), (_, before) in zip(
        nnx.to_flat_state(stats), nnx.to_flat_state(nnx.state(net, nnx.BatchStat)), strict=True
    ):
        assert after[...].dtype == jnp.float32
        assert not np.array_equal(after[...], before[...]), path
    # Of the stem's convolution, in numbers.
    y = np.asarray(net.stem[0].conv(x)).reshape(-1, 4)
    first = stats["stem"][0]["norm"]
    np.testing.assert_allclose(first["mean"][...], 0.1 * y.mean(0), rtol=1e-4)
    np.testing.assert_allclose(first["var"][...], 0.9 + 0.1 * y.var(0, ddof=1), rtol=1e-4)
    # In evaluation they stay.
    _, stats = train(evaluating(net), x)
    jax.tree.map(np.testing.assert_array_equal, stats, nnx.state(net, nnx.BatchStat))


def test_freeze_norm():
    frozen, x = loaded("basic", freeze_norm=True), images(2, 33, 45, 3)
    pyramid, stats = train(frozen, x)
    jax.tree.map(np.testing.assert_array_equal, stats, nnx.state(frozen, nnx.BatchStat))
    for y, expected in zip(pyramid, run(evaluating(loaded("basic")), x), strict=True):
        np.testing.assert_array_equal(y, expected)
    # Also in a view for training.
    view = nnx.view(evaluating(frozen), use_running_average=False)
    np.testing.assert_array_equal(train(view, x)[0][3], pyramid[3])


@pytest.mark.parametrize("training", [False, True])
def test_bfloat16(training):
    x = images(2, 33, 45, 3)
    half, full = loaded("basic", dtype=jnp.bfloat16), loaded("basic")
    if not training:
        half, full = evaluating(half), evaluating(full)
    (pyramid, stats), (wanted, wanted_stats) = train(half, x), train(full, x)
    for y, expected in zip(pyramid, wanted, strict=True):
        assert y.dtype == jnp.bfloat16
        error = jnp.linalg.norm(y.astype(jnp.float32) - expected)
        assert error < 0.06 * jnp.linalg.norm(expected)
    for stat, expected in zip(jax.tree.leaves(stats), jax.tree.leaves(wanted_stats), strict=True):
        assert stat.dtype == jnp.float32
        np.testing.assert_allclose(stat, expected, atol=0.05)


def loss_and_gradients(net, x):
    """Loss, gradients, and the statistics that the forward pass updates."""
    graphdef, params, rest = nnx.split(net, nnx.Param, ...)

    def loss(params):
        model = nnx.merge(graphdef, params, rest, copy=True)
        outputs = [jnp.sum(y * jnp.sin(jnp.arange(y.size).reshape(y.shape))) for y in model(x)]
        return sum(outputs), nnx.state(model, nnx.BatchStat)

    (value, rest), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return value, gradients, rest


def test_remat_changes_nothing():
    x = images(2, 33, 40, 3)
    kept = loss_and_gradients(tiny(), x)
    for graph in (True, False):
        with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
            recomputed = loss_and_gradients(tiny(remat=True), x)
        np.testing.assert_allclose(recomputed[0], kept[0], rtol=1e-5)
        for part in (1, 2):
            for (path, a), (_, b) in zip(
                nnx.to_flat_state(recomputed[part]), nnx.to_flat_state(kept[part]), strict=True
            ):
                goldens.assert_close(a[...], b[...], 1e-4, str(path))
                assert np.any(b[...]), path


def test_jit_equals_eager_and_sharded_equals_unsharded():
    # In training, so that the statistics, too, are those of the whole batch.
    net, x = tiny(), images(8, 33, 40, 3)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread, spread_stats = train(
        jax.device_put(net, NamedSharding(mesh, P())),
        jax.device_put(x, NamedSharding(mesh, P("data"))),
    )
    compiled, stats = train(net, x)
    eager = net(x)
    after = nnx.state(net, nnx.BatchStat)
    for a, b, c in zip(
        *(jax.tree.leaves(x) for x in ((compiled, stats), (spread, spread_stats), (eager, after))),
        strict=True,
    ):
        goldens.assert_close(a, c, 5e-5, "compiled")
        goldens.assert_close(b, c, 5e-5, "sharded")


def test_exports_with_symbolic_sizes():
    graphdef, state = nnx.split(evaluating(tiny()))
    b, h, w = jax.export.symbolic_shape("b, h, w")
    exported = jax.export.export(jax.jit(lambda x: nnx.merge(graphdef, state)(x)))(
        jax.ShapeDtypeStruct((b, h, w, 3), jnp.float32)
    )
    x = images(1, 61, 34, 3)
    for y, expected in zip(exported.call(x), run(nnx.merge(graphdef, state), x), strict=True):
        np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(variant="51"), "variant must be one of 18, 34, 50, 101, got '51'"),
        (dict(widths=(8, 16, 24)), "widths must be four positive integers"),
        (dict(depths=(1, 1, 0, 1)), "depths must be four positive integers"),
        (dict(strides=(1, 2, 2)), "strides must be four positive integers"),
        (dict(dilations=(1, 1, 2, 0)), "dilations must be four positive integers"),
        (dict(stem_width=3), "stem_width must be even"),
        (dict(stem="v1c"), "stem must be one of .*'deep'.*, got 'v1c'"),
    ],
)
def test_wrong_options(options, message, as_users_call):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_wrong_images(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"must be \(batch, height, width, 3\), got"):
        tiny()(jnp.zeros((1, 32, 32, 4)))


def test_is_registered():
    net = create_backbone("resnet", **TINY, rngs=nnx.Rngs(0))
    assert net.features == (4, 4, 6, 8)


# ------------------------------------------------------------------------------------- checkpoints
def _model(name):
    """What `ResNetModel` saves."""
    prefix = "resnet."
    return {k.removeprefix(prefix): v for k, v in entries(name).items() if k.startswith(prefix)}


def _mmseg(name):
    """Entries of a whole model of MMSegmentation."""
    state = {"decode_head.conv_seg.bias": np.zeros(5, np.float32)}
    for key, value in entries(name).items():
        for ours, theirs in (("conv1.", "stem."), ("bn1.", "stem.7.")):
            if name == "bottleneck" and key.startswith(ours):
                key = theirs + key.removeprefix(ours)
        if not key.startswith("fc."):
            state[f"backbone.{key}"] = value
    return state


@pytest.mark.parametrize(
    "name, layout, ignored",
    [
        ("transformers", _model, 0),
        ("basic", _mmseg, 1),
        ("bottleneck", _mmseg, 1),
    ],
)
def test_loads_other_layouts(name, layout, ignored):
    net = network(name)
    unused = load_resnet(layout(name), net, "")
    assert sum(not key.endswith("num_batches_tracked") for key in unused) == ignored
    jax.tree.map(np.testing.assert_array_equal, nnx.state(net), nnx.state(loaded(name)))


def test_names_what_is_not_used():
    unused = load_pretrained(GOLDENS / "basic.safetensors", network("basic"))
    assert unused == sorted(
        k for k in entries("basic") if k.startswith("fc.") or k.endswith("num_batches_tracked")
    )
    unused = load_pretrained(GOLDENS / "transformers.safetensors", network("transformers"))
    assert unused[:2] == ["classifier.1.bias", "classifier.1.weight"]


def test_names_all_that_does_not_fit_and_leaves_the_network_alone(tmp_path):
    state = entries("basic")
    del state["layer1.0.bn1.running_var"]
    state["layer4.1.conv3.weight"] = np.zeros((3, 3, 1, 1), np.float32)
    state["layer2.0.conv1.weight"] = np.zeros((6, 6, 1, 1), np.float32)
    state["layer3.0.downsample.1.weight"] = np.zeros((8, 6, 1, 1), np.float32)
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors")
    net = network("basic")
    before = jax.tree.map(np.asarray, nnx.as_pure(nnx.state(net)))
    with pytest.raises(ValueError) as error:
        load_pretrained(tmp_path, net)
    for part in (
        str(tmp_path),
        "missing 'layer1.0.bn1.running_var'",
        "unexpected 'layer4.1.conv3.weight'",
        "'layer2.0.conv1.weight' has shape (6, 6, 1, 1), expected (6, 6, 3, 3)",
        "its shortcuts pool (ResNet-D",
    ):
        assert part in str(error.value)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.as_pure(nnx.state(net)))
