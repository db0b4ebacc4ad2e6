"""Typed configuration of an experiment: what `configs/*.py` fill in and the command line overrides.

`train.py` reads a config file through `ml_collections.config_flags`; any field can be overridden
as `--config.optimizer.learning_rate=1e-4`, tuples as `--config.data.crop_size="(96, 96)"` and
dictionaries as literals, `--config.model.head.upsampler_options="{'lr_mult': 500.0}"`.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import json
import math
import os
import pathlib
import runpy
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags

from resfu_jax import data
from resfu_jax._checks import is_number
from resfu_jax._files import local_path, write_whole
from resfu_jax.backbones import backbone_strides, check_backbone_options
from resfu_jax.heads import check_head_options
from resfu_jax.inference import Inference
from resfu_jax.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from resfu_jax.upsamplers import upsampler_entry


@dataclasses.dataclass
class BackboneConfig:
    """Arguments of `resfu_jax.backbones.create_backbone`, its weights, and whether they learn."""

    name: str = "mit"
    """Architecture family: "mit", "resnet" or "vit"."""
    variant: str = "b0"
    """Published size: b0 .. b5; 18, 34, 50, 101; tiny, small, base, large."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further arguments of the family's class, for instance {"drop_path": 0.1}."""
    pretrained: str | None = None
    """Weights to start from: a file, its folder, or a Hugging Face repository."""
    pretrained_prefix: str | None = None
    """Where in that file they are ("teacher.backbone."), if it has them in several places."""
    frozen: bool = False
    """The backbone runs as in evaluation and does not learn."""
    cache_features: bool = False
    """Frozen backbones: keep the features of every image met in `data.dir`/features. It pays where
    the same pixels come again, that is without augmentation."""


@dataclasses.dataclass
class HeadConfig:
    """Arguments of `resfu_jax.heads.create_head`; None keeps the head's own value."""

    name: str = "segformer"
    """Architecture: "segformer", "upernet", "fpn", "linear" or "linear_probe"."""
    upsampler: str = "resfu"
    """Any of `resfu_jax.list_upsamplers()`."""
    upsampler_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of that upsampler, for instance {"lr_mult": 500.0}."""
    width: int | None = None
    """Channels of all maps in the head; linear: channels of the guide."""
    dropout: float | None = None
    """Dropout rate before the classifier."""
    wiring: str | None = None
    """segformer: "direct" (each map to the finest grid at once) or "stagewise" (x2 by x2)."""
    project: str | None = None
    """segformer: "conv_bn_relu" or "linear", what a map goes through first."""
    pool_sizes: tuple[int, ...] | None = None
    """upernet: sides of the grids of the pyramid pooling."""
    scale: int | None = None
    """linear: ratio of the upsampler, the backbone's stride over `guide_stride`."""
    guide_stride: int | None = None
    """linear: stride of the guide and of the logits: 1, 2, 4 or 8."""
    norm: bool | None = None
    """linear: normalise the features before the upsampler."""


@dataclasses.dataclass
class ModelConfig:
    """Backbone, head and numerics."""

    backbone: BackboneConfig = dataclasses.field(default_factory=BackboneConfig)
    head: HeadConfig = dataclasses.field(default_factory=HeadConfig)
    dtype: str = "float32"
    """Compute type, float32 or bfloat16. Parameters, norms and the loss stay float32."""
    remat: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean of the three colours in 0 .. 255, as the pretrained weights were trained with."""
    std: tuple[float, ...] = IMAGENET_STD
    """Their standard deviation."""


@dataclasses.dataclass
class DataConfig:
    """Dataset and input pipeline."""

    name: str = "shapes"
    """Dataset and, after a slash, its configuration: "camvid/clean"."""
    dir: str | None = None
    """Where prepared datasets are; None: `$RESFU_DATA_DIR`, else `~/.cache/resfu_jax`."""
    resize_scale: float = 1.0
    """Every image is resized by this factor before anything else, in training and evaluation."""
    resize_to: tuple[int, ...] | None = None
    """(short, long): before that, to `short` pixels of the shorter side, or fewer where the longer
    would exceed `long`. (512, 2048) is MMSegmentation's scale=(2048, 512) with keep_ratio. Labels
    are resized, too, and scores counted at that size; MMSegmentation brings the logits to the size
    of the original label map instead."""
    crop_size: tuple[int, ...] = (128, 128)
    """Height and width of training crops, in pixels."""
    scale_range: tuple[float, ...] = (0.5, 2.0)
    """Bounds of the random training scale."""
    max_class_share: float = 1.0
    """Training crops in which one class has this share of the labelled pixels are drawn anew, up
    to ten times; MMSegmentation's `cat_max_ratio`. 1 takes the first."""
    flip: bool = True
    """Mirror half of the training images."""
    photometric: bool = True
    """Jitter brightness, contrast, saturation and hue."""
    num_workers: int = 0
    """Processes that read and augment; 0 does it in threads of this process."""
    on_corrupt: str = "raise"
    """What an unreadable image does: "raise" (naming it) or "skip" (counting it)."""


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW or SGD with linear warm-up and polynomial decay."""

    name: str = "adamw"
    """"adamw", or "sgd": with Nesterov-free momentum `beta1`, and decay added to the gradient."""
    learning_rate: float = 6e-5
    """Peak rate of the backbone."""
    final_learning_rate: float = 0.0
    """Rate of the last step, number `steps` - 1 counted from 0, as MMEngine's `eta_min`."""
    layer_decay: float = 1.0
    """The rate of each block of the backbone is this many times that of the block after it; the
    last block's is this many times the full rate, which the final norm has, as in BEiT."""
    upsampler_learning_rate_multiple: float = 1.0
    """Rate of the head's upsamplers over that of the rest of the head."""
    head_learning_rate_multiple: float = 10.0
    """The head learns at this multiple of the backbone's rate."""
    weight_decay: float = 0.01
    """Decay of weights, decoupled in AdamW. Norms, biases and other vectors do not decay, nor do
    the positions, class token and registers of a ViT."""
    beta1: float = 0.9
    """Decay of the running mean of the gradient."""
    beta2: float = 0.999
    """Decay of the running mean of its square."""
    warmup_steps: int = 1500
    """Steps of linear growth from `warmup_start` times the peak rate; the step after them has the
    peak rate."""
    warmup_start: float = 1e-6
    """Rate of the first step of the warm-up over the peak rate."""
    power: float = 1.0
    """Exponent of the polynomial decay from the peak to `final_learning_rate`."""
    clip_norm: float | None = None
    """Largest global norm of the gradient; None does not clip."""
    accumulate: int = 1
    """A batch is processed in this many parts, with the gradient of the whole: less memory."""
    ema_decay: float | None = None
    """Decay per step of the averaged parameters; None keeps none. Evaluation uses them if kept."""


@dataclasses.dataclass
class LossConfig:
    """Cross-entropy."""

    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes, as in PyTorch."""
    class_weights: tuple[float, ...] | None = None
    """One weight per class; the mean is over the labels' weights, as in PyTorch."""
    class_balance: float = 0.0
    """Exponent of class weights (median frequency / frequency)^exponent, counted on the training
    labels: 0.5 weighs rare classes up, 1 to equal shares; 0 does not count. Times
    `class_weights`."""


@dataclasses.dataclass
class EvalConfig:
    """Evaluation on the whole validation split."""

    every: int = 1000
    """Steps between evaluations; there is always one after the last step."""
    batch_size: int = 8
    """Images evaluated at once, over all devices and hosts."""
    pad_to: tuple[int, ...] | None = None
    """Height and width that images are padded to; None: the largest, rounded up to what the
    backbone takes."""
    group_sizes: bool = False
    """Round up each image by itself instead, and evaluate together those of equal size: next to
    no padding, which a pass over the whole image would see, for a compilation per size."""
    mode: str = "whole"
    """An image in one pass, "whole", or in overlapping windows, "slide"; see `Inference`."""
    crop: tuple[int, ...] | None = None
    """Height and width of the windows of "slide"."""
    stride: tuple[int, ...] | None = None
    """Pixels between them, down and across; at most `crop`."""
    windows_per_step: int = 1
    """Windows of each image that pass through the model at once."""
    scales: tuple[float, ...] = (1.0,)
    """Sizes at which an image is seen, over its own; the probabilities are averaged."""
    flip: bool = False
    """See it mirrored, too, at every scale."""
    dilation_ratio: float = 0.02
    """Width of the boundary in boundary IoU, as a share of the image diagonal."""
    pictures: int = 4
    """Images drawn into predictions/ at every evaluation."""


@dataclasses.dataclass
class CheckpointConfig:
    """What is kept for resuming. Each evaluation saves too."""

    every: int = 500
    """Steps between checkpoints."""
    keep: int = 1
    """Newest checkpoints kept, beside the best by mIoU."""


@dataclasses.dataclass
class ParallelConfig:
    """How a run uses its devices; no result depends on it, up to rounding."""

    shard_parameters: bool = False
    """Each device keeps a part of parameters, averages and moments: less memory, more traffic."""
    shard_at_least: int = 2**16
    """Arrays with fewer values than this stay whole on every device."""
    peak_tflops: float | None = None
    """Peak of one device for `mfu` in the logs; None looks up the device, if it is a known one."""


@dataclasses.dataclass
class ProfileConfig:
    """A `jax.profiler` trace of some training steps, in `profile/` of the workdir."""

    start: int = 10
    """First step of the trace; the first steps of a run compile."""
    steps: int = 0
    """Number of steps traced; 0 traces none."""


@dataclasses.dataclass
class Config:
    """One experiment."""

    steps: int = 1000
    """Total number of optimizer steps."""
    batch_size: int = 16
    """Global batch, over all devices and hosts."""
    seed: int = 0
    """Seeds initialisation, dropout, shuffling and augmentation."""
    log_every: int = 20
    """Steps between lines in metrics.jsonl."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)


class ConfigError(ValueError):
    """A config that cannot be run. The message names every field that is wrong."""


_DICTIONARIES = ("model.head.upsampler_options", "model.backbone.options")


def define_config(
    flag_values: flags.FlagValues = flags.FLAGS, sys_argv: Sequence[str] | None = None
) -> flags.FlagHolder[Config]:
    """Defines `--config=FILE[:NAME]` and `--config.some.field=VALUE`; `parse_flags` parses them.

    Args:
      flag_values: where to.
      sys_argv: the command line, `sys.argv` by default.
    """
    for kind, parser in _PARSERS.items():
        config_flags.register_flag_parser_for_type(kind, parser)
    return config_flags.DEFINE_config_file(
        "config",
        help_string="A file in configs/.",
        flag_values=flag_values,
        sys_argv=sys_argv,
    )


class _LiteralParser(flags.ArgumentParser):
    """Lets `--config.a_tuple="(1, 2)"` and `--config.a_dict="{'key': 1}"` replace the value.

    The last one counts, as with all flags; config_flags' own parser appends tuples to each other.
    """

    def __init__(self, kind: type, example: str):
        self.kind, self.example = kind, example

    def parse(self, argument: Any) -> Any:
        if not isinstance(argument, str):
            return argument  # the config's own value
        try:
            value = ast.literal_eval(argument)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = argument
        if self.kind is tuple and isinstance(value, list):
            value = tuple(value)
        if self.kind is tuple and isinstance(value, int | float):
            value = (value,)
        if value is not None and not isinstance(value, self.kind):
            raise ValueError(f"it has to be {self.example}")
        return value


class _OrNoneParser(flags.ArgumentParser):
    """Lets `--config.a_field=None` unset a value; `validate` knows which fields may be."""

    def __init__(self, parser: flags.ArgumentParser):
        self.parser = parser

    def parse(self, argument: Any) -> Any:
        return None if argument == "None" else self.parser.parse(argument)


_PARSERS = {
    int: _OrNoneParser(flags.IntegerParser()),
    float: _OrNoneParser(flags.FloatParser()),
    str: _OrNoneParser(flags.ArgumentParser()),
    tuple: _LiteralParser(tuple, 'a tuple such as "(1, 2)"'),
    dict: _LiteralParser(dict, "a dictionary such as \"{'key': 1}\""),
}


def parse_flags(argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parses a command line, `argv[0]` being the program; returns what is no flag.

    Raises:
      ConfigError: an unknown flag or field, a value that cannot be read, or a config file that
        cannot be loaded.
    """
    argv = list(argv)
    check_overrides(argv[1:])
    names = [argument.partition("=")[0].lstrip("-").removeprefix("no") for argument in argv[1:]]
    if "config" not in names and any(name.startswith("config.") for name in names):
        raise ConfigError("--config is missing: name the file whose fields to override")
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if i > 0 and name in ("--config", "-config") and (equals or i + 1 < len(argv)):
            value = os.path.expanduser(value if equals else argv[i + 1])
            # config_flags loads it too, but then a mistake is a traceback.
            _check_items(load_config(value), argv[1:])
            argv[i if equals else i + 1] = f"--config={value}" if equals else value
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the load_module", DeprecationWarning)  # config_flags
            return flag_values(argv)
    except flags.Error as error:
        raise ConfigError(str(error)) from error


def _check_items(config: Config, arguments: Sequence[str]) -> None:
    """A `ConfigError` for `--config.a_dict.key=value` unless the file's dictionary has the key."""
    for argument in arguments:
        path = argument.split("=", 1)[0].lstrip("-")
        for field in _DICTIONARIES:
            if path.startswith(f"config.{field}."):
                value = functools.reduce(getattr, field.split("."), config)
                for key in path.removeprefix(f"config.{field}.").split("."):
                    if not isinstance(value, dict) or key not in value:
                        raise ConfigError(
                            f"{path}: the config file sets no {key!r} there; give the whole "
                            f"dictionary, --config.{field}=\"{{'{key}': ...}}\""
                        )
                    value = value[key]


def load_config(argument: str) -> Config:
    """What `get_config()` of a file returns.

    Args:
      argument: the file's path and, after a colon, what `get_config` is called with.

    Raises:
      ConfigError: there is no such file, or it does not run or has no `get_config`.
    """
    path, *name = argument.split(":", 1)
    file = pathlib.Path(path)
    try:
        if not file.is_file():
            folder = file if file.is_dir() else file.parent
            files = sorted(map(str, folder.glob("*.py")))[:30]
            raise ConfigError(
                f"--config={argument} {'is a folder' if file.is_dir() else 'does not exist'}"
                f"{'; ' + did_you_mean(path, files) if files else ''}"
            )
        get_config = runpy.run_path(path).get("get_config")
        if not callable(get_config):
            raise ConfigError(f"--config={argument}: the file has no function get_config()")
        try:
            inspect.signature(get_config).bind(*name)
        except TypeError as error:
            takes = "takes no name after a colon" if name else "needs a name after a colon"
            raise ConfigError(f"--config={argument}: its get_config() {takes}") from error
        config = get_config(*name)
    except ConfigError:
        raise
    except Exception as error:  # whatever the person's code raises
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        line = f" line {lines[-1]}:" if lines else ""
        raise ConfigError(
            f"--config={argument}:{line} {type(error).__name__}: {str(error)[:500]}"
        ) from error
    if not isinstance(config, Config):
        raise ConfigError(
            f"--config={argument}: get_config() has to return a resfu_jax.training.Config, "
            f"got {type(config).__name__}"
        )
    return config


def model_arguments(config: ModelConfig) -> dict[str, Any]:
    """Arguments of `resfu_jax.model.create_model`, all but the number of classes and `rngs`."""
    backbone = config.backbone
    return dict(
        backbone=dict(name=backbone.name, variant=backbone.variant, **backbone.options),
        head=_given(config.head),
        frozen=backbone.frozen,
        mean=config.mean,
        std=config.std,
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
    )


def _given(group: Any) -> dict[str, Any]:
    """Fields of a group that are not None, as keyword arguments."""
    return {
        field.name: value
        for field in dataclasses.fields(group)
        if (value := getattr(group, field.name)) is not None
    }


def create_inference(config: Config) -> Inference:
    """The test protocol of a config.

    Raises:
      ValueError: a field is out of range. The message starts with its name.
    """
    names = {field.name for field in dataclasses.fields(Inference)}
    return Inference(**{name: getattr(config.eval, name) for name in names})


def create_preprocess(config: Config) -> Preprocess:
    """How images are resized and padded, in training as wherever the model is used later.

    Raises:
      ValueError: a field is out of range. The message starts with its name.
    """
    return Preprocess(
        scale=config.data.resize_scale,
        resize_to=config.data.resize_to,
        mean=config.model.mean,
        std=config.model.std,
        multiple=size_multiple(config.model.backbone),
    )


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain nested values, equal to what its JSON text reads back as."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one dictionary with dotted keys; an empty one stays a value."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """A sentence with the near matches of `name`, or with all known names."""
    near = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"


def check_overrides(arguments: Sequence[str]) -> None:
    """Checks the names in `--config.x.y=...` arguments before config_flags sees them.

    Raises:
      ConfigError: naming every unknown field and its near matches.
    """
    known: list[str] = []
    groups: list[str] = []
    for path, value in _fields(Config()):
        (groups if dataclasses.is_dataclass(value) else known).append(path)
    wrong = []
    for argument in arguments:
        name = argument.lstrip("-").split("=", 1)[0]
        if argument.startswith("-") and name.removeprefix("no").startswith("config."):
            path = name.removeprefix("no").removeprefix("config.")
            inside_dict = path.startswith(tuple(f"{field}." for field in _DICTIONARIES))
            if path not in known and not inside_dict:
                reason = "is a group of fields" if path in groups else "does not exist"
                wrong.append(f"config.{path} {reason}; {did_you_mean(path, known)}")
    if wrong:
        raise ConfigError("\n".join(wrong))


def _fields(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """All (dotted path, value) pairs below a dataclass, groups included."""
    pairs = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        pairs.append((prefix + field.name, value))
        if dataclasses.is_dataclass(value):
            pairs += _fields(value, f"{prefix}{field.name}.")
    return pairs


def validate(config: Config, *, devices: int = 1, processes: int = 1) -> None:
    """Checks everything that can be known before data are read or a program is compiled.

    Args:
      config: the experiment.
      devices: number of devices that share a batch.
      processes: number of processes that share the devices.

    Raises:
      ConfigError: naming every field that is wrong, what it is and what it has to be.
    """
    check_types(config)
    wrong = []
    values = dict(_fields(config))
    positive, not_negative = lambda v: v > 0, lambda v: v >= 0

    def require(field: str, condition: Callable[[Any], bool], need: str) -> None:
        if not condition(values[field]):
            wrong.append(f"config.{field} is {values[field]!r}; it has to be {need}")

    for field in (
        "steps batch_size log_every optimizer.accumulate eval.every eval.batch_size "
        "checkpoint.every checkpoint.keep parallel.shard_at_least profile.start"
    ).split():
        require(field, lambda v: v >= 1, "at least 1")
    for field in (
        "data.num_workers eval.pictures optimizer.weight_decay optimizer.warmup_steps profile.steps"
    ).split():
        require(field, not_negative, "0 or more")
    for field in (
        "data.resize_scale optimizer.learning_rate optimizer.power "
        "optimizer.head_learning_rate_multiple optimizer.upsampler_learning_rate_multiple"
    ).split():
        require(field, positive, "positive")
    for field in "parallel.peak_tflops optimizer.clip_norm".split():
        require(field, lambda v: v is None or v > 0, "positive, or None")
    for field in "model.head.width model.head.scale".split():
        require(field, lambda v: v is None or v >= 1, "at least 1, or None")
    for field in "optimizer.beta1 optimizer.beta2 loss.label_smoothing".split():
        require(field, lambda v: 0 <= v < 1, "at least 0 and less than 1")
    require("seed", lambda v: 0 <= v < 2**32, "from 0 to 2**32 - 1")
    for field in "steps optimizer.warmup_steps".split():
        require(field, lambda v: v < 2**31, "at most 2**31 - 1")
    if devices % processes:
        wrong.append(
            f"{devices} devices are not {processes} equal parts: every process has to have as "
            "many devices as the others"
        )
    them = f"{devices} devices of {processes} processes" if processes > 1 else "devices"
    parts = max(config.optimizer.accumulate, 1) * devices
    require(
        "batch_size",
        lambda v: v % parts == 0,
        f"a multiple of {parts} ({them} x config.optimizer.accumulate)",
    )
    require("eval.batch_size", lambda v: v % devices == 0, f"a multiple of {devices} (the {them})")
    try:
        multiple = size_multiple(config.model.backbone)
        create_preprocess(config)
    except ValueError as error:  # the fields of `data` are told below
        multiple = 1
        if not str(error).startswith(("scale", "resize_to")):
            wrong.append(f"config.model: {error}")

    def is_size(v: tuple[int, ...]) -> bool:
        return len(v) == 2 and all(side >= multiple and side % multiple == 0 for side in v)

    size = f"(height, width), multiples of {multiple} (the backbone's largest stride)"
    require("data.crop_size", is_size, size)
    require("eval.pad_to", lambda v: v is None or is_size(v), size + ", or None")
    if config.model.backbone.name == "vit":  # the others round up
        require("eval.crop", lambda v: v is None or is_size(v), size + ", or None")
    require(
        "data.scale_range",
        lambda v: len(v) == 2 and 0 < v[0] <= v[1],
        "(smallest, largest), both positive",
    )
    require(
        "data.resize_to",
        lambda v: v is None or len(v) == 2 and 0 < v[0] <= v[1],
        "(short, long) with 0 < short <= long, or None",
    )
    require("data.max_class_share", lambda v: 0 < v <= 1, "above 0, at most 1")
    require(
        "eval.group_sizes",
        lambda v: not v or config.eval.pad_to is None,
        "False unless config.eval.pad_to is None",
    )
    require("data.on_corrupt", lambda v: v in ("raise", "skip"), "'raise' or 'skip'")
    require("model.dtype", lambda v: v in ("float32", "bfloat16"), "'float32' or 'bfloat16'")
    require("optimizer.name", lambda v: v in ("adamw", "sgd"), "'adamw' or 'sgd'")
    require("optimizer.layer_decay", lambda v: 0 < v <= 1, "above 0, at most 1")
    require(
        "optimizer.final_learning_rate",
        lambda v: 0 <= v <= config.optimizer.learning_rate,
        "from 0 to config.optimizer.learning_rate",
    )
    require("loss.class_balance", lambda v: 0 <= v <= 1, "between 0 and 1")
    require(
        "model.backbone.cache_features",
        lambda v: not v or config.model.backbone.frozen,
        "False unless config.model.backbone.frozen is True",
    )
    require(
        "model.head.dropout",
        lambda v: v is None or 0 <= v < 1,
        "at least 0 and less than 1, or None",
    )
    require(
        "model.head.guide_stride",
        lambda v: v is None or v in (1, 2, 4, 8),
        "1, 2, 4 or 8, or None",
    )
    require(
        "model.head.pool_sizes",
        lambda v: v is None or all(side >= 1 for side in v),
        "sides of at least 1, or None",
    )
    require("model.mean", lambda v: len(v) == 3, "three numbers, one per colour")
    require(
        "model.std",
        lambda v: len(v) == 3 and all(x > 0 for x in v),
        "three positive numbers, one per colour",
    )
    require("optimizer.warmup_start", lambda v: 0 <= v <= 1, "between 0 and 1")
    require("optimizer.ema_decay", lambda v: v is None or 0 < v < 1, "between 0 and 1, or None")
    require(
        "loss.class_weights",
        lambda v: v is None or all(w >= 0 for w in v) and any(v),
        "weights of 0 or more, not all 0, or None",
    )
    require("eval.dilation_ratio", lambda v: 0 < v < 1, "between 0 and 1")
    try:
        create_inference(config)
    except ValueError as error:
        wrong.append(f"config.eval.{error}")
    try:
        options = config.model.backbone.options
        if fixed := options.keys() & {"name", "variant", "dtype", "param_dtype", "remat", "rngs"}:
            raise ValueError(f"options cannot hold {', '.join(sorted(fixed))}: other fields set it")
        check_backbone_options(config.model.backbone.name, options)
        json.dumps(options)  # as `write_config` does
    except (ValueError, TypeError) as error:
        wrong.append(f"config.model.backbone: {error}")
    try:
        upsampler_entry(config.model.head.upsampler)
    except ValueError as error:
        wrong.append(f"config.model.head.upsampler: {error}")
    try:
        json.dumps(config.model.head.upsampler_options)
    except (ValueError, TypeError) as error:
        wrong.append(f"config.model.head.upsampler_options: {error}")
    try:
        check_head_options(config.model.head.name, _given(config.model.head).keys() - {"name"})
    except ValueError as error:
        wrong.append(f"config.model.head: {error}")
    try:
        classes = data.dataset_info(config.data.name, config.data.dir).num_classes
        require(
            "loss.class_weights",
            lambda v: v is None or len(v) == classes,
            f"one weight for each of the {classes} classes of {config.data.name!r}, or None",
        )
    except ValueError as error:
        wrong.append(f"config.data.name: {error}")
    if wrong:
        raise ConfigError("\n".join(wrong))


def check_types(config: Config) -> None:
    """Checks that every field has a value of its type, and that there are no others.

    Raises:
      ConfigError: naming every field that is wrong. Numbers have to be finite.
    """
    wrong = _mistyped(config) if isinstance(config, Config) else [f"it is no Config: {config!r}"]
    if wrong:
        raise ConfigError("\n".join(wrong))


def _mistyped(group: Any, prefix: str = "config.") -> list[str]:
    """What is said about the fields of a group that are not of their type, or no fields."""
    kinds = {field.name: field.type for field in dataclasses.fields(group)}
    wrong = [
        f"{prefix}{name} does not exist; {did_you_mean(name, list(kinds))}"
        for name in vars(group).keys() - kinds.keys()
    ]
    for name, kind in kinds.items():
        value = getattr(group, name)
        if not _is(value, kind):
            wrong.append(f"{prefix}{name} is {value!r}; it has to be {_in_words(kind)}")
        elif dataclasses.is_dataclass(kind):
            wrong += _mistyped(value, f"{prefix}{name}.")
    return wrong


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's type: no bool for a number, no NaN, nothing infinite."""
    if isinstance(kind, types.UnionType):
        return any(_is(value, part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return isinstance(value, tuple | list) and all(_is(v, item) for v in value)
    if typing.get_origin(kind) is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and is_number(value)
    return isinstance(value, kind)


def _in_words(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(map(_in_words, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return f"a tuple, each item {_in_words(typing.get_args(kind)[0])}"
    if typing.get_origin(kind) is dict:
        return "a dictionary"
    words = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a text"}
    return words.get(kind, "None" if kind is types.NoneType else f"a {kind.__name__}")


def size_multiple(config: BackboneConfig) -> int:
    """What the sides of images have to be multiples of: all strides of the backbone divide it.

    Raises:
      ValueError: options that no strides follow from.
    """
    options = {"variant": config.variant} | config.options
    return math.lcm(*backbone_strides(config.name, **options))


def find_workdir(path: str, *, new: bool) -> pathlib.Path:
    """The directory of a run, absolute, with `~` replaced by the home folder.

    Args:
      path: as a person typed it.
      new: whether it may not be there yet.

    Raises:
      ConfigError: it is not a folder of this machine, or not there.
    """
    try:
        workdir = local_path(path, "--workdir").resolve()
    except (ValueError, OSError, RuntimeError) as error:
        raise ConfigError(str(error)) from error
    if not new and not workdir.is_dir():
        raise ConfigError(f"--workdir={workdir} is not a folder: there is no run to evaluate")
    return workdir


# What may change between a run and its continuation: its length, and what no number depends on.
_FREE_TO_CHANGE = (
    *("steps", "log_every", "eval.", "checkpoint.", "data.dir"),
    *("parallel.", "profile."),
)

# What a config.json without the field was trained with, where that is not the field's default now.
# Whoever adds a field whose default changes what a run computes, or changes a default, adds a line.
_IN_EFFECT_BEFORE: dict[str, Any] = {}


def check_same_run(workdir: pathlib.Path, config: Config, *, only: str = "") -> None:
    """Checks a config against the one that the checkpoints of a workdir were made with.

    Args:
      workdir: directory of the run.
      config: the present config.
      only: compare fields whose dotted path starts with this.

    Raises:
      ConfigError: naming every field that differs, or a `config.json` that cannot be read. The
        number of steps may differ (the learning rate then follows the new schedule from here
        on), and how often things are logged, evaluated and saved, where the dataset lies, and
        how the devices are used. Fields that were added since count as `read_config` has them.
    """
    if not (workdir / "config.json").exists():
        return
    before = flatten(to_dict(read_config(workdir)))
    now = flatten(to_dict(config))
    lines = [
        f"  config.{field}: was {before.get(field)!r}, is {now.get(field)!r}"
        for field in sorted(before.keys() | now.keys())
        if field.startswith(only)
        and not field.startswith(_FREE_TO_CHANGE)
        and before.get(field) != now.get(field)
    ]
    if lines:
        raise ConfigError(
            f"the checkpoints in {workdir} are of another config:\n"
            + "\n".join(lines)
            + "\nuse that config, or another --workdir"
        )


def write_config(workdir: pathlib.Path, config: Config) -> None:
    """Writes `config.json`."""
    write_whole(workdir / "config.json", json.dumps(to_dict(config), indent=2) + "\n")


def read_config(workdir: pathlib.Path) -> Config:
    """The config that `write_config` wrote; fields that it does not have get their defaults.

    Raises:
      ConfigError: there is none, or it is not one, naming the file and what to do.
    """
    path = workdir / "config.json"
    advice = (
        "put back a copy of it; or, if you know the command that started the run, move it away and "
        "give that command again, which writes it anew"
    )
    try:
        content = path.read_bytes()
        tree = json.loads(content.decode())
    except FileNotFoundError:
        raise ConfigError(f"{workdir} is not the workdir of a run: no config.json in it") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        what = f"not JSON: {error}" if content.strip(b"\0 \r\n") else "it is empty"
        raise ConfigError(f"{path} cannot be read ({what}): {advice}") from error
    unknown: list[str] = []
    wrong: list[str] = []
    config = _filled(_config_of_before(), tree, "", unknown, wrong)
    if unknown:
        near = difflib.get_close_matches(unknown[0], dict(_fields(config)), n=1)
        hint = f"did you mean {near[0]}? Or " if near else ""
        raise ConfigError(
            f"{path} has fields that this version does not know: {', '.join(unknown[:20])}; {hint}"
            "another version of resfu_jax wrote it, a newer one perhaps: use that one"
        )
    if wrong:
        raise ConfigError(f"{path} cannot be read ({'; '.join(wrong[:20])}): {advice}")
    return config


def _config_of_before() -> Config:
    """What a `config.json` without any field says."""
    config = Config()
    for name, value in _IN_EFFECT_BEFORE.items():
        *groups, field = name.split(".")
        setattr(functools.reduce(getattr, groups, config), field, value)
    return config


def _filled(group: Any, tree: Any, prefix: str, unknown: list[str], wrong: list[str]) -> Any:
    """The group with the values of its JSON tree; paths that are no field, and wrong groups."""
    if not isinstance(tree, dict):
        wrong.append(f"{prefix.rstrip('.') or 'all of it'} is {str(tree)[:50]!r}, not a group")
        return group
    values = {}
    for name, value in tree.items():
        default = getattr(group, name, None)
        if name not in {field.name for field in dataclasses.fields(group)}:
            unknown.append(prefix + name)
        elif dataclasses.is_dataclass(default):
            values[name] = _filled(default, value, f"{prefix}{name}.", unknown, wrong)
        else:
            values[name] = _tuples(value)
    return dataclasses.replace(group, **values)


def _tuples(value: Any) -> Any:
    """JSON knows lists only, a config tuples."""
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value
