"""Grad-CAM on upsampled activations, and its scores, against the golden values."""

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import weights

from resfu_jax import FeaturePipeline, explain
from resfu_jax.backbones import ViT
from resfu_jax.convert import load_classifier
from resfu_jax.ops import resize

PHOTOS = np.random.default_rng(0).integers(0, 256, (2, 24, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    return weights.write(path, weights.entries("vit"))


@pytest.mark.parametrize("size", ["low", "high"])
def test_metrics_equal_the_golden_values(size):
    with jax.enable_x64(True), np.load(goldens.index()["metric_gradcam"]["path"]) as z:
        given = {k[3:]: np.asarray(z[k], np.float64) for k in z.files if k.startswith("in/")}

        def cam(suffix):
            parts = [given[f"{name}{suffix}"] for name in ("activations", "gradients")]
            found = explain.grad_cam(*(jnp.asarray(goldens.nhwc(part)) for part in parts))
            np.testing.assert_allclose(found, z[f"out/cam{suffix}"], rtol=1e-9)
            high = (24, 28) if size == "high" else found.shape[1:]
            return resize(found[..., None], high, method="bilinear")[..., 0]

        scores = jnp.asarray(given["score"]), jnp.asarray(given["score_masked"])
        first, second = cam(""), cam("_masked")
        found = explain.Explanation(first, second, jnp.zeros(5, jnp.int32), *scores)
        metrics = found.metrics()
        averages = explain.averages(metrics)
        for name in ("average_drop", "average_increase", "average_gain"):
            np.testing.assert_allclose(averages[name], z[f"out/{name}"], rtol=1e-9)
        np.testing.assert_allclose(averages["coherency"], z[f"out/{size}/coherency"], rtol=1e-9)
        for ours, theirs in (("nonzero", "nonzero"), ("l1", "mean")):
            expected = {
                k: z[f"out/{size}/{k}_{theirs}"] for k in ("complexity", "adcc_of_averages")
            }
            np.testing.assert_allclose(
                averages[f"complexity_{ours}"], expected["complexity"], rtol=1e-9
            )
            np.testing.assert_allclose(
                averages[f"adcc_{ours}"], 100 * expected["adcc_of_averages"], rtol=1e-9
            )
            each = explain.adcc(
                metrics["coherency"], metrics[f"complexity_{ours}"], metrics["average_drop"]
            )
            average = z[f"out/{size}/adcc_average_of_samples_{theirs}"]
            np.testing.assert_allclose(np.mean(each), average, rtol=1e-9)


def test_activations_decide_the_logits_of_the_classifier(file):
    vit = load_classifier(file, image_size=(24, 16))
    assert isinstance(vit, ViT)
    images = jnp.asarray(PHOTOS, jnp.float32) / 255
    activations, logits_of = vit.last_activations(images)
    assert activations.shape == (2, 6, 4, 16)
    np.testing.assert_allclose(logits_of(activations), vit.classify(images), rtol=1e-5, atol=1e-6)
    assert np.abs(logits_of(0 * activations) - vit.classify(images)).max() > 1e-3


def test_masks(as_users_call):
    images = jnp.full((1, 1, 3, 3), 200, jnp.uint8)
    cam = jnp.asarray([[[0.0, 1.0, 4.0]]])
    mean = (100.0,) * 3
    for mask, masked, expected in (
        ("hard", "before", [0, 200, 200]),
        ("hard", "after", [100, 200, 200]),
        ("soft", "before", [0, 50, 200]),
        ("soft", "after", [100, 125, 200]),
    ):
        convention = explain.Convention(mask, masked)
        assert mask in str(convention) and masked in str(convention)
        np.testing.assert_allclose(convention.apply(images, cam, mean)[0, 0, :, 0], expected)
    with pytest.raises(ValueError, match="mask must be one of"):
        explain.Convention("none")


def test_explanation_of_photos(file):
    classifier = explain.Classifier(
        load_classifier(file, image_size=(24, 16)), normalisation="half"
    )
    pipeline = FeaturePipeline(classifier.vit, "bilinear", normalisation="half")
    found = explain.explain(classifier, pipeline, PHOTOS)
    assert found.cam.shape == (2, 24, 16)
    low, gradients, classes, score = classifier(PHOTOS)
    np.testing.assert_array_equal(found.classes, classes)
    high = resize(low, (24, 16), method="bilinear")
    np.testing.assert_allclose(found.cam, explain.grad_cam(high, gradients), rtol=1e-4, atol=1e-7)
    table = explain.markdown({"bilinear": explain.averages(found.metrics())})
    assert table.count("\n") == 3 and "| bilinear |" in table
    with pytest.raises(ValueError, match="classes must be 2 whole numbers"):
        classifier(PHOTOS, [0, 99])
