"""The directory of a run, and the config in it."""

import dataclasses
import datetime
import difflib
import functools
import json
import pathlib
from typing import Any

from resfu_jax._files import local_path, write_whole
from resfu_jax.training.config import Config, ConfigError, all_fields, flatten, to_dict


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


def find_run(path: pathlib.Path, which: str = "best") -> tuple[pathlib.Path, str]:
    """The workdir of a run, and which checkpoint in it.

    Args:
      path: the workdir, its `checkpoints/`, or one checkpoint in that.
      which: for a workdir.

    Raises:
      ConfigError: it is none of these.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder; give the workdir of a run of train.py")
    if path.parent.name == "checkpoints" and path.name.isdigit():
        path, which = path.parent.parent, path.name
    elif path.name == "checkpoints":
        path = path.parent
    if not (path / "config.json").is_file() or not (path / "checkpoints").is_dir():
        raise ConfigError(
            f"{path} is not the workdir of a run of train.py: it has to have config.json and "
            "checkpoints/ in it"
        )
    return path, which


# What may change between a run and its continuation: its length, and what no number depends on.
_FREE_TO_CHANGE = (
    *("steps", "log_every", "eval.", "checkpoint.", "data.dir", "data.num_workers"),
    *("parallel.", "profile.", "wandb"),
)
# What no continuation can change, and why; of the rest the person has to say that it is meant.
_NEVER_CHANGES = {
    "init_": "the run has started",
    "seed": "the order of the images follows from it",
    "data.name": "the checkpoint is of those classes and images",
    "task": "the checkpoint is of that task",
    "objective.name": "the checkpoint has the other one's parts",
    "optimizer.name": "the checkpoint has the other one's averages",
    "model.backbone.pretrained": "the run has started",
    "model.head.pretrained": "the run has started",
    "model.": "the checkpoint is of that model",
}
_BUT = ("model.dtype", "model.remat", "model.backbone.cache_features")  # the same arrays

# What a config.json without the field was trained with, where that is not the field's default now.
# Whoever adds a field whose default changes what a run computes, or changes a default, adds a line.
_IN_EFFECT_BEFORE: dict[str, Any] = {}


def check_same_run(
    workdir: pathlib.Path, config: Config, *, only: str = "", with_changes: bool = False
) -> list[str]:
    """Checks a config against the one that the checkpoints of a workdir were made with.

    The number of steps may differ (the learning rate then follows the new schedule from here on),
    and how often things are logged, evaluated and saved, where the dataset lies, and how the
    devices are used. Fields that were added since count as `read_config` has them.

    Args:
      workdir: directory of the run.
      config: the present config.
      only: compare fields whose dotted path starts with this.
      with_changes: other fields may differ, too, but for those that the checkpoints depend on.

    Returns:
      A line for each field that differs.

    Raises:
      ConfigError: naming every field that may not differ, or a `config.json` that cannot be read.
    """
    if not (workdir / "config.json").exists():
        return []
    before, now = flatten(to_dict(read_config(workdir))), flatten(to_dict(config))
    differ, wrong, fixed = [], [], False
    for field in sorted(before.keys() | now.keys()):
        if not field.startswith(only) or before.get(field) == now.get(field):
            continue
        line = f"  config.{field}: was {before.get(field)!r}, is {now.get(field)!r}"
        differ.append(line)
        reason = _why_not(field, before.get(field), now.get(field))
        if reason or not (with_changes or field.startswith(_FREE_TO_CHANGE)):
            wrong.append(f"{line}; that cannot change: {reason}" if reason else line)
            fixed |= bool(reason)
    if not wrong:
        return differ
    advice = "use that config, or another --workdir"
    if fixed:
        advice += f" (--config.init_from={workdir} starts there with the weights of this run)"
    elif not only:
        advice += ", or continue with these changes: --resume_with_changes"
    raise ConfigError(
        "\n".join([f"the checkpoints in {workdir} are of another config:", *wrong, advice])
    )


def _why_not(field: str, before: Any, now: Any) -> str:
    """Why a field cannot change; "" if it can."""
    if field == "optimizer.ema_decay" and None in (before, now):
        return f"the checkpoint has {'no' if before is None else 'the'} averaged parameters"
    if field in _BUT:
        return ""
    return next((why for start, why in _NEVER_CHANGES.items() if field.startswith(start)), "")


def write_config(workdir: pathlib.Path, config: Config, *, step: int = 0) -> None:
    """Writes `config.json`.

    Where it replaces that of a run which continues with another config, its `history` says since
    which step, from when, and what the fields were before.

    Args:
      workdir: directory of the run.
      config: the present config.
      step: that the run continues from; 0 starts anew.
    """
    path, now = workdir / "config.json", to_dict(config)
    history: list[dict[str, Any]] = []
    if step and path.exists():
        before, after = flatten(to_dict(read_config(workdir))), flatten(now)
        fields = sorted(before.keys() | after.keys())
        was = {f: before.get(f) for f in fields if before.get(f) != after.get(f)}
        date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        history = json.loads(path.read_bytes()).get(_HISTORY, [])
        history += [{"step": step, "date": date, "was": was}] * bool(was)
    tree = now | ({_HISTORY: history} if history else {})
    write_whole(path, json.dumps(tree, indent=2) + "\n")


_HISTORY = "history"  # beside the fields in config.json


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
    if isinstance(tree, dict):
        tree.pop(_HISTORY, None)
    unknown: list[str] = []
    wrong: list[str] = []
    config = _filled(_config_of_before(), tree, "", unknown, wrong)
    if unknown:
        near = difflib.get_close_matches(unknown[0], dict(all_fields(config)), n=1)
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
