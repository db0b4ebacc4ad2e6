"""The directory of a run, and the config in it."""

import dataclasses
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
