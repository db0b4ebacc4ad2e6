"""What commands that run a trained model share: its options, and the start of JAX."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from resfu_jax._files import local_path

if TYPE_CHECKING:
    from resfu_jax.predictor import Predictor

CACHE = Path("~/.cache/resfu_jax/xla")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of train.py and how its model is applied; what is not given is as in the run."""

    checkpoint: Path
    """Workdir of the run, or one checkpoint in it: WORKDIR/checkpoints/STEP."""
    which: str = "best"
    """Checkpoint: best (by mIoU), latest, or a step."""
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
        """The predictor; further options are those of `Predictor`."""
        start_jax()
        from resfu_jax.predictor import Predictor

        names = ("mode", "crop", "stride", "scales", "flip")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.orientation is not None:
            options["orientation"] = self.orientation
        return Predictor.from_checkpoint(
            local_path(self.checkpoint, "--checkpoint"),
            self.which,
            dtype=self.dtype,
            inference=given,
            data_dir=self.data_dir,
            **options,
        )


RunOptions = Annotated[Run, tyro.conf.arg(name="")]  # --which, not --run.which


def start_jax() -> None:
    """Compiled programs are kept on disk, unless JAX_COMPILATION_CACHE_DIR says where or "" not."""
    import jax
    from absl import logging

    logging.set_verbosity(logging.WARNING)  # Orbax would tell every step of a restore.
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(CACHE.expanduser()))
