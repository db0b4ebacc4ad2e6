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
import warnings
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags

from resfu_jax.backbones import backbone_strides
from resfu_jax.inference import Inference
from resfu_jax.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess


@dataclasses.dataclass
class BackboneConfig:
    """Arguments of `resfu_jax.backbones.create_backbone`, its weights, and whether they learn."""

    name: str = "mit"
    """Architecture family: "mit", "resnet" or "vit"."""
    variant: str = "b0"
    """Published size: b0 .. b5; 18, 34, 50, 101; tiny, small, base, large, s54, b24, b48."""
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
    """Architecture: "segformer", "upernet", "fpn", "linear" or "linear_probe"; in the task "depth"
    "bins" or "depth_decoder". The task "features" has none: of this group it reads upsampler,
    upsampler_options, pretrained, scale and width; "matting" has its own, and reads upsampler,
    upsampler_options and dropout."""
    upsampler: str = "resfu"
    """Any of `resfu_jax.list_upsamplers()`."""
    upsampler_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of that upsampler, for instance {"lr_mult": 500.0}."""
    pretrained: str | None = None
    """linear, linear_probe, bins and the task "features": weights of that upsampler to start from.
    A file, a name of `resfu upsamplers --weights`, or "released" if there is one of that upsampler;
    see `resfu_jax.load_upsampler`."""
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
    bins: int | None = None
    """bins: number of bins."""
    class_token: bool | None = None
    """bins: the matrix sees the class token of a ViT, too."""


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
    orientation: bool = True
    """Turn images as their EXIF data say, and so as viewers show them. False: leave them as they
    are stored."""
    crop_size: tuple[int, ...] = (128, 128)
    """Height and width of training crops, in pixels."""
    scale_range: tuple[float, ...] = (0.5, 2.0)
    """Bounds of the random training scale."""
    area_range: tuple[float, ...] | None = None
    """Training crops cover this share of the image, drawn between these bounds, and are resized to
    `crop_size`: RandomResizedCrop. None: crops of the image at a random scale."""
    aspect_range: tuple[float, ...] = (0.75, 1.3333333333333333)
    """Bounds of the width over the height of such a crop, in the image."""
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
    """AdamW or SGD with linear warm-up and polynomial or cosine decay."""

    name: str = "adamw"
    """"adamw"; "nadam", the same with Nesterov's momentum; or "sgd": with Nesterov-free momentum
    `beta1`, and decay added to the gradient."""
    learning_rate: float = 6e-5
    """Peak rate of the backbone."""
    final_learning_rate: float = 0.0
    """Rate of the last step, number `steps` - 1 counted from 0, as MMEngine's `eta_min`."""
    layer_decay: float = 1.0
    """The rate of each block of the backbone is this many times that of the block after it; the
    last block's is this many times the full rate, which the final norm has, as in BEiT."""
    upsampler_learning_rate_multiple: float = 1.0
    """Rate of the head's upsamplers over that of the rest of the head; 0: they stay as they are."""
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
    decay: str = "polynomial"
    """How the rate falls from the peak to `final_learning_rate`: "polynomial", or "cosine", half a
    period of it."""
    power: float = 1.0
    """Exponent of the polynomial decay from the peak to `final_learning_rate`."""
    milestones: tuple[int, ...] = ()
    """Steps from which on the rate is a tenth of that before, instead of the polynomial decay."""
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
class ObjectiveConfig:
    """What teaches an upsampler without labels, in the task "features"."""

    name: str = "naf"
    """"naf", "jafar", "anyup", "featup", "loftup" or "stitch": `resfu_jax.tasks.objectives`."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Its options where they are not the published ones, for instance {"ratios": (0.25, 0.5)}."""


@dataclasses.dataclass
class MattingConfig:
    """Loss and trimaps of the task "matting"."""

    composition_weight: float = 0.5
    """Share of the composition loss; the alpha loss has the rest."""
    trimap_width: tuple[int, ...] = (1, 29)
    """Smallest and largest diameter, in pixels, by which the known regions are eroded where a
    trimap is drawn for training."""


@dataclasses.dataclass
class DepthConfig:
    """Range, losses and metrics of the task "depth"; depths are in the unit of the dataset."""

    min_depth: float = 1e-3
    """Smaller depths count neither in the losses nor in the metrics, nor are they predicted."""
    max_depth: float = 10.0
    """Likewise larger ones."""
    sig: float = 1.0
    """Weight of `resfu_jax.training.depth.sig_loss`."""
    silog: float = 0.0
    """Weight of `silog_loss`, that of BTS."""
    gradient: float = 0.5
    """Weight of `gradient_loss`."""
    warmup_steps: int = 100
    """Steps in which `sig_loss` leaves the variance out."""
    cap: float | None = None
    """Largest depth in the metrics, where it is not `max_depth`: 50 or 80 for KITTI."""
    crop: str = "none"
    """What of an image counts in the metrics: "none" (all of it), "eigen" (NYU) or "garg"."""
    align: str = "none"
    """"scale_shift" first fits the scale and shift of every prediction; "none" does not."""


@dataclasses.dataclass
class MIRLConfig:
    """Masks and decoders of the task "mirl"; see `resfu_jax.heads.mirl`."""

    segments: int = 6
    """Parts of equal length that the backbone's blocks fall into, each with a decoder: even; or 1,
    which is a masked autoencoder (MAE)."""
    mask_ratio: float = 0.75
    """Share of the patches that the encoder does not see."""
    decoder_width: int = 384
    """Channels of the decoders."""
    decoder_depth: int = 1
    """Blocks of every decoder."""
    decoder_heads: int = 12
    """Their attention heads."""


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
    """Newest checkpoints kept, beside the best: by mIoU, or the task's own metric."""


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

    task: str = "segmentation"
    """What is learned: "segmentation"; "depth"; "matting"; "features", an upsampler of a frozen
    backbone's features, without labels; or "mirl", a ViT from images alone."""
    steps: int = 1000
    """Total number of optimizer steps."""
    batch_size: int = 16
    """Global batch, over all devices and hosts."""
    seed: int = 0
    """Seeds initialisation, dropout, shuffling and augmentation."""
    log_every: int = 20
    """Steps between lines in metrics.jsonl."""
    init_from: str | None = None
    """Weights to start from, of backbone and head, instead of `model.backbone.pretrained`: a
    workdir (its best checkpoint), WORKDIR/checkpoints/STEP, a file of `resfu export`, or what
    `pretrained` takes."""
    init_skip: tuple[str, ...] = ()
    """Parts and parameters that are not taken from there but initialised: "head.classify",
    "head.upsample.*.kernel"."""
    wandb: str | None = None
    """Project of Weights & Biases that the metrics go to as well; needs the extra `[wandb]`."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    matting: MattingConfig = dataclasses.field(default_factory=MattingConfig)
    depth: DepthConfig = dataclasses.field(default_factory=DepthConfig)
    mirl: MIRLConfig = dataclasses.field(default_factory=MIRLConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)


class ConfigError(ValueError):
    """A config that cannot be run. The message names every field that is wrong."""


# A wheel has none.
_CONFIGS = "a clone has some in configs/; your own is a file whose get_config() returns a Config"
_DICTIONARIES = ("model.head.upsampler_options", "model.backbone.options", "objective.options")


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
            near = did_you_mean(path, files) if files else _CONFIGS
            raise ConfigError(
                f"--config={argument} {'is a folder' if file.is_dir() else 'does not exist'}"
                f"; {near}"
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
    backbone, head = config.backbone, given(config.head)
    head.pop("pretrained", None)
    return dict(
        backbone=dict(name=backbone.name, variant=backbone.variant, **backbone.options),
        head=head,
        frozen=backbone.frozen,
        mean=config.mean,
        std=config.std,
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
    )


def given(group: Any) -> dict[str, Any]:
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
    given = {name: value for name, value in vars(config.eval).items() if name in names}
    return Inference(**given)


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
        orientation=config.data.orientation,
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
    for path, value in all_fields(Config()):
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


def all_fields(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """All (dotted path, value) pairs below a dataclass, groups included."""
    pairs = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        pairs.append((prefix + field.name, value))
        if dataclasses.is_dataclass(value):
            pairs += all_fields(value, f"{prefix}{field.name}.")
    return pairs


# What a task is like, by its name: `tasks.register_task` adds to it.
TASK_KINDS = {name: name for name in ("segmentation", "depth", "features", "matting", "mirl")}


def task_kind(config: Config) -> str:
    """The task of this library that the config's is, or is derived from; else its own name."""
    return TASK_KINDS.get(config.task, config.task)


def size_multiple(config: BackboneConfig) -> int:
    """What the sides of images have to be multiples of: all strides of the backbone divide it.

    Raises:
      ValueError: options that no strides follow from.
    """
    options = {"variant": config.variant} | config.options
    return math.lcm(*backbone_strides(config.name, **options))


def masked_patches(config: Config) -> int:
    """How many patches of an image the task "mirl" masks: all but the whole part of the others.

    Raises:
      ValueError: options that no stride follows from.
    """
    height, width = config.data.crop_size
    patch = size_multiple(config.model.backbone)
    patches = (height // patch) * (width // patch)
    # 10 (1 - 0.9) is a little less than 1.
    return patches - int(patches * (1 - config.mirl.mask_ratio) + 1e-6)
