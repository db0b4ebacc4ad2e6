"""Bad input is answered in one message that names the argument, what it got and what it needs.

One row is one mistake: who makes it, the argument, the value, and what the message must say. A new
mistake is a new line. `call(value, tmp_path)` makes the mistake; what it raises must be one of the
errors that users are told to expect.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from flax import nnx

from resfu_jax import training
from resfu_jax.model import create_model


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
def workdir(value, tmp_path):
    """The workdir of a run, as train.py takes it."""
    training.find_workdir(value, new=True)


def workdir_of(kind):
    """A workdir where something else is, or that cannot be made."""

    def call(value, tmp_path):
        (tmp_path / "file").write_text("")
        training.check_together(tmp_path / value, training.Config())

    return call


def data_dir(value, tmp_path):
    config = training.Config()
    config.data.dir = value
    training.check_together(tmp_path / "run", config)


def config_json(use):
    """A `config.json` with this content, read by a function of a workdir."""

    def call(value, tmp_path):
        (tmp_path / "config.json").write_bytes(value)
        use(tmp_path)

    return call


def same_run(path):
    training.check_same_run(path, training.Config())


def checkpoint(value, tmp_path):
    """One that is not there."""
    checkpoints = training.Checkpoints(tmp_path)
    try:
        checkpoints.find(value)
    finally:
        checkpoints.close()


def feature_cache(value, tmp_path):
    head = dict(name="fpn", upsampler="bilinear", width=8)
    small = dict(widths=(8, 8, 16, 16), depths=(1, 1, 1, 1), heads=(1, 1, 2, 2))
    model = create_model(backbone=small, head=head, num_classes=3, frozen=True, rngs=nnx.Rngs(0))
    training.FeatureCache(value, model)


REMOTE = "has to be a folder or file of this machine"
DO = "put back a copy of it; or, .* move it away and give that command again"

RUNS: list[Bad] = [
    *(
        Bad("find_workdir", "--workdir", value, workdir, REMOTE, training.ConfigError)
        for value in ("gs://bucket/run", "s3://b/r", "gs:/bucket/run", "file:///tmp/run")
    ),
    Bad("find_workdir", "--workdir", "", workdir, "is not a path", training.ConfigError),
    Bad("find_workdir", "--workdir", "a\0b", workdir, "is not a path", training.ConfigError),
    Bad(
        *("check_together", "--workdir", "file", workdir_of("file")),
        *("cannot be used: File exists", training.ConfigError),
    ),
    Bad(
        *("check_together", "--workdir", "file/run", workdir_of("file")),
        *("cannot be used: Not a directory", training.ConfigError),
    ),
    Bad(
        *("check_together", "--workdir", "x" * 300, workdir_of("name")),
        *("cannot be used: File name too long", training.ConfigError),
    ),
    Bad("train", "config.data.dir", "gs://bucket", data_dir, REMOTE, training.ConfigError),
    Bad("FeatureCache", "directory", "gs://bucket", feature_cache, REMOTE),
    *(
        Bad(name, "config.json", value, config_json(use), message + DO, training.ConfigError)
        for name, use in (("read_config", training.read_config), ("check_same_run", same_run))
        for value, message in (
            (b"", "config.json cannot be read .it is empty.: "),
            (b"\0\0\0", "config.json cannot be read .it is empty.: "),
            (b'{"steps": 1, "mod', "config.json cannot be read .not JSON: .*: "),
            (b"\xff\xfe{}", "config.json cannot be read .not JSON: .*: "),
            (b"[" * 100_000, "config.json cannot be read .not JSON: .*: "),
            (b"[1, 2]", "config.json cannot be read .all of it is '.1, 2.', not a group.: "),
            (b'{"model": 3}', "config.json cannot be read .model is '3', not a group.: "),
            (b'{"model": {"head": null}}', "cannot be read .model.head is 'None', not a group.: "),
        )
    ),
    Bad(
        *("read_config", "config.json", b'{"new": 1, "model": {"x": 2}}'),
        config_json(training.read_config),
        *("does not know: new, model.x; another version", training.ConfigError),
    ),
    *(
        Bad(
            "find",
            "checkpoint",
            value,
            checkpoint,
            "there are: best, latest, .none yet",
            RuntimeError,
        )
        for value in ("7", "first", "-1", "1.0", "", "\u00b2", "[0-9]")
    ),
]


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
