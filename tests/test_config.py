import dataclasses
import datetime
import functools
import importlib
import inspect
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from flax import nnx

from resfu_jax.data.fabricate import prepare_fabricated
from resfu_jax.inference import Inference
from resfu_jax.model import create_model
from resfu_jax.tasks import create_task
from resfu_jax.training import (
    Config,
    ConfigError,
    check_overrides,
    check_same_run,
    create_inference,
    create_schedule,
    define_config,
    model_arguments,
    parse_flags,
    read_config,
    validate,
    write_config,
)
from resfu_jax.training.config import flatten, to_dict

CONFIGS = sorted(p.stem for p in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


def runnable(**changes):
    """A valid config, with `{"group.field": value}` changed."""
    config = Config(steps=2000)
    for path, value in changes.items():
        *groups, field = path.split(".")
        holder = config
        for group in groups:
            holder = getattr(holder, group)
        assert hasattr(holder, field)
        setattr(holder, field, value)
    return config


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Where the recipes' datasets of one's own photos are prepared."""
    directory = tmp_path_factory.mktemp("data")
    for name in ("photos", "imagenet"):
        prepare_fabricated(f"image_folder/{name}", directory)
    return str(directory)


def config_of(name, photos):
    config = importlib.import_module(f"configs.{name}").get_config()
    if config.data.name.startswith("image_folder/"):  # known once it is prepared
        config.data.dir = photos
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_valid_and_say_how_to_run_them(name, photos):
    module = importlib.import_module(f"configs.{name}")
    validate(config_of(name, photos))
    config = module.get_config()
    assert module.get_config() is not config
    takes_upsampler = bool(inspect.signature(module.get_config).parameters)
    argument = ":[a-z_]+" if takes_upsampler else ""
    command = rf"python train.py --config configs/{name}.py{argument} --workdir"
    assert re.search(command, module.__doc__)
    assert "Result" in module.__doc__


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_build_a_model(name, photos):
    config = config_of(name, photos)
    task = create_task(config)
    classes = task.info.num_classes
    if config.task == "matting":
        nnx.eval_shape(lambda: task.create_model(nnx.Rngs(0)))
        return
    if config.task == "features":
        model = nnx.eval_shape(lambda: task.create_model(nnx.Rngs(0)))
        assert model.head.features == model.backbone.features[-1]
        return
    images = jax.ShapeDtypeStruct((1, *config.data.crop_size, 3), jnp.uint8)
    if config.task == "mirl":
        batch = task.draw(dict(image=np.zeros((1, *config.data.crop_size, 3), np.uint8)), 1)
        predictions = jax.eval_shape(
            lambda x: task.create_model(nnx.Rngs(0))(x, jnp.asarray(batch["visible"])), images
        )
        assert len(predictions) == config.mirl.segments
        return
    if config.task == "depth":
        depth = jax.eval_shape(lambda x: task.create_model(nnx.Rngs(0))(x), images)
        assert depth.shape == (1, *config.data.crop_size, 1)
        return

    def logits(images):
        return create_model(
            **model_arguments(config.model),
            num_classes=classes,
            rngs=nnx.Rngs(0),
        )(images)

    assert jax.eval_shape(logits, images).shape == (1, *config.data.crop_size, classes)


def parse(config_file, *arguments):
    """The config as train.py reads it from the command line."""
    path = pathlib.Path(__file__).parents[1] / "configs" / config_file
    return parse_line(f"--config={path}", *arguments)


def parse_line(*arguments):
    argv = ["train.py", *arguments]
    values = flags.FlagValues()
    define_config(values, argv)
    parse_flags(argv, values)
    return values.config


@pytest.mark.parametrize("name", ["direct", "stagewise", "upernet"])
def test_configs_that_take_any_upsampler(name):
    config = parse(f"shapes_{name}.py:bilinear", "--config.model.head.width=16")
    assert (config.model.head.upsampler, config.model.head.width) == ("bilinear", 16)
    validate(config)
    with pytest.raises(ConfigError, match="did you mean 'bilinear'"):
        validate(parse(f"shapes_{name}.py:bilinaer"))


@pytest.mark.parametrize(
    ("upsampler", "added"),
    [
        ("bilinear", 0),
        ("carafe", 0.44e6),
        ("fade", 0.29e6),
        ("fade_lite", 0.08e6),
        ("sapa", 0.1e6),
        ("sapa_deform", 0.84e6),
        ("resfu", 0.142710e6),
    ],
)
def test_segformer_b1_has_the_published_number_of_parameters(upsampler, added):
    """13.7 million in all, and what the repositories say that an upsampler adds."""
    config = importlib.import_module("configs.ade20k_segformer_b1").get_config(upsampler)
    validate(config)
    model = nnx.eval_shape(
        lambda: create_model(**model_arguments(config.model), num_classes=150, rngs=nnx.Rngs(0))
    )
    numbers = [
        sum(p.size for p in jax.tree.leaves(nnx.state(module, nnx.Param)))
        for module in (model, model.head.upsample)
    ]
    assert numbers[1] == pytest.approx(added, abs=0.006e6)
    assert numbers[0] - numbers[1] == pytest.approx(13.7e6, rel=2e-3)
    direct = upsampler in ("bilinear", "resfu")
    assert len(model.head.upsample) == (3 if direct else 6)
    assert [up.dilation for up in model.head.upsample if upsampler == "resfu"] in ([], [2, 2, 2])


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("segformer_b1", {0: 6e-11, 1500: 6e-5, 101_125: 6e-5 * 58_874 / 158_499, 159_999: 0.0}),
        ("segmenter_s_resfu", {0: 1e-3, 53_333: 1e-4 + 9e-4 * (2 / 3) ** 0.9, 159_999: 1e-4}),
        ("upernet_r50", {0: 1e-2, 79_998: 1e-4 + 99e-4 / 79_999**0.9, 79_999: 1e-4}),
    ],
)
def test_learning_rates_of_the_recipes(name, rates):
    config = importlib.import_module(f"configs.ade20k_{name}").get_config()
    schedule = create_schedule(config.optimizer, config.steps)
    assert config.steps == max(rates) + 1
    for step, rate in rates.items():
        assert float(schedule(step)) == pytest.approx(rate, rel=1e-4, abs=1e-11)


def test_options_of_heads_on_the_command_line():
    config = parse(
        "shapes_resfu.py",
        "--config.model.head.wiring=stagewise",
        "--config.model.head.project=linear",
        "--config.model.head.pool_sizes=(1, 2)",
    )
    head = config.model.head
    assert (head.wiring, head.project, head.pool_sizes) == ("stagewise", "linear", (1, 2))
    assert (
        parse("shapes_upernet.py", "--config.model.head.pool_sizes=()").model.head.pool_sizes == ()
    )


def test_options_that_the_head_does_not_take():
    changes = {"model.head.name": "upernet", "model.head.pool_sizes": ()}
    validate(runnable(**changes))
    with pytest.raises(ConfigError, match="config.model.head: .*head 'upernet': 'wiring'"):
        validate(runnable(**changes, **{"model.head.wiring": "direct"}))
    with pytest.raises(ConfigError, match="config.model.head: .*'segfromer'; did you mean"):
        validate(runnable(**{"model.head.name": "segfromer"}))


@pytest.mark.parametrize("pair", ["shapes_{}", "camvid_segformer_b0_{}"])
def test_twins_differ_in_the_upsampler_alone(pair):
    a, b = (
        flatten(to_dict(importlib.import_module(f"configs.{pair.format(name)}").get_config()))
        for name in ("resfu", "bilinear")
    )
    assert {field for field in a if a[field] != b[field]} == {"model.head.upsampler"}


@pytest.mark.parametrize(
    ("field", "value", "need"),
    [
        ("steps", 0, "at least 1"),
        ("batch_size", 12, "multiple of 8"),
        ("eval.batch_size", 4, "multiple of 8"),
        ("log_every", 0, "at least 1"),
        ("data.crop_size", (100, 128), "multiples of 32"),
        ("data.crop_size", (128,), "height, width"),
        ("eval.pad_to", (100, 100), "multiples of 32"),
        ("data.scale_range", (2.0, 1.0), "smallest, largest"),
        ("data.resize_scale", 0.0, "positive"),
        ("data.resize_to", (64, 32), "short <= long"),
        ("data.resize_to", (64,), "(short, long)"),
        ("data.max_class_share", 0.0, "above 0, at most 1"),
        ("data.area_range", (0.2, 1.5), "share of an image"),
        ("data.aspect_range", (0.0, 1.0), "both positive"),
        ("optimizer.decay", "linear", "'polynomial' or 'cosine'"),
        ("data.on_corrupt", "drop", "'raise' or 'skip'"),
        ("data.name", "shape", "shapes"),
        ("model.dtype", "float16", "bfloat16"),
        ("model.head.upsampler", "resfuu", "resfu"),
        ("optimizer.warmup_steps", -1, "0 or more"),
        ("optimizer.clip_norm", -1.0, "positive, or None"),
        ("optimizer.ema_decay", 1.0, "between 0 and 1"),
        ("loss.label_smoothing", 1.0, "less than 1"),
        ("loss.class_weights", (1.0, 2.0), "one weight for each"),
        ("checkpoint.keep", 0, "at least 1"),
        ("parallel.shard_at_least", 0, "at least 1"),
        ("parallel.peak_tflops", 0.0, "positive, or None"),
        ("profile.start", 0, "at least 1"),
        ("profile.steps", -1, "0 or more"),
    ],
)
def test_wrong_values_are_named_with_what_they_need(field, value, need):
    validate(runnable(**{"eval.batch_size": 16}), devices=8)
    with pytest.raises(ConfigError) as error:
        validate(runnable(**{"eval.batch_size": 16, field: value}), devices=8)
    assert str(error.value).startswith(f"config.{field}")
    assert need in str(error.value)


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        validate(runnable(steps=0, log_every=0))
    assert "config.steps" in str(error.value) and "config.log_every" in str(error.value)


def test_grouping_leaves_no_size_to_pad_to():
    validate(runnable(**{"eval.group_sizes": True}))
    need = "config.eval.group_sizes is True; .* config.eval.pad_to is None"
    with pytest.raises(ConfigError, match=need):
        validate(runnable(**{"eval.group_sizes": True, "eval.pad_to": (64, 64)}))


def test_accumulation_divides_the_batch():
    validate(runnable(**{"batch_size": 12, "optimizer.accumulate": 3}))
    with pytest.raises(ConfigError, match="multiple of 24"):
        validate(runnable(**{"batch_size": 12, "optimizer.accumulate": 3}), devices=8)


def test_batches_are_divided_among_processes():
    config = runnable(**{"batch_size": 8, "eval.batch_size": 4})
    validate(config, devices=4, processes=2)
    with pytest.raises(ConfigError) as error:
        validate(config, devices=16, processes=2)
    for field, value in (("batch_size", 8), ("eval.batch_size", 4)):
        assert f"config.{field} is {value}; it has to be a multiple of 16" in str(error.value)
    assert "16 devices of 2 processes" in str(error.value)
    with pytest.raises(ConfigError, match="as many devices as the others"):
        validate(config, devices=3, processes=2)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.sead=3", "config.sead does not exist; did you mean seed"),
        ("--config.model.head.widht=3", "did you mean model.head.width"),
        ("--config.optimizer.lr=3", "config.optimizer.lr does not exist"),
        ("--config.optimizer=3", "is a group of fields"),
        ("--noconfig.data.flp", "did you mean data.flip"),
    ],
)
def test_unknown_fields_are_named_with_near_matches(argument, message):
    with pytest.raises(ConfigError, match=message):
        check_overrides(["--config=x.py", argument, "--workdir=y"])


def test_known_fields_pass():
    check_overrides(
        [
            "--config=x.py",
            "--config.seed=3",
            "--noconfig.data.flip",
            "--config.model.head.upsampler_options={'lr_mult': 1.0}",
            "--config.model.head.upsampler_options.lr_mult=2.0",
        ]
    )


# ------------------------------------------------------------------------- every field has a range
def leaves(group, prefix=""):
    for field in dataclasses.fields(group):
        value, path = getattr(group, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from leaves(value, path + ".")
        else:
            yield path, str(field.type), value


def refused(path, value):
    """Whether `validate` names the field, when it has this value and all others are in order."""
    changes = {"model.backbone.frozen": True} if path != "model.backbone.frozen" else {}
    with pytest.raises(ConfigError) as error:
        validate(runnable(**(changes | {path: value})))
    return f"config.{path} is" in str(error.value) or f"config.{path} must" in str(error.value)


# Numbers below zero that are right.
MAY_BE_NEGATIVE = {"model.mean"}
# Whole numbers, and their tuples, for which 0 is right.
MAY_BE_ZERO = {"seed", "data.num_workers", "eval.pictures", "profile.steps"}
MAY_BE_ZERO |= {"optimizer.warmup_steps", "depth.warmup_steps"}


def of_kind(kind, number):
    """The number as the field has it: three of it for a tuple of colours or of sizes."""
    return (number,) * 3 if "tuple" in kind else number


@pytest.mark.parametrize(
    ("path", "kind"),
    [(p, k) for p, k, _ in leaves(Config()) if "int" in k or "float" in k],
)
def test_numbers_that_cannot_be_right_are_refused(as_users_call, path, kind):
    """Every numeric field refuses NaN, infinity, a truth value, text, and a wrong sign.

    A field added without a range turns this red.
    """
    for value in (math.nan, math.inf, -math.inf, True, "1", 1j):
        assert refused(path, of_kind(kind, value))
        if "tuple" in kind:
            assert refused(path, value)
    if "float" in kind:
        assert refused(path, of_kind(kind, 10**400))
    else:
        assert refused(path, of_kind(kind, 2.0))
        if path not in MAY_BE_ZERO:
            assert refused(path, of_kind(kind, 0))
    if path not in MAY_BE_NEGATIVE:
        number = -1.0 if "float" in kind else -1
        lengths = (1, 2, 3, 8) if "tuple" in kind else (None,)
        for length in lengths:
            assert refused(path, number if length is None else (number,) * length)
    assert ("None" in kind) or refused(path, None)


@pytest.mark.parametrize(
    ("path", "kind"),
    [(p, k) for p, k, _ in leaves(Config()) if "int" not in k and "float" not in k],
)
def test_other_fields_refuse_other_types(as_users_call, path, kind):
    values = [1, 2.5, b"x", (1,) if "tuple" in kind else ("a",)]
    for value in values + ["yes"] * ("str" not in kind or "tuple" in kind):
        assert refused(path, value)
    assert ("None" in kind) or refused(path, None)


def test_a_field_that_does_not_exist_in_a_config_file(as_users_call):
    config = runnable()
    config.optimizer.learning_rte = 1.0
    with pytest.raises(ConfigError, match="config.optimizer.learning_rte .* mean learning_rate"):
        validate(config)
    with pytest.raises(ConfigError, match="no Config: None"):
        validate(None)


@pytest.mark.parametrize("value", [0, 2**32 - 1])
def test_seeds_that_jax_and_grain_take(value):
    validate(runnable(seed=value))


# ------------------------------------------------------------------------------- the command line
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.steps=abc"], "config.steps=abc"),
        (["--config.steps=1e3"], "config.steps=1e3"),
        (["--config.steps"], "Missing value for flag --config.steps"),
        (["--config.steps="], "config.steps="),
        (["--config.data.flip=maybe"], "config.data.flip=maybe"),
        (["--noconfig.steps"], "noconfig.steps"),
        (["--config.data.crop_size=(64, 64"], "crop_size=.* it has to be a tuple such as"),
        (["--config.data.crop_size=64, 64)"], "crop_size=.* it has to be a tuple such as"),
        (["--config.data.crop_size=wide"], "crop_size=.* it has to be a tuple such as"),
        (["--config.data.crop_size="], "crop_size=.* it has to be a tuple such as"),
        (["--config.model.head.upsampler_options={'eps': 1"], "options=.* has to be a dictionary"),
        (["--config.model.head.upsampler_options={'eps': x}"], "options=.* has to be a dictionary"),
        (["--config.model.head.upsampler_options={[]: 1}"], "options=.* has to be a dictionary"),
        (["--config.model.head.upsampler_options=(1,)"], "options=.* has to be a dictionary"),
        (["--config.model.backbone.options=" + "[" * 10_000], "options=.* has to be a dictionary"),
        (["--config.model.head.upsampler_options.eps=1"], "sets no 'eps' there; give the whole"),
        (["--config.model.backbone.options.widths.first=1"], "sets no 'first' there"),
        (["--config.sead=3"], "config.sead does not exist; did you mean seed"),
        (["--confg.seed=3"], "Unknown command line flag 'confg.seed'"),
        (["--config.data.name=shape"], "Did you mean 'shapes'"),
        (["--config.model.head.upsampler=resfuu"], "did you mean 'resfu'"),
        (["--config.seed=-1"], "config.seed is -1; it has to be from 0"),
        (["--config.optimizer.learning_rate=nan"], "learning_rate is nan; .* finite"),
        (["--config.optimizer.beta1=1.5"], "beta1 is 1.5; it has to be at least 0 and less than 1"),
        (["--config.steps=3000000000"], "config.steps is 3000000000; .* 2\\*\\*31 - 1"),
        (["--config.steps=None"], "config.steps is None; it has to be a whole number"),
        (["--config.model.backbone.options={'drop_pat': 0.1}"], "did you mean 'drop_path'"),
        (["--config.model.backbone.options={'rngs': 0}"], "options cannot hold rngs"),
        (["--config.model.backbone.options={'depths': {1}}"], "set is not JSON serializable"),
        (["--config.data.crop_size=64"], r"crop_size is \(64,\); .* \(height, width\)"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message):
    with pytest.raises(ConfigError, match=message) as error:
        validate(parse("shapes_resfu.py", *arguments))
    assert len(str(error.value)) < 12_000 and "Traceback" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("def get_config(:", "config=.*py: SyntaxError: .*line 1"),
        ("import nothing_like_it", "config=.*py: line 1: ModuleNotFoundError: .*nothing_like_it"),
        ("x = 1", r"has no function get_config\(\)"),
        ("get_config = 3", r"has no function get_config\(\)"),
        ("def get_config():\n    return {}", "has to return a resfu_jax.training.Config, got dict"),
        ("def get_config():\n    pass", "has to return .* got NoneType"),
        ("def get_config():\n    return 1 / 0", "line 2: ZeroDivisionError"),
        ("def get_config():\n    return int('x')", "line 2: ValueError"),
        ("def get_config(name): pass", "needs a name after a colon"),
    ],
)
def test_config_files_that_cannot_be_loaded(tmp_path, text, message):
    path = tmp_path / "some.py"
    if text is not None:
        path.write_text(text)
    for arguments in [[f"--config={path}"], ["--config", str(path)]]:
        with pytest.raises(ConfigError, match=message) as error:
            parse_line(*arguments)
        assert str(path) in str(error.value) and "Traceback" not in str(error.value)


def test_config_files_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match=r"configs is a folder; did you mean .*configs/\w+\.py"):
        parse(".")
    with pytest.raises(ConfigError, match="does not exist; did you mean .*shapes_resfu.py"):
        parse("shape_resfu.py")
    with pytest.raises(ConfigError, match="takes no name after a colon"):
        parse("shapes_resfu.py:carafe")
    (tmp_path / "bytes.py").write_bytes(b"\xff\x00")
    with pytest.raises(ConfigError, match="bytes.py: "):
        parse_line(f"--config={tmp_path / 'bytes.py'}")


def test_fields_without_a_config_file():
    with pytest.raises(ConfigError, match="--config is missing: name the file"):
        parse_line("--config.seed=3", "--workdir=x")


def test_config_files_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = (pathlib.Path(__file__).parent / "tiny_config.py").read_text()
    (tmp_path / "mine.py").write_text(text)
    assert parse_line("--config=~/mine.py").steps == 8


def test_the_last_value_counts_also_of_tuples():
    config = parse(
        "shapes_resfu.py",
        "--config.seed=1",
        "--config.data.crop_size=(64, 32)",
        "--config.seed=2",
        "--config.data.crop_size=[96, 64]",
    )
    assert (config.seed, config.data.crop_size) == (2, (96, 64))


def test_none_unsets_a_field():
    config = parse(
        "camvid_vit_augmented.py",
        "--config.model.backbone.pretrained=None",
        "--config.eval.crop=None",
        "--config.optimizer.clip_norm=None",
        "--config.model.head.width=None",
    )
    unset = (config.model.backbone.pretrained, config.eval.crop)
    assert (*unset, config.optimizer.clip_norm, config.model.head.width) == (None,) * 4


def test_items_of_dictionaries_that_the_file_sets():
    config = parse("shapes_resfu.py", "--config.model.backbone.options.drop_path=0.25")
    assert config.model.backbone.options["drop_path"] == 0.25


def test_train_says_error_and_stops():
    """train.py's own parser of the command line, without a process."""
    import train

    with pytest.raises(SystemExit) as stopped:
        train.parse_flags(["train.py", "--config=x.py", "--config.sead=3"])
    assert stopped.value.code.startswith("error: config.sead does not exist")


def test_windows_fit_the_patches_of_a_vit():
    changes = {"model.backbone.name": "vit", "model.backbone.variant": "tiny", "eval.mode": "slide"}
    changes["eval.stride"] = (32, 32)
    validate(runnable(**changes, **{"eval.crop": (48, 64)}))
    with pytest.raises(ConfigError, match="config.eval.crop is .* multiples of 16"):
        validate(runnable(**changes, **{"eval.crop": (50, 64)}))


def test_model_arguments_leave_out_none():
    config = Config().model
    config.backbone.options = {"widths": (8, 16, 32, 64)}
    config.head.width = 16
    arguments = model_arguments(config)
    assert arguments["backbone"] == {"name": "mit", "variant": "b0", "widths": (8, 16, 32, 64)}
    assert arguments["head"] == {
        "name": "segformer",
        "upsampler": "resfu",
        "upsampler_options": {},
        "width": 16,
    }


def test_a_run_continues_with_its_own_config_only(tmp_path):
    config = Config()
    check_same_run(tmp_path, config)  # nothing there yet
    write_config(tmp_path, config)
    assert json.loads((tmp_path / "config.json").read_text()) == to_dict(config)
    check_same_run(tmp_path, config)

    config.eval.every, config.log_every, config.checkpoint.keep, config.steps = 7, 3, 2, 5000
    config.parallel.shard_parameters, config.profile.steps = True, 3
    check_same_run(tmp_path, config)

    config.seed, config.model.head.width = 5, 32
    with pytest.raises(ConfigError) as error:
        check_same_run(tmp_path, config)
    assert "config.seed: was 0, is 5" in str(error.value)
    assert f"--config.init_from={tmp_path}" in str(error.value)
    assert "config.model.head.width: was None, is 32" in str(error.value)
    with pytest.raises(ConfigError) as error:
        check_same_run(tmp_path, config, only="model.")
    assert "seed" not in str(error.value)


def changed(value):
    """Another one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return {"x": 1} if isinstance(value, dict) else ("x",) if isinstance(value, tuple) else "x"


@pytest.mark.parametrize(("field", "value"), [(path, v) for path, _, v in leaves(Config())])
def test_every_field_changes_freely_or_when_it_is_meant_or_never(tmp_path, field, value):
    config = Config()
    write_config(tmp_path, config)
    *groups, name = field.split(".")
    setattr(functools.reduce(getattr, groups, config), name, changed(value))

    def refusal(**options):
        try:
            lines = check_same_run(tmp_path, config, **options)
            assert lines and all(line.startswith(f"  config.{field}") for line in lines)
            return ""
        except ConfigError as error:
            return str(error)

    plain, meant = refusal(), refusal(with_changes=True)
    free = ("steps", "log_every", "data.dir", "data.num_workers", "wandb")
    groups = ("eval", "checkpoint", "parallel", "profile")
    never = (
        *("init_from", "init_skip", "seed", "data.name", "optimizer.name", "optimizer.ema_decay"),
        *("task", "objective.name"),
    )
    same_arrays = ("model.dtype", "model.remat", "model.backbone.cache_features")
    if field in free or field.startswith(groups):
        assert plain == meant == ""
    elif field in never or field.startswith("model.") and field not in same_arrays:
        assert "; that cannot change: the " in plain and plain == meant
    else:
        assert "continue with these changes: --resume_with_changes" in plain and meant == ""


def test_changes_are_kept_in_the_history(tmp_path):
    config = Config()
    write_config(tmp_path, config)
    config.steps = 5000
    write_config(tmp_path, config)  # before its first checkpoint: it starts anew
    config.optimizer.learning_rate, config.batch_size = 1e-3, 8
    write_config(tmp_path, config, step=60)
    write_config(tmp_path, config, step=80)
    config.optimizer.learning_rate = 2e-3
    write_config(tmp_path, config, step=90)
    history = json.loads((tmp_path / "config.json").read_text())["history"]
    assert [(entry["step"], entry["was"]) for entry in history] == [
        (60, {"batch_size": 16, "optimizer.learning_rate": 6e-5}),
        (90, {"optimizer.learning_rate": 1e-3}),
    ]
    assert all(datetime.datetime.fromisoformat(entry["date"]).tzinfo for entry in history)
    assert read_config(tmp_path) == config


def test_every_field_is_documented_or_self_evident():
    """A field without its own line of documentation is one that config readers must guess."""
    source = (pathlib.Path(__file__).parents[1] / "resfu_jax/training/config.py").read_text()
    undocumented = []
    for group in (Config(), *(getattr(Config(), f.name) for f in dataclasses.fields(Config))):
        if not dataclasses.is_dataclass(group):
            continue
        body = source.split(f"class {type(group).__name__}:")[1].split("\n\n\n")[0].splitlines()
        for i, line in enumerate(body):
            name = line.strip().split(":")[0]
            if (
                name in {f.name for f in dataclasses.fields(group)}
                and "default_factory" not in line
            ):
                following = body[i + 1].strip() if i + 1 < len(body) else ""
                if not following.startswith('"""'):
                    undocumented.append(f"{type(group).__name__}.{name}")
    assert undocumented == []


def test_evaluation_in_windows_on_the_command_line():
    config = parse(
        "shapes_resfu.py",
        "--config.eval.mode=slide",
        "--config.eval.crop=(64, 96)",
        "--config.eval.stride=(48, 96)",
        "--config.eval.scales=(0.5, 1, 1.75)",
        "--config.eval.flip",
    )
    validate(config)
    assert create_inference(config) == Inference(
        "slide", (64, 96), (48, 96), scales=(0.5, 1.0, 1.75), flip=True
    )
    assert create_inference(Config()) == Inference()


@pytest.mark.parametrize(
    ("field", "value", "need"),
    [
        ("mode", "tile", "'whole' or 'slide'"),
        ("mode", "slide", "when mode is 'slide'"),
        ("crop", (64,), "(height, width)"),
        ("stride", (0, 64), "at least 1"),
        ("scales", (), "at least one"),
        ("windows_per_step", 0, "at least 1"),
    ],
)
def test_wrong_ways_to_evaluate(as_users_call, field, value, need):
    with pytest.raises(ConfigError) as error:
        validate(runnable(**{f"eval.{field}": value}))
    shown = "crop" if value == "slide" else field
    assert str(error.value).startswith(f"config.eval.{shown} must be")
    assert need in str(error.value)
