"""The images of an experiment: `resfu_jax.data` as its config, which is checked, says."""

import sys
from typing import Any, cast

import jax
import numpy as np

from resfu_jax import data
from resfu_jax.training.config import Config, create_preprocess
from resfu_jax.training.devices import one_after_another


def prepare_embedded(config: Config, info: data.DatasetInfo) -> None:
    """Builds an embedded dataset where it is missing."""

    def build() -> None:
        if not data.is_prepared(config.data.name, config.data.dir):
            print(f"building the dataset {config.data.name} (once)", file=sys.stderr)
            data.prepare(config.data.name, config.data.dir)

    if info.embedded:
        one_after_another(build)


def open_sources(config: Config, info: data.DatasetInfo) -> tuple[data.Source, data.Source]:
    """The examples for training and for validation."""
    train, val = (
        data.open_source(config.data.name, split, config.data.dir)
        for split in ("train", "validation")
    )
    if config.data.on_corrupt == "skip":
        train, val = data.skip_corrupt(train, info), data.skip_corrupt(val, info)
    return train, val


def train_batches(config: Config, source: data.Source, info: data.DatasetInfo) -> Any:
    """Batches for training, the rows of this process; an iterator whose place can be saved."""
    return data.train_batches(
        source,
        info,
        batch_size=config.batch_size // jax.process_count(),
        crop_size=cast(tuple[int, int], config.data.crop_size),
        preprocess=create_preprocess(config),
        scale_range=cast(tuple[float, float], config.data.scale_range),
        max_class_share=config.data.max_class_share,
        flip=config.data.flip,
        photometric=config.data.photometric,
        area_range=cast(tuple[float, float] | None, config.data.area_range),
        aspect_range=cast(tuple[float, float], config.data.aspect_range),
        seed=config.seed,
        num_workers=config.data.num_workers,
        shard=(jax.process_index(), jax.process_count()),
    )


def blank_batch(config: Config, info: data.DatasetInfo) -> dict[str, np.ndarray]:
    """A batch of this process, but for its content."""
    shape = (config.batch_size // jax.process_count(), *config.data.crop_size)
    return {
        "image": np.zeros((*shape, 3), np.uint8),
        "label": np.zeros(shape, info.target.fill.dtype),
    }


def eval_batches(config: Config, source: data.Source, info: data.DatasetInfo) -> Any:
    """Batches for validation, the rows of this process, the same at every evaluation."""
    return data.eval_batches(
        source,
        info,
        batch_size=config.eval.batch_size // jax.process_count(),
        preprocess=create_preprocess(config),
        pad_to=cast(tuple[int, int] | None, config.eval.pad_to),
        group_sizes=config.eval.group_sizes,
        shard=(jax.process_index(), jax.process_count()),
    )
