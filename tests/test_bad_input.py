"""Bad input is answered in one message that names the argument, what it got and what it needs.

One row is one mistake: who makes it, the argument, the value, and what the message must say. A new
mistake is a new line. `call(value, tmp_path)` makes the mistake; what it raises must be one of the
errors that users are told to expect.
"""

import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from flax import nnx

from resfu_jax import ops, training
from resfu_jax.backbones import create_backbone
from resfu_jax.heads import create_head
from resfu_jax.upsamplers import create_upsampler


class Bad(NamedTuple):
    """A mistake, and what has to be said about it."""

    who: str  # the public function or class
    argument: str
    value: Any
    call: Callable[[Any, Any], Any]
    message: str  # a regular expression
    error: type[Exception] = ValueError


# ------------------------------------------------------------------------------- ops and upsamplers
def resized(size, tmp_path):
    return ops.resize(jnp.zeros((1, 2, 2, 1)), size)


OPS: list[Bad] = [
    Bad("ops.resize", "size", (1, 2**29 + 1), resized, r"at most 2\*\*29.*536870913"),
]


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


def command(*arguments):
    """Reads a command line of train.py with the smallest config, then `value` for the argument."""

    def call(value, tmp_path):
        file = pathlib.Path(__file__).parent / "tiny_config.py"
        argv = ["train.py", f"--config={file}", *arguments, value]
        flag_values = flags.FlagValues()
        training.define_config(flag_values, argv)
        training.parse_flags(argv, flag_values)

    return call


def loss(option):
    """The cross-entropy of two pixels of three classes, with one argument replaced."""

    def call(value, tmp_path):
        arguments = dict(logits=jnp.zeros((1, 1, 2, 3)), labels=jnp.zeros((1, 1, 2), jnp.int32))
        training.cross_entropy(**(arguments | {option: value}))

    return call


def counts(option):
    """Counts of two pixels of three classes, with one argument replaced."""

    def call(value, tmp_path):
        labels = jnp.zeros((1, 1, 2), jnp.int32)
        arguments = dict(predictions=labels, labels=labels, num_classes=3)
        training.count(**(arguments | {option: value}))

    return call


def upsampler(name, option):
    def call(value, tmp_path):
        create_upsampler(name, **({"features": 32, "guide_features": 32} | {option: value}))

    return call


def built(create, name, option, **options):
    """A head or a backbone with this option."""

    def call(value, tmp_path):
        create(name, **(options | {option: value}), rngs=nnx.Rngs(0))

    return call


def in_parts(value, tmp_path):
    step = jax.value_and_grad(lambda params, rest, part: (jnp.sum(part), rest), has_aux=True)
    training.accumulate_gradients(step, jnp.zeros(()), None, jnp.ones((4, 1)), parts=value)


NAN, INF = float("nan"), float("inf")
FOUR = dict(in_features=(8, 8, 8, 8), num_classes=3, upsampler="bilinear")
FIELDS = [
    ("optimizer.beta1", 1.5, "at least 0 and less than 1"),
    ("optimizer.beta1", -0.1, "at least 0 and less than 1"),
    ("optimizer.beta2", -0.999, "at least 0 and less than 1"),
    ("optimizer.beta2", 1.0, "at least 0 and less than 1"),
    ("optimizer.learning_rate", INF, "a finite number"),
    ("optimizer.learning_rate", NAN, "a finite number"),
    ("optimizer.learning_rate", 0.0, "positive"),
    ("optimizer.learning_rate", "1e-4", "a finite number"),
    ("optimizer.final_learning_rate", 1.0, "from 0 to config.optimizer.learning_rate"),
    ("optimizer.final_learning_rate", -1e-6, "from 0 to config.optimizer.learning_rate"),
    ("optimizer.layer_decay", 1.1, "above 0, at most 1"),
    ("optimizer.layer_decay", 0.0, "above 0, at most 1"),
    ("optimizer.head_learning_rate_multiple", -10.0, "positive"),
    ("optimizer.upsampler_learning_rate_multiple", NAN, "a finite number"),
    ("optimizer.weight_decay", -0.01, "0 or more"),
    ("optimizer.weight_decay", NAN, "a finite number"),
    ("optimizer.warmup_steps", 10.0, "a whole number"),
    ("optimizer.warmup_start", -1.0, "between 0 and 1"),
    ("optimizer.power", INF, "a finite number"),
    ("optimizer.clip_norm", NAN, "a finite number or None"),
    ("optimizer.accumulate", True, "a whole number"),
    ("optimizer.accumulate", 0, "at least 1"),
    ("optimizer.ema_decay", 1.5, "between 0 and 1, or None"),
    ("optimizer.name", "adam", "'adamw' or 'sgd'"),
    ("loss.label_smoothing", -0.1, "at least 0 and less than 1"),
    ("loss.label_smoothing", NAN, "a finite number"),
    ("loss.class_weights", (1.0, -1.0) + (1.0,) * 6, "weights of 0 or more"),
    ("loss.class_weights", (1.0, NAN) + (1.0,) * 6, "a finite number"),
    ("loss.class_weights", (0.0,) * 8, "not all 0"),
    ("loss.class_weights", 1.0, "a tuple"),
    ("loss.class_balance", -0.5, "between 0 and 1"),
    ("model.mean", (1.0, 2.0), "three numbers"),
    ("model.mean", (1.0, NAN, 2.0), "a finite number"),
    ("model.std", (1.0, 0.0, 1.0), "three positive numbers"),
    ("model.std", (1.0, -1.0, 1.0), "three positive numbers"),
    ("model.std", (1.0,) * 4, "three positive numbers"),
    ("model.dtype", "int32", "'float32' or 'bfloat16'"),
    ("model.remat", 1, "True or False"),
    ("model.head", None, "a HeadConfig"),
    ("model.head.width", 0, "at least 1, or None"),
    ("model.head.width", 64.0, "a whole number or None"),
    ("model.head.dropout", 1.0, "at least 0 and less than 1, or None"),
    ("model.head.guide_stride", 3, "1, 2, 4 or 8, or None"),
    ("model.head.scale", -4, "at least 1, or None"),
    ("model.head.pool_sizes", (1, 0), "sides of at least 1, or None"),
    ("model.head.upsampler_options", [("eps", 1)], "a dictionary"),
    ("model.backbone.options", {1: 2}, "a dictionary"),
    ("model.backbone.pretrained", 3, "a text or None"),
    ("data.num_workers", -1, "0 or more"),
    ("data.scale_range", (1.0, INF), "a finite number"),
    ("data.crop_size", (64.0, 64.0), "a whole number"),
    ("data.crop_size", (-64, 64), "height, width"),
    ("data.flip", "False", "True or False"),
    ("eval.scales", (1.0, NAN), "a finite number"),
    ("eval.every", 2.5, "a whole number"),
    ("eval.dilation_ratio", NAN, "a finite number"),
    ("eval.pictures", -1, "0 or more"),
    ("checkpoint.every", 0, "at least 1"),
    ("parallel.peak_tflops", INF, "a finite number or None"),
    ("steps", True, "a whole number"),
    ("steps", "1000", "a whole number"),
    ("seed", -1, "from 0 to 2"),
    ("seed", 2**32, "from 0 to 2"),
]
BACKBONE_OPTIONS = [
    ({"drop_pat": 0.1}, "unknown option of backbone 'mit': 'drop_pat'; did you mean 'drop_path'"),
    ({"variant": "b1"}, "options cannot hold variant"),
    ({"dtype": "int32"}, "options cannot hold dtype"),
]
CONFIG: list[Bad] = [
    *(Bad("validate", f"config.{f}", v, config(f), re.escape(m)) for f, v, m in FIELDS),
    *(
        Bad("validate", "config.model.backbone", value, config("model.backbone.options"), message)
        for value, message in BACKBONE_OPTIONS
    ),
    Bad("parse_flags", "config.sead", "--config.sead=3", command(), "did you mean seed"),
    Bad("parse_flags", "config.steps", "--config.steps=1e3", command(), "config.steps=1e3"),
    Bad(
        "parse_flags",
        "upsampler_options",
        "--config.model.head.upsampler_options={'eps': 1",
        command(),
        "has to be a dictionary such as",
    ),
    Bad(
        "parse_flags",
        "crop_size",
        "--config.data.crop_size=(64, 64",
        command(),
        "has to be a tuple",
    ),
    Bad("parse_flags", "--config", "--config=nowhere/x.py", command(), "does not exist"),
    Bad("parse_flags", "--config", "--config=", command(), "is a folder|does not exist"),
    Bad("cross_entropy", "labels", jnp.zeros((1, 1, 2)), loss("labels"), "whole numbers"),
    Bad(
        "cross_entropy", "labels", jnp.zeros((1, 2), jnp.int32), loss("labels"), "labels have shape"
    ),
    Bad("cross_entropy", "logits", jnp.zeros((1, 1, 2, 3), jnp.int32), loss("logits"), "floating"),
    Bad("cross_entropy", "label_smoothing", NAN, loss("label_smoothing"), "between 0 and 1"),
    Bad("cross_entropy", "label_smoothing", -0.1, loss("label_smoothing"), "between 0 and 1"),
    Bad("cross_entropy", "class_weights", (1.0, 2.0), loss("class_weights"), "3 numbers, one per"),
    Bad("cross_entropy", "class_weights", (1, -1, 1), loss("class_weights"), "none negative"),
    Bad("cross_entropy", "class_weights", (1, NAN, 1), loss("class_weights"), "finite"),
    Bad("cross_entropy", "class_weights", (0, 0, 0), loss("class_weights"), "not all zero"),
    Bad("count", "num_classes", 0, counts("num_classes"), "positive whole number"),
    Bad("count", "dilation_ratio", NAN, counts("dilation_ratio"), "positive number"),
    Bad("count", "labels", jnp.zeros((1, 2, 2), jnp.int32), counts("labels"), "both be"),
    Bad("count", "predictions", jnp.zeros((1, 1, 2)), counts("predictions"), "whole numbers"),
    Bad("accumulate_gradients", "parts", 3, in_parts, "divide the batch of 4"),
    Bad("accumulate_gradients", "parts", 0, in_parts, "positive whole number"),
    Bad("resfu", "eps", -1, upsampler("resfu", "eps"), "positive number, got -1"),
    Bad("resfu", "eps", 0.0, upsampler("resfu", "eps"), "positive number"),
    Bad("resfu", "lr_mult", NAN, upsampler("resfu", "lr_mult"), "0 or more, got nan"),
    Bad("resfu", "embedding_dim", 0, upsampler("resfu", "embedding_dim"), "positive whole number"),
    Bad("resfu", "normx", "False", upsampler("resfu", "normx"), "True or False"),
    Bad("sapa", "norm", "batch", upsampler("sapa", "norm"), "one of"),
    Bad("carafe", "features", 32.0, upsampler("carafe", "features"), "positive whole number"),
    Bad("carafe", "implementation", "cuda", upsampler("carafe", "implementation"), "one of"),
    Bad("bilinear", "method", "lanczos", upsampler("bilinear", "method"), "one of"),
    Bad("bilinear", "scale", NAN, upsampler("bilinear", "scale"), "positive number"),
    Bad("lda_aqu", "range_factor", INF, upsampler("lda_aqu", "range_factor"), "0 or more"),
    Bad("fade", "guide_features", "32", upsampler("fade", "guide_features"), "whole number"),
    Bad("segformer", "dropout", NAN, built(create_head, "segformer", "dropout", **FOUR), "less"),
    Bad(
        "upernet", "pool_sizes", (2.5,), built(create_head, "upernet", "pool_sizes", **FOUR), "inte"
    ),
    Bad("mit", "drop_path", True, built(create_backbone, "mit", "drop_path"), "less than 1"),
    Bad("vit", "norm_epsilon", -1e-6, built(create_backbone, "vit", "norm_epsilon"), "positive"),
    Bad("vit", "patch_size", 0, built(create_backbone, "vit", "patch_size"), "positive whole"),
    Bad("vit", "depht", 12, built(create_backbone, "vit", "depht"), "did you mean 'depth'"),
    Bad("resnet", "strides", "1222", built(create_backbone, "resnet", "strides"), "four positive"),
]


# ------------------------------------------------------- checkpoints, workdirs, metrics, train.py
RUNS: list[Bad] = []


# -------------------------------------------------------------- Predictor, export, serving, server
PREDICTOR: list[Bad] = []


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
