"""Does an experiment run at all? Two steps of it, without its data, weights or time."""

import contextlib
import copy
import pathlib
import tempfile
from collections.abc import Iterator

import jax

from resfu_jax.data.fabricate import prepare_fabricated
from resfu_jax.training.config import Config, size_multiple
from resfu_jax.training.validation import check_types, validate

_SIDE = 64  # of crops and windows, rounded up to what the backbone takes


@contextlib.contextmanager
def dry_run(config: Config) -> Iterator[tuple[Config, pathlib.Path]]:
    """What to run instead of an experiment: config and workdir, in a folder that is then removed.

    The dataset there is a made-up one in the official layout.

    Raises:
      ConfigError: the config itself cannot be run.
    """
    check_types(config)
    with tempfile.TemporaryDirectory(prefix="resfu_dry_run_") as folder:
        directory = pathlib.Path(folder)
        config = copy.deepcopy(config)
        config.data.dir = str(directory / "data")
        prepare_fabricated(config.data.name, config.data.dir)
        validate(config)
        yield shrink(config, devices=jax.device_count()), directory / "run"


def shrink(config: Config, *, devices: int = 1) -> Config:
    """The same model and options for two steps on small crops, from random weights.

    Args:
      config: an experiment; left as it is.
      devices: number of devices that share a batch.
    """
    small = copy.deepcopy(config)
    multiple = size_multiple(config.model.backbone)
    side = -(-_SIDE // multiple) * multiple

    def scaled(sizes: tuple[int, ...], full: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(max(1, round(n * side / of)) for n, of in zip(sizes, full, strict=True))

    small.steps, small.log_every = 2, 1
    small.batch_size = max(2, devices) * config.optimizer.accumulate
    small.model.backbone.pretrained = small.model.head.pretrained = None
    small.init_from = small.wandb = None
    small.init_skip = ()
    small.data.crop_size = (side, side)
    small.data.num_workers = 0
    if config.data.resize_to is not None:
        small.data.resize_to = scaled(config.data.resize_to, (min(config.data.crop_size),) * 2)
    small.optimizer.warmup_steps = min(config.optimizer.warmup_steps, 1)
    small.eval.every = small.checkpoint.every = 2
    small.eval.batch_size = max(2, devices)
    small.eval.pad_to = None
    if config.eval.crop is not None and config.eval.stride is not None:
        small.eval.crop = (side, side)
        small.eval.stride = scaled(config.eval.stride, config.eval.crop)
    small.profile.steps = 0
    return small
