"""Bad input is answered in one message that names the argument, what it got and what it needs.

One row is one mistake: who makes it, the argument, the value, and what the message must say. A new
mistake is a new line. `call(value, tmp_path)` makes the mistake; what it raises must be one of the
errors that users are told to expect.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import pytest

from resfu_jax import create_upsampler, ops, training


class Bad(NamedTuple):
    """A mistake, and what has to be said about it."""

    who: str  # the public function or class
    argument: str
    value: Any
    call: Callable[[Any, Any], Any]
    message: str  # a regular expression
    error: type[Exception] = ValueError


# ------------------------------------------------------------------------------- ops and upsamplers
def op(name, argument, *arrays, **keywords):
    """Calls the op with ones of these shapes, and the value as one more argument."""

    def call(value, tmp_path):
        given = [jnp.ones(shape) for shape in arrays]
        return getattr(ops, name)(*given, **keywords | {argument: value})

    return call


def upsampler(argument, name="carafe", **options):
    """Calls an upsampler of 8 channels, with the value as this argument."""

    def call(value, tmp_path):
        up = create_upsampler(name, features=8, guide_features=8, scale=2, **options)
        return up(**{"features": jnp.ones((1, 4, 4, 8)), argument: value})

    return call


def built(argument, name="carafe"):
    """Builds an upsampler with the value as this argument."""
    return lambda value, tmp_path: create_upsampler(
        name, **dict(features=8, guide_features=8, scale=2) | {argument: value}
    )


X, NORM = (1, 4, 4, 8), dict(bias=jnp.ones(8), groups=2)
GRID = jnp.zeros((1, 2, 2, 2))
POINT_SHAPES = [(1, 4, 4, 16), (1, 2, 2, 16), (1, 2, 2, 16), (1, 4, 4, 1, 9, 2)]
PHASES = jnp.ones((1, 4, 4, 8), jnp.complex64)
LABELS, NO_ROWS = jnp.ones((1, 4, 4, 8), jnp.int32), jnp.ones((1, 0, 4, 8))
REAL, EMPTY = "must be floating point, got .*; cast it", "must have no axis of length 0"

OPS: list[Bad] = [
    Bad("conv", "x", LABELS, op("conv", "x", kernel=jnp.ones((1, 1, 8, 8))), REAL),
    Bad("conv", "kernel", jnp.ones((1, 1, 8, 8), bool), op("conv", "kernel", X), REAL),
    Bad("group_norm", "scale", jnp.ones(1), op("group_norm", "scale", X, **NORM), r"\(channels,\)"),
    Bad("box_filter", "x", NO_ROWS, op("box_filter", "x", radius=1), EMPTY),
    Bad("box_filter", "x", 1.5, op("box_filter", "x", radius=1), "must be an array, got float"),
    Bad(
        "grid_sample",
        "x",
        PHASES,
        op("grid_sample", "x", grid=GRID),
        r"jnp.abs\(x\)",
    ),
    Bad(
        "deformable_attention",
        "bias",
        jnp.ones((2, 9, 8)),  # as many values, for two heads
        op("deformable_attention", "bias", *POINT_SHAPES, heads=1),
        r"= \(1, 9, 16\) .*float32, got \(2, 9, 8\)",
    ),
    Bad(
        "deformable_attention",
        "bias",
        jnp.ones((1, 9, 16), jnp.bfloat16),
        op("deformable_attention", "bias", *POINT_SHAPES, heads=1),
        "have q's dtype float32, got .* bfloat16",
    ),
    Bad(
        "deformable_attention",
        "points",
        jnp.ones((1, 4, 4, 9, 2)),
        op("deformable_attention", "points", *POINT_SHAPES[:3]),
        "points must be",
    ),
    Bad(
        "grouped_linear",
        "kernel",
        jnp.ones((8, 6)),
        op("grouped_linear", "kernel", X, groups=2),
        "must be .8/groups, 6.",
    ),
    Bad("carafe", "features", LABELS, upsampler("features"), REAL),
    Bad("carafe", "features", NO_ROWS, upsampler("features"), EMPTY),
    Bad("carafe", "values", LABELS, upsampler("values"), REAL),
    Bad("sapa", "guide", LABELS, upsampler("guide", "sapa"), REAL),
    Bad("sapa", "guide", jnp.ones((1, 8, 0, 8)), upsampler("guide", "sapa"), EMPTY),
    Bad("carafe", "dtype", jnp.int32, built("dtype"), "a floating-point dtype.*got int32"),
    Bad("carafe", "dtype", "half-ish", built("dtype"), "a floating-point dtype.*got 'half-ish'"),
    Bad("carafe", "param_dtype", complex, built("param_dtype"), "a floating-point dtype.*complex"),
    Bad("carafe", "features", 0, built("features"), "positive whole number"),
    Bad("nearest", "features", -1, built("features", "nearest"), "positive whole number"),
    Bad("sapa", "guide_features", 2.5, built("guide_features", "sapa"), "positive whole number"),
    Bad("nearest", "scale", float("nan"), built("scale", "nearest"), "scale must be positive"),
    Bad("bilinear", "scale", float("inf"), built("scale", "bilinear"), "scale must be positive"),
    Bad("lda_aqu", "scale", float("inf"), built("scale", "lda_aqu"), "scale must be positive"),
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


CONFIG: list[Bad] = []


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
