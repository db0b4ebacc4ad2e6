"""What a run starts from: config.init_from, and config.model.backbone.pretrained behind it."""

import shutil
import zipfile

import goldens
import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from tiny_run import make_run, tiny_config_of

from resfu_jax import create_upsampler, load_upsampler, training
from resfu_jax.export import export_model
from resfu_jax.model import create_model
from resfu_jax.predictor import Predictor
from resfu_jax.training import (
    CheckpointError,
    ConfigError,
    model_arguments,
    pretrained,
    validate,
)

CLASSES = 8  # of shapes


def initial_weights(config, classes):
    arguments = model_arguments(config.model)
    return training.initial_weights(
        config, classes, lambda n, rngs: create_model(**arguments, num_classes=n, rngs=rngs)
    )


HEAD = ("head.classify.bias", "head.classify.kernel")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with averages, and one of its models."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    config = tiny_config_of()
    config.optimizer.ema_decay = 0.9
    make_run(workdir, config, {3: 0.4, 5: None})
    return workdir


@pytest.fixture(scope="module")
def exported(run):
    predictor = Predictor.from_checkpoint(run, devices=jax.devices()[:1])
    return export_model(predictor.model, run.parent / "tiny.zip", size=(32, 32), platforms=["cpu"])


def config_of(init_from=None, skip=(), **head):
    config = tiny_config_of()
    config.init_from, config.init_skip = None if init_from is None else str(init_from), skip
    for name, value in head.items():
        setattr(config.model.head, name, value)
    return config


def arrays(weights):
    return {".".join(map(str, path)): np.asarray(x) for path, x in nnx.to_flat_state(weights)}


def of_checkpoint(run, step):
    model = Predictor.from_checkpoint(run, step, devices=jax.devices()[:1]).model
    return arrays(nnx.as_pure(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))))


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], name)


def test_a_workdir_a_checkpoint_and_an_exported_file_give_all_that_evaluation_uses(
    run, exported, tmp_path
):
    with zipfile.ZipFile(exported) as archive:
        archive.extract("weights.safetensors", tmp_path)
    best, other = of_checkpoint(run, 3), of_checkpoint(run, 5)
    for path, expected in [
        (run, best),
        (run / "checkpoints" / "5", other),
        (exported, best),
        (tmp_path / "weights.safetensors", best),
    ]:
        weights, said = initial_weights(config_of(path), CLASSES)
        same(arrays(weights), expected)
        assert said.startswith("starting from ") and said.endswith(": 135 of 135 arrays")
    assert not np.array_equal(best["head.classify.kernel"], other["head.classify.kernel"])


@pytest.mark.parametrize(
    ("skip", "classes", "head", "messages"),
    [
        ((), 5, {}, ["in 2 of 135", "head.classify.kernel: there (8, 8), here (8, 5)"]),
        ((), CLASSES, {"upsampler": "dysample"}, ["head.upsample.0.offset.bias: there nothing"]),
        ((), 5, {}, ["--config.init_skip=\"('head.classify',)\""]),
        ((), CLASSES, {"width": 16}, ["  and 6 more", "'head.fuse', 'head.project'"]),
        (("head.clasify",), 5, {}, ["does not have: head.clasify; it has backbone.stages, head."]),
        (("head.classify.kernel",), 5, {}, ["in 1 of 135 arrays", "head.classify.bias"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(run, skip, classes, head, messages):
    with pytest.raises(ConfigError, match="^config.init_from: ") as error:
        initial_weights(config_of(run, skip, **head), classes)
    for message in messages:
        assert message in str(error.value)


def test_what_is_skipped_and_what_is_not_used(run):
    for skip in (("head.classify",), ("*.classify.*",), HEAD):
        weights, _ = initial_weights(config_of(run, skip), 5)
        assert not arrays(weights).keys() & set(HEAD)
    _, said = initial_weights(config_of(run, HEAD), 5)
    skipped = ": 133 of 135 arrays; initialised, as config.init_skip says: " + ", ".join(HEAD)
    assert said.endswith(skipped)
    _, said = initial_weights(config_of(run, ("head",), name="fpn"), CLASSES)
    assert "; not in this model: head.project.0.conv.kernel" in said


def test_places_without_weights(run, tmp_path):
    for path in (tmp_path, tmp_path / "none", "nowhere/run", "nowhere/run/checkpoints/3"):
        with pytest.raises(ConfigError, match="init_from: no run of train.py.*does not exist"):
            initial_weights(config_of(path), CLASSES)
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/checkpoints/3/state/_METADATA").write_bytes(b"{")
    with pytest.raises(CheckpointError, match="checkpoint 3 is damaged"):
        initial_weights(config_of(tmp_path / "run"), CLASSES)


def test_pretrained_points_to_init_from(run, exported):
    config = config_of()
    for path in (run, run / "checkpoints" / "5"):
        config.model.backbone.pretrained = str(path)
        with pytest.raises(ConfigError, match="is a run of train.py.*--config.init_from=") as error:
            initial_weights(config, CLASSES)
        assert str(error.value).startswith("config.model.backbone.pretrained: ")
    config.model.backbone.pretrained = str(exported)
    with pytest.raises(ConfigError, match="does not fit MiT: it holds a model of this library"):
        initial_weights(config, CLASSES)


# ------------------------------------------------------------------------------ upsamplers of heads
ANYUP = str(goldens.index()["anyup_multi_backbone"]["path"])


@pytest.mark.parametrize("head", ["linear", "linear_probe"])
def test_a_head_starts_from_released_weights_of_its_upsampler(run, head):
    upsampler = arrays(nnx.state(load_upsampler("anyup", ANYUP), nnx.Param))
    config = config_of(name=head, width=None, upsampler="anyup", pretrained=ANYUP)
    validate(config)
    weights, said = initial_weights(config, CLASSES)
    same(arrays(weights), {f"head.upsample.{name}": value for name, value in upsampler.items()})
    assert said == f"anyup starts from {ANYUP}: {len(upsampler)} arrays" and len(upsampler) > 20
    config.init_from, config.init_skip = str(run), ("head",)
    found, said = initial_weights(config, CLASSES)
    assert len(arrays(found)) > len(arrays(weights)) and "; anyup starts from " in said


def test_weights_of_another_upsampler_are_refused(monkeypatch):
    jafar = config_of(name="linear", width=None, upsampler="jafar", pretrained="anyup")
    with pytest.raises(ConfigError, match="config.model.head.pretrained: anyup is of anyup, not"):
        initial_weights(jafar, CLASSES)
    jafar.model.head.pretrained = "released"
    with pytest.raises(ConfigError, match="'jafar' has .* choose one by its name"):
        initial_weights(jafar, CLASSES)
    other = create_upsampler("jafar", features=8)
    monkeypatch.setattr(pretrained, "load_upsampler", lambda name: other)
    jafar.model.head.pretrained = "jafar_dinov2_vits14"
    with pytest.raises(ConfigError, match="does not fit the head's jafar:\n  head.upsample.*there"):
        initial_weights(jafar, CLASSES)


def test_a_head_of_several_upsamplers_starts_from_whole_models():
    with pytest.raises(ConfigError, match="head.pretrained is 'x'; .*unless the head is linear, "):
        validate(config_of(name="segformer", pretrained="x"))


# --------------------------------------------------------------------------------- published files
def published(path, config, classes):
    """A SegFormer of transformers with random weights, and our names for them."""
    from resfu_jax.convert import segformer

    model = create_model(**model_arguments(config.model), num_classes=classes, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    entries = {}

    class Recorder(segformer.StateDict):
        def take(self, key, shape):
            entries[key] = rng.normal(size=shape).astype(np.float32)
            return entries[key]

        def done(self):
            pass

    segformer._mit(recorder := Recorder({}, ""), model.backbone)
    segformer._head(recorder, model.head)
    save_file(
        {("" if n.startswith("decode") else "segformer.") + n: v for n, v in entries.items()}, path
    )
    return arrays(nnx.as_pure(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))))


def test_a_published_segformer_gives_decoder_and_encoder_or_the_encoder_alone(tmp_path):
    path = tmp_path / "segformer.safetensors"
    config = config_of(path, project="linear")
    expected = published(path, config, 150)
    same(arrays(initial_weights(config, 150)[0]), expected)
    with pytest.raises(ConfigError, match=r"head.classify.kernel: there \(8, 150\), here \(8, 8\)"):
        initial_weights(config, CLASSES)
    config.init_skip = ("head.classify",)
    weights, _ = initial_weights(config, CLASSES)
    same(arrays(weights), {n: v for n, v in expected.items() if n not in HEAD})

    config = config_of(path, ("head",), name="fpn")
    backbone = {n: v for n, v in expected.items() if n.startswith("backbone.")}
    same(arrays(initial_weights(config, CLASSES)[0]), backbone)

    # `pretrained` is read only where init_from leaves something of the backbone.
    config.model.backbone.pretrained = str(tmp_path / "none.safetensors")
    initial_weights(config, CLASSES)
    config.init_skip = ("head", "backbone.stages.0.norm")
    with pytest.raises(ConfigError, match="none.safetensors does not exist"):
        initial_weights(config, CLASSES)
    config.model.backbone.pretrained = str(path)
    same(arrays(initial_weights(config, CLASSES)[0]), backbone)
