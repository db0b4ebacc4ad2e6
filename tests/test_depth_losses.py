"""Losses and metrics of depth, against official numbers and their literal definitions."""

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resfu_jax.training.depth import (
    DepthSums,
    align_scale_shift,
    depth_metrics,
    gradient_loss,
    sig_loss,
    silog_loss,
    valid_pixels,
)

RNG = np.random.default_rng(0)


def pair(shape=(2, 9, 11)):
    depth = RNG.uniform(0.5, 9.0, shape).astype(np.float32)
    prediction = depth * RNG.uniform(0.7, 1.4, shape).astype(np.float32)
    depth[:, 2:4, 3:7] = 0
    return prediction, depth


def test_metrics_equal_the_official_ones():
    entry = goldens.index()["metric_depth"]
    with np.load(entry["path"]) as golden:
        official = {name.removeprefix("out/"): golden[name] for name in golden.files}
    prediction, depth = (official[f"in/{name}"].astype(np.float32) for name in ("pred", "gt"))
    found = depth_metrics(jnp.asarray(prediction), jnp.asarray(depth), **entry["args"])
    values = DepthSums.zeros().merge(found).compute()
    for name, value in values.items():
        np.testing.assert_allclose(value, official[name], rtol=1e-5, err_msg=name)
    for i, (p, g) in enumerate(zip(np.clip(prediction, 1e-3, 10), depth, strict=True)):
        given = (jnp.asarray(x[None]) for x in (p, g, official["valid"][i] > 0))
        expected = official["per_image/silog_loss_0p85"][i]
        np.testing.assert_allclose(silog_loss(*given), expected, rtol=1e-5)


def test_images_without_a_valid_pixel_and_padding_count_nowhere():
    prediction, depth = pair()
    alone = depth_metrics(jnp.asarray(prediction[:1]), jnp.asarray(depth[:1]))
    padded = np.zeros((3, 12, 16), np.float32)
    padded[0, :9, :11], padded[1, 0, 0] = depth[0], np.nan
    wide = np.full_like(padded, np.nan)
    wide[0, :9, :11] = prediction[0]
    among = depth_metrics(jnp.asarray(wide), jnp.asarray(padded))
    assert among.images == alone.images == 1
    for name, value in alone.metrics.items():
        np.testing.assert_allclose(among.metrics[name], value, rtol=1e-6, err_msg=name)
    assert np.isnan(DepthSums.zeros().compute()["rmse"])


@pytest.mark.parametrize(
    ("crop", "size", "box"),
    [
        ("eigen", (480, 640), (45, 471, 41, 601)),
        ("garg", (375, 1242), (153, 371, 44, 1197)),
        ("none", (30, 40), (0, 30, 0, 40)),
    ],
)
def test_crops_are_those_of_the_official_code(crop, size, box):
    depth = np.full((1, size[0] + 32, size[1]), 2.0, np.float32)
    valid = valid_pixels(
        jnp.asarray(depth),
        min_depth=1e-3,
        max_depth=10.0,
        crop=crop,
        sizes=None if crop == "none" else jnp.array([size]),
    )
    rows, columns = (np.flatnonzero(np.asarray(valid[0]).any(axis=axis)) for axis in (1, 0))
    if crop == "none":  # without sizes, the array is the image
        box = (0, depth.shape[1], 0, size[1])
    assert (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) == box


def test_alignment_undoes_scale_and_shift_and_nothing_else():
    prediction, depth = pair()
    valid = jnp.asarray(depth > 0)
    relative = jnp.asarray(np.where(depth > 0, (depth - 0.7) / 3.5, 1e4))
    aligned = np.asarray(align_scale_shift(relative, jnp.asarray(depth), valid))
    np.testing.assert_allclose(aligned[depth > 0], depth[depth > 0], rtol=1e-5)
    aligned = np.asarray(align_scale_shift(jnp.asarray(prediction), jnp.asarray(depth), valid))
    for p, g, a in zip(prediction, depth, aligned, strict=True):
        known = g > 0
        scale, shift = np.polyfit(p[known].astype(np.float64), g[known], 1)
        np.testing.assert_allclose(a[known], scale * p[known] + shift, rtol=1e-4)


def test_losses_equal_their_formulas_on_the_valid_pixels():
    prediction, depth = pair()
    known = depth > 0
    given = jnp.asarray(np.where(known, prediction, np.nan)), jnp.asarray(depth)
    valid = jnp.asarray(known)
    d = np.log(prediction[known].astype(np.float64)) - np.log(depth[known])
    silog = 10 * np.sqrt((d**2).mean() - 0.85 * d.mean() ** 2)
    np.testing.assert_allclose(silog_loss(*given, valid), silog, rtol=1e-5)
    e = np.log(prediction[known] + 1e-3) - np.log(depth[known] + 1e-3)
    sig = np.sqrt(e.var(ddof=1) + 0.15 * e.mean() ** 2)
    np.testing.assert_allclose(sig_loss(*given, valid), sig, rtol=1e-5)
    first = sig_loss(*given, valid, variance=0.0)
    np.testing.assert_allclose(first, np.sqrt(0.15) * abs(e.mean()), rtol=1e-4)


def test_the_gradient_loss_equals_loops():
    prediction, depth = pair((1, 13, 14))
    expected = 0.0
    for step in (1, 2, 4, 6):
        p, g = prediction[0, ::step, ::step], depth[0, ::step, ::step]
        d = np.log(p + 1e-3) - np.log(g + 1e-3)
        total = 0.0
        for y, x in np.ndindex(*d.shape):
            for other in ((y + 2, x), (y, x + 2)):
                inside = other[0] < d.shape[0] and other[1] < d.shape[1]
                if inside and g[y, x] > 0 and g[other] > 0:
                    total += abs(d[other] - d[y, x])
        expected += total / (g > 0).sum()
    found = gradient_loss(*map(jnp.asarray, (prediction, depth, depth > 0)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_without_valid_pixels_losses_and_gradients_are_zero():
    prediction, depth = (jnp.asarray(x) for x in pair())
    none = jnp.zeros(depth.shape, bool)
    for loss in (sig_loss, silog_loss, gradient_loss):
        value, slope = jax.value_and_grad(loss)(prediction, depth, none)
        assert value == 0 and not np.asarray(slope).any()
