"""Features of a frozen backbone, computed once for every image and kept on disk."""

import hashlib
import io
import os
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jaxtyping import UInt8

from resfu_jax._files import local_path, write_whole
from resfu_jax.data import default_data_dir
from resfu_jax.model import SegmentationModel
from resfu_jax.training.config import Config
from resfu_jax.training.devices import Layout
from resfu_jax.training.state import State, merge_model

Path = str | os.PathLike[str]


class FeatureCache:
    """`model.features(images)`, read back instead of computed for images met before.

    An image is known by its pixels, the backbone by its compiled program and its weights, so
    nothing stale is ever found; an augmented image is another image. A file holds the maps of one
    image; one that is damaged is written anew.

    Args:
      directory: where features are kept.
      model: its backbone must be frozen. Its arrays are copied.
      batch_size: images computed at once.

    Raises:
      ValueError: the backbone is not frozen, or the directory is not one of this machine.
    """

    def __init__(self, directory: Path, model: SegmentationModel, *, batch_size: int = 4):
        if not model.frozen:
            raise ValueError("model.frozen must be True: features of a backbone that learns change")
        graphdef, state = nnx.split(model)
        state = nnx.as_pure(state)
        # Copies: the training step donates its arrays. The head's are not needed, only its shapes.
        self._state = {"backbone": jax.tree.map(_copy, state.pop("backbone"))}
        head = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)

        def features(state: dict, images: jax.Array) -> tuple[jax.Array, ...]:
            return nnx.merge(graphdef, head | state).features(images)

        self._features = jax.jit(features)
        self._root = local_path(directory, "directory")
        self._batch_size = batch_size
        self._folders: dict[tuple[int, ...], pathlib.Path] = {}

    def __call__(self, images: UInt8[np.ndarray, "b h w 3"]) -> tuple[np.ndarray, ...]:
        """The feature maps of a batch, as `model.features(images)` returns them."""
        folder = self._folder(images.shape[1:])
        paths = [folder / f"{_digest(image)}.npz" for image in images]
        rows = [_read(path) for path in paths]
        new = [i for i, row in enumerate(rows) if row is None]
        for start in range(0, len(new), self._batch_size):
            some = new[start : start + self._batch_size]
            # Always the same number of images: one compilation.
            filled = some + some[-1:] * (self._batch_size - len(some))
            maps = jax.device_get(self._features(self._state, images[np.array(filled)]))
            for row, i in enumerate(some):
                found = [x[row] for x in maps]
                rows[i] = found
                _write(paths[i], found)
        return tuple(np.stack(maps) for maps in zip(*rows, strict=True))

    def _folder(self, size: tuple[int, ...]) -> pathlib.Path:
        """The folder of this backbone for images of this size."""
        if size not in self._folders:
            images = jax.ShapeDtypeStruct((self._batch_size, *size), jnp.uint8)
            program = self._features.lower(self._state, images).as_text()
            digest = hashlib.blake2b(program.encode(), digest_size=12)
            for leaf in jax.tree.leaves(self._state):
                if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                    digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
            self._folders[size] = self._root / digest.hexdigest()
            self._folders[size].mkdir(parents=True, exist_ok=True)
        return self._folders[size]


def feature_lookup(
    config: Config, layout: Layout, graphdef: nnx.GraphDef, state: State
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What adds to a batch the backbone's features, from a cache beside the run's dataset.

    Where the config does not ask for a cache, batches stay as they are.
    """
    if not config.model.backbone.cache_features:
        return lambda batch: batch
    directory = pathlib.Path(config.data.dir or default_data_dir()) / "features"
    whole = jax.jit(lambda x: x, out_shardings=layout.replicated)
    params, rest = whole((state["params"], state["rest"]))
    cache = FeatureCache(directory, merge_model(graphdef, params, rest))
    return lambda batch: batch | {"features": cache(batch["image"])}


def _copy(x: jax.Array) -> jax.Array:
    """On this process alone; the array is the same in all."""
    return jnp.array(x.addressable_data(0))


def _digest(image: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).hexdigest()


def _write(path: pathlib.Path, maps: list[np.ndarray]) -> None:
    # NumPy's files do not know bfloat16: types go into the names.
    arrays: dict[str, Any] = {
        f"{i} {x.dtype}": np.ascontiguousarray(x).view(np.uint8) for i, x in enumerate(maps)
    }
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_whole(path, content.getbuffer())


def _read(path: pathlib.Path) -> list[np.ndarray] | None:
    """The maps; None if there is no such file, or it is damaged."""
    try:
        with zipfile.ZipFile(path) as file:
            # `read` compares checksums; `np.load` of the file itself would not read to their end.
            members = {name.removesuffix(".npy"): file.read(name) for name in file.namelist()}
        return [
            np.load(io.BytesIO(content)).view(jnp.dtype(name.split()[1]))
            for name, content in members.items()
        ]
    except FileNotFoundError:
        return None
    except Exception as error:  # A flipped bit may lead to any of a dozen.
        logging.warning("%s is damaged (%s); it is computed again", path, error)
        return None
