"""UPerNetHead and its form without pyramid pooling."""

import jax
import jax.numpy as jnp
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
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from resfu_jax.heads import UPerNetHead, create_head
from resfu_jax.ops.pool import adaptive_avg_pool
from resfu_jax.ops.resize import resize
from resfu_jax.upsamplers import _registry, list_upsamplers


def head(upsampler="bilinear", name="upernet", **options):
    options = dict(width=8, upsampler=upsampler) | options
    return create_head(name, in_features=WIDTHS, num_classes=3, rngs=nnx.Rngs(0), **options)


@pytest.fixture
def guided(monkeypatch):
    """The name of a quick upsampler with a guide."""
    monkeypatch.setitem(_registry._ENTRIES, "guided", _registry.Entry(Guided, {}))
    return "guided"


@pytest.mark.parametrize("upsampler", ["bilinear", "guided"])
@pytest.mark.parametrize("name", ["upernet", "fpn"])
def test_equals_the_wiring_written_out(upsampler, name, guided):
    options = dict(pool_sizes=(1, 3)) if name == "upernet" else {}
    module, maps = randomize_norms(evaluating(head(upsampler, name, **options))), pyramid(19, 23)

    @jax.jit
    def expected(module, maps):
        def up(i, x, guide):
            if upsampler == guided:
                return module.upsample[i](x, guide)
            return resize(x, guide.shape[1:3])

        laterals, smooth = list(module.lateral), list(module.smooth)
        l1, l2, l3 = (conv_bn_relu(x, m) for x, m in zip(maps[:3], laterals[:3], strict=True))
        c4, top = maps[3], laterals[3]
        if name == "upernet":
            pooled = [adaptive_avg_pool(c4, (n, n)) for n in (1, 3)]
            grids = [conv_bn_relu(x, m) for x, m in zip(pooled, top.project, strict=True)]
            back = [resize(x, c4.shape[1:3]) for x in grids]
            l4 = conv_bn_relu(jnp.concatenate([c4, *back], -1), top.merge)
        else:
            l4 = conv_bn_relu(c4, top)
        l3 += up(2, l4, l3)
        l2 += up(1, l3, l2)
        l1 += up(0, l2, l1)
        p1, p2, p3 = (conv_bn_relu(x, m) for x, m in zip((l1, l2, l3), smooth[:3], strict=True))
        p4 = l4 if name == "upernet" else conv_bn_relu(l4, smooth[3])
        finest = [p1, *(resize(x, (19, 23)) for x in (p2, p3, p4))]
        fused = conv_bn_relu(jnp.concatenate(finest, -1), module.fuse)
        return fused @ module.classify.kernel[...] + module.classify.bias[...]

    with jax.numpy_rank_promotion("allow"):
        np.testing.assert_allclose(run(module, maps), expected(module, maps), atol=1e-5)


@pytest.mark.parametrize("upsampler", list_upsamplers())
def test_takes_every_upsampler(upsampler):
    assert_runs_or_says_why_not(lambda: head(upsampler, "fpn", width=64))


@pytest.mark.parametrize("size", [(16, 8), (9, 11), (1, 1)])
def test_any_size(size, guided):
    module, maps = head(guided), pyramid(*size, batch=1)
    logits = run(module, maps)  # in training: one image, and the 1 x 1 grid has one pixel
    assert logits.shape == (1, *size, 3)
    assert np.all(np.isfinite(logits))


def test_any_number_of_maps():
    module = evaluating(UPerNetHead(WIDTHS[:2], 3, width=8, upsampler="bilinear", rngs=nnx.Rngs(0)))
    assert run(module, pyramid(9, 11)[:2]).shape == (2, 9, 11, 3)
    assert len(module.upsample) == 1


def test_upsamplers_that_know_only_their_scale():
    module = evaluating(head("deconv"))
    assert jax.eval_shape(module, pyramid(8, 16)).shape == (2, 8, 16, 3)
    with pytest.raises(ValueError, match="deconv of scale 2 .* only, got output_size"):
        jax.eval_shape(module, pyramid(9, 11))


@pytest.mark.parametrize("name, graph", [("upernet", False), ("fpn", True)])
def test_training_step_reaches_every_parameter(name, graph, guided):
    with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
        module = head(guided, name)
        gradients, updated = gradients_and_update(module, pyramid(16, 16))
    for path, g in nnx.to_flat_state(gradients):
        assert np.max(np.abs(g[...])) > 1e-5, path
    assert len(jax.tree.leaves(gradients["upsample"])) == 3
    before = dict(nnx.to_flat_state(nnx.state(module, nnx.BatchStat)))
    for path, stat in nnx.to_flat_state(updated):
        if path in before:
            assert not np.array_equal(stat[...], before[path][...]), path


def test_bfloat16():
    maps = pyramid(8, 8)
    logits = run(evaluating(head(dtype=jnp.bfloat16)), [x.astype(jnp.bfloat16) for x in maps])
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits.astype(jnp.float32), run(evaluating(head()), maps), atol=3e-3)


def test_sharded_equals_unsharded():
    # Training mode: statistics are of the whole batch, however it is spread.
    module, maps = head(dropout=0.0), pyramid(8, 8, batch=8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = run(
        jax.device_put(module, NamedSharding(mesh, P())),
        jax.device_put(maps, NamedSharding(mesh, P("data"))),
    )
    np.testing.assert_allclose(sharded, run(module, maps), atol=1e-5)


def test_exports_with_symbolic_batch_and_sizes(guided):
    module = evaluating(head(guided))
    b, h, w = export.symbolic_shape("b, h, w")
    shapes = [
        jax.ShapeDtypeStruct((b, 2**k * h, 2**k * w, n), jnp.float32)
        for k, n in zip((3, 2, 1, 0), WIDTHS, strict=True)
    ]
    exported = export.export(jax.jit(lambda *maps: module(maps)))(*shapes)
    for size in ((8, 16), (32, 24)):
        maps = pyramid(*size, batch=1)
        np.testing.assert_allclose(exported.call(*maps), run(module, maps), atol=1e-5)


def test_wrong_options_and_input():
    with pytest.raises(ValueError, match="in_features must be two or more positive"):
        UPerNetHead((4,), 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"pool_sizes must be positive integers, got \(0, 2\)"):
        head(pool_sizes=(0, 2))
    with pytest.raises(ValueError, match="width must be a positive whole number, got 0"):
        head(width=0)
    with pytest.raises(ValueError, match="dropout must be at least 0"):
        head(dropout=1.0)
    with pytest.raises(ValueError, match="unknown upsampler 'bilinaer'"):
        head("bilinaer")
    with pytest.raises(ValueError, match="unknown option of head 'fpn': 'wiring'"):
        head(name="fpn", wiring="direct")
    with pytest.raises(ValueError, match=r"features must be 4 maps with \(4, 6, 8, 10\) channels"):
        head()(pyramid()[:3])
