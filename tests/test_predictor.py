import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from tiny_run import make_run, tiny_config_of

import resfu_jax
from resfu_jax import data, training
from resfu_jax.inference import Inference
from resfu_jax.predictor import ImageError, Predictor
from resfu_jax.preprocess import Preprocess

MEAN = (124, 116, 104)
RNG = np.random.default_rng(0)


def picture(height, width):
    """Blocks of colours: untrained networks tell them apart."""
    blocks = RNG.integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
    return blocks.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Steps 3, 5 (best) and 7."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    make_run(workdir, tiny_config_of(), {3: 0.1, 5: 0.3, 7: None})
    return workdir


class Toy(nnx.Module):
    """Compiles in no time. Its logits depend on the pixel and on all of the image, padding too."""

    def __init__(self, offset=0.0):
        self.weights = nnx.Param(jnp.array([[1.0, -1.0, 0.5], [0.5, 1.0, -1.0], [-1.0, 0.5, 1.0]]))
        self.offset = nnx.Param(jnp.array([offset, 0.0, 0.0]))

    def __call__(self, images):
        x = images.astype(jnp.float32) / 255
        x = x - jnp.mean(x, axis=(1, 2), keepdims=True) ** 2
        return x @ self.weights[...] + self.offset[...].reshape(1, 1, 1, 3)


def toy(**options):
    """On one device, sides padded to multiples of 8."""
    defaults = dict(
        class_names=tuple("abc"),
        palette=((0, 0, 0), (255, 0, 0), (0, 255, 0)),
        multiple=8,
        devices=jax.devices()[:1],
    )
    return Predictor(Toy(), **defaults | options)


def one_device(workdir, *args, **options):
    return Predictor.from_checkpoint(workdir, *args, devices=jax.devices()[:1], **options)


@pytest.fixture(scope="module")
def predictor(run):
    return one_device(run)


def padded(image, size):
    result = np.full((1, *size, 3), MEAN, np.uint8)
    result[0, : image.shape[0], : image.shape[1]] = image
    return result


def expected(predictor, image, size):
    """The model called directly."""
    logits = jax.jit(lambda model, x: model(x))(predictor.model, padded(image, size))
    return np.asarray(logits)[0, : image.shape[0], : image.shape[1]]


# ------------------------------------------------------------------------------------- checkpoints
def test_it_is_one_of_the_public_names():
    assert resfu_jax.Predictor is Predictor
    assert "Predictor" in dir(resfu_jax)
    with pytest.raises(AttributeError, match="nothing"):
        _ = resfu_jax.nothing


def test_which_checkpoint(run):
    before = sorted(run.rglob("*"))
    kernels = {}
    for path, which, step in (
        (run, "best", 5),
        (str(run), "latest", 7),
        (run, 3, 3),
        (run / "checkpoints", "best", 5),
        (run / "checkpoints" / "3", "best", 3),
    ):
        predictor = one_device(path, which)
        assert predictor.step == step
        kernels.setdefault(step, predictor.model.head.classify.kernel[...])
        np.testing.assert_array_equal(predictor.model.head.classify.kernel[...], kernels[step])
    assert not np.array_equal(kernels[3], kernels[5])
    info = data.dataset_info("shapes")
    assert (predictor.class_names, predictor.palette) == (info.class_names, info.palette)
    assert predictor.config.model.head.width == 8
    assert sorted(run.rglob("*")) == before


def test_averaged_weights_are_taken_where_they_are_kept(run, predictor, tmp_path):
    config = tiny_config_of()
    config.optimizer.ema_decay = 0.9
    make_run(tmp_path / "ema", config, {5: 0.1})
    kernel = one_device(tmp_path / "ema").model.head.classify.kernel[...]
    assert not np.array_equal(kernel, predictor.model.head.classify.kernel[...])


def test_a_config_comes_back_from_its_file(tmp_path):
    config = tiny_config_of(mode="slide", crop=(32, 64), stride=(16, 16))
    config.model.head.pool_sizes = (1, 2)
    training.write_config(tmp_path, config)
    assert training.read_config(tmp_path) == config
    tree = json.loads((tmp_path / "config.json").read_text())
    tree["model"]["head"]["upsampled"] = 1
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(training.ConfigError, match=r"model.head.upsampled; did you mean model.hea"):
        training.read_config(tmp_path)


@pytest.mark.parametrize(
    ("make", "which", "error", "message"),
    [
        (lambda run, tmp: tmp / "none", "best", ValueError, "is not a folder"),
        (lambda run, tmp: tmp, "best", ValueError, "is not the workdir of a run"),
        (lambda run, tmp: run, "4", training.CheckpointError, "there are: best, latest, 3, 5, 7"),
    ],
)
def test_wrong_folders(run, tmp_path, make, which, error, message):
    with pytest.raises(error, match=message):
        one_device(make(run, tmp_path), which)
    assert not list(tmp_path.iterdir())


def test_a_config_that_does_not_fit_its_checkpoints(run, tmp_path):
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    config = tiny_config_of()
    config.model.head.width = 16
    training.write_config(tmp_path, config)
    with pytest.raises(
        training.CheckpointError, match=r"head/classify/kernel: saved \(8, 8\), .*16"
    ):
        one_device(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json cannot be read"):
        one_device(tmp_path)


# ----------------------------------------------------------------------------------------- results
def test_the_same_as_the_model_called_directly(predictor):
    image = picture(40, 70)
    (result,) = predictor.predict(image, probabilities=True, features=True)
    assert predictor.padded_size(40, 70) == (64, 96)
    logits = expected(predictor, image, (64, 96))
    assert len(np.unique(result.labels)) > 1
    assert (result.id, result.path) == ("0", None)
    assert result.labels.dtype == np.uint8 and result.labels.shape == (40, 70)
    np.testing.assert_array_equal(result.labels, logits.argmax(-1))
    np.testing.assert_allclose(result.probabilities, jax.nn.softmax(logits), atol=1e-5)
    # What the classifier makes of the features is the logits.
    assert result.features.shape == (10, 18, 8)
    at_quarter = jax.jit(lambda model, x: model.logits(x))(
        predictor.model, padded(image, (64, 96))
    )[0, :10, :18]
    np.testing.assert_allclose(
        predictor.model.head.classify(jnp.asarray(result.features)),
        at_quarter,
        rtol=1e-4,
        atol=1e-4,
    )


def test_sizes_grow_geometrically(predictor):
    sides = sorted({predictor.padded_size(n, 32)[0] for n in range(1, 2000)})
    assert sides[:8] == [32, 64, 96, 128, 160, 224, 288, 384]
    assert all(b <= max(a + 32, 1.25 * a + 32) for a, b in zip(sides, sides[1:], strict=False))
    assert toy(growth=1).padded_size(161, 1024) == (168, 1024)


def test_mixed_sizes_among_others_and_alone():
    """In batches of 2: blank rows, neighbours and order change nothing."""
    calls = []
    predictor = toy(batch_size=2, on_compile=calls.append)
    sizes = [(7, 7), (9, 22), (16, 16), (3, 8), (22, 9), (16, 24), (8, 8), (1, 5)]
    images = [picture(*size) for size in sizes]
    results = predictor.predict(images, probabilities=True)
    assert [r.id for r in results] == [str(i) for i in range(8)]
    assert not results.errors
    for image, result in zip(images, results, strict=True):
        assert result.labels.shape == image.shape[:2]
        (alone,) = predictor.predict(image, probabilities=True)
        np.testing.assert_allclose(result.probabilities, alone.probabilities, atol=1e-6)
        logits = expected(predictor, image, predictor.padded_size(*image.shape[:2]))
        np.testing.assert_allclose(result.probabilities, jax.nn.softmax(logits), atol=1e-6)
    assert sorted(predictor.compiled_shapes) == [(2, 8, 8), (2, 16, 16), (2, 16, 24), (2, 24, 16)]
    assert tuple(calls) == predictor.compiled_shapes
    assert len(predictor.compile_seconds) == 4 and min(predictor.compile_seconds) > 0
    assert predictor.predict(images)[0].probabilities is None
    assert len(predictor.compiled_shapes) == 8  # other outputs, other programs


def test_compilations_are_bounded():
    predictor = toy(max_compilations=2)
    images = [picture(16, 16), picture(8, 8), picture(8, 16), picture(24, 8), picture(3, 3)]
    results = predictor.predict(images)
    assert predictor.compiled_shapes == ((1, 16, 16), (1, 8, 8))
    assert [r.id for r in results] == ["0", "1", "2", "4"]
    np.testing.assert_array_equal(
        results[2].labels, expected(predictor, images[2], (16, 16)).argmax(-1)
    )
    (error,) = results.errors
    assert "image 3: 24x8" in str(error) and "max_compilations is 2" in str(error)


def test_all_devices_share_a_batch():
    images = np.stack([picture(16, 16) for _ in range(11)])
    together = toy(devices=None)
    assert together.batch_size == 8
    results = together.predict(images, probabilities=True)
    assert together.compiled_shapes == ((8, 16, 16),)
    for result, alone in zip(results, toy().predict(images, probabilities=True), strict=True):
        np.testing.assert_allclose(result.probabilities, alone.probabilities, atol=1e-6)


def test_bfloat16_is_close(run, predictor):
    image = picture(40, 70)
    half = one_device(run, dtype=jnp.bfloat16)
    assert half.config.model.dtype == "bfloat16"
    outputs = dict(probabilities=True, features=True)
    (a,), (b,) = (p.predict(image, **outputs) for p in (half, predictor))
    assert a.probabilities.dtype == a.features.dtype == np.float32
    assert 0 < np.abs(a.features - b.features).mean() < 0.02 * np.abs(b.features).max()


def test_scaled_images_get_results_of_their_own_size():
    predictor = toy(scale=0.5)
    image = picture(30, 60)
    (result,) = predictor.predict(image, probabilities=True)
    assert predictor.compiled_shapes == ((1, 16, 32),)
    small = np.asarray(Image.fromarray(image).resize((30, 15), Image.Resampling.BILINEAR))
    (of_small,) = toy().predict(small, probabilities=True)
    assert result.labels.shape == (30, 60) and result.probabilities.shape == (30, 60, 3)
    np.testing.assert_array_equal(result.labels, result.probabilities.argmax(-1))
    back = jax.image.resize(of_small.probabilities, (30, 60, 3), "bilinear")
    np.testing.assert_allclose(result.probabilities, back, atol=1e-5)
    (labels_only,) = predictor.predict(image)
    assert labels_only.probabilities is None
    np.testing.assert_array_equal(labels_only.labels, result.labels)


@pytest.mark.parametrize(
    ("resize_to", "scale", "size"),
    [((12, 100), 1.0, (12, 18)), ((40, 48), 0.5, (16, 24)), ((20, 30), 1.0, (20, 30))],
)
def test_images_brought_to_a_short_side(resize_to, scale, size):
    predictor = toy(resize_to=resize_to, scale=scale, multiple=2, growth=1)
    (result,) = predictor.predict(picture(20, 30))
    assert predictor.compiled_shapes == ((1, *size),)
    assert result.labels.shape == (20, 30)


def test_the_protocol_of_the_run_and_changes_of_it(run, tmp_path):
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    training.write_config(
        tmp_path, tiny_config_of(0.25, mode="slide", crop=(32, 32), stride=(16, 16))
    )
    predictor = one_device(tmp_path)
    assert predictor.inference == Inference("slide", (32, 32), (16, 16))
    assert predictor.preprocess == training.create_preprocess(predictor.config)
    assert predictor.preprocess == Preprocess(scale=0.25)
    flipped = one_device(tmp_path, inference={"mode": "whole", "flip": True}, scale=1.0)
    assert flipped.inference == Inference("whole", (32, 32), (16, 16), flip=True)
    assert flipped.preprocess == Preprocess()


def test_windows_do_not_see_the_padding():
    infer = Inference("slide", (16, 16), (8, 8), flip=True)
    predictor = toy(inference=infer)
    image = picture(17, 25)
    (result,) = predictor.predict(image, probabilities=True)
    assert predictor.compiled_shapes == ((1, 24, 32),)
    logits = jax.jit(lambda model, x: infer(model, x))(predictor.model, image[None])
    np.testing.assert_allclose(result.probabilities, jax.nn.softmax(logits[0]), atol=1e-5)


# ------------------------------------------------------------------------------------------- files
@pytest.fixture(scope="module")
def small():
    return toy()


@pytest.fixture
def folder(tmp_path):
    """Good files of several kinds, and two that are none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    image = Image.fromarray(picture(24, 30))
    image.save(folder / "a.png")
    image.convert("L").save(folder / "b.PNG")
    image.convert("RGBA").save(folder / "c.png")
    image.quantize(16).save(folder / "d.png")
    (folder / "e.jpg").write_bytes(b"no image")
    (folder / "f.png").write_bytes((folder / "a.png").read_bytes()[:100])
    Image.fromarray(np.zeros((8, 8), np.float32)).save(folder / "g.tif")
    (folder / "notes.txt").write_text("no image either")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by a quarter
    image.transpose(Image.Transpose.ROTATE_90).save(folder / "h.png", exif=exif)
    return folder


def test_a_folder_with_bad_files(small, folder):
    results = small.predict(folder)
    assert [r.id for r in results] == ["a", "b", "c", "d", "h"]
    assert all(r.labels.shape == (24, 30) for r in results)
    assert results[0].path == folder / "a.png"
    np.testing.assert_array_equal(results[2].labels, results[0].labels)
    np.testing.assert_array_equal(results[4].labels, results[0].labels)  # as viewers show it
    stored = toy(growth=1, orientation=False).predict(folder / "h.png")[0].labels
    assert stored.shape == (30, 24)
    messages = [str(error) for error in results.errors]
    assert [m.split(":")[0] for m in messages] == [
        str(folder / n) for n in ("e.jpg", "f.png", "g.tif")
    ]
    assert "cannot be read as an image" in messages[0] and "floating-point" in messages[2]


def test_a_list_of_everything(small, folder, tmp_path):
    array = picture(24, 30)
    batch = np.stack([array, array])
    results = small.predict([str(folder / "a.png"), array, folder / "missing.png", batch])
    assert [r.id for r in results] == ["a", "1", "3", "4"]
    np.testing.assert_array_equal(results[1].labels, results[3].labels)
    (error,) = results.errors
    assert str(error) == f"{folder / 'missing.png'}: no such file"
    assert {r.id for r in small.stream([array, folder / "b.PNG"])} == {"0", "b"}


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (lambda folder: folder / "e.jpg", "e.jpg: cannot be read as an image"),
        (lambda folder: folder / "none.png", "no such file"),
        (lambda folder: (folder / "empty").mkdir() or folder / "empty", "no images in this folder"),
        (lambda folder: [], "at least one"),
        (lambda folder: np.zeros((4, 4), np.uint8), r"\(H, W, 3\) .* got \(4, 4\) of uint8"),
        (lambda folder: [folder / "a.png", np.zeros((4, 4, 3))], r"images\[1\] .* float64"),
        (lambda folder: np.zeros((0, 4, 3), np.uint8), "must have pixels"),
        (lambda folder: [3], r"images\[0\] must be a path, an array or a list of these, got int"),
    ],
)
def test_what_is_no_image(as_users_call, small, folder, images, message):
    with pytest.raises(ValueError, match=message):
        small.predict(images(folder))


def test_what_the_device_refuses_is_an_error_of_those_images(monkeypatch):
    predictor = toy()
    compile_ = predictor._compile

    def refuse(size, outputs):
        if size == (16, 16):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying")
        compile_(size, outputs)

    monkeypatch.setattr(predictor, "_compile", refuse)
    results = predictor.predict([picture(16, 16), picture(8, 8)])
    assert [r.id for r in results] == ["1"]
    assert "image 0: not enough memory on the device" in str(results.errors[0])
    with pytest.raises(ImageError, match="not enough memory"):
        predictor.predict(picture(16, 16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(palette=((0, 0, 0),)), "class_names and palette"),
        (dict(scale=0.0), "scale must be positive"),
        (dict(resize_to=(9, 8)), "resize_to must be"),
        (dict(batch_size=3), "batch_size must be a multiple of 8"),
        (dict(growth=0.9), "growth must be at least 1"),
        (dict(max_compilations=0), "max_compilations must be at least 1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        toy(**dict(devices=None) | options)


class Coloured(Toy):
    """A model with colours and strides of its own, as `SegmentationModel` has them."""

    def __init__(self):
        super().__init__()
        self.mean, self.std, self.backbone = (127.5,) * 3, (127.5,) * 3, Strides()


class Strides(nnx.Module):
    strides = (14, 28)


def test_padding_is_the_models_own(monkeypatch):
    options = dict(class_names=tuple("abc"), palette=((0, 0, 0),) * 3, devices=jax.devices()[:1])
    predictor = Predictor(Coloured(), **options)
    assert predictor.preprocess == Preprocess(mean=(127.5,) * 3, std=(127.5,) * 3, multiple=28)
    assert predictor.padded_size(29, 5) == (56, 28)
    seen = []
    put = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda x, to: seen.append(x) or put(x, to))
    image = picture(5, 20)
    predictor.predict(image)
    (batch, sizes), *_ = seen
    assert sizes.tolist() == [[5, 20]] and batch.shape == (1, 28, 28, 3)
    np.testing.assert_array_equal(batch[0, :5, :20], image)
    assert (batch[0, 5:] == 128).all() and (batch[0, :, 20:] == 128).all()
    for wrong, message in (
        (dict(multiple=14), r"multiple must be a multiple of the backbone's strides \(14, 28\)"),
        (dict(mean=(1, 2, 3)), "mean must be the model's"),
        (dict(preprocess=Preprocess()), "mean must be the model's"),
    ):
        with pytest.raises(ValueError, match=message):
            Predictor(Coloured(), **options | wrong)


def test_too_few_names():
    with pytest.raises(ValueError, match="each of the 3 logits, got 2"):
        toy(class_names=("a", "b"), palette=((0, 0, 0),) * 2).predict(picture(8, 8))


def test_classes_of_its_own(run):
    info = dataclasses.replace(data.dataset_info("shapes"), class_names=tuple("abcdefgh"))
    assert one_device(run, info=info).class_names == tuple("abcdefgh")
