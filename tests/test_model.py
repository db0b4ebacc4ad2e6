"""Whole models: against SegformerForSemanticSegmentation of transformers, and as users run them."""

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
from small import SMALL

from resfu_jax import create_upsampler
from resfu_jax.backbones import MiT
from resfu_jax.convert import load_pretrained
from resfu_jax.heads import SegFormerHead
from resfu_jax.model import IMAGENET_MEAN, IMAGENET_STD, SegmentationModel, create_model
from resfu_jax.ops.resize import resize

GOLDENS = pathlib.Path(__file__).parent / "goldens_mit"
BACKBONE = dict(widths=(8, 16, 24, 32), depths=(2, 1, 1, 1), heads=(1, 2, 3, 4))
TINY = dict(widths=(4, 8, 8, 8), depths=(1, 1, 1, 1), heads=(1, 1, 2, 2), sr_ratios=(4, 2, 1, 1))


def segformer(**head):
    """The architecture of the goldens."""
    head = dict(upsampler="bilinear", project="linear", width=16) | head
    return create_model(backbone=BACKBONE, head=head, num_classes=5, rngs=nnx.Rngs(0))


def tiny(upsampler="bilinear", **options):
    head = dict(upsampler=upsampler, width=32)
    return create_model(backbone=TINY, head=head, num_classes=3, rngs=nnx.Rngs(0), **options)


def evaluating(model):
    return nnx.view(model, deterministic=True, use_running_average=True, raise_if_not_found=False)


def images(*shape):
    return jax.random.randint(jax.random.key(7), shape, 0, 256).astype(jnp.uint8)


@jax.jit
def run(model, x):
    return model(x)


def as_official(path, gradients):
    """The gradient that has this name in published files, in PyTorch's axis order."""
    blocks = gradients.backbone.stages
    return {
        "encoder.patch_embeddings.0.proj.weight": lambda: (
            blocks[0].embed.kernel[...].transpose(3, 2, 0, 1)
        ),
        "encoder.block.0.1.attention.self.sr.weight": lambda: (
            blocks[0].blocks[1].attention.reduce.kernel[...].transpose(3, 2, 0, 1)
        ),
        "encoder.block.1.0.layer_norm_1.weight": lambda: (
            blocks[1].blocks[0].attention_norm.scale[...]
        ),
        "encoder.block.1.0.mlp.dwconv.dwconv.weight": lambda: (
            blocks[1].blocks[0].ffn.depthwise.kernel[...].transpose(2, 0, 1)[:, None]
        ),
        "encoder.block.2.0.attention.self.query.weight": lambda: (
            blocks[2].blocks[0].attention.query.kernel[...].T
        ),
        "encoder.block.3.0.mlp.dense2.bias": lambda: blocks[3].blocks[0].ffn.contract.bias[...],
        "decode_head.linear_fuse.weight": lambda: gradients.head.fuse.conv.kernel[...].T[
            :, :, None, None
        ],
        "decode_head.batch_norm.weight": lambda: gradients.head.fuse.norm.scale[...],
    }[path]()


@pytest.mark.parametrize("x64", [False, True])
def test_values_and_gradients_equal_transformers(x64):
    with np.load(GOLDENS / "model.npz") as z, jax.enable_x64(x64):
        dtype = jnp.float64 if x64 else jnp.float32
        model = segformer()
        assert load_pretrained(GOLDENS, model) == ["decode_head.batch_norm.num_batches_tracked"]
        graphdef, params, rest = nnx.split(evaluating(model), nnx.Param, ...)
        wide = jax.tree.map(lambda p: p.astype(dtype), params)
        image, seed = (jnp.asarray(goldens.nhwc(z[k]), dtype) for k in ("image", "seed"))

        def loss(params, image):
            m = nnx.merge(graphdef, params, rest)
            logits = m.head(m.backbone(image))
            return jnp.vdot(logits, seed), logits

        (gradients, image_gradient), logits = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(
            wide, image
        )
        goldens.assert_close(logits, goldens.nhwc(z["logits"]), 5e-7 if x64 else 5e-6, "logits")
        tol = 5e-7 if x64 else 5e-5
        goldens.assert_close(image_gradient, goldens.nhwc(z["grad/image"]), tol, "image")
        paths = [k.removeprefix("grad/") for k in z.files if k.startswith("grad/")]
        for path in paths:
            if path != "image":
                actual = as_official(path, gradients)
                goldens.assert_close(actual, z[f"grad/{path}"], tol, path)
        assert len(paths) == 9


def test_images_are_normalised_and_logits_have_their_size():
    model, x = evaluating(tiny()), images(2, 37, 45, 3)
    normalised = (np.asarray(x, np.float32) - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
    expected = run(model.head, run(model.backbone, jnp.asarray(normalised)))
    assert expected.shape == (2, 10, 12, 3)
    np.testing.assert_allclose(jax.jit(lambda m, x: m.logits(x))(model, x), expected, atol=1e-5)
    logits = run(model, x)
    np.testing.assert_allclose(logits, resize(expected, (37, 45)), atol=1e-5)
    np.testing.assert_array_equal(run(model, x.astype(jnp.float32)), logits)
    # An image by itself, as in the batch.
    np.testing.assert_allclose(run(model, x[:1]), logits[:1], atol=1e-5)


@pytest.mark.parametrize("upsampler", ["bilinear", "resfu"])
def test_bfloat16_computes_in_it_and_answers_in_float32(upsampler):
    x = images(1, 64, 32, 3)
    model = evaluating(tiny(upsampler, dtype=jnp.bfloat16))
    assert {p.dtype for p in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
    logits, expected = run(model, x), run(evaluating(tiny(upsampler)), x)
    assert logits.dtype == jnp.float32
    assert jax.eval_shape(model.logits, x).dtype == jnp.bfloat16
    scale = np.max(np.abs(expected))
    np.testing.assert_allclose(logits, expected, atol=0.1 * scale)
    assert not np.allclose(logits, expected, atol=1e-6 * scale)


def test_training_and_evaluation():
    model, x = tiny(), images(2, 32, 32, 3)
    step = nnx.jit(lambda model, x: model(x))
    mean = np.asarray(model.head.fuse.norm.mean)
    first = step(model, x)
    assert not np.array_equal(first, step(model, x))  # dropout, dropped paths
    assert not np.array_equal(mean, model.head.fuse.norm.mean[...])
    mean = np.asarray(model.head.fuse.norm.mean)
    still = evaluating(model)
    np.testing.assert_array_equal(step(still, x), step(still, x))
    np.testing.assert_array_equal(mean, model.head.fuse.norm.mean[...])


@pytest.mark.parametrize("graph, remat", [(True, False), (False, True)])
def test_gradient_descent_fits_an_image(graph, remat):
    x, labels = images(1, 32, 32, 3), jnp.arange(32 * 32).reshape(1, 32, 32) // 400
    with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
        graphdef, params, rest = nnx.split(tiny(remat=remat), nnx.Param, ...)

        def loss(params, rest):
            model = nnx.merge(graphdef, params, rest, copy=True)
            likelihood = jax.nn.log_softmax(model(x)) * jax.nn.one_hot(labels, 3)
            return -jnp.sum(likelihood) / labels.size, nnx.state(model, nnx.Not(nnx.Param))

        @jax.jit
        def step(params, rest):
            (value, rest), gradients = jax.value_and_grad(loss, has_aux=True)(params, rest)
            return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), rest

        values = []
        for _ in range(20):
            value, params, rest = step(params, rest)
            values.append(float(value))
    assert values[-1] < 0.6 * values[0], values


def test_remat_gives_the_same_model():
    x = images(1, 32, 32, 3)
    np.testing.assert_allclose(
        run(evaluating(tiny(remat=True)), x), run(evaluating(tiny()), x), atol=1e-5
    )


@pytest.mark.parametrize("upsampler", ["bilinear", "resfu"])
def test_sharded_equals_unsharded(upsampler):
    model, x = evaluating(tiny(upsampler)), images(8, 32, 32, 3)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = run(
        jax.device_put(model, NamedSharding(mesh, P())),
        jax.device_put(x, NamedSharding(mesh, P("data"))),
    )
    np.testing.assert_allclose(sharded, run(model, x), atol=1e-5)


def test_initialises_under_jit_without_running():
    model = nnx.eval_shape(lambda: tiny("resfu"))
    made = jax.jit(lambda: nnx.state(tiny("resfu")))()
    assert jax.tree.map(jnp.shape, nnx.state(model)) == jax.tree.map(jnp.shape, made)


def test_checkpoint_needs_a_head_of_its_form(tmp_path):
    with pytest.raises(ValueError, match="project='linear'.*pass model.backbone"):
        load_pretrained(GOLDENS, segformer(project="conv_bn_relu"))
    # Of an encoder alone, the decoder is missing.
    entries = safetensors.numpy.load_file(GOLDENS / "model.safetensors")
    encoder = {k: v for k, v in entries.items() if k.startswith("segformer.")}
    safetensors.numpy.save_file(encoder, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="missing 'decode_head.classifier.weight'"):
        load_pretrained(tmp_path, segformer())
    # Into another number of classes.
    model = create_model(
        backbone=BACKBONE,
        head=dict(upsampler="bilinear", project="linear", width=16),
        num_classes=7,
        rngs=nnx.Rngs(0),
    )
    with pytest.raises(ValueError, match=r"classifier.bias' has shape \(5,\), expected \(7,\)"):
        load_pretrained(GOLDENS, model)
    assert len(load_pretrained(GOLDENS, model.backbone)) == 16


def test_wrong_input(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model = tiny()
    with pytest.raises(ValueError, match=r"images must be \(batch, height, width, 3\)"):
        model(jnp.zeros((32, 32, 3)))
    with pytest.raises(ValueError, match="images must be uint8 or floating point, got int32"):
        model(jnp.zeros((1, 32, 32, 3), jnp.int32))
    with pytest.raises(ValueError, match="unknown upsampler 'reesfu'; did you mean 'resfu'"):
        tiny("reesfu")
    mit = MiT(**TINY, rngs=nnx.Rngs(0))
    head = SegFormerHead(mit.features, 3, width=32, upsampler="bilinear", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="std > 0"):
        SegmentationModel(mit, head, std=(0, 1, 1))


@pytest.mark.parametrize("head", ["segformer", "upernet", "fpn"])
def test_logits_are_those_of_the_upsampled_features(head):
    head = dict(name=head, upsampler="bilinear", width=8)
    model = create_model(backbone=TINY, head=head, num_classes=3, rngs=nnx.Rngs(0))
    x = images(1, 32, 64, 3)

    def both(model):
        return model.logits(x), model.head.classify(model.upsampled(x))

    logits, classified = jax.jit(both)(evaluating(model))
    np.testing.assert_allclose(classified, logits, rtol=1e-5, atol=1e-6)


def test_norms_of_upsamplers_see_the_batch_where_a_model_is_trained():
    """UPLiFT is made for evaluation: its norms use what they have learned."""
    options = SMALL["uplift"]
    up = create_upsampler("uplift", features=8, rngs=nnx.Rngs(0), **options)
    head = dict(name="segformer", width=16, upsampler="uplift", upsampler_options=options)
    model = create_model(backbone=TINY, head=head, num_classes=3, rngs=nnx.Rngs(0))
    for module, evaluates in ((up, True), (model.head, False), (evaluating(model).head, True)):
        norms = [m for _, m in nnx.iter_modules(module) if hasattr(m, "use_running_average")]
        assert norms and {m.use_running_average for m in norms} == {evaluates}
