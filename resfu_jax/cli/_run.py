"""What commands that run a trained model share: its options, and the start of JAX."""

import dataclasses
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from resfu_jax._files import local_path

if TYPE_CHECKING:
    from resfu_jax.depth import DepthPipeline
    from resfu_jax.matting import MattingPipeline
    from resfu_jax.predictor import Predictor

CACHE = Path("~/.cache/resfu_jax/xla")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of train.py and how its model is applied; what is not given is as in the run."""

    checkpoint: Path
    """Workdir of the run, or one checkpoint in it: WORKDIR/checkpoints/STEP."""
    which: str = "best"
    """Checkpoint: best (by mIoU, AbsRel of depth, SAD of mattes), latest, or a step."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute type."""
    mode: Literal["whole", "slide"] | None = None
    """An image in one pass, or in overlapping windows."""
    crop: tuple[int, int] | None = None
    """Height and width of the windows."""
    stride: tuple[int, int] | None = None
    """Pixels between windows, down and across."""
    scales: tuple[float, ...] | None = None
    """Sizes at which an image is seen, over its own; the probabilities are averaged."""
    flip: bool | None = None
    """See it mirrored, too."""
    orientation: bool | None = None
    """Turn images as their EXIF data say, and so as viewers show them."""
    data_dir: Path | None = None
    """Where the dataset was prepared: its classes, and for evaluation its images."""

    def load(self, **options: Any) -> "Predictor":
        """The predictor of a run that segments; further options are those of `Predictor`."""
        start_jax()
        from resfu_jax.predictor import Predictor

        return Predictor.from_checkpoint(
            self._path, inference=self._views, data_dir=self.data_dir, **self._options, **options
        )

    def kind(self) -> str:
        """Of the run's task: segmentation, depth, matting or features."""
        from resfu_jax import training

        workdir, _ = training.find_run(self._path.resolve())
        return training.task_kind(training.read_config(workdir))

    def load_depth(self, **options: Any) -> "DepthPipeline":
        """The pipeline of a run of depth; further options are those of `DepthPipeline`."""
        self._sees_images_once("depth")
        start_jax()
        from resfu_jax.depth import DepthPipeline

        return DepthPipeline.from_checkpoint(self._path, **self._options, **options)

    def load_matting(self, **options: Any) -> "MattingPipeline":
        """The pipeline of a run of matting; further options are those of `MattingPipeline`."""
        self._sees_images_once("matting")
        start_jax()
        from resfu_jax.matting import MattingPipeline

        return MattingPipeline.from_checkpoint(self._path, **self._options, **options)

    def _sees_images_once(self, kind: str) -> None:
        for name in self._views:
            raise ValueError(
                f"--{name} is for runs that segment; one of {kind} sees each image once, and whole"
            )

    @property
    def _path(self) -> Path:
        return local_path(self.checkpoint, "--checkpoint")

    @property
    def _views(self) -> dict[str, Any]:
        names = ("mode", "crop", "stride", "scales", "flip")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def _options(self) -> dict[str, Any]:
        turned = {} if self.orientation is None else {"orientation": self.orientation}
        return dict(which=self.which, dtype=self.dtype, **turned)


class Shown:
    """What a stream of results gives, under a progress bar, without what cannot be used.

    That is told on stderr and counted: images that could not be read, and those whose results would
    replace another one's.

    Args:
      stream: results with `id` and `path`, or errors.
      total: how many images there are.
    """

    def __init__(self, stream: Iterable[Any], total: int):
        from tqdm import tqdm

        self._stream = stream
        self.bar = tqdm(total=total, unit="image", disable=None)
        self.written: dict[str, Any] = {}
        self.failed = 0

    def __iter__(self) -> Iterator[Any]:
        with self.bar:
            for result in self._stream:
                self.bar.update()
                error = result if isinstance(result, Exception) else None
                if error is None and result.id in self.written:
                    error = ValueError(
                        f"{result.path}: its results would replace those of "
                        f"{self.written[result.id]}; give it another --out"
                    )
                if error is not None:
                    self.failed += 1
                    self.bar.write(f"error: {error}", file=sys.stderr)
                    continue
                self.written[result.id] = result.path
                yield result


RunOptions = Annotated[Run, tyro.conf.arg(name="")]  # --which, not --run.which


def start_jax() -> None:
    """Compiled programs are kept on disk, unless JAX_COMPILATION_CACHE_DIR says where or "" not."""
    import jax
    from absl import logging

    logging.set_verbosity(logging.WARNING)  # Orbax would tell every step of a restore.
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(CACHE.expanduser()))
