"""What teaches upsamplers without labels: each objective against its formula, written out."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from resfu_jax.ops import resize
from resfu_jax.self_supervised import GuidedUpsampler
from resfu_jax.tasks.objectives import (
    FeatUpParts,
    changed,
    cosine_and_error,
    create_objective,
    crf,
    jittered,
)

STRIDE, CHANNELS = 4, 6
RNG = np.random.default_rng(0)
NAMES = ("naf", "jafar", "anyup", "featup", "loftup", "stitch")


class Model:
    """A backbone whose features are those of their patch alone, and an upsampler of them."""

    stride = STRIDE

    def __init__(self, upsampler="bilinear", scale=2, parts=None):
        self.head = GuidedUpsampler(upsampler, CHANNELS, scale=scale, rngs=nnx.Rngs(0))
        self.parts = parts

    @staticmethod
    def features(images):
        b, h, w, _ = images.shape
        x = jnp.asarray(images, jnp.float32) / 255
        x = jnp.concatenate([x, jnp.sin(7 * x)], axis=3)
        return x.reshape(b, h // STRIDE, STRIDE, w // STRIDE, STRIDE, CHANNELS).mean(axis=(2, 4))

    @staticmethod
    def normalise(images):
        return images / 255


def images(count=2, height=32, width=48):
    smooth = RNG.uniform(0, 255, (count, height // 8, width // 8, 3)).astype(np.float32)
    return np.asarray(resize(jnp.asarray(smooth), (height, width))).astype(np.uint8)


def batch_of(objective, pictures, step=0, labels=None):
    labels = np.zeros(pictures.shape[:3], np.uint8) if labels is None else labels
    rng, sizes = np.random.default_rng(step), np.random.default_rng(step + 1000)
    views = objective.draw(pictures, labels, STRIDE, rng, sizes)
    return {"image": pictures} | views


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_of_each_image_and_have_gradients(name):
    objective = create_objective(name, {"pad": 5, "views": 2} if name == "featup" else {})
    graphdef, params = nnx.split(GuidedUpsampler("carafe", CHANNELS, scale=2, rngs=nnx.Rngs(0)))
    if name in ("jafar", "stitch"):  # other ratios than 2
        objective = create_objective(
            name, {"jafar": {"ratios": (0.5, 0.5)}}.get(name, {"scale": 2})
        )
    parts = objective.create_parts(CHANNELS, STRIDE, nnx.Rngs(0))
    pictures = images()
    labels = np.repeat(np.arange(4, dtype=np.uint8), 8)[None, :, None].repeat(48, 2).repeat(2, 0)
    batch = jax.tree.map(jnp.asarray, batch_of(objective, pictures, labels=labels))

    @jax.jit
    def losses(params, batch):
        model = Model(parts=parts)
        model.head = nnx.merge(graphdef, params)
        return objective.loss(model, batch)

    loss = losses(params, batch)
    assert loss.shape == (2,) and np.isfinite(loss).all()
    alone = jax.tree.map(lambda x: x[1:], batch)
    np.testing.assert_allclose(losses(params, alone), loss[1:], rtol=1e-4)
    gradient = jax.grad(lambda p: losses(p, batch).sum())(params)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(nnx.as_pure(gradient)) if g.ndim > 1)


@pytest.mark.parametrize("name", ["naf", "jafar", "anyup"])
def test_the_target_itself_has_no_loss(name):
    objective = create_objective(name, {} if name == "naf" else {"consistency": 0.0})
    batch = jax.tree.map(jnp.asarray, batch_of(objective, images(), step=3))

    def perfect(features, guide, size, guide_size=None):
        whole = Model.features(batch["image"])
        assert whole.shape[1:3] == tuple(size) and guide.shape[1:3] == guide_size or name == "naf"
        return whole

    prediction, target = objective.pair(Model, perfect, batch)
    np.testing.assert_allclose(prediction, target, atol=1e-6)  # anyup: the right windows are cut
    assert float(np.abs(target).mean()) > 0.1
    loss = objective.loss(types.SimpleNamespace(**vars_of(Model), head=perfect), batch)
    low = 1e-6 if name != "anyup" else 0.1  # features of the small image are not averages
    assert (np.abs(np.asarray(loss)) < low).all()


def vars_of(cls):
    return {name: getattr(cls, name) for name in ("stride", "features", "normalise")}


def test_cosine_and_error_is_the_published_loss():
    p, t = RNG.normal(size=(2, 2, 3, 4, 5)).astype(np.float32)
    cosine = (p * t).sum(-1) / np.linalg.norm(p, axis=-1) / np.linalg.norm(t, axis=-1)
    low, high = t.min(-1, keepdims=True), t.max(-1, keepdims=True)
    scaled = [(x - low) / (high - low + 1e-6) for x in (p, t)]
    expected = (1 - cosine).mean((1, 2)) + ((scaled[0] - scaled[1]) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(cosine_and_error(*map(jnp.asarray, (p, t))), expected, rtol=1e-5)


def test_sizes_are_drawn_between_the_ratios_and_alike_for_a_step():
    objective, pictures = create_objective("jafar", {}), images(height=64, width=96)
    sizes = [batch_of(objective, pictures, step)["small"].shape[1:3] for step in range(12)]
    assert len(set(sizes)) > 3
    assert all(h % STRIDE == w % STRIDE == 0 and 16 <= h <= 32 for h, w in sizes)
    for a, b in zip(*(batch_of(objective, pictures, 5).values() for _ in range(2)), strict=True):
        np.testing.assert_array_equal(a, b)
    half = batch_of(create_objective("naf", {}), pictures)["small"]
    pixels = pictures.astype(np.float32).reshape(2, 32, 2, 48, 2, 3)
    np.testing.assert_allclose(half, pixels.mean((2, 4)), atol=1e-3)


# ------------------------------------------------------------------------------------------ featup
def literally_jittered(x, zoom, start, flip, pad):
    """Padded, interpolated at every place of the zoomed map, cut, mirrored."""
    padded = np.pad(x, ((pad, pad), (pad, pad), (0, 0)), mode="reflect").astype(np.float64)
    out = np.zeros(x.shape)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            place = [
                np.clip((n + 0.5) / zoom - 0.5, 0, size - 1)
                for n, size in zip((i + start[0], j + start[1]), padded.shape[:2], strict=True)
            ]
            (y, x_), (v, u) = (np.floor(place).astype(int), np.mod(place, 1))
            below = np.minimum([y + 1, x_ + 1], np.array(padded.shape[:2]) - 1)
            top = (1 - u) * padded[y, x_] + u * padded[y, below[1]]
            bottom = (1 - u) * padded[below[0], x_] + u * padded[below[0], below[1]]
            out[i, j] = (1 - v) * top + v * bottom
    return out[:, ::-1] if flip else out


def test_jitter_reflects_zooms_cuts_and_mirrors():
    x = RNG.normal(size=(3, 9, 7, 2)).astype(np.float32)
    zoom, start, flip = np.float32([1, 1.4, 2]), np.int32([[0, 5], [6, 2], [11, 9]]), [0, 1, 0]
    seen = jittered(*map(jnp.asarray, (x, zoom, start, np.array(flip, bool))), pad=3)
    for i in range(3):
        expected = literally_jittered(x[i], zoom[i], start[i], flip[i], 3)
        np.testing.assert_allclose(seen[i], expected, atol=1e-5)


def test_views_stay_in_the_image_and_its_borders():
    objective, pictures = create_objective("featup", {"pad": 6, "views": 50}), images()
    views = batch_of(objective, pictures)
    assert (views["zoom"] == 1).mean() == pytest.approx(0.5, abs=0.15) and views["zoom"].max() <= 2
    for axis, n in enumerate((32, 48)):
        room = np.floor((n + 12) * views["zoom"].astype(np.float64)) - n
        assert (views["start"][..., axis] >= 0).all() and (views["start"][..., axis] <= room).all()


def test_pooling_is_attention_over_the_pixels_of_a_cell():
    parts = FeatUpParts(CHANNELS, STRIDE, rngs=nnx.Rngs(0))
    x = jnp.asarray(RNG.normal(size=(2, 8, 12, CHANNELS)), jnp.float32)
    keys = jax.vmap(jax.random.key)(jnp.arange(2, dtype=jnp.uint32))
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    taps = np.exp(-0.5 * np.arange(-2, 3) ** 2)
    taps = np.outer(taps, taps) / taps.sum() ** 2
    blurred = sum(taps[i, j] * padded[:, i : i + 8, j : j + 12] for i in range(5) for j in range(5))
    cell = blurred[1, 4:8, 8:12].reshape(16, CHANNELS)
    logits = (cell @ np.asarray(parts.attend.kernel[...]))[:, 0] + parts.attend.bias[0]

    def pooled(logits):
        weights = np.exp(logits * np.asarray(parts.weight[...]) + np.asarray(parts.bias[...]))
        return weights @ cell / weights.sum()

    np.testing.assert_allclose(parts.pooled(x)[1, 1, 2], pooled(logits), atol=1e-5)
    dropped = parts.pooled(x, keys=keys, dropout=0.999)[1, 1, 2]
    np.testing.assert_allclose(dropped, pooled(0 * logits), atol=1e-5)
    assert parts.deviation(x).shape == (2, 8, 12, 1) and float(parts.deviation(x).min()) > 0.1


def test_crf_draws_alike_places_together():
    keys = jax.vmap(jax.random.key)(jnp.arange(1, dtype=jnp.uint32))
    guide = np.zeros((1, 8, 8, 3), np.float32)
    guide[:, :, 4:] = 1
    along = np.repeat(guide[..., :1], 2, axis=3)
    across = np.swapaxes(along, 1, 2)
    same, outline, other = (
        float(crf(jnp.asarray(guide), jnp.asarray(f), keys)[0]) for f in (0 * along, along, across)
    )
    assert same == 0 and 0 < outline < 0.5 * other


# ------------------------------------------------------------------------------------------ loftup
def test_masks_average_bicubic_features():
    pictures = images(1)
    labels = np.full((1, 32, 48), 255, np.uint8)
    labels[:, :16, :24], labels[:, 16:, :24] = 3, 7
    objective = create_objective("loftup", {})
    batch = jax.tree.map(jnp.asarray, batch_of(objective, pictures, labels=labels))
    _, target = objective.pair(Model(), Model().head, batch)
    bicubic = resize(Model.features(pictures), (32, 48), method="bicubic")
    np.testing.assert_allclose(target[:, :, 24:], bicubic[:, :, 24:], atol=1e-6)
    inside = bicubic[0, :16, :24]
    expected = 0.8 * inside.mean((0, 1))[None, None] + 0.2 * inside
    np.testing.assert_allclose(target[0, :16, :24], expected, atol=1e-5)
    with pytest.raises(ValueError, match="loftup needs masks"):
        batch_of(objective, pictures, labels=np.full((1, 32, 48), 255, np.uint8))


# ------------------------------------------------------------------------------------------- anyup
def test_changed_images_are_images_and_mostly_others():
    picture = images(1)[0].astype(np.float32)
    seen = [changed(picture, np.random.default_rng(i)) for i in range(8)]
    assert all(x.shape == picture.shape and x.dtype == np.float32 for x in seen)
    assert all(0 <= x.min() and x.max() <= 255 for x in seen)
    assert len({x.tobytes() for x in seen}) == 8
    np.testing.assert_array_equal(seen[3], changed(picture, np.random.default_rng(3)))


# ----------------------------------------------------------------------------------------- options
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("jaffar", {}, "unknown objective 'jaffar'; did you mean 'jafar'"),
        (
            "naf",
            {"ratio": 0.5},
            "unknown option of objective 'naf': 'ratio'; did you mean 'ratios'",
        ),
        ("naf", {"ratios": (0.6, 0.5)}, "ratios must be .smallest, largest"),
        ("naf", {"ratios": 0.5}, "ratios must be"),
        ("naf", {"guide": 0}, "guide must be a positive whole number"),
        ("jafar", {"blur": -1.0}, "blur must be"),
        ("anyup", {"crops": 1.5}, "crops must be"),
        ("featup", {"zoom": 0.5}, "zoom must be at least 1"),
        ("featup", {"projection": -1}, "projection must be"),
        ("loftup", {"share": "all"}, "share must be"),
        ("stitch", {"scale": True}, "scale must be"),
    ],
)
def test_options_that_cannot_be(as_users_call, name, options, message):
    with pytest.raises(ValueError, match=message):
        create_objective(name, options)
