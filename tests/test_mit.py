"""MiT against Hugging Face transformers (goldens_mit, made by scripts/make_mit_goldens.py)."""

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

from resfu_jax.backbones import MiT, create_backbone
from resfu_jax.convert import load_pretrained

GOLDENS = pathlib.Path(__file__).parent / "goldens_mit"
SMALL = dict(widths=(8, 16, 24, 32), depths=(2, 1, 1, 1), heads=(1, 2, 3, 4))


def small(**options):
    return MiT(**(SMALL | options), rngs=nnx.Rngs(0))


def evaluating(model):
    return nnx.view(model, deterministic=True, use_running_average=True, raise_if_not_found=False)


@jax.jit
def run(model, x):
    return model(x)


def images(*shape):
    return jax.random.normal(jax.random.key(7), shape)


def widened(model):
    """The model with float64 parameters."""
    graphdef, state = nnx.split(model)
    return nnx.merge(
        graphdef,
        jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, state),
    )


@pytest.mark.parametrize("x64", [False, True])
def test_equals_transformers(x64):
    with np.load(GOLDENS / "model.npz") as z, jax.enable_x64(x64):
        mit = small()
        load_pretrained(GOLDENS, mit)
        if x64:
            mit = widened(mit)
        x = jnp.asarray(goldens.nhwc(z["image"]), jnp.float64 if x64 else jnp.float32)
        for i, y in enumerate(run(evaluating(mit), x)):
            goldens.assert_close(y, goldens.nhwc(z[f"hidden/{i}"]), 5e-7 if x64 else 5e-6, f"c{i}")


# Printed by scripts/make_mit_goldens.py.
@pytest.mark.parametrize(
    "variant, parameters",
    [
        ("b0", 3_319_392),
        ("b1", 13_151_424),
        ("b2", 24_196_288),
        ("b5", 81_443_008),
    ],
)
def test_parameter_count(variant, parameters):
    mit = nnx.eval_shape(lambda: MiT(variant, rngs=nnx.Rngs(0)))
    assert sum(p.size for p in jax.tree.leaves(nnx.state(mit, nnx.Param))) == parameters


def test_initial_weights():
    mit = MiT("b0", rngs=nnx.Rngs(0))
    stage = mit.stages[2]
    block = stage.blocks[0]
    stds = {
        0.02: [block.attention.query.kernel, block.ffn.expand.kernel, block.attention.out.kernel],
        (2 / (9 * 160)) ** 0.5: [stage.embed.kernel],
        (2 / (4 * 160)) ** 0.5: [block.attention.reduce.kernel],
        (2 / 9) ** 0.5: [block.ffn.depthwise.kernel],
    }
    for std, kernels in stds.items():
        for kernel in kernels:
            np.testing.assert_allclose(np.std(np.asarray(kernel)), std, rtol=0.05)
            assert abs(np.mean(np.asarray(kernel))) < 0.05 * std
    for path, p in nnx.to_flat_state(nnx.state(mit, nnx.Param)):
        if path[-1] in ("bias", "scale"):
            assert np.all(np.asarray(p) == float(path[-1] == "scale")), path


@pytest.mark.parametrize("size", [(64, 64), (29, 29), (33, 90), (61, 47)])
def test_sizes_are_rounded_up(size):
    pyramid = jax.eval_shape(lambda x: evaluating(small())(x), jnp.zeros((1, *size, 3)))
    h, w = (-(-n // 4) for n in size)
    for features, y in zip((8, 16, 24, 32), pyramid, strict=True):
        assert y.shape == (1, h, w, features)
        h, w = -(-h // 2), -(-w // 2)


def test_an_image_does_not_depend_on_the_rest_of_its_batch():
    mit, x = evaluating(small()), images(3, 40, 33, 3)
    for y, y1 in zip(run(mit, x), run(mit, x[1:2]), strict=True):
        np.testing.assert_allclose(y[1:2], y1, atol=1e-5)


def test_bfloat16():
    x = images(1, 40, 33, 3)
    for y, expected in zip(
        run(evaluating(small(dtype=jnp.bfloat16)), x), run(evaluating(small()), x), strict=True
    ):
        assert y.dtype == jnp.bfloat16
        np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.1)


def test_drop_path():
    mit, x = small(drop_path=0.5), images(8, 32, 32, 3)
    np.testing.assert_array_equal(run(evaluating(mit), x)[3], run(evaluating(small()), x)[3])
    step = nnx.jit(lambda mit, x: mit(x)[3])
    assert not np.array_equal(step(mit, x), step(mit, x))
    # The rate grows from 0 at the first block to the given one at the last.
    rates = [block.drop_path.rate for stage in mit.stages for block in stage.blocks]
    np.testing.assert_allclose(rates, [0, 0.125, 0.25, 0.375, 0.5])
    # A branch is dropped for a whole image, and scaled up where it is kept.
    branch = mit.stages[3].blocks[0].drop_path(jnp.ones((200, 2, 2, 3)))
    assert set(np.unique(branch)) == {0.0, 2.0}
    assert np.all(branch == branch[:, :1, :1, :1])
    assert 60 < np.sum(branch[:, 0, 0, 0] == 0) < 140


def loss_and_gradients(mit, x):
    """Loss, gradients, and the state that the forward pass updates."""
    graphdef, params, rest = nnx.split(mit, nnx.Param, ...)

    def loss(params):
        model = nnx.merge(graphdef, params, rest, copy=True)
        # Weights, because the mean of a normalised map is constant.
        outputs = [jnp.sum(y * jnp.sin(jnp.arange(y.size).reshape(y.shape))) for y in model(x)]
        return sum(outputs), nnx.state(model, nnx.Not(nnx.Param))

    (value, rest), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return value, gradients, rest


@pytest.mark.parametrize("graph", [True, False])
def test_remat_changes_nothing(graph):
    x = images(2, 32, 32, 3)
    with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
        kept = loss_and_gradients(small(drop_path=0.3), x)
        recomputed = loss_and_gradients(small(drop_path=0.3, remat=True), x)
    np.testing.assert_allclose(recomputed[0], kept[0], rtol=1e-6)
    for (path, g), (_, expected) in zip(
        nnx.to_flat_state(recomputed[1]), nnx.to_flat_state(kept[1]), strict=True
    ):
        np.testing.assert_allclose(g[...], expected[...], rtol=1e-4, atol=1e-5, err_msg=str(path))
    # The random streams advance as without.
    counts = [jax.tree.leaves(nnx.state(run[2], nnx.RngCount)) for run in (kept, recomputed)]
    assert counts[0] == counts[1] and any(count > 0 for count in counts[0])


def test_gradients_reach_every_parameter():
    mit = small()
    load_pretrained(GOLDENS, mit)  # initial weights make attention nearly uniform
    _, gradients, _ = loss_and_gradients(evaluating(mit), images(1, 64, 64, 3))
    for path, g in nnx.to_flat_state(gradients):
        # Softmax does not see a constant added to all of its scores.
        if path[-2:] == ("key", "bias"):
            assert np.max(np.abs(g[...])) < 1e-4, path
        else:
            assert np.max(np.abs(g[...])) > 1e-2, path


def test_jit_equals_eager_and_sharded_equals_unsharded():
    mit, x = evaluating(small(depths=(1, 1, 1, 1))), images(8, 32, 40, 3)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = run(
        jax.device_put(mit, NamedSharding(mesh, P())),
        jax.device_put(x, NamedSharding(mesh, P("data"))),
    )
    for eager, compiled, spread in zip(mit(x), run(mit, x), sharded, strict=True):
        np.testing.assert_allclose(compiled, eager, atol=1e-5)
        np.testing.assert_allclose(spread, eager, atol=1e-5)


def test_exports_with_symbolic_sizes():
    graphdef, state = nnx.split(evaluating(small()))
    b, h, w = jax.export.symbolic_shape("b, h, w")
    exported = jax.export.export(jax.jit(lambda x: nnx.merge(graphdef, state)(x)))(
        jax.ShapeDtypeStruct((b, 32 * h, 32 * w, 3), jnp.float32)
    )
    x = images(1, 64, 32, 3)
    for y, expected in zip(exported.call(x), run(nnx.merge(graphdef, state), x), strict=True):
        np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(variant="b6"), "variant must be one of b0, b1"),
        (dict(widths=(8, 16, 24)), "widths must be four positive integers"),
        (dict(depths=(1, 1, 0, 1)), "depths must be four positive integers"),
        (dict(heads=(1, 2, 5, 4)), "heads must divide widths"),
        (dict(drop_path=1.0), "drop_path must be"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_wrong_images(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"must be \(batch, height, width, 3\), got"):
        small()(jnp.zeros((1, 32, 32, 4)))
    with pytest.raises(ValueError, match="images of 28x64 are too small.*at least 29"):
        small()(jnp.zeros((1, 28, 64, 3)))
    tiny = evaluating(small(sr_ratios=(1, 1, 1, 1)))
    assert run(tiny, jnp.zeros((1, 5, 3, 3)))[3].shape == (1, 1, 1, 32)


def test_unknown_backbone():
    with pytest.raises(ValueError, match="unknown backbone 'mti'; did you mean 'mit'"):
        create_backbone("mti", rngs=nnx.Rngs(0))


# ------------------------------------------------------------------------------------- checkpoints
def checkpoint():
    return safetensors.numpy.load_file(GOLDENS / "model.safetensors")


def _state_dict(entries):
    """A `state_dict()` of transformers 5, whose names differ from those of published files."""
    with np.load(GOLDENS / "model.npz") as z:
        return {name: entries[published] for name, published in z["names"]}


def _encoder(entries):
    """What `SegformerModel` saves."""
    prefix = "segformer."
    return {k.removeprefix(prefix): v for k, v in entries.items() if k.startswith(prefix)}


def _classifier(entries):
    """What `SegformerForImageClassification` saves."""
    encoder = {k: v for k, v in entries.items() if k.startswith("segformer.")}
    return encoder | {
        "classifier.weight": np.zeros((9, 32), np.float32),
        "classifier.bias": np.zeros(9, np.float32),
    }


@pytest.mark.parametrize("layout, ignored", [(_state_dict, 16), (_encoder, 0), (_classifier, 2)])
def test_loads_other_layouts(layout, ignored, tmp_path):
    path = tmp_path / "other.safetensors"
    safetensors.numpy.save_file(layout(checkpoint()), path)
    expected, mit = small(), small()
    assert len(load_pretrained(GOLDENS, expected)) == 16
    assert len(load_pretrained(path, mit)) == ignored
    jax.tree.map(
        np.testing.assert_array_equal, nnx.state(mit, nnx.Param), nnx.state(expected, nnx.Param)
    )


def test_names_all_that_does_not_fit_and_leaves_the_model_alone(tmp_path):
    entries = checkpoint()
    del entries["segformer.encoder.layer_norm.3.weight"]
    entries["segformer.encoder.block.0.2.mlp.dense1.bias"] = np.zeros(3, np.float32)
    entries["something.else"] = np.zeros(3, np.float32)
    entries["segformer.encoder.layer_norm.2.weight"] = np.zeros(7, np.float32)
    safetensors.numpy.save_file(entries, tmp_path / "model.safetensors")
    mit = small()
    before = jax.tree.map(np.asarray, nnx.as_pure(nnx.state(mit, nnx.Param)))
    with pytest.raises(ValueError) as error:
        load_pretrained(tmp_path, mit)
    for part in (
        "missing 'encoder.layer_norm.3.weight'",
        "unexpected 'encoder.block.0.2.mlp.dense1.bias'",
        "unexpected 'something.else'",
        "'encoder.layer_norm.2.weight' has shape (7,), expected (24,)",
    ):
        assert part in str(error.value)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.as_pure(nnx.state(mit, nnx.Param)))


def test_missing_file_says_what_is_there(tmp_path):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(
        FileNotFoundError, match=r"safetensors does not exist \(there is weights.bin"
    ):
        load_pretrained(tmp_path, small())
