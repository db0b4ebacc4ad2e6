"""The pixels that a probe is fitted to: their features, computed once or in every epoch."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Num

import resfu_jax
from resfu_jax._checks import need
from resfu_jax._files import local_path
from resfu_jax.probing.images import Batch, Encoder, Split
from resfu_jax.probing.progress import progress
from resfu_jax.probing.targets import Target

PathLike = str | os.PathLike[str]


def _nearest(size: tuple[int, int], of: tuple[int, int]) -> Integer[np.ndarray, "H W"]:
    """For every pixel of a map of `size`, which of a map of size `of` its centre lies in."""
    rows, columns = ((2 * np.arange(n) + 1) * m // (2 * n) for n, m in zip(size, of, strict=True))
    return rows[:, None] * of[1] + columns


def _labels(batch: Batch, size: tuple[int, int]) -> Num[np.ndarray, "b n"]:
    """The label at the centre of every pixel of a map of this size, row after row."""
    labels = batch.labels.reshape(len(batch.labels), -1)
    return labels[:, _nearest(size, batch.labels.shape[1:]).ravel()]


@jax.jit
def _take(x: Array, pixels: Array) -> Array:
    """Pixels `(b, n)` of maps, in float32."""
    flat = x.reshape(x.shape[0], -1, x.shape[3])
    return jnp.take_along_axis(flat, pixels[..., None], axis=1).astype(jnp.float32)


def all_pixels(
    split: Split, encode: Encoder, kind: str, views: np.ndarray
) -> tuple[Float[Array, "b n c"], Num[np.ndarray, "b n"]]:
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


def sampled(
    split: Split,
    encode: Encoder,
    target: Target,
    kinds: Sequence[str],
    at_once: int,
    cache_dir: PathLike | None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Features `(views, n, C)` and labels `(views, n)` of pixels of every view.

    The pixels are drawn by the number of the view. Where fewer count, the rest is as padding.
    """
    path = None
    if cache_dir is not None:
        name = f"sampled_{_digest(split, encode, target, kinds, at_once)}.npz"
        path = local_path(cache_dir, "cache_dir") / name
        if path.exists():
            with np.load(path) as file:
                return {kind: (file[f"{kind}_x"], file[f"{kind}_y"]) for kind in kinds}
    s, found = split.settings, {}
    views, done = len(split.source) * (2 if s.flip else 1), 0
    with progress("features", views, "image") as bar:
        for batch in split.batches(at_once, flip=s.flip):
            chosen = _samples(split, encode, target, batch, kinds, done)
            for kind, (x, y) in chosen.items():
                if kind not in found:
                    shape = (views, *x.shape[1:])
                    _check_memory(shape, len(kinds))
                    found[kind] = np.zeros(shape, np.float32), np.zeros(shape[:2], y.dtype)
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
    split: Split,
    encode: Encoder,
    target: Target,
    batch: Batch,
    kinds: Sequence[str],
    first: int,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Features and labels of the pixels of a batch, whose first view has this number."""
    s, fill = split.settings, split.info.target.fill
    labels = _labels(batch, batch.size)
    pixels = np.zeros((len(labels), s.pixels_per_image or 0), np.int32)
    y = np.full(pixels.shape, fill)
    for row in range(batch.filled):
        labelled = np.flatnonzero(target.known(labels[row]))
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


def _digest(
    split: Split, encode: Encoder, target: Target, kinds: Sequence[str], at_once: int
) -> str:
    """Of all that sampled features depend on: images, backbone, settings, and the upsampler.

    The last is known by what it gives for the first images.
    """
    s = split.settings
    digest = hashlib.blake2b(digest_size=12)
    names = ("output_stride", "pixels_per_image", "flip", "cell_labels")
    known = [resfu_jax.__version__, encode.name, *kinds, *(getattr(s, name) for name in names)]
    digest.update(json.dumps(known).encode())
    batch = next(split.batches(at_once, flip=s.flip))
    for _, (x, y) in sorted(_samples(split, encode, target, batch, kinds, 0).items()):
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
