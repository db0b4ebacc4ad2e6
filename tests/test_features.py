"""Features of photos at any resolution: a tiny ViT, and upsamplers without weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from tiny_run import make_run, tiny_config_of

from resfu_jax import FeaturePipeline, Predictor, create_upsampler, training
from resfu_jax import features as module
from resfu_jax.backbones import ViT, transformer
from resfu_jax.convert import load_backbone
from resfu_jax.images import ImageError
from resfu_jax.self_supervised import GuidedUpsampler

RNG = np.random.default_rng(0)
PATCH, WIDTH = 8, 32


@pytest.fixture(scope="module")
def vit():
    sizes = dict(patch_size=PATCH, image_size=32, width=WIDTH, depth=3, heads=2)
    return ViT("tiny", **sizes, rngs=nnx.Rngs(0))


def pipeline_of(vit, upsampler="bilinear", **options):
    return FeaturePipeline(vit, upsampler, **dict(normalisation="half") | options)


@pytest.fixture(scope="module")
def pipeline(vit):
    return pipeline_of(vit, devices=jax.devices()[:1])


def photo(*size):
    return RNG.integers(0, 256, (*size, 3), np.uint8)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(("stride", "size"), [(1, (29, 43)), (2, (15, 22)), (None, (4, 5))])
def test_sizes(pipeline, stride, size):
    image = photo(29, 43)
    y = pipeline(image, stride)
    assert (y.shape, y.dtype) == ((*size, WIDTH), np.float32)


def test_a_photo_that_the_patches_divide_is_seen_as_it_is(pipeline, vit):
    image = photo(24, 32)
    expected = vit(jnp.asarray((image[None] - np.float32(127.5)) / np.float32(127.5)))[-1]
    close(pipeline(image, None), expected[0])
    close(pipeline.encode(image[None])[0], expected[0])
    upsampled = pipeline.upsample(np.asarray(expected), image[None])
    close(pipeline(image), upsampled[0])


def test_kinds_of_input(pipeline, tmp_path):
    images = [photo(24, 32), photo(24, 32), photo(16, 24)]
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    expected = [pipeline(image, 2) for image in images]
    close(pipeline(tmp_path / "0.png", 2), expected[0])
    for found in (pipeline(tmp_path, 2), pipeline(images, 2)):
        assert len(found) == 3
        for one, other in zip(found, expected, strict=True):
            close(one, other)
    batch = pipeline(np.stack(images[:2]), 2)
    assert batch.shape == (2, 12, 16, WIDTH)
    close(batch, np.stack(expected[:2]))


def test_files_are_turned(pipeline, tmp_path):
    image = photo(16, 32)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    Image.fromarray(image).save(tmp_path / "turned.png", exif=exif)
    close(pipeline(tmp_path / "turned.png", 2), pipeline(np.rot90(image, -1), 2))


def test_unreadable_files(pipeline, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    Image.fromarray(photo(16, 24)).save(tmp_path / "b.png")
    with pytest.raises(ImageError, match=r"a\.png"):
        pipeline(tmp_path)
    kinds = {type(result) for result in pipeline.stream(tmp_path, 2)}
    assert kinds == {ImageError, module.ImageFeatures}


def test_bfloat16(pipeline, vit):
    image = photo(24, 32)
    y = pipeline_of(vit, dtype="bfloat16", devices=jax.devices()[:1])(image, 2)
    assert y.dtype == jnp.bfloat16
    close(y.astype(np.float32), pipeline(image, 2), 0.05)


def test_devices(pipeline, vit):
    assert len(jax.devices()) == 8
    images = [photo(16, 24) for _ in range(10)]
    for one, other in zip(pipeline_of(vit)(images, 4), pipeline(images, 4), strict=True):
        close(one, other)


def test_layers_and_class_token(vit):
    image = photo(24, 32)
    pipeline = pipeline_of(vit, layers=(0, 2), devices=jax.devices()[:1])
    y, token = pipeline(image, None, class_token=True)
    x = (image[None] - np.float32(127.5)) / np.float32(127.5)
    maps, tokens = vit.maps_and_class_tokens(jnp.asarray(x), (0, 2))
    assert pipeline.channels == 2 * WIDTH
    close(y, jnp.concatenate(maps, axis=-1)[0])
    close(token, jnp.concatenate(tokens, axis=-1)[0])
    close(maps[1], vit(jnp.asarray(x))[0])
    with pytest.raises(ValueError, match="layers must be ascending"):
        vit.maps_and_class_tokens(jnp.asarray(x), (3,))


def test_attention_in_parts(vit, monkeypatch):
    x = jnp.asarray(RNG.normal(size=(2, 24, 32, 3)), jnp.float32)

    def run():
        return jax.value_and_grad(lambda x: jnp.sum(vit(x)[-1] ** 2 * vit(x)[-1]))(x)

    whole = run()
    monkeypatch.setattr(transformer, "_MOST_SCORES", 300)  # of 2 x 2 x 13 x 13
    for one, other in zip(run(), whole, strict=True):
        close(one, other, 1e-4)


def test_features_from_elsewhere():
    pipeline = FeaturePipeline(upsampler="jbu", devices=jax.devices()[:1])
    image, low = photo(16, 24), RNG.normal(size=(4, 6, 5)).astype(np.float32)
    y = pipeline(image, features=low)
    assert y.shape == (16, 24, 5)
    close(y, pipeline.upsample(low[None], image[None])[0])
    with pytest.raises(ValueError, match="backbone is None"):
        pipeline(image)
    with pytest.raises(ValueError, match="features must be a map"):
        pipeline(image, features=low[0])
    with pytest.raises(ValueError, match="features must be floating point"):
        pipeline(image, features=low.astype(int))


@pytest.mark.parametrize("name", ["jbu", "carafe"])
def test_passes_over_channels(vit, name, monkeypatch):
    up = create_upsampler(name, features=WIDTH, scale=PATCH, rngs=nnx.Rngs(0))
    options = dict(devices=jax.devices()[:1])
    image = photo(16, 24)
    expected = pipeline_of(vit, up, **options)(image)
    limited = pipeline_of(vit, up, pass_bytes=10_000, **options)
    close(limited(image), expected)
    assert limited.memory(16, 24).passes == 8
    out = np.empty((16, 24, WIDTH), np.float16)
    assert limited(image, out=out) is out
    close(out.astype(np.float32), expected, 1e-3)


def test_values_get_the_weights_of_features(vit):
    pipeline = pipeline_of(vit, "jbu", devices=jax.devices()[:1])
    assert pipeline.value_groups == 1
    images = photo(16, 24)[None]
    low = pipeline.encode(images)
    expected = pipeline.upsample(low, images)
    close(pipeline.upsample(low, images, values=low[..., :3]), expected[..., :3])
    with pytest.raises(ValueError, match="values must be of the features' cells"):
        pipeline.upsample(low, images, values=low[:, :1])


def test_memory_of_large_attention_is_bounded(vit, monkeypatch):
    """All of attention's scores, 4 bytes x 2 heads x 2304 ** 2, are 42 MB."""
    whole = pipeline_of(vit, devices=jax.devices()[:1]).memory(384, 384, 8)
    monkeypatch.setattr(transformer, "_MOST_SCORES", 2**20)
    parts = pipeline_of(vit, devices=jax.devices()[:1]).memory(384, 384, 8)
    assert whole.encode > 42e6 and parts.encode < 0.4 * whole.encode
    assert parts.result == 48 * 48 * WIDTH * 4


def test_untrained_upsamplers_warn(vit):
    with pytest.warns(UserWarning, match=r"'carafe' is untrained.*self_supervised\.fit"):
        pipeline_of(vit, "carafe")


def test_a_guided_upsampler_of_features(vit):
    up = GuidedUpsampler("sapa", WIDTH, scale=4, rngs=nnx.Rngs(0))
    image = photo(16, 24)
    pipeline = pipeline_of(vit, up, devices=jax.devices()[:1])
    assert pipeline.name == "sapa"
    x = (image[None] - np.float32(127.5)) / np.float32(127.5)
    expected = up(vit(jnp.asarray(x))[-1], jnp.asarray(image[None]), (16, 24))
    close(pipeline(image), expected[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(upsampler="bilinaer"), "bilinear"),
        (dict(normalisation=None), "normalisation is needed"),
        (dict(normalisation="halves"), "half"),
        (dict(layers=(5,)), "layers must be"),
        (dict(dtype="int8"), "dtype must be"),
        (dict(batch_size=3), "batch_size must be"),
        (dict(pass_bytes=0), "pass_bytes must be"),
        (dict(multiple=4), "multiple is not set here"),
        (dict(scales=2), "scale"),
        (dict(weights="file", upsampler="jbu"), "weights are read for"),
        (dict(channel_norm=1), "channel_norm must be"),
    ],
)
def test_errors_name_the_argument(as_users_call, vit, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline_of(vit, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(stride=0), "stride must be"),
        (dict(stride=16), "smaller stride"),
        (dict(out=np.empty((2, 2, 2), np.float32)), "out must be"),
        (dict(class_token=1), "class_token must be"),
    ],
)
def test_errors_of_calls(as_users_call, pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline(photo(16, 24), **options)


# ------------------------------------------------------------------------------------- backbones
def test_load_backbone_and_what_lies_beside_it(vit, tmp_path):
    from safetensors.numpy import save_file

    rng, entries = np.random.default_rng(1), {}
    shapes = {"cls_token": (1, 1, 32), "pos_embed": (1, 17, 32), "norm.weight": (32,)}
    shapes |= {"norm.bias": (32,), "patch_embed.proj.weight": (32, 3, 8, 8)}
    shapes |= {"patch_embed.proj.bias": (32,)}
    for part in ("norm1", "norm2"):
        shapes |= {f"blocks.0.{part}.weight": (32,), f"blocks.0.{part}.bias": (32,)}
    for part, (m, n) in {
        "attn.qkv": (96, 32),
        "attn.proj": (32, 32),
        "mlp.fc1": (64, 32),
        "mlp.fc2": (32, 64),
    }.items():
        shapes |= {f"blocks.0.{part}.weight": (m, n), f"blocks.0.{part}.bias": (m,)}
    entries = {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}
    save_file(entries, tmp_path / "model.safetensors")
    loaded = load_backbone(tmp_path / "model.safetensors", heads=2)
    assert (loaded.strides, loaded.features, len(loaded.blocks)) == ((8,), (32,), 1)
    np.testing.assert_array_equal(loaded.norm.scale[...], entries["norm.weight"])
    colours = '{"image_mean": [0.5, 0.25, 0.5], "image_std": [0.2, 0.2, 0.4]}'
    (tmp_path / "preprocessor_config.json").write_text(colours)
    pipeline = FeaturePipeline(tmp_path / "model.safetensors")
    assert pipeline.preprocess.mean == (127.5, 63.75, 127.5)
    save_file({"a.weight": np.zeros((2, 2), np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no backbone that is recognised"):
        load_backbone(tmp_path / "other.safetensors")


# ------------------------------------------------------------------------------------------- runs
def test_runs_of_other_tasks(tmp_path):
    make_run(tmp_path / "run", tiny_config_of(), {1: 0.5})
    with pytest.raises(ValueError, match=r"task='segmentation'.*Predictor\.from_checkpoint"):
        FeaturePipeline.from_checkpoint(tmp_path / "run")
    config = training.read_config(tmp_path / "run")
    config.task = "features"
    training.write_config(tmp_path / "run", config)
    with pytest.raises(ValueError, match=r"task='features'.*FeaturePipeline\.from_checkpoint"):
        Predictor.from_checkpoint(tmp_path / "run")
