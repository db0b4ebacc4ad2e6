"""What all that runs trained models shares: runs, which images there are, devices, compute types.

Pillow is imported with the first file: arrays do without it.
"""

import dataclasses
import mimetypes
import os
import pathlib
import platform
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

import resfu_jax
from resfu_jax._names import lookup

if TYPE_CHECKING:
    from resfu_jax.images import ImageError
    from resfu_jax.training import Config

Path = str | os.PathLike[str]
Images = Path | np.ndarray | jax.Array | Sequence[Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """One image of the input, or why there is none."""

    index: int
    id: str
    path: pathlib.Path | None
    pixels: Any = None  # uint8 array (h, w, 3), once it is read
    error: "ImageError | None" = None
    size: tuple[int, int] = (0, 0)  # before scaling


def find_images(images: Images) -> list[Item]:
    """All images of the input, files not read yet.

    Raises:
      ValueError: something that is not an image; nothing has been computed then.
    """
    items: list[Item] = []

    def add(path: pathlib.Path | None = None, **fields: Any) -> None:
        index = len(items)
        items.append(Item(index, str(index) if path is None else path.stem, path, **fields))

    def visit(source: Any, name: str) -> None:
        if isinstance(source, str | os.PathLike):
            path = pathlib.Path(os.path.expanduser(source))
            if not path.is_dir():
                add(path)
                return
            from resfu_jax.images import SUFFIXES, ImageError

            files = sorted(p for p in path.iterdir() if _is_image(p, SUFFIXES))
            for file in files:
                add(file)
            if not files:
                error = ImageError(f"{path}: no images in this folder ({', '.join(SUFFIXES)})")
                add(path, error=error)
        elif isinstance(source, np.ndarray | jax.Array):
            array = np.asarray(source)
            if array.ndim not in (3, 4) or array.shape[-1] != 3 or array.dtype != np.uint8:
                raise ValueError(
                    f"{name} must be (H, W, 3) or (B, H, W, 3) of uint8, RGB in 0 .. 255, got "
                    f"{array.shape} of {array.dtype}"
                )
            if not array.size:
                raise ValueError(f"{name} must have pixels, got {array.shape}")
            for pixels in array if array.ndim == 4 else array[None]:
                add(pixels=pixels)
        elif isinstance(source, Sequence):
            for i, part in enumerate(source):
                visit(part, f"{name}[{i}]")
        else:
            raise ValueError(
                f"{name} must be a path, an array or a list of these, got {type(source).__name__}"
            )

    visit(images, "images")
    if not items:
        raise ValueError("images must be at least one, got none")
    return items


def _is_image(path: pathlib.Path, suffixes: Sequence[str]) -> bool:
    """Whether a file's name is that of an image, also of a kind that will be refused by name."""
    kind, _ = mimetypes.guess_type(path.name)
    return path.suffix.lower() in suffixes or (kind or "").startswith("image/")


def count_images(images: Images) -> int:
    """Number of results and errors that there are for them."""
    return len(find_images(images))


def in_threads(function: Callable[[Item], Item], items: list[Item]) -> Iterator[Item]:
    """`map` in threads, a few items ahead."""
    threads = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def failed(item: Item, error: Exception, less: str) -> "ImageError":
    """What the device reports, in one line.

    Args:
      item: the image.
      error: of JAX.
      less: what needs less memory.
    """
    from resfu_jax.images import ImageError

    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
        text = f"not enough memory on the device; {less} need less"
    return ImageError(f"{item.path or f'image {item.id}'}: {text}")


def local_devices(devices: Any) -> list[jax.Device]:
    """The devices that share a batch: those that are given, or all of this process.

    Raises:
      ValueError: something else than a list of devices.
    """
    devices = jax.local_devices() if devices is None else devices
    listed = isinstance(devices, Sequence) and not isinstance(devices, str)
    if not listed or not devices or not all(isinstance(d, jax.Device) for d in devices):
        raise ValueError(f"devices must be a list of devices, at least one, got {devices!r}")
    return list(devices)


def compute_type(dtype: Any) -> str:
    """The name of a type to compute in."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    known = ("float32", "bfloat16", "float16", *["float64"] * jax.config.read("jax_enable_x64"))
    if name not in known:
        raise ValueError(f"dtype must be one of {', '.join(known)}, or None, got {name}")
    return name


def versions() -> dict[str, str]:
    """What results were computed with."""
    return {
        "resfu_jax": resfu_jax.__version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }


def check_fields(cls: type, given: Mapping[str, Any], kind: str) -> None:
    """Raises a `ValueError` for names that are no fields; near matches are named."""
    known = {field.name: field for field in dataclasses.fields(cls)}
    for name in given:
        lookup(kind, known, name)


def run_folder(path: Any) -> pathlib.Path:
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"path must be the workdir of a run of train.py, got {path!r}")
    return pathlib.Path(os.path.expanduser(path)).resolve()


# What the runs of each kind of task are for.
_USES = {
    "segmentation": "Predictor.from_checkpoint loads it",
    "depth": "DepthPipeline.from_checkpoint loads it",
    "features": "FeaturePipeline.from_checkpoint loads it",
    "matting": "MattingPipeline.from_checkpoint loads it",
    "mirl": "other runs of train.py start from it with --config.init_from",
}


def open_run(
    path: Any, which: str | int, kind: str, dtype: Any = None
) -> "tuple[pathlib.Path, str, Config]":
    """The workdir of a run of train.py, which checkpoint in it, and its config.

    Args:
      path: the workdir, or one checkpoint in it.
      which: "best", "latest" or a step.
      kind: of the task that the run has to be of.
      dtype: the compute type that the config gets; None: that of the run.

    Raises:
      ValueError: the folder does not hold such a run, or there is no such type.
    """
    from resfu_jax import training

    compute = None if dtype is None else compute_type(dtype)
    workdir, which = training.find_run(run_folder(path), str(which))
    config = training.read_config(workdir)
    other = training.task_kind(config)
    if other != kind:
        advice = f": {_USES[other]}" if other in _USES else ""
        raise ValueError(
            f"path must be a run of {kind}, and {workdir} has task={config.task!r}{advice}"
        )
    config.model.dtype = compute or config.model.dtype
    return workdir, which, config


def restore(
    workdir: pathlib.Path, which: str, create: Callable[[], Any], devices: list[jax.Device]
) -> tuple[Any, int]:
    """The model of a run of train.py, and the step of its checkpoint.

    Args:
      workdir: of the run.
      which: "best", "latest" or a step.
      create: makes the model; it is only traced.
      devices: which get the weights.

    Raises:
      CheckpointError: there is no such checkpoint, or it is of another architecture.
    """
    from resfu_jax import training

    layout = training.Layout(training.ParallelConfig(), devices)
    graphdef, wanted = jax.eval_shape(lambda: training.split_model(create()))
    checkpoints = training.Checkpoints(workdir / "checkpoints", read_only=True)
    try:
        step = checkpoints.find(which)
        if step is None:
            raise training.CheckpointError(f"there is no checkpoint in {checkpoints.directory}")
        state = checkpoints.restore_weights(step, layout.abstract(wanted))
    finally:
        checkpoints.close()
    return training.merge_model(graphdef, state["params"], state["rest"]), step
