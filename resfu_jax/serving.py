"""Runs exported models: one file without model code, that works alone.

    model = load_exported("model.zip")
    labels = model(images)

It needs jax, numpy and safetensors, nothing else of this package, and no Flax: copy it next to a
server, or import it as `resfu_jax.serving`. The files are written by `resfu_jax.export`:

    model.stablehlo      f(weights, *inputs), serialised by `jax.export`
    weights.safetensors  the weights by name
    meta.json            what the inputs and outputs are; classes, colours, versions

`Exported.call` is the whole of it in plain JAX.
"""

import json
import os
import zipfile
from typing import Any

import jax
import numpy as np
import safetensors

FORMAT = 1
"""Version of the layout of the files."""

PROGRAM, WEIGHTS, META = "model.stablehlo", "weights.safetensors", "meta.json"


class Exported:
    """A model from a file of `resfu_jax.export`, ready to call.

    It may be called from several threads. JAX compiles once for every shape of the inputs.

    Attributes:
      meta: what `meta.json` says; `class_names` and `palette` among it, empty if unknown.
      exported: the `jax.export.Exported` program, a function of weights and inputs.
      weights: the weights by name, on the device.
    """

    def __init__(
        self,
        exported: jax.export.Exported,
        weights: dict[str, np.ndarray],
        meta: dict[str, Any],
        *,
        multiple: int | None = None,
    ):
        self.exported, self.meta = exported, meta
        self._multiple = meta["pad"] and meta["pad"]["multiple"]
        if multiple is not None:
            if not self._multiple or multiple < 1 or multiple % self._multiple:
                needs = f"a multiple of {self._multiple}" if self._multiple else "None here"
                raise ValueError(f"multiple must be {needs}, got {multiple}")
            self._multiple = multiple
        platform = jax.export.default_export_platform()
        if platform not in exported.platforms:
            raise ValueError(
                f"the model was exported for {', '.join(exported.platforms)}, and JAX runs on "
                f"{platform} here: export it with platforms=(..., {platform!r})"
            )
        self.weights = jax.device_put(weights)
        self._call = jax.jit(exported.call)
        _, *self._inputs = jax.tree.unflatten(exported.in_tree, exported.in_avals)[0]

    def call(self, *inputs: jax.typing.ArrayLike) -> Any:
        """The program as it was exported, for other JAX code, also in `jit`: arrays to arrays."""
        return self._call(self.weights, *inputs)

    def __call__(self, *inputs: jax.typing.ArrayLike) -> Any:
        """The outputs as NumPy arrays.

        Where the file says so (`meta["pad"]`), images are padded at the bottom and right with the
        mean colour to sides that the model takes, and the outputs cropped.

        Raises:
          ValueError: inputs of another number, type or shape.
        """
        if len(inputs) != len(self._inputs):
            raise ValueError(f"the model takes {self._takes()}, got {len(inputs)} arrays")
        inputs = [x if isinstance(x, jax.Array) else np.asarray(x) for x in inputs]
        for x, aval in zip(inputs, self._inputs, strict=True):
            fixed = [(i, n) for i, n in enumerate(aval.shape) if isinstance(n, int)]
            if self.meta["pad"]:
                fixed = [(i, n) for i, n in fixed if i not in (1, 2)]
            if (
                x.dtype != aval.dtype
                or x.ndim != len(aval.shape)
                or 0 in x.shape
                or any(x.shape[i] != n for i, n in fixed)
            ):
                raise ValueError(f"the model takes {self._takes()}, got {x.dtype}{list(x.shape)}")
        if not self.meta["pad"]:
            return jax.tree.map(np.asarray, self.call(*inputs))
        (images,) = inputs
        height, width = images.shape[1:3]
        outputs = self.call(self._padded(np.asarray(images)))
        return jax.tree.map(lambda y: np.asarray(y)[:, :height, :width], outputs)

    def _padded(self, images: np.ndarray) -> np.ndarray:
        wanted = []
        for n, side in zip(images.shape[1:3], self._inputs[0].shape[1:3], strict=True):
            if isinstance(side, int) and n > side:
                raise ValueError(
                    f"the model takes {self._takes()}, or smaller images, got {images.shape}"
                )
            m = self._multiple
            wanted.append(side if isinstance(side, int) else -(-n // m) * m)
        if tuple(wanted) == images.shape[1:3]:
            return images
        padded = np.empty((len(images), *wanted, 3), images.dtype)
        padded[:] = np.asarray(self.meta["pad"]["color"], images.dtype)
        padded[:, : images.shape[1], : images.shape[2]] = images
        return padded

    def _takes(self) -> str:
        return " and ".join(f"{name} {spec}" for name, spec in self.meta["inputs"].items())


def load_exported(path: str | os.PathLike[str], *, multiple: int | None = None) -> Exported:
    """Reads a file of `resfu_jax.export`.

    Args:
      path: the file.
      multiple: pad images to sides that are multiples of this instead of the file's own number,
        which must divide it. Larger means fewer shapes to compile, and more padding to compute.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no such file, or does not fit this machine or this version of JAX.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            meta = json.loads(archive.read(META))
            if meta["format"] != FORMAT:
                raise ValueError(f"has format {meta['format']}, this loader reads {FORMAT}")
            program, weights = bytearray(archive.read(PROGRAM)), archive.read(WEIGHTS)
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a file of resfu_jax.export: {error}") from error
    try:
        exported = jax.export.deserialize(program)
    except Exception as error:  # flatbuffers and MLIR raise their own
        raise ValueError(
            f"{path} was exported with JAX {meta['jax']}, which JAX {jax.__version__} here does "
            f"not read: {error}"
        ) from error
    return Exported(exported, _arrays(weights, exported), meta, multiple=multiple)


def _arrays(data: bytes, exported: jax.export.Exported) -> dict[str, np.ndarray]:
    """Like `safetensors.numpy.load`, which has no bfloat16."""
    avals = jax.tree.unflatten(exported.in_tree, exported.in_avals)[0][0]
    return {
        name: np.frombuffer(entry["data"], avals[name].dtype).reshape(entry["shape"])
        for name, entry in safetensors.deserialize(data)
    }
