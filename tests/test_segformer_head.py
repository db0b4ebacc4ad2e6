"""SegFormerHead; its "linear" form against transformers is in test_model."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from heads import (
    WIDTHS,
    Guided,
    assert_runs_or_says_why_not,
    conv_bn_relu,
    evaluating,
    gradients_and_update,
    pyramid,
    randomize_norms,
    run,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from resfu_jax.heads import SegFormerHead, _layers, create_head
from resfu_jax.heads._layers import BatchNorm
from resfu_jax.ops.resize import resize
from resfu_jax.upsamplers import _registry, create_upsampler, list_upsamplers


def head(upsampler="bilinear", **options):
    return SegFormerHead(
        WIDTHS, 3, **(dict(width=32, upsampler=upsampler) | options), rngs=nnx.Rngs(0)
    )


@pytest.fixture
def guided(monkeypatch):
    """The name of a quick upsampler with a guide."""
    monkeypatch.setitem(_registry._ENTRIES, "guided", _registry.Entry(Guided, {}))
    return "guided"


def test_equals_the_wiring_written_out():
    module, maps = randomize_norms(evaluating(head())), pyramid(9, 7)
    with jax.numpy_rank_promotion("allow"):
        ups = [
            resize(conv_bn_relu(x, p), (9, 7)) for x, p in zip(maps, module.project, strict=True)
        ]
        fused = conv_bn_relu(jnp.concatenate(ups, -1), module.fuse)
        expected = fused @ module.classify.kernel[...] + module.classify.bias[...]
    np.testing.assert_allclose(run(module, maps), expected, atol=1e-5)


@pytest.mark.parametrize("upsampler", ["bilinear", "guided"])
def test_stagewise_equals_the_wiring_written_out(upsampler, guided):
    module = randomize_norms(evaluating(head(upsampler, wiring="stagewise", project="linear")))
    maps = pyramid(9, 7)

    def up(i, x, guide):
        if upsampler == guided:
            return module.upsample[i](x, guide)
        return resize(x, guide.shape[1:3])

    with jax.numpy_rank_promotion("allow"):
        p1, p2, p3, p4 = (
            x @ p.kernel[...] + p.bias[...] for x, p in zip(maps, module.project, strict=True)
        )
        p4_up = up(2, up(1, up(0, p4, p3), p2), p1)
        last, *inputs = module.upsampler_path(maps)[-1]
        np.testing.assert_allclose(last(*inputs), p4_up, atol=1e-5)
        p3_up = up(4, up(3, p3, p2), p1)
        p2_up = up(5, p2, p1)
        fused = conv_bn_relu(jnp.concatenate([p4_up, p3_up, p2_up, p1], -1), module.fuse)
        expected = fused @ module.classify.kernel[...] + module.classify.bias[...]
    np.testing.assert_allclose(run(module, maps), expected, atol=1e-5)


@pytest.mark.parametrize("upsampler", list_upsamplers())
def test_takes_every_upsampler(upsampler):
    assert_runs_or_says_why_not(lambda: head(upsampler, width=64))


@pytest.mark.parametrize(
    "upsampler, wiring",
    [("nearest", "direct"), ("bicubic", "stagewise"), ("guided", "stagewise"), ("resfu", "direct")],
)
@pytest.mark.parametrize("size", [(16, 8), (9, 11)])
def test_any_size(upsampler, size, wiring, guided):
    module, maps = head(upsampler, wiring=wiring), pyramid(*size, batch=1)
    logits = run(evaluating(module), maps)
    assert logits.shape == (1, *size, 3)
    assert not np.array_equal(logits, run(evaluating(head(wiring=wiring)), maps))


@pytest.mark.parametrize("upsampler", ["deconv", "pixel_shuffle"])
@pytest.mark.parametrize("wiring", ["direct", "stagewise"])
def test_upsamplers_that_know_only_their_scale(upsampler, wiring):
    module = evaluating(head(upsampler=upsampler, wiring=wiring))
    assert run(module, pyramid(8, 16)).shape == (2, 8, 16, 3)
    with pytest.raises(ValueError, match=f"{upsampler} of scale .* only, got output_size"):
        module(pyramid(9, 11))


def test_upsamplers_are_built_for_their_ratios(monkeypatch):
    built = []

    def record(name, **options):
        built.append((name, *(options[k] for k in ("features", "guide_features", "scale"))))
        return create_upsampler(name, **options)

    monkeypatch.setattr(_layers, "create_upsampler", record)
    module = head(upsampler="resfu", upsampler_options={"radius": 6})
    assert built == [("resfu", 32, 32, 2), ("resfu", 32, 32, 4), ("resfu", 32, 32, 8)]
    assert [up.radius for up in module.upsample] == [6, 6, 6]
    built.clear()
    head(upsampler="resfu", wiring="stagewise")
    assert built == [("resfu", 32, 32, 2)] * 6


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize(
    "upsampler, wiring", [("bilinear", "direct"), ("resfu", "direct"), ("guided", "stagewise")]
)
def test_training_step_reaches_every_parameter(upsampler, wiring, graph, guided):
    with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
        module = head(upsampler, wiring=wiring)
        gradients, updated = gradients_and_update(module, pyramid(8, 8))
    for path, g in nnx.to_flat_state(gradients):
        # What a softmax over neighbours adds to all of them alike has no effect.
        if upsampler != "resfu":
            assert np.max(np.abs(g[...])) > 1e-5, path
        assert np.all(np.isfinite(g[...])), path
    if upsampler == guided:
        assert len(jax.tree.leaves(gradients["upsample"])) == 6
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
        (dict(width=0), "width must be a positive whole number, got 0"),
        (dict(dropout=1.0), "dropout must be"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        head(**options)


def test_a_guide_that_heads_do_not_have(monkeypatch):
    class ByDepth(nnx.Module):
        guide = "depth"

    monkeypatch.setattr(_layers, "upsampler_entry", lambda name: _registry.Entry(ByDepth, {}))
    with pytest.raises(ValueError, match="'by_depth' needs a guide of kind 'depth'"):
        head(upsampler="by_depth")


def test_wrong_input(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="project must be one of"):
        head(project="conv")
    with pytest.raises(
        ValueError, match="wiring must be one of .'direct', 'stagewise'., got 'dire'"
    ):
        head(wiring="dire")
    with pytest.raises(ValueError, match="in_features must be four"):
        SegFormerHead((4, 6, 8), 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"4 maps with \(4, 6, 8, 10\) channels"):
        head()(pyramid()[:3])
    with pytest.raises(ValueError, match="unknown head 'segfromer'; did you mean 'segformer'"):
        create_head("segfromer", in_features=WIDTHS, num_classes=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="unknown option of head 'segformer': 'pool_sizes'"):
        create_head(in_features=WIDTHS, num_classes=3, pool_sizes=(1,), rngs=nnx.Rngs(0))
