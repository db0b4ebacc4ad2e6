"""SegFormerHead; its "linear" form against transformers is in test_model."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from resfu_jax.heads import SegFormerHead, create_head, segformer
from resfu_jax.heads.segformer import BatchNorm
from resfu_jax.ops.resize import resize
from resfu_jax.upsamplers import create_upsampler

WIDTHS = (4, 6, 8, 10)


def head(**options):
    return SegFormerHead(
        WIDTHS, 3, **(dict(width=32, upsampler="bilinear") | options), rngs=nnx.Rngs(0)
    )


def evaluating(model):
    return nnx.view(model, deterministic=True, use_running_average=True, raise_if_not_found=False)


def pyramid(h=16, w=24, batch=2):
    """Maps as MiT makes them of an image whose quarter is h x w: halved rounding up."""
    maps, keys = [], jax.random.split(jax.random.key(0), 4)
    for key, features in zip(keys, WIDTHS, strict=True):
        maps.append(jax.random.normal(key, (batch, h, w, features)))
        h, w = -(-h // 2), -(-w // 2)
    return maps


@jax.jit
def run(model, features):
    return model(features)


def test_equals_the_wiring_written_out():
    module, maps = evaluating(head()), pyramid(9, 7)

    def conv_bn_relu(x, layer):
        x = x @ layer.conv.kernel[...]
        norm = layer.norm
        x = (x - norm.mean[...]) / np.sqrt(norm.var[...] + 1e-5)
        return jnp.maximum(x * norm.scale[...] + norm.bias[...], 0)

    with jax.numpy_rank_promotion("allow"):
        rng = np.random.default_rng(0)
        for layer in [*module.project, module.fuse]:
            for variable in (layer.norm.mean, layer.norm.var, layer.norm.scale, layer.norm.bias):
                variable.set_value(jnp.asarray(rng.uniform(0.5, 1.5, variable.shape), jnp.float32))
        ups = [
            resize(conv_bn_relu(x, p), (9, 7)) for x, p in zip(maps, module.project, strict=True)
        ]
        fused = conv_bn_relu(jnp.concatenate(ups, -1), module.fuse)
        expected = fused @ module.classify.kernel[...] + module.classify.bias[...]
    np.testing.assert_allclose(module(maps), expected, atol=1e-5)


@pytest.mark.parametrize("upsampler", ["nearest", "bicubic", "resfu"])
@pytest.mark.parametrize("size", [(16, 8), (9, 11)])
def test_any_upsampler_any_size(upsampler, size):
    module, maps = head(upsampler=upsampler), pyramid(*size, batch=1)
    logits = run(evaluating(module), maps)
    assert logits.shape == (1, *size, 3)
    assert not np.array_equal(logits, run(evaluating(head()), maps))


@pytest.mark.parametrize("upsampler", ["deconv", "pixel_shuffle"])
def test_upsamplers_that_know_only_their_scale(upsampler):
    assert run(evaluating(head(upsampler=upsampler)), pyramid(8, 16)).shape == (2, 8, 16, 3)
    with pytest.raises(ValueError):
        head(upsampler=upsampler)(pyramid(9, 11))


def test_upsamplers_are_built_for_their_ratios(monkeypatch):
    built = []

    def record(name, **options):
        built.append((name, *(options[k] for k in ("features", "guide_features", "scale"))))
        return create_upsampler(name, **options)

    monkeypatch.setattr(segformer, "create_upsampler", record)
    module = head(upsampler="resfu", upsampler_options={"radius": 6})
    assert built == [("resfu", 32, 32, 2), ("resfu", 32, 32, 4), ("resfu", 32, 32, 8)]
    assert [up.radius for up in module.upsample] == [6, 6, 6]


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("upsampler", ["bilinear", "resfu"])
def test_training_step_reaches_every_parameter(upsampler, graph):
    with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
        module, maps = head(upsampler=upsampler), pyramid(8, 8)
        graphdef, params, rest = nnx.split(module, nnx.Param, ...)

        def loss(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            logits = model(maps)
            seed = jnp.sin(jnp.arange(logits.size)).reshape(logits.shape)
            return jnp.vdot(logits, seed), nnx.state(model, nnx.Not(nnx.Param))

        gradients, updated = jax.jit(jax.grad(loss, has_aux=True))(params)
    for path, g in nnx.to_flat_state(gradients):
        # What a softmax over neighbours adds to all of them alike has no effect.
        if upsampler == "bilinear":
            assert np.max(np.abs(g[...])) > 1e-5, path
        assert np.all(np.isfinite(g[...])), path
    before = dict(nnx.to_flat_state(nnx.state(module, nnx.BatchStat)))
    for path, stat in nnx.to_flat_state(updated):
        if path in before:
            assert not np.array_equal(stat[...], before[path][...]), path


def test_evaluation_is_deterministic_and_training_is_not():
    module, maps = head(dropout=0.5), pyramid(8, 8)
    step = nnx.jit(lambda module: module(maps))
    assert not np.array_equal(step(module), step(module))
    still = evaluating(module)
    np.testing.assert_array_equal(run(still, maps), run(still, maps))


def test_batch_norm_is_that_of_pytorch():
    norm = BatchNorm(3, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (2, 3, 4, 3))
    y = np.asarray(norm(x))
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(y.std((0, 1, 2)), 1, rtol=1e-4)
    pixels = np.asarray(x).reshape(-1, 3)
    np.testing.assert_allclose(norm.mean[...], 0.1 * pixels.mean(0), rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * pixels.var(0, ddof=1), rtol=1e-5)
    # A view shares the statistics.
    view = nnx.view(norm, use_running_average=True)
    expected = (x - norm.mean[...].reshape(1, 1, 1, 3)) / np.sqrt(
        norm.var[...].reshape(1, 1, 1, 3) + 1e-5
    )
    np.testing.assert_allclose(view(x), expected, rtol=1e-5, atol=1e-6)


def test_bfloat16():
    maps = pyramid(8, 8)
    logits = run(evaluating(head(dtype=jnp.bfloat16)), [x.astype(jnp.bfloat16) for x in maps])
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits.astype(jnp.float32), run(evaluating(head()), maps), atol=3e-3)


def test_jit_equals_eager_and_sharded_equals_unsharded():
    # Training mode: statistics are of the whole batch, however it is spread.
    module, maps = head(dropout=0.0), pyramid(8, 8, batch=8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = run(
        jax.device_put(module, NamedSharding(mesh, P())),
        jax.device_put(maps, NamedSharding(mesh, P("data"))),
    )
    np.testing.assert_allclose(sharded, run(module, maps), atol=1e-5)
    np.testing.assert_allclose(run(module, maps), module(maps), atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(upsampler="bilinaer"), "unknown upsampler 'bilinaer'; did you mean 'bilinear'"),
        (dict(upsampler_options={"skale": 2}), "option.*'skale'"),
        (dict(width=0), "must be positive"),
        (dict(dropout=1.0), "dropout must be"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        head(**options)


def test_wrong_input(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="project must be one of"):
        head(project="conv")
    with pytest.raises(ValueError, match="in_features must be four"):
        SegFormerHead((4, 6, 8), 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"four maps with \(4, 6, 8, 10\) channels"):
        head()(pyramid()[:3])
    with pytest.raises(ValueError, match="unknown head 'segfromer'; did you mean 'segformer'"):
        create_head("segfromer", in_features=WIDTHS, num_classes=3, rngs=nnx.Rngs(0))
