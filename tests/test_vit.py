"""ViT against timm and Hugging Face transformers, and on real weights where they are.

The golden files in goldens_vit are made by scripts/make_vit_goldens.py.
"""

import os
import pathlib
import re

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image

from resfu_jax.backbones import ViT, create_backbone
from resfu_jax.convert.vit import load_vit

GOLDENS = pathlib.Path(__file__).parent / "goldens_vit"
SHARED = pathlib.Path(__file__).resolve().parent.parent.parent / "shared"
if "RESFU_GOLDENS" in os.environ:
    SHARED = pathlib.Path(os.environ["RESFU_GOLDENS"]).parent
WEIGHTS = SHARED / "weights" / "vit_tiny_patch16_224.safetensors"

SMALL = dict(width=16, depth=2, heads=2, mlp_ratio=2, patch_size=4, image_size=24, layers=(0, 1))
MODELS = {
    "timm": dict(image_size=(24, 16), num_classes=5),
    "vit": dict(num_classes=5, antialias=False, norm_epsilon=1e-12),
    "dinov2": dict(variant="dinov2_small"),
    "dinov2_registers": dict(variant="dinov2_registers_small", registers=3),
    "dinov3": dict(variant="dinov3_small", registers=3),
}


def small(model="timm", **options):
    return ViT(**(SMALL | MODELS[model] | options), rngs=nnx.Rngs(0))


def checkpoint(model, group="param"):
    """Arrays of a golden file under `group/`."""
    with np.load(GOLDENS / f"{model}.npz") as z:
        return {k.removeprefix(f"{group}/"): z[k] for k in z.files if k.startswith(f"{group}/")}


def loaded(model="timm", **options):
    vit = small(model, **options)
    load_vit(checkpoint(model), vit, model)
    return vit


def evaluating(model):
    return nnx.view(model, deterministic=True)


@jax.jit
def run(model, x):
    return model(x)


@jax.jit
def classify(model, x):
    return model.classify(x)


def images(*shape):
    return jax.random.normal(jax.random.key(7), shape)


def widened(model):
    """The model with float64 parameters."""
    graphdef, state = nnx.split(model)
    return nnx.merge(
        graphdef,
        jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, state),
    )


def parameters(model):
    return {path: p[...] for path, p in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def golden(model, dtype):
    """The official image (NHWC) and outputs (NCHW)."""
    with np.load(GOLDENS / f"{model}.npz") as z:
        outputs = {k: z[k] for k in z.files if k.startswith(("map/", "logits"))}
        return jnp.asarray(goldens.nhwc(z["image"]), dtype), outputs


@jax.jit
def named_outputs(vit, image):
    outputs = {f"map/{i}": jnp.moveaxis(y, -1, 1) for i, y in enumerate(vit(image))}
    return outputs if vit.head is None else outputs | {"logits": vit.classify(image)}


@pytest.mark.parametrize("model", MODELS)
def test_equals_official(model):
    image, expected = golden(model, jnp.float32)
    outputs = named_outputs(evaluating(loaded(model)), image)
    assert outputs.keys() == expected.keys()
    for name, y in outputs.items():
        goldens.assert_close(y, expected[name], 5e-6, name)


@pytest.mark.parametrize("model", MODELS)
def test_equals_official_in_float64_with_gradients(model):
    with jax.enable_x64(True):
        image, expected = golden(model, jnp.float64)
        seeds = checkpoint(model, "seed")
        graphdef, params, rest = nnx.split(evaluating(widened(loaded(model))), nnx.Param, ...)

        def loss(params, image):
            outputs = named_outputs(nnx.merge(graphdef, params, rest), image)
            return sum(jnp.sum(y * seeds[k].astype(y.dtype)) for k, y in outputs.items()), outputs

        (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
            params, image
        )
        for name, y in outputs.items():
            goldens.assert_close(y, expected[name], 5e-7, name)
        entries = checkpoint(model, "grad")
        goldens.assert_close(gradients[1], goldens.nhwc(entries.pop("image")), 5e-7, "image")

        # The gradients of the official parameters have their names and layout: read them so.
        official = small(model)
        load_vit(entries, official, model)
        official = parameters(official)
        for path, g in nnx.to_flat_state(gradients[0]):
            # Softmax does not see a constant added to all of its scores.
            if path[-2:] == ("key", "bias"):
                assert np.max(np.abs(g[...])) < 1e-12, path
            else:
                goldens.assert_close(g[...], official.pop(path), 5e-7, str(path))
        assert all(path[-2:] == ("key", "bias") for path in official)


# Printed by scripts/make_vit_goldens.py.
@pytest.mark.parametrize(
    "variant, options, count",
    [
        ("tiny", dict(num_classes=1000), 5_717_416),
        ("small", dict(num_classes=1000), 22_050_664),
        ("base", dict(num_classes=1000), 86_567_656),
        ("large", dict(num_classes=1000), 304_326_632),
        ("dinov2_small", {}, 22_056_192),
        ("dinov2_registers_base", {}, 86_582_784),
        ("dinov2_large", {}, 304_367_616),
        ("dinov3_small", {}, 21_596_160),
        ("dinov3_base", {}, 85_659_648),
        ("dinov3_large", {}, 303_128_576),
    ],
)
def test_parameter_count(variant, options, count):
    vit = nnx.eval_shape(lambda: ViT(variant, **options, rngs=nnx.Rngs(0)))
    assert sum(p.size for p in jax.tree.leaves(nnx.state(vit, nnx.Param))) == count


def test_initial_weights():
    vit = ViT("dinov2_small", depth=1, registers=2, num_classes=3, rngs=nnx.Rngs(0))
    block = vit.blocks[0]
    stds = {
        0.02: [block.attention.query.kernel, block.ffn.contract.kernel, vit.positions],
        (3 * 14 * 14) ** -0.5: [vit.embed.kernel],
        1e-6: [vit.class_token, vit.registers],
    }
    for std, arrays in stds.items():
        for a in arrays:
            np.testing.assert_allclose(np.std(np.asarray(a)), std, rtol=0.1)
            assert abs(np.mean(np.asarray(a))) < 0.1 * std
    assert np.all(block.attention_scale[...] == np.float32(1e-5))
    assert not np.any(vit.head.kernel[...])


def test_layers():
    image, expected = golden("timm", jnp.float32)
    for layers, last in (((0,), 0), (None, 1)):
        vit = evaluating(loaded(layers=layers))
        assert (vit.features, vit.strides) == ((16,), (4,))
        outputs = named_outputs(vit, image)
        goldens.assert_close(outputs["map/0"], expected[f"map/{last}"], 5e-6, "map")
        # The classifier reads the last block, whatever the features are.
        goldens.assert_close(outputs["logits"], expected["logits"], 5e-6, "logits")


def test_an_image_does_not_depend_on_the_rest_of_its_batch():
    vit, x = evaluating(loaded("dinov2_registers")), images(3, 20, 28, 3)
    for y, y1 in zip(run(vit, x), run(vit, x[1:2]), strict=True):
        np.testing.assert_allclose(y[1:2], y1, atol=1e-5)


@pytest.mark.parametrize("model", ["timm", "dinov3"])
def test_bfloat16(model):
    x = images(2, 20, 28, 3)
    for y, expected in zip(
        run(evaluating(loaded(model, dtype=jnp.bfloat16)), x),
        run(evaluating(loaded(model)), x),
        strict=True,
    ):
        assert y.dtype == jnp.bfloat16
        np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.15)


def test_drop_path():
    vit, x = loaded(depth=2, drop_path=0.5), images(8, 16, 16, 3)
    np.testing.assert_array_equal(run(evaluating(vit), x)[1], run(evaluating(loaded()), x)[1])
    step = nnx.jit(lambda vit, x: vit(x)[1])
    assert not np.array_equal(step(vit, x), step(vit, x))
    assert [block.drop_path.rate for block in small(depth=3, drop_path=0.5).blocks] == [
        0,
        0.25,
        0.5,
    ]
    # A branch is dropped for a whole image, and scaled up where it is kept.
    branch = vit.blocks[1].drop_path(jnp.ones((200, 5, 3)))
    assert set(np.unique(branch)) == {0.0, 2.0} and np.all(branch == branch[:, :1, :1])


def test_remat_changes_nothing():
    def loss_and_gradients(vit, x):
        graphdef, params, rest = nnx.split(vit, nnx.Param, ...)

        def loss(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            total = sum(jnp.sum(y * jnp.sin(jnp.arange(y.size).reshape(y.shape))) for y in model(x))
            return total, nnx.state(model, nnx.RngCount)

        (value, counts), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return value, gradients, jax.tree.leaves(counts)

    x = images(2, 20, 16, 3)
    kept = loss_and_gradients(loaded("dinov3", drop_path=0.3), x)
    for graph in (True, False):
        with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
            recomputed = loss_and_gradients(loaded("dinov3", drop_path=0.3, remat=True), x)
        np.testing.assert_allclose(recomputed[0], kept[0], rtol=1e-6)
        for (path, g), (_, expected) in zip(
            nnx.to_flat_state(recomputed[1]), nnx.to_flat_state(kept[1]), strict=True
        ):
            np.testing.assert_allclose(
                g[...], expected[...], rtol=1e-4, atol=1e-4, err_msg=str(path)
            )
        # The random streams advance as without.
        assert recomputed[2] == kept[2] and any(count > 0 for count in kept[2])


def test_jit_equals_eager_and_sharded_equals_unsharded():
    vit, x = evaluating(loaded(layers=(0,))), images(8, 16, 20, 3)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = run(
        jax.device_put(vit, NamedSharding(mesh, P())),
        jax.device_put(x, NamedSharding(mesh, P("data"))),
    )
    for eager, compiled, spread in zip(vit(x), run(vit, x), sharded, strict=True):
        np.testing.assert_allclose(compiled, eager, atol=1e-5)
        np.testing.assert_allclose(spread, eager, atol=1e-5)


@pytest.mark.parametrize("model", ["timm", "dinov2", "dinov3"])
def test_exports_with_symbolic_sizes(model):
    graphdef, state = nnx.split(evaluating(loaded(model, layers=(0,))))
    b, h, w = jax.export.symbolic_shape("b, h, w")
    exported = jax.export.export(jax.jit(lambda x: nnx.merge(graphdef, state)(x)))(
        jax.ShapeDtypeStruct((b, 4 * h, 4 * w, 3), jnp.float32)
    )
    for size in (28, 12), (24, 24):
        x = images(2, *size, 3)
        for y, expected in zip(exported.call(x), run(nnx.merge(graphdef, state), x), strict=True):
            np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(variant="huge"), "variant must be one of tiny, small"),
        (dict(heads=3), "heads must divide width, got heads=3, width=16"),
        (dict(mlp_ratio=0), "mlp_ratio must be a positive number, got 0"),
        (dict(depth=0, layers=None), "depth must be a positive whole number, got 0"),
        (dict(image_size=30), r"image_size must be .* patch size 4, got \(30, 30\)"),
        (dict(positions="sine"), "positions must be one of learned, rope"),
        (dict(positions="rope", heads=8), "heads of 4, 8, 12, .. channels"),
        (dict(registers=-1), "registers must be a whole number, 0 or more, got -1"),
        (dict(layers=(1, 2)), r"layers must be ascending numbers of blocks, 0 .. 1, got \(1, 2\)"),
        (dict(layers=(1, 0)), "layers must be ascending"),
        (dict(layers=()), "layers must be ascending"),
        (dict(num_classes=0), "num_classes must be a positive whole number, got 0"),
        (dict(drop_path=1.0), "drop_path must be"),
    ],
)
def test_wrong_options(options, message, as_users_call):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_wrong_images(as_users_call):
    vit = small(num_classes=None)
    with pytest.raises(ValueError, match=r"must be \(batch, height, width, 3\), got"):
        vit(jnp.zeros((1, 32, 32, 4)))
    with pytest.raises(ValueError, match="must be normalised floating point, got uint8"):
        vit(jnp.zeros((1, 32, 32, 3), jnp.uint8))
    with pytest.raises(ValueError, match="30x32 do not divide into patches of 4x4.* to 32x32"):
        vit(jnp.zeros((1, 30, 32, 3)))
    with pytest.raises(ValueError, match="build the ViT with num_classes"):
        vit.classify(jnp.zeros((1, 32, 32, 3)))


def test_is_registered():
    vit = nnx.eval_shape(lambda: create_backbone("vit", layers=(2, 5, 8, 11), rngs=nnx.Rngs(0)))
    assert isinstance(vit, ViT) and vit.features == (192,) * 4 and vit.strides == (16,) * 4


# ------------------------------------------------------------------------------------- checkpoints
def same_parameters(entries, model, **options):
    """Loads the entries and compares with what the golden file loads; returns what is unused."""
    vit = small(model, **options)
    unused = load_vit(entries, vit, model)
    expected = parameters(loaded(model, **options))
    for path, p in parameters(vit).items():
        np.testing.assert_array_equal(p, expected[path], err_msg=str(path))
    return unused


@pytest.mark.parametrize("model", ["vit", "dinov2", "dinov2_registers", "dinov3"])
def test_loads_state_dicts_of_transformers(model):
    with np.load(GOLDENS / f"{model}.npz") as z:
        names = dict(z["names"].tolist())
    entries = checkpoint(model)
    assert names.keys() != set(names.values())  # transformers renames when it saves
    masks = [name for name in names if "mask_token" in name]
    assert same_parameters({name: entries[k] for name, k in names.items()}, model) == masks


def test_loads_a_backbone_from_a_classifier_and_with_a_pooler():
    entries = checkpoint("vit") | {"vit.pooler.dense.bias": np.zeros(16, np.float32)}
    unused = ["classifier.bias", "classifier.weight", "vit.pooler.dense.bias"]
    assert same_parameters(entries, "vit") == unused[2:]
    vit = small("vit", num_classes=None)
    assert load_vit(entries, vit, "vit") == unused
    # What ViTModel saves has no prefix.
    bare = {name.removeprefix("vit."): value for name, value in entries.items()}
    assert load_vit(bare, vit, "vit") == unused[:2] + ["pooler.dense.bias"]


def as_the_authors_save(model):
    """Names and fused queries, keys and values of the official repositories of DINOv2 and 3."""
    names = (
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
        (r"^embeddings\.", ""),
        (r"^register_tokens$", "storage_tokens" if model == "dinov3" else "register_tokens"),
        (r"^(encoder\.)?layer\.", "blocks."),
        (r"attention\.(output\.dense|o_proj)", "attn.proj"),
        (r"attention\.(attention\.query|q_proj)", "attn.0"),
        (r"attention\.(attention\.key|k_proj)", "attn.1"),
        (r"attention\.(attention\.value|v_proj)", "attn.2"),
        (r"layer_scale(.)\.lambda1", r"ls\1.gamma"),
        ("up_proj", "fc1"),
        ("down_proj", "fc2"),
        (r"^layernorm\.", "norm."),
    )
    entries, parts = {}, {}
    for name, value in checkpoint(model).items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        if match := re.fullmatch(r"(.*\.attn\.)(\d)\.(\w+)", name):
            fused = match[1] + "qkv." + match[3]
            # DINOv3's official layer has no bias for the keys, but a place for it, with this in it.
            parts.setdefault(fused, [np.full(16, np.nan, np.float32)] * 3)[int(match[2])] = value
        else:
            entries[name] = value
    return entries | {name: np.concatenate(three) for name, three in parts.items()}


def test_loads_dinov2_of_its_authors():
    entries = as_the_authors_save("dinov2_registers")
    assert {"register_tokens", "blocks.1.attn.qkv.bias", "blocks.0.ls1.gamma"} < entries.keys()
    assert same_parameters(entries, "dinov2_registers") == ["mask_token"]


def test_loads_dinov2_of_timm():
    entries = as_the_authors_save("dinov2_registers")
    entries["reg_token"] = entries.pop("register_tokens")
    # timm adds the class token's position to it, and has positions of patches only.
    positions = entries["pos_embed"]
    entries["cls_token"] = entries["cls_token"] + positions[:, :1]
    entries["pos_embed"] = positions[:, 1:]
    vit = small("dinov2_registers")
    load_vit(entries, vit, "timm")
    x = images(1, 20, 28, 3)
    for y, expected in zip(run(vit, x), run(loaded("dinov2_registers"), x), strict=True):
        np.testing.assert_allclose(y, expected, atol=1e-5)


def test_loads_dinov3_of_its_authors():
    entries = as_the_authors_save("dinov3")
    entries["rope_embed.periods"] = np.ones(2, np.float32)
    entries["blocks.0.attn.qkv.bias_mask"] = np.ones(48, np.float32)
    assert {"storage_tokens", "blocks.1.attn.qkv.bias", "blocks.0.mlp.fc2.bias"} < entries.keys()
    unused = ["blocks.0.attn.qkv.bias_mask", "mask_token", "rope_embed.periods"]
    assert same_parameters(entries, "dinov3") == unused


def test_names_all_that_does_not_fit_and_leaves_the_model_alone():
    entries = checkpoint("timm")
    del entries["blocks.1.norm2.weight"]
    entries["something.else"] = np.zeros(3, np.float32)
    entries["blocks.0.ls1.gamma"] = np.zeros(16, np.float32)
    entries["norm.bias"] = np.zeros(7, np.float32)
    entries["pos_embed"] = np.zeros((1, 37, 16), np.float32)
    vit = small()
    before = jax.tree.map(np.asarray, parameters(vit))
    with pytest.raises(ValueError) as error:
        load_vit(entries, vit, "weights.safetensors")
    for part in (
        "weights.safetensors does not fit ViT: it has 37 positions",
        "missing 'blocks.1.norm2.weight'",
        "unexpected 'something.else'",
        "unexpected 'blocks.0.ls1.gamma'",
        "'norm.bias' has shape (7,), expected (16,)",
        "'pos_embed' has shape (1, 37, 16), expected (1, 25, 16)",
        "it has 37 positions, and the model 25 for images of 24x16: build it with the checkpoint's",
    ):
        assert part in str(error.value)
    jax.tree.map(np.testing.assert_array_equal, before, parameters(vit))


# ------------------------------------------------------------------------------------ real weights
# Place of a photograph's WordNet id among ImageNet's thousand classes.
PHOTOS = {
    "n01514668": 7,
    "n01687978": 42,
    "n01735189": 57,
    "n01847000": 97,
    "n01855032": 98,
    "n02018795": 138,
    "n02025239": 139,
    "n02113978": 268,
    "n02125311": 286,
    "n02127052": 287,
    "n02231487": 313,
    "n02412080": 348,
    "n02493509": 380,
    "n03032252": 498,
    "n03062245": 503,
    "n03240683": 540,
    "n03764736": 653,
}


def photo(path):
    """As timm evaluates the model: 224 / 0.9 for the shorter side, bicubic, centre of 224x224."""
    with Image.open(path) as image:
        image = image.convert("RGB")
        ratio = 248 / min(image.size)
        w, h = (round(n * ratio) for n in image.size)
        image = image.resize((w, h), Image.BICUBIC)
    x, y = (w - 224) // 2, (h - 224) // 2
    return np.asarray(image.crop((x, y, x + 224, y + 224)), np.float32) / 127.5 - 1


@pytest.mark.skipif(not WEIGHTS.is_file(), reason="needs the weights of vit_tiny_patch16_224")
def test_classifies_photographs():
    vit = ViT("tiny", num_classes=1000, rngs=nnx.Rngs(0))
    assert load_vit(safetensors.numpy.load_file(WEIGHTS), vit, WEIGHTS.name) == []
    paths = sorted((SHARED / "data" / "photos" / "imagenet17").glob("*.JPEG"))
    logits = classify(vit, np.stack([photo(path) for path in paths]))
    expected = [PHOTOS[path.name.partition("_")[0]] for path in paths]
    assert len(paths) == 17 and np.argmax(logits, axis=-1).tolist() == expected
