"""Probing: how much a linear classifier reads off upsampled features of a frozen backbone.

    pipeline = FeaturePipeline(backbone="vit.safetensors", upsampler="jbu")
    entry = probe(pipeline, "camvid", ProbeSettings(class_balance=0.5, seeds=(0, 1, 2)))
    entry["protocols"]["features"]["mean"]["miou"]

With F the features of an image I at the backbone's resolution, U the upsampler, and W a 1x1
classifier, the only part that learns, the class of a pixel is the largest of

    features        W U(F, I)             W fitted on upsampled features
    preserved       W U(F, I)             W fitted on features as the backbone gives them
    probabilities   U(softmax(W F), I)    the same W; U has the weights that F and I give it

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
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Num, UInt8

import resfu_jax
from resfu_jax import data, training
from resfu_jax._checks import check_whole, need
from resfu_jax._extras import extra
from resfu_jax._files import local_path
from resfu_jax._running import versions
from resfu_jax.ops.resize import resize
from resfu_jax.probing.images import Batch, Encoder, Pipeline, Split
from resfu_jax.probing.results import markdown, read_results, record
from resfu_jax.probing.settings import ProbeSettings
from resfu_jax.upsamplers import list_upsamplers, takes_values, upsampler_entry

with extra("train"):
    import optax
    from tqdm import tqdm

__all__ = [
    "Pipeline",
    "ProbeSettings",
    "fit_classifier",
    "markdown",
    "probe",
    "read_results",
    "record",
]

PathLike = str | os.PathLike[str]
Classifier = dict[str, Array]  # kernel (C, K) and bias (K,)


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
    """Fits classifiers to a frozen pipeline's features and scores them on the validation set.

    Progress goes to stderr, with the time left.

    Args:
      pipeline: images to features to upsampled features.
      dataset: a prepared dataset with labels, of `data.list_datasets()`.
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
      the mean of each epoch; what `SegmentationCounts.compute` has), with their `mean` and, of
      several, their standard deviation `std` (n - 1).

    Raises:
      ValueError: an unknown dataset, an upsampler that has no weights to give to probabilities,
        images of several sizes in one batch, too many pixels for the memory.
      DatasetNotPrepared: the message says how to prepare it.
    """
    check_whole(images_at_once=images_at_once)
    groups = _value_groups(pipeline) if "probabilities" in settings.protocols else 1
    info = data.dataset_info(dataset, data_dir)
    sources = [
        data.open_source(dataset, split, data_dir)
        for split in (settings.train_split, settings.validation_split)
    ]
    train, validation = (Split(source, info, pipeline, settings) for source in sources)
    weights = None
    if settings.class_balance:
        counts = data.label_counts(sources[0], info)
        weights = tuple(data.balanced_weights(counts, settings.class_balance).tolist())
    seconds, clock = {}, _Clock()

    # ------------------------------------------------------------------------- features of training
    methods = sorted({_fitted_on(method) for method in settings.protocols})
    encode, encode_validation = (
        Encoder(split, images_at_once, cache_dir) for split in (train, validation)
    )
    _try(train, encode, groups, images_at_once, info.num_classes)
    rows: dict[str, Callable[[np.ndarray], tuple[Any, Any]]] = {}
    if settings.pixels_per_image is None:
        rows = {method: functools.partial(_all_pixels, train, encode, method) for method in methods}
    else:
        found = _sampled(train, encode, methods, images_at_once, cache_dir)
        for method, (x, y) in found.items():
            rows[method] = functools.partial(_at, x, y)
    seconds["features"] = clock.lap()

    # ------------------------------------------------------------------------------------- fitting
    fitted: dict[str, list[tuple[Classifier, list[float]]]] = {}
    steps = settings.epochs * -(-len(sources[0]) // settings.batch_size)
    with _bar("fitting", steps * len(methods) * len(settings.seeds), "step") as bar:
        for method in methods:
            fitted[method] = [
                fit_classifier(
                    rows[method],
                    len(sources[0]),
                    info.num_classes,
                    settings,
                    seed=seed,
                    ignore_label=info.ignore_label,
                    class_weights=weights,
                    advance=bar.update,
                )
                for seed in settings.seeds
            ]
    del rows
    seconds["fit"] = clock.lap()

    # ------------------------------------------------------------------------------------- scoring
    score = functools.partial(
        _count,
        num_classes=info.num_classes,
        ignore_label=info.ignore_label,
        ratio=float(settings.dilation_ratio),
    )
    stacked = {
        method: jax.tree.map(lambda *x: jnp.stack(x), *(c for c, _ in fits))
        for method, fits in fitted.items()
    }
    totals = {
        (method, seed): training.SegmentationCounts.zeros(info.num_classes)
        for method in settings.protocols
        for seed in settings.seeds
    }
    with _bar("validation", len(sources[1]), "image") as bar:
        for batch in validation.batches(images_at_once, flip=False):
            low = encode_validation(batch)
            high = None
            for method in settings.protocols:
                classifiers = stacked[_fitted_on(method)]
                if method == "probabilities":
                    values = _probabilities(classifiers, low, groups)
                    high_p = pipeline.upsample(low, batch.images, batch.size, values=values)
                    logits = _by_seed(high_p, len(settings.seeds), groups)
                else:
                    if high is None:
                        high = pipeline.upsample(low, batch.images, batch.size)
                    logits = _logits(classifiers, high)
                counts = jax.device_get(score(logits, batch.labels))
                for i, seed in enumerate(settings.seeds):
                    own = jax.tree.map(lambda x, i=i: x[i], counts)
                    totals[method, seed] = totals[method, seed].merge(own)
            bar.update(batch.filled)
    seconds["validation"] = clock.lap()

    protocols = {}
    for method in settings.protocols:
        runs = []
        for seed, (_, loss) in zip(settings.seeds, fitted[_fitted_on(method)], strict=True):
            metrics = totals[method, seed].compute(info.class_names)
            runs.append({"seed": seed, "loss": loss} | metrics)
        protocols[method] = {"runs": runs} | _statistics(runs)
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


def fit_classifier(
    rows: Callable[[np.ndarray], tuple[Num[Any, "b n c"], Integer[Any, "b n"]]],
    images: int,
    num_classes: int,
    settings: ProbeSettings,
    *,
    seed: int,
    ignore_label: int = 255,
    class_weights: Sequence[float] | None = None,
    advance: Callable[[int], Any] = lambda steps: None,
) -> tuple[Classifier, list[float]]:
    """A 1x1 classifier fitted by AdamW under a cosine over all steps.

    It starts as PyTorch's `Conv2d(C, K, 1)`, uniform within 1 / sqrt(C). The loss of a step is the
    mean over the labelled pixels of its images.

    Args:
      rows: features and labels of pixels of some views, by their numbers. Image i has the views 2 i
        and 2 i + 1 (mirrored), or i alone without `settings.flip`.
      images: number of images.
      num_classes: K.
      settings: of these count `epochs`, `batch_size`, `learning_rate`, `weight_decay`, `flip`.
      seed: of the initial values, the order of images and the choice of views.
      ignore_label: of pixels that do not count.
      class_weights: one for each class.
      advance: is called with the number of steps that were made.

    Returns:
      Kernel `(C, K)` and bias `(K,)`; and the mean loss of every epoch.

    Raises:
      ValueError: the loss is not finite.
    """
    check_whole(images=images, num_classes=num_classes)
    steps = settings.epochs * -(-images // settings.batch_size)
    weights = None if class_weights is None else tuple(class_weights)
    decay = settings.weight_decay
    optimizer, step = _stepper(settings.learning_rate, decay, steps, ignore_label, weights)
    rng = np.random.default_rng(seed)
    classifier: Any = None
    state: Any = None
    epochs = []
    for _ in range(settings.epochs):
        losses = []
        order = rng.permutation(images)
        views = 2 * order + rng.integers(0, 2, images) if settings.flip else order
        for first in range(0, images, settings.batch_size):
            x, y = rows(views[first : first + settings.batch_size])
            if classifier is None:
                classifier = _initial(seed, x.shape[-1], num_classes)
                state = optimizer.init(classifier)
            classifier, state, loss = step(classifier, state, x, y)
            losses.append(loss)
            advance(1)
        epochs.append(float(np.mean(jax.device_get(losses))))
        need(
            math.isfinite(epochs[-1]),
            f"the loss is {epochs[-1]} in epoch {len(epochs)}: lower learning_rate (it is "
            f"{settings.learning_rate:g}), or look for features that are not finite",
        )
    return classifier, epochs


def _initial(seed: int, channels: int, num_classes: int) -> Classifier:
    """As PyTorch begins; the seed alone decides, not how many images there are."""
    rng, bound = np.random.default_rng([seed, 1]), channels**-0.5
    shapes = {"kernel": (channels, num_classes), "bias": (num_classes,)}
    draws = {name: rng.uniform(-bound, bound, shape) for name, shape in shapes.items()}
    return {name: jnp.asarray(values, jnp.float32) for name, values in draws.items()}


@functools.lru_cache(maxsize=1)  # all seeds share a program
def _stepper(
    learning_rate: float,
    weight_decay: float,
    steps: int,
    ignore_label: int,
    class_weights: tuple[float, ...] | None,
) -> tuple[optax.GradientTransformation, Callable[..., Any]]:
    """The optimiser, and a step of it."""
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    optimizer = optax.adamw(schedule, b1=0.9, b2=0.999, weight_decay=weight_decay)

    def loss_fn(classifier, x, y):
        logits = x.astype(jnp.float32) @ classifier["kernel"] + classifier["bias"][None, None]
        pixels = dict(ignore_label=ignore_label, class_weights=class_weights)
        return training.cross_entropy(logits, y, **pixels)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(classifier, state, x, y):
        loss, gradient = jax.value_and_grad(loss_fn)(classifier, x, y)
        updates, state = optimizer.update(gradient, state, classifier)
        return optax.apply_updates(classifier, updates), state, loss

    return optimizer, step


def _try(split: Split, encode: Encoder, groups: int, at_once: int, num_classes: int) -> None:
    """Upsamples the first images, so that what does not fit is said at once."""
    batch, pipeline = next(split.batches(at_once, flip=split.settings.flip)), split.pipeline
    low = encode(batch)
    if {"features", "preserved"} & set(split.settings.protocols):
        pipeline.upsample(low, batch.images, batch.size)
    if "probabilities" in split.settings.protocols:
        channels = groups * len(split.settings.seeds) * num_classes
        values = jnp.zeros((*low.shape[:3], channels), jnp.float32)
        pipeline.upsample(low, batch.images, batch.size, values=values)


# ------------------------------------------------------------------------------- pixels to fit on
def _at(x: np.ndarray, y: np.ndarray, views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x[views], y[views]


def _fitted_on(method: str) -> str:
    """Which features a protocol's classifier is fitted on."""
    return "upsampled" if method == "features" else "cells"


def _nearest(size: tuple[int, int], of: tuple[int, int]) -> Integer[np.ndarray, "H W"]:
    """For every pixel of a map of `size`, which of a map of size `of` its centre lies in."""
    rows, columns = ((2 * np.arange(n) + 1) * m // (2 * n) for n, m in zip(size, of, strict=True))
    return rows[:, None] * of[1] + columns


def _labels(batch: Batch, size: tuple[int, int]) -> UInt8[np.ndarray, "b n"]:
    """The label at the centre of every pixel of a map of this size, row after row."""
    labels = batch.labels.reshape(len(batch.labels), -1)
    return labels[:, _nearest(size, batch.labels.shape[1:]).ravel()]


@jax.jit
def _take(x: Array, pixels: Array) -> Array:
    """Pixels `(b, n)` of maps, in float32."""
    flat = x.reshape(x.shape[0], -1, x.shape[3])
    return jnp.take_along_axis(flat, pixels[..., None], axis=1).astype(jnp.float32)


def _all_pixels(
    split: Split, encode: Encoder, kind: str, views: np.ndarray
) -> tuple[Float[Array, "b n c"], UInt8[np.ndarray, "b n"]]:
    """Features and labels of all pixels of some views."""
    batch = split.batch(views.tolist())
    low = encode(batch)
    if kind == "upsampled":
        x = split.pipeline.upsample(low, batch.images, batch.size)
        return x.reshape(x.shape[0], -1, x.shape[3]), _labels(batch, batch.size)
    cells = (low.shape[1], low.shape[2])
    if split.settings.cell_labels == "centre":
        return low.reshape(low.shape[0], -1, low.shape[3]), _labels(batch, cells)
    of_pixel = np.tile(_nearest(batch.size, cells).ravel(), (len(low), 1))
    return _take(low, of_pixel), _labels(batch, batch.size)


def _sampled(
    split: Split,
    encode: Encoder,
    kinds: Sequence[str],
    at_once: int,
    cache_dir: PathLike | None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Features `(views, n, C)` and labels `(views, n)` of pixels of every view.

    The pixels are drawn by the number of the view. Where fewer are labelled, the rest is ignored.
    """
    path = None
    if cache_dir is not None:
        name = f"sampled_{_digest(split, encode, kinds, at_once)}.npz"
        path = local_path(cache_dir, "cache_dir") / name
        if path.exists():
            with np.load(path) as file:
                return {kind: (file[f"{kind}_x"], file[f"{kind}_y"]) for kind in kinds}
    s, found = split.settings, {}
    views, done = len(split.source) * (2 if s.flip else 1), 0
    with _bar("features", views, "image") as bar:
        for batch in split.batches(at_once, flip=s.flip):
            chosen = _samples(split, encode, batch, kinds, done)
            for kind, (x, y) in chosen.items():
                if kind not in found:
                    shape = (views, *x.shape[1:])
                    _check_memory(shape, len(kinds))
                    found[kind] = np.zeros(shape, np.float32), np.zeros(shape[:2], np.uint8)
                for whole, part in zip(found[kind], (x, y), strict=True):
                    need(
                        part.shape[1] == whole.shape[1],
                        "cell_labels='centre' needs images of one size: give crop, or "
                        "cell_labels='share'",
                    )
                    whole[done : done + batch.filled] = part[: batch.filled]
            done += batch.filled
            bar.update(batch.filled)
    if path is not None:
        _save(path, {f"{k}_{n}": a for k in kinds for n, a in zip("xy", found[k], strict=True)})
    return found


def _samples(
    split: Split, encode: Encoder, batch: Batch, kinds: Sequence[str], first: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Features and labels of the pixels of a batch, whose first view has this number."""
    s, ignored = split.settings, split.info.ignore_label
    labels = _labels(batch, batch.size)
    pixels = np.zeros((len(labels), s.pixels_per_image or 0), np.int32)
    y = np.full(pixels.shape, ignored, np.uint8)
    for row in range(batch.filled):
        labelled = np.flatnonzero(labels[row] != ignored)
        rng = np.random.default_rng([0, first + row])
        chosen = rng.permutation(labelled)[: s.pixels_per_image]
        pixels[row, : len(chosen)], y[row, : len(chosen)] = chosen, labels[row, chosen]

    low, result = encode(batch), {}
    cells = (low.shape[1], low.shape[2])
    for kind in kinds:
        if kind == "upsampled":
            x = _take(split.pipeline.upsample(low, batch.images, batch.size), pixels)
            result[kind] = np.asarray(x), y
        elif s.cell_labels == "share":
            of_pixel = _nearest(batch.size, cells).ravel().astype(np.int32)
            result[kind] = np.asarray(_take(low, of_pixel[pixels])), y
        else:
            x = np.asarray(low, np.float32).reshape(len(labels), -1, low.shape[3])
            result[kind] = x, _labels(batch, cells)
    return result


def _check_memory(shape: tuple[int, ...], stores: int) -> None:
    """Said before hours of work, not after."""
    needed = 4 * stores * int(np.prod(shape))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    need(
        needed < 0.8 * memory,
        f"pixels_per_image={shape[1]} of {shape[0]} views need {needed / 1e9:.0f} GB, and the "
        f"machine has {memory / 1e9:.0f}: fewer, flip=False, one protocol at a time, or None, "
        "which computes features in every epoch",
    )


def _digest(split: Split, encode: Encoder, kinds: Sequence[str], at_once: int) -> str:
    """Of all that sampled features depend on: images, backbone, settings, and the upsampler.

    The last is known by what it gives for the first images.
    """
    s = split.settings
    digest = hashlib.blake2b(digest_size=12)
    names = ("output_stride", "pixels_per_image", "flip", "cell_labels")
    known = [resfu_jax.__version__, encode.name, *kinds, *(getattr(s, name) for name in names)]
    digest.update(json.dumps(known).encode())
    batch = next(split.batches(at_once, flip=s.flip))
    for _, (x, y) in sorted(_samples(split, encode, batch, kinds, 0).items()):
        for a in (x, y):
            digest.update(np.ascontiguousarray(a[: batch.filled]).tobytes())
    return digest.hexdigest()


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **cast(Any, arrays))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------- classifying
@jax.jit
def _logits(classifiers: Classifier, x: Float[Array, "b h w c"]) -> Float[Array, "s b h w k"]:
    """Those of every classifier. (One product: an `einsum` is several times slower on a CPU.)"""
    kernels = jnp.moveaxis(classifiers["kernel"], 0, 1)  # (C, s, K)
    seeds, classes = kernels.shape[1:]
    y = x.astype(jnp.float32).reshape(-1, x.shape[3]) @ kernels.reshape(x.shape[3], -1)
    y = y + classifiers["bias"].reshape(1, -1)
    return jnp.moveaxis(y.reshape(*x.shape[:3], seeds, classes), 3, 0)


@functools.partial(jax.jit, static_argnums=2)
def _probabilities(classifiers: Classifier, low: Array, groups: int) -> Float[Array, "b h w d"]:
    """Those of all seeds, once for each group of channels that has weights of its own."""
    p = jnp.moveaxis(jax.nn.softmax(_logits(classifiers, low)), 0, 3)
    return jnp.tile(p.reshape(*p.shape[:3], -1), groups)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _by_seed(p: Float[Array, "b h w d"], seeds: int, groups: int) -> Float[Array, "s b h w k"]:
    """The mean over groups, seeds first."""
    p = p.astype(jnp.float32).reshape(*p.shape[:3], groups, seeds, -1).mean(axis=3)
    return jnp.moveaxis(p, 3, 0)


@functools.partial(jax.jit, static_argnames=("num_classes", "ignore_label", "ratio"))
def _count(logits, labels, *, num_classes: int, ignore_label: int, ratio: float):
    """Counts of every seed."""

    def of_seed(logits):
        logits = resize(logits, labels.shape[1:3], method="bilinear")
        return training.count(
            jnp.argmax(logits, axis=-1).astype(jnp.uint8),
            labels,
            num_classes=num_classes,
            ignore_label=ignore_label,
            dilation_ratio=ratio,
        )

    return jax.lax.map(of_seed, logits)


def _value_groups(pipeline: Pipeline) -> int:
    """Groups of channels with weights of their own.

    Probabilities get the mean of all groups' weights.

    Raises:
      ValueError: the upsampler has no weights that could be given to others than the features.
    """
    known = (name for name in list_upsamplers() if takes_values(upsampler_entry(name).cls))
    need(
        pipeline.value_groups > 0,
        f"protocols cannot be 'probabilities' for {pipeline.name!r}: its output is more than a sum "
        "of features with weights, which probabilities could be given; members that have them: "
        f"{', '.join(known)}",
    )
    return pipeline.value_groups


def _statistics(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of all metrics that every run has."""
    names = [n for n in runs[0] if n not in ("seed", "loss") and all(n in run for run in runs)]
    values = {name: [run[name] for run in runs] for name in names}
    result = {"mean": {name: float(np.mean(v)) for name, v in values.items()}}
    if len(runs) > 1:
        result["std"] = {name: float(np.std(v, ddof=1)) for name, v in values.items()}
    return result


def _jsonable(settings: ProbeSettings) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(settings)))


# ----------------------------------------------------------------------------------------- progress
class _Clock:
    """Seconds between laps."""

    def __init__(self):
        self._start = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        self._start, seconds = now, now - self._start
        return seconds


def _bar(what: str, total: int, unit: str) -> Any:
    """Progress and time left; in a log file the bar is written anew every half minute."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        file=sys.stderr,
        dynamic_ncols=terminal,
        mininterval=0.1 if terminal else 30,
        leave=True,
    )
