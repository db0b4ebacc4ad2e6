"""Runs exported models: one file without model code, that works alone.

    model = load_exported("model.zip")
    labels = model(images)

It needs jax, numpy, safetensors and flatbuffers, nothing else of this package, and no Flax: copy it
next to a server, or import it as `resfu_jax.serving`. (Pillow, too, for models whose images are
resized.) The files are written by `resfu_jax.export`:

    model.stablehlo      f(weights, *inputs), serialised by `jax.export`
    weights.safetensors  the weights by name
    meta.json            what the inputs and outputs are; preprocessing, classes, colours, versions

`Exported.call` is the whole of it in plain JAX. A file is a program: load those of whom you trust.
"""

import dataclasses
import itertools
import json
import math
import os
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import safetensors

FORMAT = 3
"""Version of the layout of the files."""

PROGRAM, WEIGHTS, META = "model.stablehlo", "weights.safetensors", "meta.json"

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


def is_integer(value: Any) -> bool:
    """Whether it is a whole number; True and False are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Whether it is a finite real number; True and False are none."""
    real = isinstance(value, int | float | np.integer | np.floating)
    return real and not isinstance(value, bool) and math.isfinite(value)


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """What is done to images before a model sees them, and undone afterwards.

    Training, evaluation, sliding windows, `Predictor`, exported files and the server all hold this
    one object, so that none of them can see an image otherwise than another:

        orient:    what is read from files is turned as their EXIF data say, before anything else
        resize:    to `resize_to`, times `scale`, antialiased bilinear
        pad:       at the bottom and right, with the mean colour, rounded: what is seen whole, to
                   `padded_size`; what is seen in windows and is smaller than one, to a window
        normalise: (image - mean) / std, inside the model

    It is here, not in a file of its own, for the sake of servers that copy this file; the package
    takes it from `resfu_jax.preprocess`.

    Args:
      scale: factor by which every image is resized.
      resize_to: (short, long): before that, to `short` pixels of the shorter side, or fewer where
        the longer would exceed `long`. None: not.
      mean: mean of the three colours, in 0 .. 255.
      std: their standard deviation.
      multiple: padded sides are multiples of it: what all strides of the backbone divide.
      growth: ratio of a padded side to the next smaller one, see `padded_side`. Larger means fewer
        shapes to compile, and more padding. 1 pads to the next multiple only.
      orientation: turn what is read from files as their EXIF data say, and so as viewers show it.
        False: leave it as it is stored. Arrays are never turned.

    Raises:
      ValueError: an argument is out of range. The message starts with its name.
    """

    scale: float = 1.0
    resize_to: Sequence[int] | None = None
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    multiple: int = 32
    growth: float = 1.25
    orientation: bool = True

    def __post_init__(self):
        def keep(name: str, fits: bool, need: str, convert: Any) -> None:
            value = getattr(self, name)
            if not fits:
                raise ValueError(f"{name} must be {need}, got {value!r}")
            object.__setattr__(self, name, convert(value))

        def three(values: Any) -> bool:
            return (
                isinstance(values, tuple | list) and len(values) == 3 and all(map(is_real, values))
            )

        keep("scale", is_real(self.scale) and self.scale > 0, "positive", float)
        if (sides := self.resize_to) is not None:
            fits = isinstance(sides, tuple | list) and len(sides) == 2
            fits = fits and all(map(is_integer, sides)) and 0 < sides[0] <= sides[1]
            need = "(short, long) with 0 < short <= long"
            keep("resize_to", fits, need, lambda pair: tuple(map(int, pair)))

        def floats(values: Any) -> tuple[float, ...]:
            return tuple(map(float, values))

        fits = three(self.mean) and all(0 <= value <= 255 for value in self.mean)
        keep("mean", fits, "three real numbers in 0 .. 255", floats)
        fits = three(self.std) and all(value > 0 for value in self.std)
        keep("std", fits, "three positive real numbers", floats)
        fits = is_integer(self.multiple) and self.multiple >= 1
        keep("multiple", fits, "at least 1, a whole number", int)
        keep("growth", is_real(self.growth) and self.growth >= 1, "at least 1", float)
        keep("orientation", isinstance(self.orientation, bool), "True or False", bool)

    @property
    def pad_color(self) -> tuple[int, int, int]:
        """The mean colour, rounded: about zero once it is normalised."""
        red, green, blue = map(round, self.mean)
        return red, green, blue

    @property
    def resizes(self) -> bool:
        """Whether images may change their size before the padding."""
        return self.scale != 1 or self.resize_to is not None

    def resize_scale(self, height: int, width: int) -> float:
        """The factor by which an image of this size is resized."""
        if self.resize_to is None:
            return self.scale
        short, long = self.resize_to
        return self.scale * min(short / min(height, width), long / max(height, width))

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """An image's height and width at the size at which the model sees it, without padding."""
        scale = self.resize_scale(height, width)
        return max(1, round(scale * height)), max(1, round(scale * width))

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """What an image of this height and width, after resizing, is padded to."""
        return self.padded_side(height), self.padded_side(width)

    def padded_side(self, n: int) -> int:
        """The first s_i that is not smaller than n, of

        s_0 = m,    s_{i+1} = the multiple of m that is not smaller than growth * s_i, nor s_i + m

        with m the multiple: a side alone decides what it is padded to, and there are few.
        """
        m = side = self.multiple
        while side < n:
            if self.growth == 1:
                return -(-n // m) * m
            side = m * max(side // m + 1, math.ceil(side * self.growth / m))
        return side

    def resize(self, pixels: np.ndarray) -> np.ndarray:
        """An image `(h, w, 3)` of uint8 at the size at which the model sees it."""
        size = self.resized_size(*pixels.shape[:2])
        if size == pixels.shape[:2]:
            return pixels
        from PIL import Image

        return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))

    @staticmethod
    def resize_back(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Maps `(h, w, k)` of float32, as probabilities, at the size of the image, as it is."""
        if maps.shape[:2] == tuple(size):
            return maps
        from PIL import Image

        planes = [
            Image.fromarray(np.ascontiguousarray(maps[..., k])).resize(
                size[::-1], Image.Resampling.BILINEAR
            )
            for k in range(maps.shape[-1])
        ]
        return np.stack([np.asarray(plane) for plane in planes], axis=-1)


class Exported:
    """A model from a file of `resfu_jax.export`, ready to call.

    It may be called from several threads. JAX compiles once for every shape of the inputs.

    Attributes:
      meta: what `meta.json` says; `class_names` and `palette` among it, empty if unknown.
      preprocess: what is done to images; None for modules that are no models of images.
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
        growth: float | None = None,
    ):
        self.exported, self.meta = exported, meta
        self.preprocess = meta["preprocess"] and Preprocess(**meta["preprocess"])
        self._windows = meta["windows"]
        changes = {"multiple": multiple, "growth": growth}
        changes = {name: value for name, value in changes.items() if value is not None}
        if changes and not self.preprocess:
            raise ValueError(f"{', '.join(changes)} must be None here: nothing is padded")
        if changes:
            ours = self.preprocess.multiple
            self.preprocess = dataclasses.replace(self.preprocess, **changes)
            if self.preprocess.multiple % ours:
                raise ValueError(f"multiple must be a multiple of {ours}, got {multiple}")
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

        Where the file says so (`preprocess`), images are resized, padded at the bottom and right
        with the mean colour to sides that the model takes, and the outputs brought back to the size
        of the images: labels are decided there.

        Raises:
          ValueError: inputs of another number, type or shape.
        """
        if len(inputs) != len(self._inputs):
            given = f"{len(inputs)} array{'s' * (len(inputs) != 1)}"
            raise ValueError(f"the model takes {self._takes()}, got {given}")
        inputs = [x if isinstance(x, jax.Array) else np.asarray(x) for x in inputs]
        for x, aval in zip(inputs, self._inputs, strict=True):
            fixed = [(i, n) for i, n in enumerate(aval.shape) if isinstance(n, int)]
            if self.preprocess:
                fixed = [(i, n) for i, n in fixed if i not in (1, 2)]
            if (
                x.dtype != aval.dtype
                or x.ndim != len(aval.shape)
                or 0 in x.shape
                or any(x.shape[i] != n for i, n in fixed)
            ):
                raise ValueError(f"the model takes {self._takes()}, got {x.dtype}{list(x.shape)}")
        if not self.preprocess:
            return jax.tree.map(np.asarray, self.call(*inputs))
        images = np.asarray(inputs[0])
        size = images.shape[1:3]
        padded = self.padded_size(*size)  # refuses images that are too large
        height, width = self.preprocess.resized_size(*size)
        seen = images
        if (height, width) != padded or (height, width) != size:
            seen = np.empty((len(images), *padded, 3), np.uint8)
            seen[:] = self.preprocess.pad_color
            for row, image in zip(seen, images, strict=True):
                row[:height, :width] = self.preprocess.resize(image)
        output = self._mean_of_windows(seen) if self._windows else np.asarray(self.call(seen))
        output = output[:, :height, :width]
        kind, resizes = self.meta["output"], self.preprocess.resizes
        if self._windows and (kind == "probabilities" or (kind == "labels" and resizes)):
            output = np.exp(output - output.max(axis=-1, keepdims=True))
            output /= output.sum(axis=-1, keepdims=True)
        if resizes:
            output = np.stack([self.preprocess.resize_back(one, size) for one in output])
        if kind != "labels" or output.ndim == 3:
            return output
        return output.argmax(axis=-1).astype(np.uint8 if output.shape[-1] <= 256 else np.int32)

    def _mean_of_windows(self, images: np.ndarray) -> np.ndarray:
        """Logits, as `resfu_jax.inference.slide` takes them from overlapping windows."""
        height, width = crop = self._windows["crop"]
        starts = [
            [min(i * stride, n - side) for i in range(-(-(n - side) // stride) + 1)]
            for n, side, stride in zip(
                images.shape[1:3], crop, self._windows["stride"], strict=True
            )
        ]
        total: Any = 0.0  # until the number of classes is known
        count = np.zeros((*images.shape[1:3], 1), np.float32)
        for top, left in itertools.product(*starts):
            window = np.s_[:, top : top + height, left : left + width]
            logits = np.asarray(self.call(images[window]))
            if not np.ndim(total):
                total = np.zeros((*images.shape[:3], logits.shape[3]), np.float32)
            total[window] += logits
            count[window[1:]] += 1
        return total / count

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width at which the model sees an image of this size: resized and padded.

        Raises:
          ValueError: it is larger than what a file of a fixed size takes.
        """
        size = self.preprocess.resized_size(height, width)
        if self._windows:
            return tuple(map(max, size, self._windows["crop"]))
        wanted = []
        for n, side in zip(size, self._inputs[0].shape[1:3], strict=True):
            if isinstance(side, int) and n > side:
                raise ValueError(
                    f"the model takes {self._takes()}, or smaller images, got {height}x{width}"
                )
            wanted.append(side if isinstance(side, int) else self.preprocess.padded_side(n))
        height, width = wanted
        return height, width

    def _takes(self) -> str:
        return " and ".join(f"{name} {spec}" for name, spec in self.meta["inputs"].items())


def load_exported(
    path: str | os.PathLike[str], *, multiple: int | None = None, growth: float | None = None
) -> Exported:
    """Reads a file of `resfu_jax.export`; `~` is the home folder.

    All of the file is checked before any of it is used: its sizes, what it says of itself, names,
    types and shapes of the weights. What the program computes is not: trust who made it.

    Args:
      path: the file.
      multiple: pad images to sides that are multiples of this instead of the file's own number,
        which must divide it. Larger means fewer shapes to compile, and more padding to compute.
      growth: instead of the file's own, see `Preprocess`; likewise.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no such file, is damaged, or does not fit this machine or this version of
        JAX. The message names the file.
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"path must be the path of a file, got {path!r}")
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder, not a file of resfu_jax.export")
    try:
        meta, program, weights = _members(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    # Whatever zipfile, zlib and json raise for what is no zip, or is damaged or encrypted.
    except (
        *(zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, RecursionError),
        *(NotImplementedError, ValueError, OverflowError),
    ) as error:
        raise ValueError(f"{path} is not a file of resfu_jax.export: {error}") from error
    try:
        exported = jax.export.deserialize(program)
    except ImportError as error:
        raise ModuleNotFoundError(f"{path} is not read without: pip install flatbuffers") from error
    except Exception as error:  # flatbuffers and MLIR raise their own
        raise ValueError(
            f"{path} was exported with JAX {meta['jax']}, which JAX {jax.__version__} here does "
            f"not read: {error}"
        ) from error
    try:
        arrays = _arrays(weights, exported)
        _check_program(exported, meta)
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or not of resfu_jax.export: {error}") from error
    return Exported(exported, arrays, meta, multiple=multiple, growth=growth)


# Programs are text for machines and shrink to a fifth or a tenth; a thousandth is a bomb.
_MOST_UNPACKED, _AT_ONCE = 100, 1 << 20


def _members(path: str) -> tuple[dict[str, Any], bytearray, bytes]:
    """What the file says of itself, the program, and the weights."""
    contents = {}
    with zipfile.ZipFile(path) as archive:
        for name in (META, PROGRAM, WEIGHTS):
            if name not in archive.namelist():
                raise ValueError(f"there is no {name} in it")
            info = archive.getinfo(name)
            if info.file_size > _AT_ONCE + _MOST_UNPACKED * info.compress_size:
                raise ValueError(
                    f"{name} would unpack from {info.compress_size} to {info.file_size} bytes"
                )
            with archive.open(info) as member:
                # Not more than it is said to have, whatever the packed bytes unpack to.
                contents[name] = member.read(info.file_size)
            if len(contents[name]) != info.file_size:
                raise ValueError(f"{name} ends early")
            if name == META:
                _check_meta(meta := json.loads(contents[META]))
    return meta, bytearray(contents[PROGRAM]), contents[WEIGHTS]


def _check_meta(meta: Any) -> None:
    """Raises a `ValueError` for what `resfu_jax.export` would not have written."""
    if not isinstance(meta, dict) or "format" not in meta:
        raise ValueError(f"{META} says no format")
    if meta["format"] != FORMAT:
        raise ValueError(
            f"has format {meta['format']}, this loader reads {FORMAT}: export the model again"
        )

    def texts(values: Any) -> bool:
        return all(isinstance(value, str) for value in values)

    def color(value: Any) -> bool:
        three = isinstance(value, list) and len(value) == 3 and all(map(is_integer, value))
        return three and all(0 <= part <= 255 for part in value)

    def windows(value: Any) -> bool:
        """Whether they are of pixels, and no stride leaves any out."""
        names = ("crop", "stride") if isinstance(value, dict) else ()
        sides: list[Any] = [value.get(name) for name in names]
        pairs = [isinstance(pair, list) and len(pair) == 2 for pair in sides]
        return (
            bool(sides)
            and all(pairs)
            and all(map(is_integer, itertools.chain(*sides)))
            and all(1 <= step <= side for side, step in zip(*sides, strict=True))
        )

    fits = {
        "inputs": lambda v: isinstance(v, dict) and texts(v.values()),
        "outputs": lambda v: isinstance(v, list) and texts(v),
        "output": lambda v: v in (None, "labels", "probabilities", "logits"),
        "preprocess": lambda v: v is None or isinstance(v, dict),
        "windows": lambda v: v is None or (meta["preprocess"] is not None and windows(v)),
        "class_names": lambda v: isinstance(v, list) and texts(v),
        "palette": lambda v: isinstance(v, list) and all(map(color, v)),
        "jax": lambda v: isinstance(v, str),
    }
    for name, fit in fits.items():
        if name not in meta or not fit(meta[name]):
            raise ValueError(f"{META}: {name} is {str(meta.get(name, 'missing'))[:100]}")
    try:
        if meta["preprocess"] is not None:
            Preprocess(**meta["preprocess"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{META}: preprocess: {error}") from error


# The types' names in safetensors' headers.
_TYPES = {"bool": "BOOL", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
_TYPES |= {
    f"{kind}{n}": f"{kind[0].upper()}{n}" for kind in ("int", "uint") for n in (8, 16, 32, 64)
}
_TYPES |= {f"float{n}": f"F{n}" for n in (16, 32, 64)}


def _arrays(data: bytes, exported: jax.export.Exported) -> dict[str, np.ndarray]:
    """Like `safetensors.numpy.load`, which has no bfloat16; as the program takes them, or not.

    Raises:
      ValueError: names, types or shapes that are not the program's.
    """
    try:
        avals = jax.tree.unflatten(exported.in_tree, exported.in_avals)[0][0]
        avals.items()
    except (AttributeError, LookupError, TypeError):
        raise ValueError(f"{PROGRAM} takes no weights by name") from None
    try:
        entries = dict(safetensors.deserialize(data))
    except Exception as error:  # SafetensorError, which is no ValueError
        raise ValueError(f"{WEIGHTS} cannot be read: {error}") from error
    wrong = [f"{name} is missing" for name in avals.keys() - entries.keys()]
    wrong += [f"{name} is in it, not in the program" for name in entries.keys() - avals.keys()]
    wrong += [
        f"{name} is {entry['dtype']}{list(entry['shape'])}, the program takes {avals[name]}"
        for name, entry in entries.items()
        if name in avals
        and (entry["dtype"], tuple(entry["shape"]))
        != (_TYPES.get(avals[name].dtype.name), avals[name].shape)
    ]
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{WEIGHTS}: {'; '.join(sorted(wrong)[:5])}{more}")
    return {
        name: np.frombuffer(entry["data"], avals[name].dtype).reshape(avals[name].shape)
        for name, entry in entries.items()
    }


def _check_program(exported: jax.export.Exported, meta: dict[str, Any]) -> None:
    """Raises a `ValueError` where the program does not take or return what `meta.json` says."""
    weights, *inputs = jax.tree.unflatten(exported.in_tree, exported.in_avals)[0]
    if len(inputs) != len(meta["inputs"]):
        raise ValueError(
            f"{META}: inputs has length {len(meta['inputs'])}, the program takes {len(inputs)}"
        )
    if meta["preprocess"] is None:
        return
    side = Preprocess(**meta["preprocess"]).multiple
    try:
        if len(inputs) != 1 or len(inputs[0].shape) != 4:
            raise ValueError(f"it takes {', '.join(map(str, inputs))}")
        smallest = zip(inputs[0].shape, (1, side, side, 3), strict=True)
        shape = [n if isinstance(n, int) else m for n, m in smallest]
        output = jax.eval_shape(exported.call, weights, jax.ShapeDtypeStruct(shape, np.uint8))
        if output.shape[:3] != tuple(shape[:3]) or (meta["windows"] and output.ndim != 4):
            raise ValueError(f"it returns {output.shape} for images {tuple(shape)}")
        if meta["windows"] and tuple(meta["windows"]["crop"]) != tuple(shape[1:3]):
            raise ValueError(f"its windows are {tuple(shape[1:3])}")
    except (AttributeError, TypeError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise ValueError(f"{PROGRAM} does not take images as {META} says: {line}") from error
    classes = output.shape[3] if len(output.shape) == 4 else None
    for name in ("class_names", "palette"):
        if classes and len(meta[name]) not in (0, classes):
            raise ValueError(f"{META}: {name} has length {len(meta[name])}, not {classes}")
