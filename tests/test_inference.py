import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from resfu_jax.inference import Inference, slide
from resfu_jax.model import SegmentationModel
from resfu_jax.ops.resize import resize
from resfu_jax.preprocess import Preprocess

WEIGHTS = np.random.default_rng(0).integers(-3, 4, (3, 4)).astype(np.float32)


def per_pixel(images):
    """Whole-numbered logits that depend on nothing but the pixel."""
    return images.astype(jnp.float32) @ jnp.asarray(WEIGHTS)


def per_window(images):
    """Logits that depend on the pixel, its left neighbour, its place and the whole window."""
    x = images.astype(jnp.float32)
    _, h, w, _ = x.shape
    place = np.add.outer(np.arange(h) / 2, np.arange(w) / 4).astype(np.float32)[None, :, :, None]
    x = x - 0.5 * jnp.roll(x, 1, axis=2) + 0.1 * x.mean(axis=(1, 2), keepdims=True)
    return (x + place) @ jnp.asarray(WEIGHTS) / 50


def draw(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3)).astype(np.uint8)


def slide_literally(apply, image, crop, stride):
    """MMSegmentation's loop over the windows of one image (h, w, 3)."""
    h, w, _ = image.shape
    extra = [(0, max(c - n, 0)) for c, n in zip(crop, (h, w), strict=True)]
    image = np.stack(
        [
            np.pad(image[..., i], extra, constant_values=colour)
            for i, colour in enumerate((124, 116, 104))
        ],
        axis=-1,
    )
    apply = jax.jit(apply)
    height, width, _ = image.shape
    rows = max(height - crop[0] + stride[0] - 1, 0) // stride[0] + 1
    columns = max(width - crop[1] + stride[1] - 1, 0) // stride[1] + 1
    total, count = np.zeros((height, width, 4)), np.zeros((height, width, 1))
    for i in range(rows):
        for j in range(columns):
            bottom = min(i * stride[0] + crop[0], height)
            right = min(j * stride[1] + crop[1], width)
            window = np.s_[bottom - crop[0] : bottom, right - crop[1] : right]
            total[window] += np.asarray(apply(image[window][None]))[0]
            count[window] += 1
    return (total / count)[:h, :w]


def softmax(x):
    return np.asarray(jax.nn.softmax(jnp.asarray(x, jnp.float32)), np.float64)


# ----------------------------------------------------------------------------------------- windows
@pytest.mark.parametrize(
    ("size", "crop", "stride"),
    [
        ((13, 17), (6, 5), (4, 3)),  # nothing divides
        ((12, 18), (6, 6), (6, 6)),  # stride = crop
        ((7, 19), (7, 8), (1, 5)),  # one row of windows
        ((8, 8), (8, 8), (3, 3)),  # one window
        ((5, 11), (8, 8), (6, 6)),  # lower than a window
        ((3, 4), (8, 9), (8, 9)),  # smaller than a window
    ],
)
@pytest.mark.parametrize("windows_per_step", [1, 4])
def test_slide_is_the_mean_of_the_windows(size, crop, stride, windows_per_step):
    images = draw((2, *size))
    options = dict(crop=crop, stride=stride, windows_per_step=windows_per_step)
    logits = jax.jit(lambda images: slide(per_window, images, **options))(images)
    expected = [slide_literally(per_window, image, crop, stride) for image in images]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_slide_equals_whole_for_a_model_of_pixels():
    infer = Inference(mode="slide", crop=(5, 4), stride=(5, 2))
    images = draw((1, 11, 14))
    logits = jax.jit(lambda images: infer(per_pixel, images))(images)
    np.testing.assert_allclose(logits, images @ WEIGHTS, rtol=1e-6)


def test_the_default_is_the_model():
    images = jnp.asarray(draw((2, 9, 7)))
    half = lambda images: per_window(images).astype(jnp.bfloat16)  # noqa: E731
    logits = Inference()(half, images)
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_array_equal(logits, half(images))


def test_an_image_in_a_padded_batch_gets_its_own_windows():
    sizes = [(16, 21), (9, 13), (8, 8), (0, 0)]
    images = draw((4, 16, 21))  # the padding is noise
    infer = Inference(mode="slide", crop=(8, 8), stride=(5, 6), flip=True, windows_per_step=2)
    logits = jax.jit(lambda x, s: infer(per_window, x, sizes=s))(images, np.array(sizes, np.int32))
    assert np.isfinite(logits).all()
    for image, result, (h, w) in zip(images, logits, sizes, strict=True):
        if h:
            image = image[:h, :w]
            straight = slide_literally(per_window, image, infer.crop, infer.stride)
            mirrored = slide_literally(per_window, image[:, ::-1], infer.crop, infer.stride)
            expected = np.log((softmax(straight) + softmax(mirrored[:, ::-1])) / 2)
            np.testing.assert_allclose(result[:h, :w], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n, expected", [(1, 3), (2, 2), (8, 1)])
def test_windows_of_the_padding_alone_take_no_time(n, expected):
    """Of 2 x 4 in the array, the images have 1 x 3 and 2 x 1."""
    seen = []

    def apply(images):
        jax.debug.callback(lambda: seen.append(images.shape[0]))
        return per_window(images)

    sizes = jnp.array([[8, 24], [16, 8]])
    run = jax.jit(
        lambda x, s: slide(apply, x, crop=(8, 8), stride=(8, 8), sizes=s, windows_per_step=n)
    )
    jax.block_until_ready(run(draw((2, 16, 32)), sizes))
    jax.effects_barrier()
    assert seen == [2 * n] * expected


@pytest.mark.parametrize("sizes", [None, [[13, 17], [9, 8]]])
def test_slide_under_x64(sizes):
    """Where a literal is an int64."""
    images = draw((2, 13, 17))
    infer = Inference("slide", (6, 5), (4, 3), scales=(1.0, 1.5), flip=True)

    def run(images, sizes):
        return infer(per_window, images, sizes=sizes, preprocess=Preprocess(multiple=2))

    expected = jax.jit(run)(images, sizes if sizes is None else np.array(sizes, np.int32))
    with jax.enable_x64(True):
        logits = jax.jit(run)(images, sizes if sizes is None else np.array(sizes, np.int64))
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_windows_are_averaged_in_float32():
    images = draw((1, 12, 12))
    half = lambda images: per_window(images).astype(jnp.bfloat16)  # noqa: E731
    logits = jax.jit(lambda images: slide(half, images, crop=(6, 6), stride=(2, 2)))(images)
    assert logits.dtype == jnp.float32
    in_double = lambda images: half(images).astype(jnp.float32)  # noqa: E731
    expected = slide_literally(in_double, images[0], (6, 6), (2, 2))
    np.testing.assert_allclose(logits[0], expected, rtol=1e-5, atol=1e-5)


def hidden(images):
    """A model with 256 channels inside."""
    x = images.astype(jnp.float32) @ jnp.ones((3, 256), jnp.float32) / 255
    return jnp.tanh(x) @ jnp.ones((256, 2), jnp.float32)


def test_memory_is_that_of_a_step():
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)

    def temporary(n):
        run = lambda images: slide(hidden, images, crop=(8, 8), stride=(8, 8), windows_per_step=n)  # noqa: E731
        return jax.jit(run).lower(images).compile().memory_analysis().temp_size_in_bytes

    one, all_at_once = temporary(1), temporary(64)
    assert all_at_once > 64 * 8 * 8 * 256 * 4
    assert one < all_at_once / 8


def test_the_model_is_compiled_once_for_all_windows():
    traced = []

    def apply(images):
        traced.append(images.shape)
        return hidden(images)

    images = jnp.zeros((2, 30, 30, 3), jnp.uint8)
    infer = Inference(mode="slide", crop=(8, 8), stride=(6, 6), windows_per_step=3)
    program = jax.jit(lambda images: infer(apply, images)).lower(images)
    assert set(traced) == {(2 * 3, 8, 8, 3)}
    assert len(traced) <= 2  # one of them asks for the number of classes
    assert program.as_text().count("stablehlo.tanh") == 1


# ------------------------------------------------------------------------------------------- views
@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_mirrored_images_get_mirrored_logits(mode):
    images = draw((2, 10, 13))
    infer = Inference(mode=mode, crop=(6, 7), stride=(4, 3), flip=True)
    run = jax.jit(lambda images: infer(per_window, images))
    logits = run(images)
    np.testing.assert_allclose(run(images[:, :, ::-1])[:, :, ::-1], logits, rtol=1e-4, atol=1e-5)
    single = dataclasses.replace(infer, flip=False)
    probabilities = jax.jit(lambda images: jax.nn.softmax(single(per_window, images)))(images)
    assert abs(np.asarray(probabilities) - np.exp(logits)).max() > 0.01


def test_the_probabilities_of_views_are_averaged():
    images = jnp.asarray(draw((2, 16, 24)))
    seen = []

    def apply(images):
        seen.append(images.shape[1:3])
        return per_window(images)

    infer = Inference(scales=(1.0, 0.6, 1.7), flip=True)
    logits = jax.jit(lambda images: infer(apply, images, preprocess=Preprocess(multiple=4)))(images)
    assert seen == [s for s in ((16, 24), (8, 16), (28, 40)) for _ in range(2)]

    def view(images, size):
        scaled = resize(images.astype(jnp.float32), size, antialias=size[0] < 16)
        return jax.nn.softmax(resize(per_window(scaled), (16, 24)))

    view = jax.jit(view, static_argnums=1)
    straight = [view(images, size) for size in dict.fromkeys(seen)]
    mirrored = [view(images[:, :, ::-1], size)[:, :, ::-1] for size in dict.fromkeys(seen)]
    expected = np.log(sum(map(np.asarray, straight + mirrored)) / 6)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_every_view_of_a_constant_image_agrees(mode):
    images = jnp.broadcast_to(jnp.array([200, 7, 90], jnp.uint8), (2, 21, 18, 3))
    few = lambda images: per_pixel(images) / 255  # noqa: E731
    infer = Inference(mode, crop=(16, 16), stride=(9, 16), scales=(0.5, 1.0, 1.75), flip=True)
    sizes = jnp.array([[21, 18], [20, 11]])
    logits = jax.jit(lambda x: infer(few, x, sizes=sizes, preprocess=Preprocess(multiple=16)))(
        images
    )
    expected = np.log(softmax(few(images)))
    np.testing.assert_allclose(logits[0], expected[0], atol=1e-5)
    # At the right of this image windows see no padding, where they would give zeros.
    np.testing.assert_allclose(logits[1, :20, :11], expected[1, :20, :11], atol=1e-5)


class Stored(nnx.Module):
    """Logits that are its images; colours and strides are its own, as `SegmentationModel`'s."""

    def __init__(self):
        self.mean, self.std, self.backbone = (127.5, 0.0, 255.0), (1.0,) * 3, Pyramid()

    def __call__(self, images):
        return images.astype(jnp.float32)


class Pyramid(nnx.Module):
    strides = (2, 6)


def test_windows_are_padded_and_views_scaled_as_the_model_needs():
    model = Stored()
    seen = []

    def apply(images):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), images)
        return model(images)

    apply.mean, apply.std, apply.backbone = model.mean, model.std, model.backbone
    images = jnp.full((1, 5, 4, 3), 7, jnp.uint8)
    slide(apply, images, crop=(6, 8), stride=(6, 8))
    jax.effects_barrier()
    (window,) = {x.tobytes() for x in seen}
    window = np.frombuffer(window, np.uint8).reshape(6, 8, 3)
    assert (window[:5, :4] == 7).all()
    assert (window[5:] == (128, 0, 255)).all() and (window[:, 4:] == (128, 0, 255)).all()
    shapes = []

    class Watched(Stored):
        def __call__(self, images):
            shapes.append(images.shape)
            return super().__call__(images)

    Inference(scales=(2.0,))(Watched(), jnp.zeros((1, 7, 10, 3)))
    assert shapes == [(1, 12, 18, 3)]  # 14 and 20 to the nearest multiple of 6


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_images_are_bytes_or_real_numbers(as_users_call, dtype):
    images = jnp.zeros((1, 8, 8, 3), dtype)
    for infer in (Inference(), Inference("slide", (4, 4), (4, 4))):
        with pytest.raises(
            ValueError, match=f"images must be uint8 or floating point, got {dtype}"
        ):
            infer(per_pixel, images)


def test_jit_equals_eager():
    images = jnp.asarray(draw((2, 12, 15)))
    sizes = jnp.array([[12, 15], [10, 9]])
    infer = Inference("slide", (8, 8), (8, 6), flip=True, windows_per_step=2)
    jitted = jax.jit(lambda x, s: infer(per_window, x, sizes=s))(images, sizes)
    eager = infer(per_window, images, sizes=sizes)
    np.testing.assert_allclose(jitted, eager, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------ devices and models
def test_a_batch_over_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over_batch = NamedSharding(mesh, P("data"))
    images = draw((8, 12, 14))
    sizes = np.stack([np.arange(5, 13), np.arange(14, 6, -1)], axis=1).astype(np.int32)
    infer = Inference("slide", (6, 6), (4, 5), flip=True, windows_per_step=2)
    run = lambda x, s: infer(per_window, x, sizes=s)  # noqa: E731
    program = jax.jit(run, in_shardings=over_batch, out_shardings=over_batch)
    program = program.lower(images, sizes).compile()
    # Devices tell each other how many windows there are, and nothing else.
    lines = program.as_text().splitlines()
    told = [line for line in lines if re.search(r" (all|collective|reduce)-[\w-]+\(", line)]
    assert told
    assert all(re.search(r" = \(?s32\[\](, s32\[\])*\)? all-reduce\(", line) for line in told)
    logits = program(*jax.device_put((images, sizes), over_batch))
    assert logits.sharding.is_equivalent_to(over_batch, 4)
    np.testing.assert_allclose(logits, jax.jit(run)(images, sizes), rtol=1e-5, atol=1e-5)


class Backbone(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Conv(3, 8, (4, 4), strides=4, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)

    def __call__(self, images):
        embed = nnx.remat(lambda self, images: jnp.tanh(self.norm(self.embed(images))))
        return (embed(self, images),)


class Head(nnx.Module):
    def __init__(self, rngs):
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.classify = nnx.Conv(8, 5, (3, 3), rngs=rngs)

    def __call__(self, features, images=None):
        return self.classify(self.dropout(features[0]))


def test_a_model_in_windows_that_do_not_overlap():
    """With batch statistics, dropout and rematerialisation, which want to update the model."""
    model = SegmentationModel(Backbone(nnx.Rngs(0)), Head(nnx.Rngs(1)))
    model = nnx.view(model, deterministic=True, use_running_average=True, raise_if_not_found=False)
    graphdef, state = nnx.split(model)
    infer = Inference(mode="slide", crop=(16, 16), stride=(16, 16))
    images = draw((1, 32, 48))
    logits = jax.jit(lambda state, images: infer(nnx.merge(graphdef, state), images))(state, images)
    windows = images.reshape(2, 16, 3, 16, 3).transpose(0, 2, 1, 3, 4).reshape(6, 16, 16, 3)
    expected = jax.jit(lambda state, windows: nnx.merge(graphdef, state)(windows))(state, windows)
    expected = expected.reshape(2, 3, 16, 16, 5).transpose(0, 2, 1, 3, 4).reshape(1, 32, 48, 5)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------- wrong input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mode="tile"), "mode must be 'whole' or 'slide', got 'tile'"),
        (dict(mode="slide", stride=(4, 4)), "crop must be .* when mode is 'slide', got None"),
        (dict(mode="slide", crop=(4, 4)), "stride must be .* when mode is 'slide', got None"),
        (dict(crop=(4,)), r"crop must be \(height, width\)"),
        (dict(crop=(4, 0)), "crop must be .*at least 1"),
        (dict(stride=(-1, 4)), "stride must be .*at least 1"),
        (dict(crop=(4, 4), stride=(4, 5)), r"stride must be at most the crop \(4, 4\)"),
        (dict(scales=()), "scales must be positive, at least one"),
        (dict(scales=(1.0, 0.0)), "scales must be positive"),
        (dict(scales=(float("nan"),)), "scales must be positive"),
        (dict(windows_per_step=0), "windows_per_step must be at least 1, got 0"),
    ],
)
def test_wrong_options(as_users_call, options, message):
    with pytest.raises(ValueError, match=message):
        Inference(**options)


def test_wrong_arrays(as_users_call):
    images = jnp.zeros((2, 8, 8, 3))
    windows = Inference(mode="slide", crop=(4, 4), stride=(4, 4))
    for infer in (Inference(), windows):
        with pytest.raises(ValueError, match=r"images must be \(batch, height, width, 3\)"):
            infer(per_pixel, images[0])
        with pytest.raises(ValueError, match=r"sizes must be \(2, 2\), got \(2,\)"):
            infer(per_pixel, images, sizes=jnp.array([8, 8]))
        with pytest.raises(ValueError, match="apply must return logits"):
            infer(lambda images: per_pixel(images)[:, ::4, ::4], images)
        with pytest.raises(ValueError, match="images must be uint8 or floating point, got int32"):
            infer(per_pixel, images.astype(jnp.int32))
        with pytest.raises(ValueError, match="images must have no axis of length 0"):
            infer(per_pixel, images[:, :0])
        with pytest.raises(ValueError, match="sizes must be whole numbers of pixels, got float"):
            infer(per_pixel, images, sizes=jnp.full((2, 2), 8.0))
        with pytest.raises(ValueError, match="what apply returns must be floating point"):
            infer(lambda images: per_pixel(images).astype(jnp.int32), images)
    with pytest.raises(ValueError, match="2 or more classes, got 1"):
        Inference(flip=True)(lambda images: per_pixel(images)[..., :1], images)
    with pytest.raises(ValueError, match="stride must be at most"):
        slide(per_pixel, images, crop=(4, 4), stride=(5, 4))
    with pytest.raises(ValueError, match="windows_per_step must be at least 1"):
        slide(per_pixel, images, crop=(4, 4), stride=(4, 4), windows_per_step=0)
