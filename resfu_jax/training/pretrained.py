"""Weights that a run starts from."""

import fnmatch
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resfu_jax.backbones import create_backbone
from resfu_jax.convert import load_pretrained, load_upsampler, read_entries
from resfu_jax.convert.catalogue import RELEASES
from resfu_jax.training.checkpoint import CheckpointError, Checkpoints
from resfu_jax.training.config import BackboneConfig, Config, ConfigError, HeadConfig
from resfu_jax.training.state import blaming
from resfu_jax.training.workdir import find_run

Create = Callable[[int, nnx.Rngs], Any]

_WEIGHTS = nnx.Any(nnx.Param, nnx.BatchStat)
_CLASSIFIER = "decode_head.classifier.weight"  # of a published SegFormer: a row for every class


def initial_weights(config: Config, num_classes: int, create_model: Create) -> tuple[Any, str]:
    """What a new run starts from, by `config.init_from`, then by `pretrained` of backbone and head.

    Args:
      config: an experiment.
      num_classes: of its dataset.
      create_model: of a number of classes.

    Returns:
      Weights for `nnx.update(model, ...)`, None if there are none; and what to say of `init_from`
      and of the upsampler.

    Raises:
      ConfigError: they are not there, or do not fit the model; names all that differs.
      CheckpointError: a checkpoint cannot be read.
    """
    model = _abstract(create_model, num_classes)
    variables = {
        _name(path): (path, v) for path, v in nnx.to_flat_state(nnx.state(model, _WEIGHTS))
    }
    shapes = {name: tuple(v.shape) for name, (_, v) in variables.items()}
    found: dict[str, Any] = {}
    said = []
    if config.init_from is not None:
        with blaming("config.init_from"):
            entries, source = _entries(config.init_from, config, create_model, num_classes)
            entries = _blocks_as_in(shapes, entries)
            found, left = _fitting(entries, shapes, source, config.init_skip)
        said.append(f"starting from {source}: {len(found)} of {len(variables)} arrays")
        if left:
            said.append(f"initialised, as config.init_skip says: {_listed(left)}")
        if unused := [name for name in entries if name not in variables]:
            said.append(f"not in this model: {_listed(unused)}")
    head = config.model.head
    if head.pretrained is not None:
        with blaming("config.model.head.pretrained"):
            upsampler = _upsampler(head, shapes)
        if left := upsampler.keys() - found.keys():
            said.append(f"{head.upsampler} starts from {head.pretrained}: {len(left)} arrays")
        found = upsampler | found
    if any(name.startswith("backbone.") and name not in found for name in variables):
        with blaming("config.model.backbone.pretrained"):
            backbone = pretrained_backbone(config.model.backbone)
        if backbone is not None:
            flat = nnx.to_flat_state(backbone)
            found = {_name(("backbone", *path)): value for path, value in flat} | found
    if not found:
        return None, "; ".join(said)
    kept = [(path, v, found[name]) for name, (path, v) in variables.items() if name in found]
    state = [(path, v.replace(jnp.asarray(value, v.dtype))) for path, v, value in kept]
    return nnx.as_pure(nnx.from_flat_state(state)), "; ".join(said)


def pretrained_backbone(config: BackboneConfig) -> Any:
    """Weights, an `nnx.State` for `nnx.update(model.backbone, ...)`; None if there are none.

    Raises:
      ValueError: the weights do not fit the backbone; says the likely cause, and what differs.
      FileNotFoundError: they are not there.
    """
    if config.pretrained is None:
        return None
    if (run := _run(config.pretrained)) is not None:
        raise ValueError(
            f"{run[0]} is a run of train.py: start from all of its weights with --config.init_from="
            f"{config.pretrained}"
        )
    options = dict(name=config.name, variant=config.variant, **config.options)
    # Abstract: no random weights are drawn only to be replaced.
    backbone = nnx.eval_shape(lambda: create_backbone(**options, rngs=nnx.Rngs(0)))
    load_pretrained(config.pretrained, backbone, prefix=config.pretrained_prefix)
    return nnx.as_pure(nnx.state(backbone, _WEIGHTS))


def _upsampler(head: HeadConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Weights of the head's upsampler that were released, by their names in the model.

    Args:
      head: `pretrained` is the name of a release, "released" for the member's only one, or a file.
      shapes: of the model's arrays.

    Raises:
      ValueError: they are of an upsampler with other arrays; what `load_upsampler` raises.
    """
    source = str(head.pretrained)
    if source in RELEASES:
        if RELEASES[source].member != head.upsampler:
            raise ValueError(f"{source} is of {RELEASES[source].member}, not of {head.upsampler}")
        loaded = load_upsampler(source, **head.upsampler_options)
    else:
        path = None if source == "released" else source
        loaded = load_upsampler(head.upsampler, path, **head.upsampler_options)
    flat = nnx.to_flat_state(nnx.state(loaded, _WEIGHTS))
    found = {_name(("head", "upsample", *path)): value[...] for path, value in flat}
    there = {name: np.shape(value) for name, value in found.items()}
    here = {name: shape for name, shape in shapes.items() if name.startswith("head.upsample.")}
    if there != here:
        wrong = [
            f"  {name}: there {there.get(name, 'nothing')}, here {here.get(name, 'nothing')}"
            for name in sorted(there | here)
            if there.get(name) != here.get(name)
        ]
        raise ValueError(
            f"{source} does not fit the head's {head.upsampler}:\n" + "\n".join(wrong[:20])
        )
    return found


def _run(path: str) -> tuple[pathlib.Path, str] | None:
    """The workdir that it is, and which checkpoint; None if it is something else."""
    try:
        return find_run(pathlib.Path(os.path.expanduser(path)).absolute())
    except (ConfigError, OSError, ValueError):
        return None


def _entries(
    init_from: str, config: Config, create_model: Create, num_classes: int
) -> tuple[dict[str, Any], str]:
    """Arrays by the names of our modules, and what they are of."""
    if (run := _run(init_from)) is not None:
        workdir, which = run
        checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
        try:
            step = checkpoints.find(which)
            if step is None:
                raise CheckpointError(f"config.init_from: no checkpoint in {checkpoints.directory}")
            return checkpoints.read_weights(step), f"checkpoint {step} of {workdir}"
        finally:
            checkpoints.close()
    try:
        entries = read_entries(init_from)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no run of train.py, and no weights: {error}") from error
    if any(name.endswith(".kernel") for name in entries):  # PyTorch's are called weight
        return entries, init_from
    return _published(init_from, entries, config, create_model, num_classes), init_from


def _published(
    init_from: str,
    entries: Mapping[str, Any],
    config: Config,
    create_model: Create,
    num_classes: int,
) -> dict[str, Any]:
    """What a published file holds, by our names: encoder and decoder of a SegFormer, if the config
    is one with a linear head, else the backbone.
    """
    rows = [np.shape(value)[0] for name, value in entries.items() if name.endswith(_CLASSIFIER)]
    head = config.model.head
    decoder = bool(rows) and (head.name, head.project) == ("segformer", "linear")
    model = _abstract(create_model, rows[0] if decoder else num_classes)
    load_pretrained(init_from, model if decoder else model.backbone)
    flat = nnx.to_flat_state(nnx.state(model, _WEIGHTS))
    return {_name(p): v[...] for p, v in flat if isinstance(v.get_value(), jax.Array)}


def _blocks_as_in(
    shapes: Mapping[str, tuple[int, ...]], entries: Mapping[str, Any]
) -> dict[str, Any]:
    """The entries, with the blocks of a `ViT` in one array or one by one, as the model has them."""
    found = dict(entries)
    for name, shape in shapes.items():
        place, has_blocks, part = name.partition("blocks.")
        number, _, inside = part.partition(".")
        if name in entries or not has_blocks:
            continue
        if number.isdecimal():
            stacked = f"{place}blocks.{inside}"
            if stacked not in entries:
                continue
            depth = len(entries[stacked])
            ends = (f"{place}blocks.{i}.{inside}" in shapes for i in (depth - 1, depth))
            if tuple(ends) == (True, False):
                found[name] = np.asarray(entries[stacked][int(number)])
                found.pop(stacked, None)
        elif shape:
            each = [f"{place}blocks.{i}.{part}" for i in range(shape[0])]
            if all(n in entries for n in each) and (
                f"{place}blocks.{shape[0]}.{part}" not in entries
            ):
                found[name] = np.stack([np.asarray(found.pop(n)) for n in each])
    return found


def _fitting(
    entries: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    source: str,
    skip: Sequence[str],
) -> tuple[dict[str, Any], list[str]]:
    """The entries that the model takes, and what of it `config.init_skip` leaves out.

    Raises:
      ValueError: others do not fit, or `skip` names what is not in the model.
    """
    skipped = {
        part: [n for n in shapes if n.startswith(f"{part}.") or fnmatch.fnmatchcase(n, part)]
        for part in skip
    }
    if idle := [part for part, names in skipped.items() if not names]:
        raise ValueError(
            f"config.init_skip names what the model does not have: {', '.join(idle)}; it has "
            f"{_listed(_parts(shapes))}"
        )
    left = {name for names in skipped.values() for name in names}
    wrong = [
        f"  {name}: there {np.shape(entries[name]) if name in entries else 'nothing'}, here {shape}"
        for name, shape in shapes.items()
        if name not in left and (name not in entries or np.shape(entries[name]) != shape)
    ]
    if not wrong:
        return {n: np.asarray(entries[n]) for n in shapes if n not in left}, sorted(left)
    parts = _parts(line.strip().partition(":")[0] for line in wrong)
    shown = wrong[:20] + [f"  and {len(wrong) - 20} more"] * (len(wrong) > 20)
    raise ValueError(
        f"{source} does not fit the model in {len(wrong)} of {len(shapes)} arrays:\n"
        + "\n".join(shown)
        + f'\nto initialise these anew: --config.init_skip="{tuple(parts)}"'
    )


def _abstract(create_model: Create, num_classes: int) -> Any:
    """The model in shapes."""
    return nnx.eval_shape(lambda: create_model(num_classes, nnx.Rngs(0)))


def _name(path: tuple) -> str:
    """As files of `resfu_jax.export` name it."""
    return ".".join(map(str, path))


def _parts(names: Iterable[str]) -> list[str]:
    """The parts of the model that parameters are of: "head.classify"."""
    return sorted({".".join(name.split(".")[:2]) for name in names})


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + f" and {len(names) - 8} more" * (len(names) > 8)
