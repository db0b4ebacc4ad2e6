"""Segmenter's linear head with ReSFU's wiring, and models whose backbone is frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from heads import evaluating
from small import SMALL

from resfu_jax import list_upsamplers
from resfu_jax.heads import LinearHead, create_head
from resfu_jax.model import create_model
from resfu_jax.ops.resize import resize
from resfu_jax.upsamplers import takes_values, upsampler_entry

IMAGE = (2, 32, 48, 3)


def normal(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def count(module):
    return sum(p.size for p in jax.tree.leaves(nnx.state(module, nnx.Param)))


def test_published_sizes():
    """Segmenter-S with ReSFU: the stem has 20,384 parameters, the upsampler 44,306."""
    head = nnx.eval_shape(lambda: LinearHead((384,), 150, rngs=nnx.Rngs(0)))
    assert count(head.stem) == 20_384
    assert count(head.upsample) == 44_306
    assert count(head) == 20_384 + 44_306 + 384 * 150 + 150


def literal_stem(x, stem, strides):
    """Convolutions as sums over taps of the replicated image, in float64."""

    def conv(x, layer, stride):
        kernel, bias = (np.asarray(v[...], np.float64) for v in (layer.kernel, layer.bias))
        x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        h, w = ((n - 3) // stride + 1 for n in x.shape[1:3])
        y = np.zeros((len(x), h, w, kernel.shape[-1]))
        for i in range(3):
            for j in range(3):
                rows = x[:, i : i + stride * (h - 1) + 1 : stride]
                y += rows[:, :, j : j + stride * (w - 1) + 1 : stride] @ kernel[i, j]
        return y + bias

    x = conv(np.asarray(x, np.float64), stem.conv1, strides[0])
    mean, var = x.mean((1, 2, 3), keepdims=True), x.var((1, 2, 3), keepdims=True)
    scale, bias = (np.asarray(v[...], np.float64) for v in (stem.norm.scale, stem.norm.bias))
    x = (x - mean) / np.sqrt(var + 1e-5) * scale + bias
    return conv(np.maximum(x, 0), stem.conv2, strides[1])


@pytest.mark.parametrize(
    ("guide_stride", "strides", "size"), [(2, (2, 1), (9, 12)), (4, (2, 2), (13, 18))]
)
def test_stem(guide_stride, strides, size):
    head = LinearHead((8,), 3, width=5, stem_width=6, guide_stride=guide_stride, rngs=nnx.Rngs(0))
    stem = head.stem
    for i, norm in enumerate((stem.norm.scale, stem.norm.bias, stem.conv1.bias, stem.conv2.bias)):
        norm.set_value(normal(norm.shape, i))
    x = normal((2, *size, 3))
    y = jax.jit(lambda stem, x: stem(x))(stem, x)
    assert y.shape == (2, *(-(-n // guide_stride) for n in size), 5)
    np.testing.assert_allclose(y, literal_stem(x, stem, strides), atol=2e-5)


def test_bilinear_probe_written_out():
    head = create_head(
        "linear_probe", in_features=(8,), num_classes=3, upsampler="bilinear", rngs=nnx.Rngs(0)
    )
    assert head.stem is None
    x, images = normal((2, 2, 3, 8)), normal(IMAGE)
    expected = resize(x, (32, 48), method="bilinear") @ head.classify.kernel[...]
    np.testing.assert_allclose(head((x,), images), expected, atol=1e-6)


def test_several_maps_and_norm():
    head = create_head(
        "linear", in_features=(4, 8), num_classes=3, upsampler="nearest", norm=True,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    maps, images = (normal((2, 2, 3, 4)), normal((2, 2, 3, 8), 1)), normal(IMAGE)
    x = np.concatenate(maps, axis=-1)
    x = (x - x.mean((1, 2, 3), keepdims=True)) / np.sqrt(x.var((1, 2, 3), keepdims=True) + 1e-5)
    x = x.repeat(4, axis=1).repeat(4, axis=2) @ np.asarray(head.classify.kernel[...])
    np.testing.assert_allclose(head(maps, images), x, atol=1e-5)


@pytest.mark.parametrize("upsampler", list_upsamplers())
def test_every_upsampler(upsampler):
    head = nnx.eval_shape(
        lambda: create_head(
            "linear",
            in_features=(32,),
            num_classes=3,
            upsampler=upsampler,
            width=32,
            rngs=nnx.Rngs(0),
        )
    )
    run = lambda head, x, images: head((x,), images)  # noqa: E731
    assert jax.eval_shape(run, head, normal((2, 2, 3, 32)), normal(IMAGE)).shape == (2, 8, 12, 3)


CLASSIFY_FIRST = [n for n in list_upsamplers() if takes_values(upsampler_entry(n).cls)]
# Options change what an upsampler's kernels are made of, not how its class applies them to values.
FIRST_OF_CLASS = {upsampler_entry(n).cls: n for n in reversed(CLASSIFY_FIRST)}.values()


@pytest.mark.parametrize("upsampler", CLASSIFY_FIRST)
def test_logits_equal_those_of_upsampled_features(upsampler):
    """The written order: upsample, drop channels, classify."""
    features, classes = 32, 3
    head = create_head(
        "linear",
        in_features=(features,),
        num_classes=classes,
        upsampler=upsampler,
        upsampler_options=SMALL.get(upsampler),
        width=features,
        dropout=0.5,
        rngs=nnx.Rngs(0),
    )
    head.classify.kernel.set_value(normal((features, classes), 3))
    head.classify.bias.set_value(normal((classes,), 4))
    graph, parameters, rest = nnx.split(head, nnx.Param, ...)
    x, images = normal((2, 3, 4, features)), normal((2, 48, 64, 3), 1)

    def written_out(head):
        return head.classify(head.dropout(head.upsampled((x,), images)))

    def run(f, parameters):
        def loss(parameters):
            out = f(nnx.merge(graph, parameters, rest, copy=True))
            return jnp.vdot(out, normal(out.shape, 5)), out

        if upsampler in FIRST_OF_CLASS:
            return jax.grad(loss, has_aux=True)(parameters)
        return None, loss(parameters)[1]

    @jax.jit
    def both(parameters):
        return run(lambda head: head((x,), images), parameters), run(written_out, parameters)

    (ours, out), (literal, expected) = both(parameters)
    np.testing.assert_allclose(out, expected, atol=2e-5 * np.abs(expected).max())
    if upsampler in FIRST_OF_CLASS:
        largest = max(np.abs(g).max() for g in jax.tree.leaves(literal))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(literal), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4 * largest)


def test_wide_features_are_never_large():
    """A probe of 768 channels at the pixels of the image: logits and kernels, no features."""
    head = nnx.eval_shape(
        lambda: create_head(
            "linear_probe",
            in_features=(768,),
            num_classes=21,
            upsampler="bilinear",
            rngs=nnx.Rngs(0),
        )
    )
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 16, 16, 768), (1, 256, 256, 3))]
    compiled = jax.jit(lambda head, x, images: head((x,), images)).lower(head, *shapes).compile()
    logits = 4 * 256 * 256 * 21
    memory = compiled.memory_analysis()
    assert memory.output_size_in_bytes == logits
    assert memory.temp_size_in_bytes <= 2 * logits  # the features there: 36 times


def test_errors(as_users_call):
    with pytest.raises(ValueError, match="guide_stride must be one of"):
        LinearHead((8,), 3, guide_stride=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="in_features must be positive"):
        LinearHead((), 3, rngs=nnx.Rngs(0))
    head = LinearHead((8, 8), 3, upsampler="bilinear", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="features must be maps of one size for the linear head"):
        head((jnp.zeros((1, 8, 8, 8)), jnp.zeros((1, 4, 4, 8))), jnp.zeros((1, 32, 32, 3)))
    with pytest.raises(ValueError, match="project the guide"):
        LinearHead((8,), 3, upsampler="fade", rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def frozen():
    return create_model(
        backbone=dict(name="vit", width=16, depth=2, heads=2, drop_path=0.5),
        head=dict(name="linear", upsampler="bilinear", dropout=0.5),
        num_classes=3,
        frozen=True,
        mean=(127.5,) * 3,
        std=(127.5,) * 3,
        rngs=nnx.Rngs(0),
    )


def test_frozen_backbones_do_not_learn(frozen):
    _, params, rest = nnx.split(frozen, frozen.trainable, ...)
    assert set(nnx.to_pure_dict(params)) == {"head"}
    assert "backbone" in nnx.to_pure_dict(rest)
    model = nnx.clone(frozen)
    model.frozen = False
    assert set(nnx.to_pure_dict(nnx.split(model, model.trainable, ...)[1])) == {"backbone", "head"}

    grads = jax.jit(nnx.grad(lambda model, x: model(x).sum()))(evaluating(frozen), normal(IMAGE))
    assert not any(np.any(g) for g in jax.tree.leaves(nnx.to_pure_dict(grads)["backbone"]))
    assert any(np.any(g) for g in jax.tree.leaves(nnx.to_pure_dict(grads)["head"]))


def test_frozen_backbones_run_as_in_evaluation(frozen):
    x = normal(IMAGE)

    @jax.jit
    def run(model, x):
        first, second = model.features(x), model.features(x)
        clean = evaluating(model)
        return first[0], second[0], model(x), model(x), clean(x), clean(x, first)

    first, second, noisy, other, clean, given = run(frozen, x)
    np.testing.assert_array_equal(first, second)  # no dropped path
    assert np.any(noisy != other)  # the head's dropout is on
    np.testing.assert_allclose(clean, given, atol=1e-6)
