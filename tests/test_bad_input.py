"""Bad input is answered in one message that names the argument, what it got and what it needs.

One row is one mistake: who makes it, the argument, the value, and what the message must say. A new
mistake is a new line. `call(value, tmp_path)` makes the mistake; what it raises must be one of the
errors that users are told to expect.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from resfu_jax import training
from resfu_jax.data import DatasetInfo, Source, train_batches
from resfu_jax.export import export_model
from resfu_jax.inference import Inference
from resfu_jax.predictor import Predictor
from resfu_jax.preprocess import Preprocess
from resfu_jax.serving import load_exported


class Bad(NamedTuple):
    """A mistake, and what has to be said about it."""

    who: str  # the public function or class
    argument: str
    value: Any
    call: Callable[[Any, Any], Any]
    message: str  # a regular expression
    error: type[Exception] = ValueError


# ------------------------------------------------------------------------------- ops and upsamplers
OPS: list[Bad] = []


# ------------------------------------------------------------------------------ backbones, convert
CONVERT: list[Bad] = []


# -------------------------------------------------------------------------------------------- data
DATA: list[Bad] = []


# ------------------------------------------------------------------------ config, losses, optimizer
def config(field):
    """Validates a config that has the value in this field, such as `optimizer.beta1`."""

    def call(value, tmp_path):
        config = training.Config()
        *parents, last = field.split(".")
        owner = functools.reduce(getattr, parents, config)
        setattr(owner, last, value)
        training.validate(config, devices=1, processes=1)

    return call


CONFIG: list[Bad] = []


# ------------------------------------------------------- checkpoints, workdirs, metrics, train.py
RUNS: list[Bad] = []


# -------------------------------------------------------------- Predictor, export, serving, server
class Brightest(nnx.Module):
    """A model whose logits are its images."""

    def __call__(self, images):
        return images.astype(jnp.float32)


def predictor(argument):
    """Makes a `Predictor` with this argument."""
    options = dict(class_names=("r", "g", "b"), palette=((0, 0, 0),) * 3)

    def call(value, tmp_path):
        Predictor(**{"model": Brightest()} | options | {argument: value})

    return call


def from_checkpoint(argument):
    """Looks for a run in an empty folder, with this argument, which is refused before."""

    def call(value, tmp_path):
        Predictor.from_checkpoint(**{"path": tmp_path} | {argument: value})

    return call


def predict(value, tmp_path):
    options = dict(class_names=("r", "g", "b"), palette=((0, 0, 0),) * 3)
    Predictor(Brightest(), **options).predict(value)


def preprocess(argument):
    return lambda value, tmp_path: Preprocess(**{argument: value})


def inference(argument):
    options = dict(mode="slide", crop=(32, 32), stride=(16, 16))
    return lambda value, tmp_path: Inference(**options | {argument: value})


class Backbone(nnx.Module):
    strides = (4, 16)


class Segments(Brightest):
    mean, std, backbone = (0.0,) * 3, (1.0,) * 3, Backbone()


def export(argument):
    def call(value, tmp_path):
        export_model(**dict(model=Segments(), path=tmp_path / "m.zip") | {argument: value})

    return call


def load(argument):
    def call(value, tmp_path):
        if argument == "path":
            load_exported(value)
        path = export_model(Segments(), tmp_path / "m.zip", platforms=("cpu",))
        load_exported(path, **{argument: value})

    return call


def batches(argument):
    def call(value, tmp_path):
        source = Source("toy", "train", [{"image": b"", "label": b"", "id": b""}])
        info = DatasetInfo("toy", ("a",), ((0, 0, 0),))
        train_batches(
            source, info, **dict(batch_size=1, crop_size=(8, 8), seed=0) | {argument: value}
        )

    return call


def rows(who, call, argument, message, *values):
    return [Bad(who, argument, value, call(argument), message) for value in values]


PIXELS = np.zeros((1, 8, 8, 3))
REAL = ("1", True, 1j, math.nan, math.inf, None)
PREDICTOR: list[Bad] = [
    *rows("Preprocess", preprocess, "scale", "scale must be positive", 0, -1.0, *REAL),
    *rows("Preprocess", preprocess, "growth", "growth must be at least 1", 0.5, *REAL[:-1]),
    *rows("Preprocess", preprocess, "multiple", "multiple must be at least 1", 0, 1.5, "8", True),
    *rows(
        "Preprocess", preprocess, "resize_to", r"\(short, long\)", 5, (9, 8), (1.5, 2), (1,), "ab"
    ),
    *rows(
        "Preprocess", preprocess, "mean", "three real numbers", 1.0, (1, 2), (1, 2, 256), (1, 2, 3j)
    ),
    *rows(
        "Preprocess", preprocess, "std", "three positive real", 0.0, (1, 1, 0), (True, 1, 1), "abc"
    ),
    *rows("Inference", inference, "mode", "'whole' or 'slide'", "window", None, ["slide"]),
    *rows(
        "Inference", inference, "crop", "height, width", 32, (32,), (32.0, 32.0), "ab", None, (0, 1)
    ),
    *rows(
        "Inference", inference, "stride", "height, width|at most", 16, (16, 33), (True, True), None
    ),
    *rows(
        "Inference", inference, "scales", "must be positive", 1.0, (), (0,), (1j,), ("1",), (True,)
    ),
    *rows("Inference", inference, "flip", "True or False", "yes", 1, None),
    *rows("Inference", inference, "windows_per_step", "at least 1", 0, 1.5, True, "2"),
    *rows("Predictor", predictor, "model", "Flax NNX module", None, lambda x: x, "runs/shapes"),
    *rows(
        "Predictor", predictor, "class_names", "class_names", "rgb", (1, 2, 3), ("r", "g"), (), None
    ),
    *rows(
        "Predictor",
        predictor,
        "palette",
        "palette",
        None,
        ((0, 0, 0),) * 2,
        ((0, 0, 256),) * 3,
        (1, 2, 3),
    ),
    *rows(
        "Predictor",
        predictor,
        "palette",
        "three integers",
        ((0.5, 0, 0),) * 3,
        (("a", "b", "c"),) * 3,
    ),
    *rows("Predictor", predictor, "inference", "an Inference", "slide", {"flip": True}, 1),
    *rows("Predictor", predictor, "preprocess", "a Preprocess", 0.5, {"scale": 0.5}),
    *rows("Predictor", predictor, "scale", "scale must be positive", *REAL),
    *rows("Predictor", predictor, "growht", "did you mean 'growth'", 1),
    *rows("Predictor", predictor, "batch_size", "multiple of", 0, 8.0, True, "8", 3),
    *rows("Predictor", predictor, "max_compilations", "at least 1", 0, 1.5, True, "2"),
    *rows("Predictor", predictor, "devices", "list of devices", [], "cpu", ["cpu"], 3),
    *rows(
        "from_checkpoint",
        from_checkpoint,
        "dtype",
        "must be one of float32, bfloat16, float16",
        "int32",
    ),
    *rows(
        "from_checkpoint",
        from_checkpoint,
        "dtype",
        "one of float32",
        bool,
        "complex64",
        "float",
        "int8",
        3,
        "f128",
    ),
    *rows(
        "from_checkpoint", from_checkpoint, "inference", "an Inference, a dictionary", "slide", 3
    ),
    Bad(
        "from_checkpoint", "flop", {"flop": 1}, from_checkpoint("inference"), "did you mean 'flip'"
    ),
    *rows("from_checkpoint", from_checkpoint, "path", "workdir of a run", 3, None, b"x"),
    Bad("from_checkpoint", "missing", "~/missing run", from_checkpoint("path"), "is not a folder"),
    *(
        Bad("predict", "images", value, lambda value, _: predict(value, _), "of uint8, RGB")
        for value in (PIXELS, PIXELS.astype(np.int32), PIXELS[..., 0] > 0, PIXELS.astype(complex))
    ),
    *rows("export_model", export, "path", "file to write", 3, None, "."),
    *rows(
        "export_model", export, "path", "must be local", "gs://bucket/m.zip", "https://a.org/m.zip"
    ),
    *rows("export_model", export, "batch", "at least 1", 0, 1.5, "1", True),
    *rows("export_model", export, "size", "height, width", 32, (32,), (0, 32), (32.0, 32.0)),
    *rows("export_model", export, "multiple", "multiple must be", 0, 24, 16.0, "16"),
    *rows(
        "export_model", export, "platforms", "cpu, cuda, rocm and tpu", "cpu", (), ("gpu",), None
    ),
    *rows("export_model", export, "preprocess", "a Preprocess", 0.5),
    Bad("export_model", "mean", Preprocess(), export("preprocess"), "mean must be the model's"),
    *rows("export_model", export, "palette", "three integers", ((0, 0, 300),) * 3),
    *rows("export_model", export, "class_names", "a list of names", "rgb", (1, 2, 3)),
    *rows("load_exported", load, "path", "path of a file", 3, None, b"m.zip"),
    *rows("load_exported", load, "multiple", "multiple must be", 0, 24, 16.0, "16", True),
    *rows("load_exported", load, "growth", "growth must be at least 1", 0.5, "1", math.nan),
    *rows("train_batches", batches, "batch_size", "at least 1", 0, 1.5, "1", True),
    *rows(
        "train_batches", batches, "crop_size", "height, width", 8, (8,), (8.0, 8.0), (True, True)
    ),
    *rows(
        "train_batches", batches, "scale_range", "0 < low <= high", 1.0, (1,), (1, 1j), ("1", "2")
    ),
    *rows("train_batches", batches, "scale_range", "0 < low", (True, True), (1, math.inf)),
    *rows("train_batches", batches, "max_class_share", "at most 1", 0, 1j, True, "1", math.nan),
    *rows("train_batches", batches, "seed", "whole number", -1, 0.5, "0", True),
    *rows("train_batches", batches, "num_workers", "not be negative", -1, 0.5, True),
    *rows("train_batches", batches, "preprocess", "a Preprocess", None, 0.5),
]


ROWS = [*OPS, *CONVERT, *DATA, *CONFIG, *RUNS, *PREDICTOR]


@pytest.mark.parametrize(
    "row", ROWS, ids=[f"{row.who}-{row.argument}-{str(row.value)[:40]}" for row in ROWS]
)
def test_bad_input(row, tmp_path, as_users_call):
    with pytest.raises(row.error) as raised:
        row.call(row.value, tmp_path)
    text = str(raised.value)
    assert re.search(row.message, text), text
    assert row.argument in text
    assert len(text) < 2000  # at most a screen
