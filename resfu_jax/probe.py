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
import io
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Num, UInt8

import resfu_jax
from resfu_jax import data, training
from resfu_jax._checks import check_whole, need
from resfu_jax._extras import extra
from resfu_jax._files import local_path, write_whole
from resfu_jax._probe_settings import ProbeSettings
from resfu_jax.data import transforms
from resfu_jax.ops.resize import resize
from resfu_jax.upsamplers import list_upsamplers, takes_values, upsampler_entry

with extra("train"):
    import optax
    from PIL import Image
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


@runtime_checkable
class Pipeline(Protocol):
    """What is probed: of a `FeaturePipeline`, or of anything that has its methods.

    Attributes:
      name: of the upsampler.
      multiple: sides of the images that `encode` takes are multiples of it.
      value_groups: blocks of channels that the upsampler gives weights of their own, for `values`;
        0 if its output is more than a sum of features with weights.
    """

    name: str
    multiple: int
    value_groups: int

    def encode(self, images: Num[np.ndarray, "b H W 3"]) -> Float[Array, "b h w c"]:
        """Features of images in 0 .. 255."""
        ...

    def upsample(
        self,
        features: Float[Array, "b h w c"],
        images: Num[np.ndarray, "b _H _W 3"],
        size: tuple[int, int],
        *,
        values: Float[Array, "b h w d"] | None = None,
    ) -> Float[Array, "b H W d"]:
        """Features, or values with the features' weights, at a size; images guide, of any size."""
        ...


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
    train, validation = (_Split(source, info, pipeline, settings) for source in sources)
    weights = None
    if settings.class_balance:
        counts = data.label_counts(sources[0], info)
        weights = tuple(data.balanced_weights(counts, settings.class_balance).tolist())
    seconds, clock = {}, _Clock()

    # ------------------------------------------------------------------------- features of training
    methods = sorted({_fitted_on(method) for method in settings.protocols})
    encode, encode_validation = (
        _Encoder(split, images_at_once, cache_dir) for split in (train, validation)
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
        "versions": {
            "resfu_jax": resfu_jax.__version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
            "device": jax.devices()[0].device_kind,
        },
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


# --------------------------------------------------------------------------------------- the images
class _Batch(NamedTuple):
    """Images of one size."""

    inputs: UInt8[np.ndarray, "b Hi Wi 3"]  # what the backbone sees
    images: UInt8[np.ndarray, "b H W 3"]  # what guides
    labels: UInt8[np.ndarray, "b H W"]
    size: tuple[int, int]  # of the upsampled map
    views: tuple[tuple[int, bool], ...]  # example, mirrored; further rows repeat the last one

    @property
    def filled(self) -> int:
        return len(self.views)


@dataclasses.dataclass(frozen=True)
class _Split:
    """A split as the pipeline sees it."""

    source: data.Source
    info: data.DatasetInfo
    pipeline: Pipeline
    settings: ProbeSettings

    def read(self, index: int, mirrored: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the backbone sees, what guides, and the labels."""
        example, s = self.source[index], self.settings
        image, label = transforms.decode(example, self.info, self.source.where(example))
        width, height = image.size
        box, size = (0.0, 0.0, float(width), float(height)), (width, height)
        if s.crop is not None:
            side = min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            box, size = (left, top, left + side, top + side), (s.crop, s.crop)
        m = self.pipeline.multiple
        seen = [max(1, round(n * s.scale / m)) * m for n in size]
        pictures = (
            image.resize((seen[0], seen[1]), Image.Resampling.BILINEAR, box),
            image.resize(size, Image.Resampling.BILINEAR, box),
            label.resize(size, Image.Resampling.NEAREST, box),
        )
        arrays = [np.asarray(picture) for picture in pictures]
        x, y, z = (np.ascontiguousarray(a[:, ::-1]) if mirrored else a for a in arrays)
        return x, y, z

    def batch(self, views: Sequence[int]) -> _Batch:
        """These views of images that learn, which must be of one size."""
        places = [divmod(view, 2) if self.settings.flip else (view, 0) for view in views]
        examples = [self.read(index, mirrored == 1) for index, mirrored in places]
        sizes = {label.shape for _, _, label in examples}
        need(
            len(sizes) == 1,
            "pixels_per_image=None fits whole images of one size at once, and there are "
            f"{' and '.join(f'{h}x{w}' for h, w in sorted(sizes))}: give crop, or batch_size=1",
        )
        return self._stack([(i, m == 1) for i, m in places], examples, len(examples))

    def batches(self, at_once: int, *, flip: bool) -> Iterator[_Batch]:
        """All views in order. Fewer of a size than `at_once` are filled up: one compilation."""
        waiting: list[Any] = []
        places: list[tuple[int, bool]] = []
        for index in range(len(self.source)):
            for mirrored in (False, True) if flip else (False,):
                example = self.read(index, mirrored)
                full = len(waiting) == at_once
                if waiting and (full or waiting[0][2].shape != example[2].shape):
                    yield self._stack(places, waiting, at_once)
                    waiting, places = [], []
                waiting.append(example)
                places.append((index, mirrored))
        yield self._stack(places, waiting, at_once)

    def _stack(self, views: list[tuple[int, bool]], examples: list[Any], rows: int) -> _Batch:
        filled = examples + examples[-1:] * (rows - len(examples))
        inputs, images, labels = (np.stack(arrays) for arrays in zip(*filled, strict=True))
        labels[len(examples) :] = self.info.ignore_label
        stride = self.settings.output_stride
        h, w = inputs.shape[1:3] if stride else labels.shape[1:3]
        size = (h // stride, w // stride) if stride else (h, w)
        return _Batch(inputs, images, labels, size, tuple(views))


class _Encoder:
    """The backbone's features of batches, kept on disk where there is a folder for them.

    Other upsamplers, protocols and settings of the classifier find them there: a file for each
    view, in a folder for what the images are, and what the backbone gives for the first of them.
    """

    def __init__(self, split: _Split, at_once: int, cache_dir: PathLike | None):
        self._pipeline, self._folder = split.pipeline, None
        if cache_dir is None:
            return
        s, digest = split.settings, hashlib.blake2b(digest_size=12)
        digest.update(json.dumps([s.crop, s.scale, split.pipeline.multiple]).encode())
        for example in split.source:
            for name in ("image", "label"):
                digest.update(hashlib.blake2b(example[name]).digest())
        first = next(split.batches(at_once, flip=False))
        low = np.asarray(split.pipeline.encode(first.inputs), np.float32)
        digest.update(low[:1].tobytes())
        self._folder = local_path(cache_dir, "cache_dir") / f"encoded_{digest.hexdigest()}"
        self._folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, batch: _Batch) -> Any:
        """Features `(b, h, w, C)`."""
        if self._folder is None:
            return self._pipeline.encode(batch.inputs)
        paths = [self._folder / f"{i}{'_mirrored' if m else ''}.npy" for i, m in batch.views]
        if not all(path.exists() for path in paths):
            low = np.asarray(self._pipeline.encode(batch.inputs), np.float32)
            for path, x in zip(paths, low, strict=False):
                content = io.BytesIO()
                np.save(content, x)
                write_whole(path, content.getbuffer())
        rows = [np.load(path) for path in paths]
        return jnp.asarray(np.stack(rows + rows[-1:] * (len(batch.inputs) - len(rows))))

    @property
    def name(self) -> str:
        """Of the folder: stands for the images and the backbone."""
        return "" if self._folder is None else self._folder.name


def _try(split: _Split, encode: _Encoder, groups: int, at_once: int, num_classes: int) -> None:
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


def _labels(batch: _Batch, size: tuple[int, int]) -> UInt8[np.ndarray, "b n"]:
    """The label at the centre of every pixel of a map of this size, row after row."""
    labels = batch.labels.reshape(len(batch.labels), -1)
    return labels[:, _nearest(size, batch.labels.shape[1:]).ravel()]


@jax.jit
def _take(x: Array, pixels: Array) -> Array:
    """Pixels `(b, n)` of maps, in float32."""
    flat = x.reshape(x.shape[0], -1, x.shape[3])
    return jnp.take_along_axis(flat, pixels[..., None], axis=1).astype(jnp.float32)


def _all_pixels(
    split: _Split, encode: _Encoder, kind: str, views: np.ndarray
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
    split: _Split,
    encode: _Encoder,
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
    split: _Split, encode: _Encoder, batch: _Batch, kinds: Sequence[str], first: int
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


def _digest(split: _Split, encode: _Encoder, kinds: Sequence[str], at_once: int) -> str:
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


# ------------------------------------------------------------------------------------------ results
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


def record(path: PathLike, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Adds a probe to a file of results, `{"probes": [...]}`, and returns all that it holds.

    An entry of the same upsampler, dataset, settings and facts is replaced.

    Args:
      path: a JSON file; it need not exist.
      entry: of `probe`.

    Raises:
      ValueError: the file holds something else.
    """
    file = local_path(path, "path")
    probes = read_results(file) if file.exists() else []
    changing = ("protocols", "seconds", "versions")

    def key(entry: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in entry.items() if name not in changing}

    probes = [other for other in probes if key(other) != key(entry)] + [entry]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps({"probes": probes}, indent=1) + "\n")
    return probes


def read_results(path: PathLike) -> list[dict[str, Any]]:
    """The entries of a file that `record` wrote.

    Raises:
      ValueError: the file holds something else.
    """
    file = local_path(path, "path")
    try:
        probes = json.loads(file.read_text())["probes"]
        fits = all("protocols" in entry and "upsampler" in entry for entry in probes)
    except (ValueError, KeyError, TypeError):
        fits = False
    need(fits, f"{file} does not hold results of a probe; give another file")
    return probes


def markdown(probes: Sequence[dict[str, Any]], classes: Sequence[str] = ()) -> str:
    """A table of results: a row for every upsampler and protocol, in the order of `probes`.

    Args:
      probes: entries of `probe`.
      classes: names of classes whose IoU is shown, too.

    Raises:
      ValueError: a class that no entry has.
    """
    names = {"miou": "mIoU", "boundary_iou": "boundary IoU", "pixel_accuracy": "accuracy"}
    for name in classes:
        has = any(f"iou/{name}" in p["mean"] for e in probes for p in e["protocols"].values())
        need(has, f"classes must be names of classes that were scored, got {name!r}")
        names[f"iou/{name}"] = name
    lines = [
        f"| upsampler | dataset | protocol | {' | '.join(names.values())} | seeds |",
        "|---" * (len(names) + 4) + "|",
    ]
    for entry in probes:
        for method, result in entry["protocols"].items():
            cells = []
            for name in names:
                mean, std = (result.get(kind, {}).get(name) for kind in ("mean", "std"))
                text = "-" if mean is None else f"{mean:.3f}"
                cells.append(text if std is None else f"{text} ± {std:.3f}")
            start = f"| {entry['upsampler']} | {entry['dataset']} | {method} "
            lines.append(f"{start}| {' | '.join(cells)} | {len(result['runs'])} |")
    return "\n".join(lines) + "\n"


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
