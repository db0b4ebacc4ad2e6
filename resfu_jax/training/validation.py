"""What is wrong with a config, before data are read or a program is compiled."""

import dataclasses
import functools
import importlib
import json
import types
import typing
from collections.abc import Callable
from typing import Any, get_args

from resfu_jax import data
from resfu_jax._checks import is_number
from resfu_jax._output import counted
from resfu_jax.backbones import check_backbone_options
from resfu_jax.backbones.matting import DEPTHS
from resfu_jax.heads import DEPTH_HEADS, check_head_options
from resfu_jax.training.config import (
    TASK_KINDS,
    Config,
    ConfigError,
    DepthConfig,
    HeadConfig,
    LossConfig,
    MattingConfig,
    MIRLConfig,
    ObjectiveConfig,
    all_fields,
    create_inference,
    create_preprocess,
    did_you_mean,
    given,
    masked_patches,
    size_multiple,
    task_kind,
)
from resfu_jax.training.depth import Align, Crop
from resfu_jax.upsamplers import upsampler_entry


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
    values = dict(all_fields(config))
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
        "data.num_workers eval.pictures optimizer.weight_decay optimizer.warmup_steps "
        "optimizer.upsampler_learning_rate_multiple profile.steps"
    ).split():
        require(field, not_negative, "0 or more")
    for field in (
        "data.resize_scale optimizer.learning_rate optimizer.power "
        "optimizer.head_learning_rate_multiple"
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
            f"{processes} processes have {counted(devices, 'device')}: each has to have as "
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
        "data.area_range",
        lambda v: v is None or len(v) == 2 and 0 < v[0] <= v[1] <= 1,
        "(smallest, largest) share of an image, above 0 and at most 1, or None",
    )
    require(
        "data.aspect_range",
        lambda v: len(v) == 2 and 0 < v[0] <= v[1],
        "(smallest, largest) width over height, both positive",
    )
    if config.data.area_range is not None:
        # They would have no effect.
        need = "where config.data.area_range is given"
        require("data.scale_range", lambda v: tuple(v) == (1.0, 1.0), f"(1.0, 1.0) {need}")
        require("data.max_class_share", lambda v: v == 1, f"1 {need}")
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
    names = ("adamw", "nadam", "sgd")
    require("optimizer.name", lambda v: v in names, "'adamw', 'nadam' or 'sgd'")
    require("task", lambda v: v in TASK_KINDS, " or ".join(map(repr, TASK_KINDS)))
    decays = ("polynomial", "cosine")
    require("optimizer.decay", lambda v: v in decays, "'polynomial' or 'cosine'")
    require("optimizer.layer_decay", lambda v: 0 < v <= 1, "above 0, at most 1")
    require(
        "optimizer.final_learning_rate",
        lambda v: 0 <= v <= config.optimizer.learning_rate,
        "from 0 to config.optimizer.learning_rate",
    )
    require(
        "optimizer.milestones",
        lambda v: list(v) == sorted(set(v)) and all(m > config.optimizer.warmup_steps for m in v),
        "increasing steps after config.optimizer.warmup_steps",
    )
    low = config.depth.min_depth
    require("depth.min_depth", lambda v: v > 0, "positive")
    require("depth.max_depth", lambda v: v > low, "above config.depth.min_depth")
    require("depth.cap", lambda v: v is None or v > low, "above config.depth.min_depth, or None")
    for field in ("sig", "silog", "gradient", "warmup_steps"):
        require(f"depth.{field}", lambda v: v >= 0, "0 or more")
    require("depth.crop", lambda v: v in get_args(Crop), "'none', 'eigen' or 'garg'")
    require("depth.align", lambda v: v in get_args(Align), "'none' or 'scale_shift'")
    require(
        "mirl.segments",
        lambda v: v == 1 or v >= 2 and v % 2 == 0,
        "even, or 1 (a masked autoencoder)",
    )
    require("mirl.mask_ratio", lambda v: 0 < v < 1, "between 0 and 1")
    for field in ("mirl.decoder_depth", "mirl.decoder_heads"):
        require(field, lambda v: v >= 1, "at least 1")
    heads = max(config.mirl.decoder_heads, 1)
    require(
        "mirl.decoder_width",
        lambda v: v >= 4 and v % 4 == 0 and v % heads == 0,
        "a multiple of 4 and of config.mirl.decoder_heads",
    )
    require("model.head.bins", lambda v: v is None or v >= 2, "2 or more, or None")
    require("matting.composition_weight", lambda v: 0 <= v <= 1, "between 0 and 1")
    require(
        "matting.trimap_width",
        lambda v: len(v) == 2 and 1 <= v[0] <= v[1],
        "(smallest, largest), both at least 1",
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
    require("init_from", lambda v: v != "", "a path or a repository, or None")
    require(
        "init_skip",
        lambda v: not v or bool(config.init_from),
        "empty unless config.init_from is given",
    )
    require("wandb", lambda v: v != "", "the name of a project, or None")
    if config.wandb:
        try:
            importlib.import_module("wandb")
        except ImportError:
            need = "None unless Weights & Biases is installed: pip install 'resfu_jax[wandb]'"
            require("wandb", lambda _: False, need)
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
    kind = task_kind(config)
    wrong += _BY_KIND[kind](config) if kind in _BY_KIND else []
    groups = dict(depth=DepthConfig(), matting=MattingConfig(), mirl=MIRLConfig())
    for task, default in groups.items():
        if kind != task and getattr(config, task) != default:
            wrong.append(
                f"config.{task} is {getattr(config, task)!r}; it has to be {default!r} unless "
                f"config.task is {task!r}"
            )
    try:
        info = data.dataset_info(config.data.name, config.data.dir)
        classes = info.num_classes
        if info.mattes != (kind == "matting"):
            has = "has alpha mattes" if info.mattes else "has none"
            wrong.append(
                f"config.data.name is {config.data.name!r}, which {has}; config.task 'matting' "
                "needs a dataset of alpha mattes, and no other task takes one"
            )
        require(
            "loss.class_weights",
            lambda v: v is None or len(v) == classes,
            f"one weight for each of the {classes} classes of {config.data.name!r}, or None",
        )
        if not (classes or info.mattes) and kind == "segmentation":
            wrong.append(
                f"config.data.name is {config.data.name!r}, images without label maps; it has to "
                "be a dataset with classes, or config.task 'features' or 'mirl'"
            )
        if not classes and kind == "features" and config.objective.name == "loftup":
            holds = "depths" if info.depth else "none"
            wrong.append(
                f"config.data.name is {config.data.name!r}, whose label maps hold {holds}; "
                "config.objective.name 'loftup' averages over masks: it needs a dataset with "
                "classes, or label maps whose numbers are masks"
            )
        if not info.depth and kind == "depth":
            wrong.append(
                f"config.data.name is {config.data.name!r}, which has no depth maps; those of "
                "'shapes/depth', 'nyu_depth_v2' and depth_folder/NAME have"
            )
    except ValueError as error:
        wrong.append(f"config.data.name: {error}")
    if wrong:
        raise ConfigError("\n".join(wrong))


def _segmentation(config: Config) -> list[str]:
    """What is wrong for this task alone."""
    wrong = _objective_and_upsampler(config)
    if config.model.head.name in DEPTH_HEADS:
        wrong.append(f"config.model.head.name is {config.model.head.name!r}, a head of depth")
    return wrong + _head(config)


def _depth(config: Config) -> list[str]:
    """Likewise."""
    wrong, depth = _objective_and_upsampler(config), config.depth
    for field, holds, need in (
        ("model.head.name", config.model.head.name in DEPTH_HEADS, f"one of {DEPTH_HEADS}"),
        (
            "optimizer.accumulate",
            config.optimizer.accumulate == 1,
            "1: losses are of whole batches",
        ),
        ("data.max_class_share", config.data.max_class_share == 1, "1: there are no classes"),
        ("loss", config.loss == LossConfig(), "as it is by default: config.depth has the losses"),
        ("eval.mode", config.eval.mode == "whole", "'whole'"),
        ("eval.scales", tuple(config.eval.scales) == (1.0,), "(1.0,)"),
        ("eval.flip", not config.eval.flip, "False"),
    ):
        if not holds:
            value = functools.reduce(getattr, field.split("."), config)
            wrong.append(
                f"config.{field} is {value!r}; it has to be {need}, where config.task is 'depth'"
            )
    if not depth.sig + depth.silog + depth.gradient > 0:
        wrong.append("config.depth: one of the weights sig, silog and gradient has to be positive")
    return wrong + _head(config)


_OF_ONE_UPSAMPLER = ("linear", "linear_probe", "bins")


def _objective_and_upsampler(config: Config) -> list[str]:
    """What only the task "features" reads, and what it and some heads do."""
    wrong = []
    default = ObjectiveConfig()
    if config.objective != default:
        wrong.append(
            f"config.objective is {config.objective!r}; it has to be {default!r} unless "
            "config.task is 'features'"
        )
    head = config.model.head
    if head.pretrained is not None and head.name not in _OF_ONE_UPSAMPLER:
        wrong.append(
            f"config.model.head.pretrained is {head.pretrained!r}; it has to be None unless the "
            f"head is {', '.join(_OF_ONE_UPSAMPLER)} or config.task is 'features' "
            "(config.init_from starts from whole models)"
        )
    return wrong


def _head(config: Config) -> list[str]:
    """Options that the head does not have."""
    try:
        options = given(config.model.head).keys() - {"name", "pretrained"}
        check_head_options(config.model.head.name, options)
    except ValueError as error:
        return [f"config.model.head: {error}"]
    return []


_OF_FEATURES = ("name", "upsampler", "upsampler_options", "pretrained", "width", "scale")


def _features(config: Config) -> list[str]:
    """Likewise."""
    wrong = []
    for name, value in vars(config.model.head).items():
        if name not in _OF_FEATURES and value is not None:
            wrong.append(
                f"config.model.head.{name} is {value!r}; it has to be None where config.task is "
                "'features', which has no head but the upsampler"
            )
    backbone = config.model.backbone
    for name in ("frozen", "cache_features"):
        value, needed = getattr(backbone, name), name == "frozen"
        if value is not needed:
            wrong.append(
                f"config.model.backbone.{name} is {value!r}; it has to be {needed!r} where "
                "config.task is 'features'"
            )
    if config.loss != LossConfig():
        wrong.append(
            f"config.loss is {config.loss!r}; it has to be {LossConfig()!r} where config.task is "
            "'features', which has config.objective"
        )
    try:
        json.dumps(config.objective.options)
    except (ValueError, TypeError) as error:
        wrong.append(f"config.objective.options: {error}")
    return wrong


# Fields that have one value in this task.
_FIXED_IN_MATTING: dict[str, Any] = {
    "model.backbone.name": "resnet",
    "model.backbone.cache_features": False,
    **{
        f"model.head.{name}": None
        for name in ("pretrained", "width", "wiring", "project", "pool_sizes", "scale")
        + ("guide_stride", "norm")
    },
    "data.resize_scale": 1.0,
    "data.resize_to": None,
    "data.max_class_share": 1.0,
    "data.on_corrupt": "raise",
    "eval.mode": "whole",
    "eval.scales": (1.0,),
    "eval.flip": False,
    "loss": LossConfig(),
    "objective": ObjectiveConfig(),
}


def _matting(config: Config) -> list[str]:
    """Likewise."""
    wrong = _not_fixed(config, _FIXED_IN_MATTING, "matting")
    backbone = config.model.backbone
    if backbone.variant not in DEPTHS:
        wrong.append(
            f"config.model.backbone.variant is {backbone.variant!r}; it has to be "
            f"{' or '.join(map(repr, DEPTHS))} where config.task is 'matting'"
        )
    takes = ("widths", "depths", "stem_width", "freeze_norm")
    for option in backbone.options.keys() - set(takes):
        wrong.append(
            f"config.model.backbone.options holds {option!r}; it can hold {', '.join(takes)} where "
            "config.task is 'matting'"
        )
    return wrong


# Fields that have one value in this task.
_FIXED_IN_MIRL: dict[str, Any] = {
    "model.backbone.name": "vit",
    "model.backbone.frozen": False,
    "model.backbone.cache_features": False,
    "model.head": HeadConfig(),
    "data.max_class_share": 1.0,
    "eval.mode": "whole",
    "eval.scales": (1.0,),
    "eval.flip": False,
    "loss": LossConfig(),
    "objective": ObjectiveConfig(),
}


def _mirl(config: Config) -> list[str]:
    """Likewise."""
    wrong = _not_fixed(config, _FIXED_IN_MIRL, "mirl")
    mirl = config.mirl
    for option in config.model.backbone.options.keys() & {"layers", "num_classes"}:
        wrong.append(
            f"config.model.backbone.options holds {option!r}, which config.task 'mirl' sets itself"
        )
    try:
        height, width = config.data.crop_size
        patches = height * width // size_multiple(config.model.backbone) ** 2
        masked = masked_patches(config)
        if 0 < mirl.mask_ratio < 1 and not 0 < masked < patches:
            wrong.append(
                f"config.mirl.mask_ratio is {mirl.mask_ratio!r}, which masks {masked} of the "
                f"{patches} patches of config.data.crop_size: it has to mask some and leave some"
            )
    except ValueError:
        pass  # the size or the patch, which are told elsewhere
    return wrong


def _not_fixed(config: Config, fixed: dict[str, Any], task: str) -> list[str]:
    """The fields that have another value than the only one in a task."""
    values = dict(all_fields(config))
    return [
        f"config.{field} is {values[field]!r}; it has to be {value!r} where config.task is {task!r}"
        for field, value in fixed.items()
        if (tuple(values[field]) if isinstance(values[field], list) else values[field]) != value
    ]


_BY_KIND: dict[str, Callable[[Config], list[str]]] = {
    "segmentation": _segmentation,
    "depth": _depth,
    "features": _features,
    "matting": _matting,
    "mirl": _mirl,
}


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
