"""Bad input is answered in one message that names the argument, what it got and what it needs.

One row is one mistake: who makes it, the argument, the value, and what the message must say. A new
mistake is a new line. `call(value, tmp_path)` makes the mistake; what it raises must be one of the
errors that users are told to expect.
"""

import functools
import os
import pickle
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from flax import nnx

import resfu_jax
from resfu_jax import training
from resfu_jax.backbones import create_backbone
from resfu_jax.convert import load_pretrained


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
def from_torch(state_dict=None, official_class="CARAFEPack", **arguments):
    """Reads this state_dict, or the row's value."""

    def call(value, tmp_path):
        state = value if state_dict is None else state_dict
        options = dict(channels=8, scale_factor=2) | arguments
        resfu_jax.from_torch(official_class, state, **options)

    return call


def from_torch_file(content, name="a.pth"):
    """Reads a file of this content."""

    def call(value, tmp_path):
        (tmp_path / name).write_bytes(content)
        resfu_jax.from_torch("CARAFEPack", tmp_path / name, channels=8, scale_factor=2)

    return call


def argument(official_class, **arguments):
    """Gives the row's value as the last of these arguments, by name."""
    *given, last = arguments

    def call(value, tmp_path):
        options = {name: arguments[name] for name in given} | {last: value}
        resfu_jax.from_torch(official_class, {}, **options)

    return call


def pretrained(value, tmp_path):
    """Weights of this path into a small backbone."""
    load_pretrained(value, create_backbone("resnet", **_RESNET, rngs=nnx.Rngs(0)))


_RESNET = dict(variant="18", widths=(2, 2, 2, 2), depths=(1, 1, 1, 1), stem_width=2)
_NOT_A_STATE = r"state_dict must be a mapping of names to arrays .*or the path of a file .*got "
_GONE = FileNotFoundError
_CARAFE = [
    ("channel_compressor", "weight", (64, 8, 1, 1)),
    ("channel_compressor", "bias", (64,)),
    ("content_encoder", "weight", (100, 64, 3, 3)),
    ("content_encoder", "bias", (100,)),
]

CONVERT: list[Bad] = [
    *(
        Bad("from_torch", "state_dict", value, from_torch(), _NOT_A_STATE + got)
        for value, got in [
            (None, "NoneType"),
            (3, "int"),
            (b"a.pth", "bytes"),
            ([], "list"),
            ([("weight", np.ones(3))], "list"),
            (np.ones(3), "ndarray"),
            (iter({}.items()), "dict_itemiterator"),
            (len, "builtin_function_or_method"),
        ]
    ),
    Bad("from_torch", "channel_compressor.weight", {}, from_torch(), "it has no entries"),
    Bad(
        "from_torch", "b.c.weight", {"b.c.weight": 1}, from_torch(), "all its names begin with 'b.'"
    ),
    Bad(
        "from_torch",
        "state_dict",
        {"a": {"b": {"c": {"d": {"e": {"f": {"g": {"h": {}}}}}}}}},
        from_torch(),
        "state_dict is nested too deeply",
    ),
    Bad("from_torch", "xxx", "x" * 3000, from_torch(), "xxx does not exist", _GONE),
    Bad("from_torch", "a", "a\0b", from_torch(), "does not exist", _GONE),
    Bad(
        "from_torch",
        "content_encoder.bias",
        {f"{m}.{p}": np.ones(s, np.int8) for m, p, s in _CARAFE},
        from_torch(),
        "'content_encoder.bias' holds int8, not floating-point",
    ),
    Bad("from_torch", "", "", from_torch(), "weights must be a path or a repository, got ''"),
    Bad("from_torch", "no.pth", "no.pth", from_torch(), "no.pth does not exist", _GONE),
    Bad("from_torch", "no.pt", "~/no.pt", from_torch(), "/no.pt does not exist", _GONE),
    Bad("from_torch", "CARAFE", "CARAFE", from_torch({}, "CARAFE"), "did you mean 'CARAFEPack'"),
    Bad("from_torch", "SAPA", "SAPA", from_torch({}, "SAPA"), "'SAPA' is in several repositories"),
    Bad("from_torch", "prefix", {"a.b": 1}, from_torch(prefix="c"), "begins with prefix 'c.'"),
    Bad(
        "from_torch",
        "scale",
        "scale",
        from_torch({}, scale=2),
        "unknown argument of open-mmlab/mmcv:CARAFEPack 'scale'; did you mean 'scale_factor'",
    ),
    *(
        Bad("from_torch", "a.pth", content[:20], from_torch_file(content), message)
        for content, message in [
            (b"", "is empty"),
            (b"weights", "neither a safetensors file nor one of torch.save"),
            (b"<html></html>", "is a web page"),
            (b"PK\x03\x04", "damaged or cut short"),
            (b"PK\x05\x06" + bytes(18), r"without a checkpoint of PyTorch"),
            (b"\x80\x04.", "damaged or cut short"),
            (
                pickle.dumps(os.system),
                "names '(posix|nt).system', which would be run by torch.load",
            ),
            (pickle.dumps({"weight": 1}), "none that torch.save writes"),
        ]
    ),
    Bad(
        "from_torch",
        "a.safetensors.index.json",
        "{}",
        from_torch_file(b"{}", "a.safetensors.index.json"),
        "is no index of shards",
    ),
    *(
        Bad("from_torch", name, value, call, message)
        for name, value, call, message in [
            ("dim_y", None, lambda *_: resfu_jax.from_torch("ReSFU", {}), "needs dim_y, as its"),
            ("norm", "BatchNorm", argument("SAPAExp", dim_y=8, norm=0), "norm must be .*LayerNorm"),
            (
                "groups",
                2,
                argument("ConvTranspose2d", in_channels=8, out_channels=8, kernel_size=1, groups=0),
                "ConvTranspose2d is read with groups=1 only, got 2",
            ),
            (
                "padding",
                0,
                argument(
                    "Sequential(Conv2d, PixelShuffle)",
                    in_channels=8,
                    out_channels_conv=32,
                    upscale_factor=2,
                    kernel_size=3,
                    padding=0,
                ),
                r"padding must be kernel_size // 2 = 1, got 0 \(the default is 0\)",
            ),
        ]
    ),
    *(
        Bad("load_pretrained", name, name, pretrained, message, error)
        for name, message, error in [
            ("no/such/folder", "no/such/folder does not exist", _GONE),
            ("/no/file.safetensors", "/no/file.safetensors does not exist", _GONE),
            ("no.bin", "no.bin does not exist", _GONE),
            ("~nobody-here/a.pth", "~nobody-here/a.pth: ", _GONE),
            ("https://a.org/b.pth", "is a URL.*download the file", ValueError),
            ("http://a.org/b.pth", "is a URL.*download the file", ValueError),
            ("s3://a/b.pth", "is a URL", ValueError),
        ]
    ),
    Bad("load_pretrained", "None", None, pretrained, "a path or a repository, got None"),
    Bad(
        "load_pretrained",
        "Linear",
        "a.pth",
        lambda v, _: load_pretrained(v, nnx.Linear(1, 1, rngs=nnx.Rngs(0))),
        "model must be one of MiT, ResNet, ViT, SegmentationModel, got Linear",
    ),
]


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
