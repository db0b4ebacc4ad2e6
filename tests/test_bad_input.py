"""Bad input is answered in one message that names the argument, what it got and what it needs.

One row is one mistake: who makes it, the argument, the value, and what the message must say. A new
mistake is a new line. `call(value, tmp_path)` makes the mistake; what it raises must be one of the
errors that users are told to expect.
"""

import functools
import io
import math
import os
import pathlib
import pickle
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from flax import nnx
from PIL import Image

import resfu_jax
from resfu_jax import data, ops, training
from resfu_jax.backbones import create_backbone
from resfu_jax.convert import load_pretrained
from resfu_jax.data import DatasetInfo, Source, train_batches
from resfu_jax.export import export_model
from resfu_jax.heads import create_head
from resfu_jax.images import ImageError, read_image
from resfu_jax.inference import Inference
from resfu_jax.model import create_model
from resfu_jax.predictor import Predictor
from resfu_jax.preprocess import Preprocess
from resfu_jax.serving import load_exported
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


def scaled(scale, tmp_path):
    return ops.resize(jnp.zeros((1, 2, 2, 1)), scale=scale)


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
    Bad("ops.resize", "size", (1, 2**29 + 1), resized, r"at most 2\*\*29.*536870913"),
    Bad("ops.resize", "scale", math.inf, scaled, "positive, finite and one number, got inf"),
    Bad("ops.resize", "scale", math.nan, scaled, "positive, finite and one number, got nan"),
    Bad("ops.resize", "scale", (2, 2), scaled, r"positive, finite and one number, got \(2, 2\)"),
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
    Bad("nearest", "scale", float("nan"), built("scale", "nearest"), "a positive number"),
    Bad("bilinear", "scale", float("inf"), built("scale", "bilinear"), "a positive number"),
    Bad("lda_aqu", "scale", float("inf"), built("scale", "lda_aqu"), "a positive number"),
]


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
    Bad("from_torch", "", "", from_torch(), "weights must be a path, a repository or .*, got ''"),
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
            ("http://a.org/b.pth", "by https only, got http://a.org/b.pth", ValueError),
            ("s3://a/b.pth", "by https only", ValueError),
        ]
    ),
    Bad(
        "load_pretrained", "None", None, pretrained, "a path, a repository or an address, got None"
    ),
    *(
        Bad("load_upsampler", name, name, lambda v, _: resfu_jax.load_upsampler(v), message)
        for name, message in [
            ("anyupp", "unknown released weights 'anyupp'; did you mean 'anyup'"),
            ("carafe", "unknown released weights 'carafe'"),
            ("featup", "'featup' has 11 released models, .*weights='path'. They are featup_dino16"),
        ]
    ),
    Bad(
        "load_pretrained",
        "Linear",
        "a.pth",
        lambda v, _: load_pretrained(v, nnx.Linear(1, 1, rngs=nnx.Rngs(0))),
        "model must be one of MiT, ResNet, ViT, SegmentationModel, got Linear",
    ),
]


# -------------------------------------------------------------------------------------------- data
def png(array, **options):
    """An encoded image."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(array)).save(buffer, "PNG", **options)
    return buffer.getvalue()


def batches(function, argument):
    """Makes batches of a source of one image, with the value for this argument."""

    def call(value, tmp_path):
        info = data.DatasetInfo("toy", ("a", "b"), ((0, 0, 0),) * 2)
        pictures = png(np.zeros((8, 8, 3), np.uint8)), png(np.zeros((8, 8), np.uint8))
        source = data.Source("toy", "train", [{"image": pictures[0], "label": pictures[1]}])
        options = {"batch_size": 1}
        options |= (
            dict(seed=0, crop_size=(8, 8)) if function is data.train_batches else {"pad_to": 8}
        )
        function(source, info, **options | {argument: value})

    return call


def prepare_own_images(folder, **files):
    """Prepares three images in the folder, with the content of files that replace others or add."""
    content = {"classes.txt": b"a\nb\n"}
    for k in range(3):
        content[f"images/{k}.png"] = png(np.zeros((6, 8, 3), np.uint8))
        content[f"labels/{k}.png"] = png(np.eye(6, 8, dtype=np.uint8))
    for name, new in (content | files).items():
        (folder / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "raw" / name).write_bytes(new)
    data.prepare("image_folder/mine", folder / "data", folder / "raw")


def own(file, value, message, error=data.DataError):
    """A mistake in one file of one's own images."""
    return Bad(
        *("prepare", file, value),
        *(lambda value, tmp_path: prepare_own_images(tmp_path, **{file: value}), message, error),
    )


def open_split(value, tmp_path):
    """Opens a split of a prepared dataset."""
    prepare_own_images(tmp_path)
    data.open_source("image_folder/mine", value, tmp_path / "data")


def to_data_dir(value, tmp_path):
    """Prepares into a place that cannot be."""
    data.prepare("shapes", value)


def from_manual_dir(value, tmp_path):
    """Prepares from a place that cannot be."""
    data.prepare("voc", tmp_path, value)


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return png(np.zeros((8, 6, 3), np.uint8), exif=exif)


NOISE = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
TRAIN, EVAL = data.train_batches, data.eval_batches
READ = lambda value, tmp_path: read_image(value)  # noqa: E731
DATA: list[Bad] = [
    # Arguments of the pipeline.
    Bad("train_batches", "batch_size", 0, batches(TRAIN, "batch_size"), "at least 1.*got 0"),
    Bad(
        "train_batches",
        "batch_size",
        2.5,
        batches(TRAIN, "batch_size"),
        "whole number, at least 1, got 2.5",
    ),
    Bad("train_batches", "batch_size", True, batches(TRAIN, "batch_size"), "got True"),
    Bad("train_batches", "batch_size", "2", batches(TRAIN, "batch_size"), "got 2"),
    Bad("train_batches", "crop_size", 8, batches(TRAIN, "crop_size"), r"\(height, width\), got 8"),
    Bad("train_batches", "crop_size", (8,), batches(TRAIN, "crop_size"), r"got \(8,\)"),
    Bad("train_batches", "crop_size", (8, 8, 3), batches(TRAIN, "crop_size"), r"got \(8, 8, 3\)"),
    Bad("train_batches", "crop_size", (8.5, 8), batches(TRAIN, "crop_size"), r"got \(8.5, 8\)"),
    Bad("train_batches", "crop_size", (0, 8), batches(TRAIN, "crop_size"), "must be positive"),
    Bad("train_batches", "scale_range", 1.0, batches(TRAIN, "scale_range"), "low <= high, got 1.0"),
    Bad("train_batches", "scale_range", (0.5,), batches(TRAIN, "scale_range"), "low <= high"),
    Bad("train_batches", "scale_range", (2, 1), batches(TRAIN, "scale_range"), "low <= high"),
    Bad("train_batches", "scale_range", (1, math.inf), batches(TRAIN, "scale_range"), "got .*inf"),
    Bad("train_batches", "scale_range", (math.nan, 1), batches(TRAIN, "scale_range"), "got .nan"),
    Bad("train_batches", "max_class_share", 0, batches(TRAIN, "max_class_share"), "above 0.*got 0"),
    Bad("train_batches", "max_class_share", math.nan, batches(TRAIN, "max_class_share"), "got nan"),
    Bad("train_batches", "num_workers", -1, batches(TRAIN, "num_workers"), "from 0, got -1"),
    Bad("train_batches", "num_workers", 1.5, batches(TRAIN, "num_workers"), "whole.*got 1.5"),
    Bad("train_batches", "seed", -1, batches(TRAIN, "seed"), "whole number from 0, got -1"),
    Bad("train_batches", "seed", 0.5, batches(TRAIN, "seed"), "whole number from 0, got 0.5"),
    Bad("train_batches", "seed", None, batches(TRAIN, "seed"), "whole number from 0, got None"),
    Bad("train_batches", "shard", (2, 2), batches(TRAIN, "shard"), "0 <= index < count"),
    Bad("train_batches", "shard", (0,), batches(TRAIN, "shard"), r"\(index, count\).*got \(0,\)"),
    Bad("train_batches", "shard", (0.0, 1), batches(TRAIN, "shard"), r"got \(0.0, 1\)"),
    Bad("train_batches", "on_corrupt", "no", batches(TRAIN, "on_corrupt"), "'raise' or 'skip'"),
    Bad("eval_batches", "pad_to", 0, batches(EVAL, "pad_to"), "must be positive.*got 0"),
    Bad("eval_batches", "pad_to", (8,), batches(EVAL, "pad_to"), r"\(height, width\).*got \(8,\)"),
    Bad("eval_batches", "pad_to", 8.5, batches(EVAL, "pad_to"), "got 8.5"),
    Bad("eval_batches", "pad_to", True, batches(EVAL, "pad_to"), "got True"),
    Bad("eval_batches", "batch_size", 0, batches(EVAL, "batch_size"), "at least 1"),
    Bad("eval_batches", "shard", (1, 1), batches(EVAL, "shard"), "0 <= index < count"),
    # Names and places.
    Bad("dataset_info", "name", None, lambda v, t: data.dataset_info(v, t), "got None"),
    Bad("dataset_info", "shape", "shape", lambda v, t: data.dataset_info(v, t), "mean 'shapes'"),
    Bad(
        *("dataset_info", "image_folder/my cats", "image_folder/my cats"),
        *(lambda v, t: data.dataset_info(v, t), "letters, digits, - and _"),
    ),
    Bad("open_source", "test", "test", open_split, "it has 'train'"),
    Bad("open_source", "split", "train[a:", open_split, "as a slice"),
    Bad("open_source", "split", "train[2:1]", open_split, "holds no"),
    Bad("prepare", "data_dir", "gs://bucket/x", to_data_dir, "of this machine"),
    Bad("prepare", "data_dir", "~nobody-here/x", to_data_dir, "home"),
    Bad("prepare", "data_dir", "a\0b", to_data_dir, "null character"),
    Bad("prepare", "data_dir", 3, to_data_dir, "must be a path, got 3"),
    Bad(
        "prepare",
        "--data-dir",
        "/dev/null",
        to_data_dir,
        "Cannot write to /dev/null/shapes",
        OSError,
    ),
    Bad("prepare", "manual_dir", "/no/such", from_manual_dir, "is not a folder", OSError),
    Bad("prepare", "manual_dir", "s3://b/x", from_manual_dir, "of this machine"),
    # One's own images.
    own("classes.txt", b"a\n", "1 class; it needs 2"),
    own("classes.txt", "Stra\xdfe\nb\n".encode("latin-1"), "line 1: this is not UTF-8"),
    own("classes.txt", "a\nb\n".encode("utf-16-be"), "null characters"),
    own("classes.txt", b"a\na\n", "line 2: the class 'a' is there twice"),
    own("classes.txt", b"a\nb, 1, 2\n", "line 2: .* is neither"),
    own("labels.txt", b"0 = a\n255 = car\n", "line 2: '255 = car' is not"),
    own("labels.txt", b"", "is empty"),
    own("images/1.png", b"", "the file is empty"),
    own("images/1.png", b"<html>404</html>", "it is none of BMP"),
    own(
        "images/1.png",
        png(NOISE)[:100],
        "cannot be read as an image",
    ),
    own("images/1.png", png(np.zeros((6, 9, 3), np.uint8)), "differ in size: 9x6 against 8x6"),
    own("labels/1.png", png(np.full((6, 8), 2, np.uint8)), "holds the label 2; .* 0 to 1 and 255"),
    own(
        "labels/1.png", png(np.full((6, 8, 3), (9, 0, 0), np.uint8)), "colours that are of no class"
    ),
    own("labels/1.png", png(np.full((6, 8), 300, np.uint16)), "16-bit file .* up to 300"),
    own("labels/1.png", b"GIF89a", "cannot be read as an image"),
    Bad(
        *("prepare", "images/1.png", turned()),
        lambda value, tmp_path: prepare_own_images(
            tmp_path,
            **{"images/1.png": value, "labels/1.png": png(np.zeros((8, 6), np.uint8))},
        ),
        "differ in size: 8x6 against 6x8.*EXIF orientation.*Turn the label map",
    ),
    own("images/1.jpg", turned(), "1.jpg and .*1.png share the label map"),
    Bad(
        *("prepare", "labels", turned()),
        lambda value, tmp_path: prepare_own_images(tmp_path, **{"images/4.png": value}),
        *("lacks 1 label map of images.*4.png", FileNotFoundError),
    ),
    # Single images.
    Bad("read_image", "source", None, READ, "path or the bytes of a file, got NoneType"),
    Bad("read_image", "source", np.zeros((2, 2)), READ, "got ndarray"),
    Bad("read_image", "/no/such.png", "/no/such.png", READ, "no such file", ImageError),
    Bad("read_image", "image", b"", READ, "the file is empty", ImageError),
    Bad("read_image", "max_pixels", "many", lambda v, t: read_image(b"x", max_pixels=v), "'many'"),
    Bad("read_image", "formats", ("EPS",), lambda v, t: read_image(b"x", formats=v), "some of"),
    Bad(
        "balanced_weights",
        "exponent",
        math.nan,
        lambda v, t: data.balanced_weights(np.arange(3), v),
        "got nan",
    ),
    Bad(
        "balanced_weights",
        "counts",
        [-1, 2],
        lambda v, t: data.balanced_weights(np.array(v), 1.0),
        "negative",
    ),
]


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
    ("optimizer.name", "adam", "'adamw', 'nadam' or 'sgd'"),
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
    ("init_from", "", "a path or a repository, or None"),
    ("init_skip", ("head.classify",), "empty unless config.init_from is given"),
    ("init_skip", "head.classify", "a tuple, each item a text"),
    ("wandb", "", "the name of a project, or None"),
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
    *rows("Inference", inference, "whole_up_to", "at least 0", -1, 1.5, True, "2"),
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
    *rows(
        "export_model",
        export,
        "inference",
        "inference",
        "slide",
        Inference(flip=True),
        Inference(scales=(0.5, 1)),
    ),
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
    *rows("train_batches", batches, "num_workers", "whole number from 0", -1, 0.5, True),
    *rows("train_batches", batches, "preprocess", "a Preprocess", None, 0.5),
]


ROWS = [*OPS, *CONVERT, *DATA, *CONFIG, *RUNS, *PREDICTOR]


def name_of(row):
    """The same in every process: without addresses in memory."""
    return f"{row.who}-{row.argument}-{re.sub(' at 0x[0-9a-f]+', '', str(row.value))[:40]}"


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_bad_input(row, tmp_path, as_users_call):
    with pytest.raises(row.error) as raised:
        row.call(row.value, tmp_path)
    text = str(raised.value)
    assert re.search(row.message, text), text
    assert row.argument in text
    assert len(text) < 2000  # at most a screen
