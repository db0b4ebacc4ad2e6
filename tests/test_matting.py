"""Matting: the network, its losses and metrics, and train.py with task = "matting"."""

import json
import pathlib
import shutil

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from PIL import Image
from tiny_run import losses

from resfu_jax import cli, data, tasks, training
from resfu_jax.data.fabricate import prepare_fabricated
from resfu_jax.matting import MattingPipeline
from resfu_jax.model import create_matting_model

RNG = np.random.default_rng(0)
SIZES = dict(variant="18", widths=(4, 8, 8), depths=(1, 1, 1), stem_width=4)


def grey(*shape):
    return RNG.integers(0, 256, shape, np.uint8)


# ------------------------------------------------------------------------------------------ metrics
def test_metrics_are_those_of_the_matlab_code(as_users_call):
    with np.load(goldens.index()["metric_matting_lemur"]["path"]) as file:
        golden = {name: file[name] for name in file.files}
    mattes = tuple(golden[f"in/{name}"] for name in ("pred", "alpha", "trimap"))
    errors = training.matting_errors(*mattes)
    for name in ("sad", "mse", "grad", "conn"):
        assert errors[name] == pytest.approx(float(golden[f"out/{name}"]), rel=1e-9)
    assert 0.01 < abs(errors["grad_python"] / errors["grad"] - 1) < 0.1  # alike, but not the same
    both = training.count_mattes([mattes]).merge(training.count_mattes([(mattes[1], *mattes[1:])]))
    assert both.compute()["sad"] == pytest.approx(errors["sad"] / 2)
    with pytest.raises(ValueError, match="trimap must have unknown pixels"):
        training.matting_errors(*mattes[:2], np.zeros_like(mattes[2]))
    with pytest.raises(ValueError, match="prediction must be uint8"):
        training.matting_errors(mattes[0][1:], *mattes[1:])


def test_losses_are_their_formula():
    alpha, foreground, background = grey(2, 4, 5), grey(2, 4, 5, 3), grey(2, 4, 5, 3)
    trimap = RNG.choice(np.array([0, 128, 255], np.uint8), (2, 4, 5))
    prediction = RNG.normal(size=(2, 4, 5)).astype(np.float32)

    def losses(p, weight):
        arrays = map(jnp.asarray, (alpha, trimap, foreground, background))
        return training.matting_losses(p, *arrays, composition_weight=weight)

    p, a, f, b = (x.astype(np.float64) for x in (prediction, alpha, foreground, background))
    unknown, a, p = trimap == 128, (a / 255)[..., None], p[..., None]
    colours = np.abs((p * f + (1 - p) * b) - (a * f + (1 - a) * b)).sum(-1) / 255
    for weight, each in ((0.0, np.abs(p - a)[..., 0]), (1.0, colours)):
        expected = (unknown * each).sum((1, 2)) / (unknown.sum((1, 2)) + 1)
        np.testing.assert_allclose(losses(jnp.asarray(prediction), weight), expected, rtol=1e-4)
    gradient = jax.grad(lambda p: losses(p, 0.5).sum())(jnp.asarray(prediction))
    assert ((gradient != 0) == unknown).all()


# -------------------------------------------------------------------------------------------- model
def test_parameters_are_as_many_as_published():
    """Of bilinear upsampling 8.05 million; and what the others add to it, in thousands."""
    published = dict(
        bilinear=(8050, 5), fade=(120, 5), fade_lite=(27, 0.5), carafe=(260, 5), sapa=(40, 5)
    )
    count = {}
    for name in published:
        model = nnx.eval_shape(
            lambda name=name: create_matting_model(head=dict(upsampler=name), rngs=nnx.Rngs(0))
        )
        count[name] = sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param))) / 1000
    for name, (thousands, tolerance) in published.items():
        found = count[name] - (0 if name == "bilinear" else count["bilinear"])
        assert found == pytest.approx(thousands, abs=tolerance), name


@pytest.mark.parametrize("upsampler", ["resfu", "dysample", "jbu"])
def test_upsamplers_of_all_kinds_fit_the_slots(upsampler, as_users_call):
    """Guided by features, by nothing, and by the image."""

    def alpha(images, trimaps):
        head = dict(upsampler=upsampler)
        return create_matting_model(backbone=SIZES, head=head, rngs=nnx.Rngs(0))(images, trimaps)

    images = jax.ShapeDtypeStruct((2, 32, 48, 3), jnp.uint8)
    trimaps = jax.ShapeDtypeStruct((2, 32, 48), jnp.uint8)
    assert jax.eval_shape(alpha, images, trimaps).shape == (2, 32, 48)
    with pytest.raises(ValueError, match="sides that are multiples of 16"):
        jax.eval_shape(
            alpha,
            *(jax.ShapeDtypeStruct((1, 24, *x.shape[2:]), x.dtype) for x in (images, trimaps)),
        )
    with pytest.raises(ValueError, match="trimaps must be uint8 of shape"):
        jax.eval_shape(alpha, images, jax.ShapeDtypeStruct((2, 32, 48), jnp.float32))


@pytest.mark.parametrize("seed", range(3))
def test_alpha_begins_above_zero(seed):
    """Of every seed: from below, training has to turn the last kernel round, and may not."""
    head = dict(upsampler="nearest")

    @jax.jit
    def alpha(images, trimaps):
        return create_matting_model(backbone=SIZES, head=head, rngs=nnx.Rngs(seed))(images, trimaps)

    y = alpha(jnp.asarray(grey(2, 32, 32, 3)), jnp.full((2, 32, 32), 128, np.uint8))
    assert y.max() > 0.1 > -0.1 < y.min()


# ---------------------------------------------------------------------------------------------- run
def config_of():
    return training.Config(
        task="matting",
        steps=4,
        batch_size=8,
        log_every=1,
        model=training.ModelConfig(
            backbone=training.BackboneConfig(
                name="resnet",
                variant="18",
                options=dict(widths=(4, 8, 8, 8), depths=(1, 1, 1, 1), stem_width=4),
            ),
            head=training.HeadConfig(upsampler="bilinear", dropout=0.1),
        ),
        data=training.DataConfig(name="soft_shapes", crop_size=(32, 32), scale_range=(1.0, 1.0)),
        matting=training.MattingConfig(trimap_width=(3, 9)),
        optimizer=training.OptimizerConfig(
            learning_rate=1e-3, final_learning_rate=1e-3, weight_decay=0.0, warmup_steps=0
        ),
        eval=training.EvalConfig(every=2, batch_size=8, pictures=1),
        checkpoint=training.CheckpointConfig(every=3),
    )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    prepare_fabricated("soft_shapes", directory)
    return directory


def test_a_run_scores_draws_continues_bit_for_bit_and_mattes(
    train_here, data_dir, tmp_path, capsys
):
    whole = train_here(tmp_path / "whole", config_of())
    first = config_of()
    first.steps = 3
    train_here(tmp_path / "parts", first)
    continued = losses(train_here(tmp_path / "parts", config_of()))
    assert continued == losses(whole) and len(continued) == 4
    scores = {line["step"]: line["val/sad"] for line in whole if "val/sad" in line}
    assert list(scores) == [2, 4]
    with Image.open(tmp_path / "whole/predictions/step0000004_0.png") as picture:
        assert picture.size == (4 * 128, 128)
    train_here(tmp_path / "whole", config_of(), mode="eval")
    best = min(scores, key=lambda step: (scores[step], -step))
    saved = json.loads((tmp_path / f"whole/eval_{best}.json").read_text())
    assert saved["sad"] == scores[best] and {"mse", "grad", "conn", "grad_python"} < saved.keys()
    the_run_mattes_photos(tmp_path, data_dir, scores[best])
    told = capsys.readouterr()
    assert "120x100, " in told.out + told.err and "% foreground; " in told.out + told.err


def the_run_mattes_photos(tmp_path, data_dir, sad):
    """As in its evaluation; and of any size, from the command line."""
    source = data.open_source("soft_shapes", "validation", data_dir)
    info = data.dataset_info("soft_shapes")
    (batch,) = data.matting_eval_batches(source, info, batch_size=len(source))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        pipeline = MattingPipeline.from_checkpoint(tmp_path / "whole")
        mattes = [pipeline(*pair) for pair in zip(batch["image"], batch["trimap"], strict=True)]
        rows = list(zip(mattes, batch["alpha"], batch["trimap"], strict=True))
        assert training.count_mattes(rows).compute()["sad"] == pytest.approx(sad, rel=1e-3)
        image, trimap = tmp_path / "photo.png", tmp_path / "trimap.png"
        Image.fromarray(batch["image"][0, :100, :120]).save(image)
        known = batch["trimap"][0, :100, :120]
        Image.fromarray(known).save(trimap)
        arguments = ["--trimap", str(trimap), "--checkpoint", str(tmp_path / "whole")]
        out = ["--out", str(tmp_path / "out")]
        assert cli.main(["predict", str(image), *arguments, *out]) == 0
        the_mistakes_of_mattes(tmp_path, image, arguments, out)
    alpha = np.asarray(Image.open(tmp_path / "out/alpha/photo.png"))
    cutout = np.asarray(Image.open(tmp_path / "out/cutouts/photo.png"))
    assert (alpha == cutout[..., 3]).all() and alpha.shape == (100, 120)
    assert (alpha[known != 128] == known[known != 128]).all()
    with pytest.raises(data.DataError, match="trimap is 120x100 .* its image 128x128"):
        pipeline(batch["image"][0], known)
    with pytest.raises(data.DataError, match="trimap has no unknown pixel"):
        pipeline(batch["image"][0], np.zeros((128, 128), np.uint8))


def the_mistakes_of_mattes(tmp_path, image, arguments, out):
    """A folder of photos, one without a trimap, and options of other tasks."""
    photos, trimaps = tmp_path / "photos", tmp_path / "trimaps"
    for folder, file, names in ((photos, image, "ab"), (trimaps, arguments[1], "a")):
        folder.mkdir()
        for name in names:
            shutil.copy(file, folder / f"{name}.png")
    words = ["predict", str(photos), "--trimap", str(trimaps), *arguments[2:], *out]
    assert cli.main(words) == 1
    assert (tmp_path / "out/alpha/a.png").exists() and not (tmp_path / "out/alpha/b.png").exists()
    pipeline = MattingPipeline.from_checkpoint(tmp_path / "whole")
    matte, error = pipeline.stream(photos, trimaps)
    assert matte.id == "a" and "has no trimap b.*" in str(error)
    assert pipeline.compiled_shapes == ((1, 112, 128),)
    with pytest.raises(ValueError, match="trimaps must be a folder for 2 photos"):
        next(pipeline.stream(photos, arguments[1]))
    for options in (arguments[2:], [*arguments, "--opacity", "1"], [*arguments, "--flip", "True"]):
        assert cli.main(["predict", str(image), *options, *out]) == 1


def test_a_resnet_that_has_seen_no_trimaps_starts_the_encoder(tmp_path):
    goldens_resnet = pathlib.Path(__file__).parent / "goldens_resnet"
    file = safetensors.numpy.load_file(goldens_resnet / "basic.safetensors")
    file["layer4.0.downsample.0.weight"] = np.zeros((8, 8, 1, 1), np.float32)  # strides there, here
    for name in ("weight", "bias", "running_mean", "running_var"):
        file[f"layer4.0.downsample.1.{name}"] = np.ones(8, np.float32)
    safetensors.numpy.save_file(file, tmp_path / "resnet.safetensors")
    config = config_of()
    config.model.backbone.options = dict(widths=(6, 6, 8, 8), depths=(1, 1, 1, 2))
    config.model.backbone.pretrained = str(tmp_path / "resnet.safetensors")
    task = tasks.create_task(config)
    weights, _ = task.initial_weights()
    model = nnx.eval_shape(lambda: task.create_model(nnx.Rngs(0)))
    nnx.update(model, weights)
    kernel = np.asarray(model.backbone.stem[0].conv.kernel[...])
    np.testing.assert_array_equal(kernel[:, :, :3], file["conv1.weight"].transpose(2, 3, 1, 0))
    assert kernel.shape[2] == 4 and not kernel[:, :, 3].any()
    np.testing.assert_array_equal(
        model.backbone.stages[2][0].layers[1].conv.kernel[...],
        file["layer3.0.conv2.weight"].transpose(2, 3, 1, 0),
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.name", "shapes", "'shapes', which has none; config.task 'matting' needs"),
        ("task", "segmentation", "'soft_shapes', which has alpha mattes"),
        ("model.backbone.name", "mit", "backbone.name is 'mit'; it has to be 'resnet'"),
        ("model.backbone.variant", "50", "backbone.variant is '50'; it has to be '18' or '34'"),
        ("model.backbone.options", {"stem": "deep"}, "options holds 'stem'; it can hold widths"),
        ("model.head.width", 64, "head.width is 64; it has to be None"),
        ("data.resize_scale", 0.5, "data.resize_scale is 0.5; it has to be 1.0"),
        ("matting.trimap_width", (0, 9), r"trimap_width is \(0, 9\)"),
        ("matting.composition_weight", 1.5, "composition_weight is 1.5; it has to be between"),
        ("optimizer.milestones", (3, 2), r"milestones is \(3, 2\); it has to be increasing"),
    ],
)
def test_configs_that_cannot_be(field, value, message):
    config = config_of()
    training.validate(config)
    *groups, name = field.split(".")
    group = config
    for part in groups:
        group = getattr(group, part)
    setattr(group, name, value)
    with pytest.raises(training.ConfigError, match=message):
        training.validate(config)


def test_milestones_divide_the_rate_by_ten():
    config = training.OptimizerConfig(learning_rate=1.0, warmup_steps=2, milestones=(4, 6))
    schedule = training.create_schedule(config, 8)
    rates = [float(schedule(step)) for step in range(2, 8)]
    np.testing.assert_allclose(rates, [1, 1, 0.1, 0.1, 0.01, 0.01], rtol=1e-6)
