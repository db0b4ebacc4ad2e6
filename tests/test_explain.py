"""Grad-CAM on upsampled activations, and its scores, against the golden values."""

import json

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import weights
from PIL import Image

from resfu_jax import FeaturePipeline, explain
from resfu_jax.backbones import ViT
from resfu_jax.cli import main
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


# --------------------------------------------------------------------------------------- from files
@pytest.mark.parametrize("family", ["vit", "mit"])
def test_weights_without_a_classifier_are_refused(tmp_path, family):
    entries = {k: v for k, v in weights.entries(family).items() if not k.startswith("head")}
    path = weights.write(tmp_path / "weights.safetensors", entries)
    what = "classifier of the ViT" if family == "vit" else "ViT"
    with pytest.raises(ValueError, match=f"holds no {what}: give weights of a ViT that were"):
        load_classifier(path)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, photo in zip("ab", PHOTOS, strict=True):
        Image.fromarray(photo).save(folder / f"{name}.png")
    return folder


@pytest.mark.usefixtures("programs_are_kept")
def test_command(file, photos, tmp_path, capsys):
    """The square in the middle of 24 x 16 pixels is 16 x 16."""
    classes = tmp_path / "classes.txt"
    count = len(weights.entries("vit")["head.bias"])
    classes.write_text("\n".join(f"name {i}, other" for i in range(count)))
    out = tmp_path / "out"
    words = ["--backbone", str(file), "--normalisation", "half", "--upsampler", "nearest", "jbu"]
    words += ["--mask", "soft", "--masked", "before", "--size", "16", "--classes", str(classes)]
    assert main(["explain", str(photos), *words, "--out", str(out)]) == 0
    result = json.loads((out / "explain.json").read_text())
    convention = explain.Convention("soft", "before")
    assert str(convention) in result["convention"]["in_words"]
    assert result["versions"]["jax"] == jax.__version__
    classifier = explain.Classifier(file, normalisation="half")
    for name in ("nearest", "jbu"):
        pipeline = FeaturePipeline(classifier.vit, name, normalisation="half")
        found = explain.explain(classifier, pipeline, PHOTOS[:, 4:20], convention=convention)
        expected = explain.averages(found.metrics())
        assert result["averages"][name] == pytest.approx(expected, rel=1e-3, abs=1e-3)
        for i, record in enumerate(result["images"]):
            assert record["class"] == found.classes[i]
            assert record["name"] == f"name {record['class']}, other"
            assert record["probability"] == pytest.approx(float(found.score[i]), rel=1e-4)
    table = (out / "explain.md").read_text()
    assert explain.markdown(result["averages"]) in table and str(convention) in table
    assert table in capsys.readouterr().out
    assert sorted(p.name for p in (out / "pictures").iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no images: give files or folders"),
        (["A", "--upsampler", "jbu", "jbu"], "--upsampler must be different names"),
        (["A", "--upsampler", "jbuu"], "did you mean 'jbu'"),
        (["A", "--weights", "V"], "--weights are those of the one --upsampler"),
        (["A", "--size", "18"], "--size must be a multiple of the patch, 4, got 18"),
        (["A", "--classes", "A/none.txt"], "No such file"),
        (["A", "--classes", "V.txt"], "--classes must have a line for each of the"),
        (["A/none.png"], "none.png: no such file"),
        (["A", "A"], "a.png: its picture would replace that of"),
    ],
)
def test_mistakes_end_in_one_line(file, photos, tmp_path, capsys, words, message):
    file.with_suffix(".txt").write_text("one\ntwo")
    places = {"A": photos, "A/none.txt": photos / "none.txt", "A/none.png": photos / "none.png"}
    places |= {"V": file, "V.txt": file.with_suffix(".txt")}
    words = [str(places.get(word, word)) for word in words]
    options = ["--backbone", str(file), "--normalisation", "half", "--out", str(tmp_path / "out")]
    size = [] if "--size" in words else ["--size", "16"]
    assert main(["explain", *words, *options, *size]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "out").exists()
