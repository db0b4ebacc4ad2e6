import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from resfu_jax import list_upsamplers
from resfu_jax.backbones import create_backbone
from resfu_jax.self_supervised import (
    GuidedUpsampler,
    dense_features,
    extractor,
    fit,
    fitted,
    training_pairs,
)

PATCH, WIDTH, SCALE = 8, 16, 4
MIX = np.random.default_rng(0).normal(size=(6, WIDTH)).astype(np.float32)


@jax.jit
def extract(images):
    """What is at the centre of a patch: the simplest backbone whose features have outlines."""
    b, h, w, _ = images.shape
    x = images.astype(jnp.float32) / 255
    x = jnp.concatenate([x, jnp.sin(9 * x)], axis=-1)
    x = x.reshape(b, h // PATCH, PATCH, w // PATCH, PATCH, 6)
    return x[:, :, 3:5, :, 3:5].mean((2, 4)) @ MIX


def discs(seed, height=64, width=48):
    """A picture of discs with sharp outlines."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    picture = np.full((height, width, 3), 90, np.uint8)
    for _ in range(5):
        inside = np.hypot(y - rng.uniform(0, height), x - rng.uniform(0, width)) < 12
        picture[inside] = rng.integers(0, 256, 3)
    return picture


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        yield


def create(name, **options):
    return GuidedUpsampler(name, WIDTH, scale=SCALE, rngs=nnx.Rngs(0), **options)


def test_dense_features_are_those_of_shifted_patches():
    image = discs(0).astype(np.float32)
    dense = dense_features(extract, jnp.asarray(image)[None], SCALE, stride=PATCH)
    assert dense.shape == (1, 32, 24, WIDTH)
    # Position (i, j) is the patch around its own centre, 2 i + 1 pixels from the top; shifts are
    # odd numbers of pixels, -3 .. 3.
    for i, j in [(1, 2), (9, 12), (30, 21)]:
        top, left = 2 * i + 1 - PATCH // 2, 2 * j + 1 - PATCH // 2
        places = [np.clip(np.arange(n, n + PATCH), 0, m - 1) for n, m in ((top, 64), (left, 48))]
        patch = image[np.ix_(*places)][None]
        np.testing.assert_allclose(dense[0, i, j], extract(patch)[0, 0, 0], rtol=1e-4, atol=1e-4)


def test_shifts_by_fractions_of_a_pixel():
    ramp = jnp.broadcast_to(jnp.arange(24.0)[None, None, :, None], (1, 16, 24, 3))
    means = lambda x: x.reshape(1, 2, 8, 3, 8, 3).mean((2, 4))  # noqa: E731
    dense = dense_features(means, ramp, 16, stride=PATCH)
    # Centres lie half a pixel apart; the ramp is as high as its column.
    np.testing.assert_allclose(dense[0, 16, 8:-8, 0], np.arange(8, 40) / 2 - 0.25, atol=1e-4)


@pytest.mark.parametrize("name", ["carafe", "sapa"])
def test_fitting_beats_bilinear(name):
    images = [discs(1), discs(2)]
    baselines = fit(create("bilinear"), extract, images)
    assert len(baselines) == 2 and 0 < min(baselines) <= max(baselines) < 1
    module = create(name)
    losses = fit(module, extract, images, steps=60, learning_rate=1e-2)
    assert len(losses) == 60
    assert np.mean(losses[-2:]) < 0.9 * np.mean(baselines)
    # The module itself has learned.
    low, high, image = training_pairs(extract, images[:1], SCALE)[0]
    up = jax.jit(lambda m, *a: m(*a))
    error, other = (jnp.square(up(m, low, image) - high).mean() for m in (module, create(name)))
    assert error < 0.5 * other


def test_fits_repeat():
    options = dict(steps=3, seed=4)
    one, other = (fit(create("carafe"), extract, [discs(1)], **options) for _ in range(2))
    assert one == other


@pytest.mark.parametrize("name", list_upsamplers())
def test_every_upsampler_can_be_used(name):
    def call():
        return create(name)(jnp.ones((2, 4, 3, WIDTH)), jnp.ones((2, 40, 30, 3), jnp.uint8))

    assert jax.eval_shape(call).shape == (2, 16, 12, WIDTH)


@pytest.mark.parametrize(("name", "width"), [("resfu", 32), ("fade", WIDTH), ("sapa_i", WIDTH)])
def test_the_guide_is_the_image_at_the_size_of_the_output(name, width):
    low, images = jnp.ones((1, 8, 6, WIDTH)), jnp.ones((1, 64, 48, 3))
    (guide,) = jax.eval_shape(lambda: create(name).guide(low, images))
    assert guide.shape == (1, 32, 24, width)
    assert create("bilinear").guide(low, images) == ()


def test_weights_of_a_pixel():
    image = jnp.asarray(discs(3))
    low = extract(image[None])
    weights = jax.jit(lambda: create("sapa").weights(low, image[None], (16, 13)))()
    assert weights.shape == (1, 8, 6)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
    rows, columns = np.nonzero(weights[0])
    assert abs(rows - 4).max() <= 2 and abs(columns - 3).max() <= 2


def test_an_extractor_of_a_backbone():
    backbone = create_backbone(
        "vit", width=16, depth=1, heads=2, image_size=32, patch_size=8, rngs=nnx.Rngs(0)
    )
    image = discs(0)[None]
    normalised = (jnp.asarray(image, jnp.float32) - 127.5) / 100
    features = extractor(backbone, mean=(127.5,) * 3, std=(100,) * 3)(image)
    np.testing.assert_allclose(features, backbone(normalised)[-1], atol=1e-4)


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(30, 60, (48, 96)), (64, 48, (96, 80)), (9, 400, (16, 96))]
)
def test_images_are_resized_to_multiples(height, width, expected):
    image = fitted(np.full((height, width, 3), 7, np.uint8), side=100, multiple=16)
    assert image.shape == (*expected, 3)
    assert image.dtype == np.uint8 and (image == 7).all()


def test_a_file_is_fitted_as_its_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for file in (tmp_path / "a.png", str(tmp_path / "a.png")):
        found = fitted(file, side=32, multiple=16)
        np.testing.assert_array_equal(found, fitted(pixels, side=32, multiple=16))


def test_wrong_arguments_are_named(as_users_call):
    module, image = create("carafe"), discs(0)
    with pytest.raises(ValueError, match="images must be at least one"):
        fit(module, extract, [])
    with pytest.raises(ValueError, match=r"images\[1\] must be \(height, width, 3\)"):
        fit(module, extract, [image, image[..., 0]])
    with pytest.raises(ValueError, match="steps must be at least 1"):
        fit(module, extract, [image], steps=0)
    with pytest.raises(ValueError, match="extract must give the 16 channels .* got 8"):
        fit(module, lambda x: extract(x)[..., :8], [image])
    with pytest.raises(ValueError, match="side must be at least 16"):
        fitted(image, side=8, multiple=16)
    with pytest.raises(ValueError, match="unknown upsampler 'carafee'"):
        create("carafee")
    with pytest.raises(ValueError, match="unknown option"):
        create("carafe", radius=3)
