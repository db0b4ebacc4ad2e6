"""Probing: how much a linear layer reads off upsampled features of a frozen backbone.

    pipeline = FeaturePipeline(backbone="vit.safetensors", upsampler="jbu")
    entry = probe(pipeline, "camvid", ProbeSettings(class_balance=0.5, seeds=(0, 1, 2)))
    entry["protocols"]["features"]["mean"]["miou"]

With F the features of an image I at the backbone's resolution, U the upsampler, and W a 1x1
classifier, the only part that learns, the class of a pixel is the largest of

    features        W U(F, I)             W fitted on upsampled features
    preserved       W U(F, I)             W fitted on features as the backbone gives them
    probabilities   U(softmax(W F), I)    the same W; U has the weights that F and I give it

Of a dataset with depth maps, W gives the weights of bins of depth, see `probing/targets.py`, and
what is upsampled in place of probabilities are depths.

`features` is how upsamplers are compared as a rule (FeatUp, JAFAR, NAF). `preserved` asks whether
an upsampler leaves features what they are, so that a classifier of the backbone's own features
still works (Wimmer et al., AnyUp, 2025, tables 5 and 11). `probabilities` is from Seo et al.,
Upsample Anything, 2025. What papers do differently, and why their numbers do not compare, is in
docs/probing.md.

Backbone and upsampler are frozen, so the features of some pixels of every training image are
computed once (`pixels_per_image`), and the classifiers of all seeds and protocols are fitted to
them; the whole validation set is upsampled once for all of them. `pixels_per_image=None` computes
all pixels in every epoch, as the papers do.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resfu_jax import data
from resfu_jax._checks import check_whole, need
from resfu_jax._running import versions
from resfu_jax.probing.fitting import Linear, fit_linear
from resfu_jax.probing.images import Encoder, Pipeline, Split
from resfu_jax.probing.pixels import all_pixels, sampled
from resfu_jax.probing.progress import Clock, progress
from resfu_jax.probing.results import markdown, read_results, record
from resfu_jax.probing.scoring import answers, by_seed, count, read_off, statistics, value_groups
from resfu_jax.probing.settings import ProbeSettings
from resfu_jax.probing.targets import Classes, Depths, Target, target_of

__all__ = [
    "Classes",
    "Depths",
    "Pipeline",
    "ProbeSettings",
    "Target",
    "fit_linear",
    "markdown",
    "probe",
    "read_results",
    "record",
]

PathLike = str | os.PathLike[str]


def probe(
    pipeline: Pipeline,
    dataset: str,
    settings: ProbeSettings = ProbeSettings(),  # noqa: B008 - frozen
    *,
    data_dir: PathLike | None = None,
    cache_dir: PathLike | None = None,
    images_at_once: int = 2,
    facts: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Fits linear layers to a frozen pipeline's features and scores them on the validation set.

    Progress goes to stderr, with the time left.

    Args:
      pipeline: images to features to upsampled features.
      dataset: a prepared dataset with classes or depth maps, of `data.list_datasets()`.
      settings: of the probe.
      data_dir: where the dataset was prepared; `data.default_data_dir()` if None.
      cache_dir: where the backbone's features of all images and the sampled pixels are kept, so
        that another upsampler, a probe that was stopped, or one with another classifier does not
        compute them again. They are found by what goes in, images and labels, and by what comes out
        for the first images. None: nowhere.
      images_at_once: that are encoded and upsampled together; changes no number but by rounding.
      facts: further entries of the result, such as the backbone's name.

    Returns:
      What goes into JSON: `upsampler`, `dataset`, `settings`, `versions`, `images` (of the two
      splits), `seconds`, and for each of `protocols` its `runs`, one for a seed (`seed`; `loss`,
      the mean of each epoch; what `SegmentationCounts.compute` or `DepthSums.compute` has), with
      their `mean` and, of several, their standard deviation `std` (n - 1).

    Raises:
      ValueError: an unknown dataset, an upsampler that has no weights to give to probabilities,
        images of several sizes in one batch, too many pixels for the memory, depths that are all
        out of the range of the settings.
      DatasetNotPrepared: the message says how to prepare it.
    """
    check_whole(images_at_once=images_at_once)
    groups = value_groups(pipeline) if "probabilities" in settings.protocols else 1
    info = data.dataset_info(dataset, data_dir)
    sources = [
        data.open_source(dataset, split, data_dir)
        for split in (settings.train_split, settings.validation_split)
    ]
    train, validation = (Split(source, info, pipeline, settings) for source in sources)
    target = target_of(info, sources[0], settings)
    seconds, clock = {}, Clock()

    # ------------------------------------------------------------------------- features of training
    methods = sorted({_fitted_on(method) for method in settings.protocols})
    encode, encode_validation = (
        Encoder(split, images_at_once, cache_dir) for split in (train, validation)
    )
    _try(train, encode, groups, images_at_once, target.answers)
    rows: dict[str, Callable[[np.ndarray], tuple[Any, Any]]] = {}
    if settings.pixels_per_image is None:
        rows = {method: functools.partial(all_pixels, train, encode, method) for method in methods}
    else:
        found = sampled(train, encode, target, methods, images_at_once, cache_dir)
        for method, (x, y) in found.items():
            need(
                bool(target.known(y).any()),
                f"no pixel of {dataset!r} counts: {settings.train_split!r} has no class, or no "
                "depth between min_depth and max_depth",
            )
            rows[method] = functools.partial(_at, x, y)
    seconds["features"] = clock.lap()

    # ------------------------------------------------------------------------------------- fitting
    fitted: dict[str, list[tuple[Linear, list[float]]]] = {}
    steps = settings.epochs * -(-len(sources[0]) // settings.batch_size)
    with progress("fitting", steps * len(methods) * len(settings.seeds), "step") as bar:
        for method in methods:
            fitted[method] = [
                fit_linear(
                    rows[method],
                    len(sources[0]),
                    target,
                    settings,
                    seed=seed,
                    advance=bar.update,
                )
                for seed in settings.seeds
            ]
    del rows
    seconds["fit"] = clock.lap()

    # ------------------------------------------------------------------------------------- scoring
    stacked = {
        method: jax.tree.map(lambda *x: jnp.stack(x), *(c for c, _ in fits))
        for method, fits in fitted.items()
    }
    totals = {
        (method, seed): target.no_counts()
        for method in settings.protocols
        for seed in settings.seeds
    }
    with progress("validation", len(sources[1]), "image") as bar:
        for batch in validation.batches(images_at_once, flip=False):
            low = encode_validation(batch)
            high = None
            for method in settings.protocols:
                linear = stacked[_fitted_on(method)]
                if method == "probabilities":
                    values = answers(target, linear, low, groups)
                    values = pipeline.upsample(low, batch.images, batch.size, values=values)
                    maps = by_seed(values, len(settings.seeds), groups)
                else:
                    if high is None:
                        high = pipeline.upsample(low, batch.images, batch.size)
                    maps = read_off(target, linear, high)
                counts = jax.device_get(count(target, maps, batch.labels))
                for i, seed in enumerate(settings.seeds):
                    own = jax.tree.map(lambda x, i=i: x[i], counts)
                    totals[method, seed] = totals[method, seed].merge(own)
            bar.update(batch.filled)
    seconds["validation"] = clock.lap()

    protocols = {}
    for method in settings.protocols:
        runs = []
        for seed, (_, loss) in zip(settings.seeds, fitted[_fitted_on(method)], strict=True):
            metrics = target.metrics(totals[method, seed])
            runs.append({"seed": seed, "loss": loss} | metrics)
        protocols[method] = {"runs": runs} | statistics(runs)
    return {
        "upsampler": pipeline.name,
        "dataset": dataset,
        **(facts or {}),
        "settings": _jsonable(settings),
        "images": [len(source) for source in sources],
        "protocols": protocols,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "versions": versions(),
    }


def _try(split: Split, encode: Encoder, groups: int, at_once: int, numbers: int) -> None:
    """Upsamples the first images, so that what does not fit is said at once."""
    batch, pipeline = next(split.batches(at_once, flip=split.settings.flip)), split.pipeline
    low = encode(batch)
    if {"features", "preserved"} & set(split.settings.protocols):
        pipeline.upsample(low, batch.images, batch.size)
    if "probabilities" in split.settings.protocols:
        channels = groups * len(split.settings.seeds) * numbers
        values = jnp.zeros((*low.shape[:3], channels), jnp.float32)
        pipeline.upsample(low, batch.images, batch.size, values=values)


def _at(x: np.ndarray, y: np.ndarray, views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x[views], y[views]


def _fitted_on(method: str) -> str:
    """Which features a protocol's layer is fitted on."""
    return "upsampled" if method == "features" else "cells"


def _jsonable(settings: ProbeSettings) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(settings)))
