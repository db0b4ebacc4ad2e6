"""What `resfu predict` makes of photos, and writes, with a run of each task."""

import abc
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from resfu_jax._checks import need
from resfu_jax._files import write_whole
from resfu_jax.cli._run import Run

if TYPE_CHECKING:
    from resfu_jax.depth import DepthPipeline, ImageDepth
    from resfu_jax.inference import Inference
    from resfu_jax.matting import ImageMatte, MattingPipeline
    from resfu_jax.predictor import Prediction, Predictor


@dataclasses.dataclass(frozen=True)
class Asked:
    """The options of `resfu predict` that not all tasks have; None where they are not given."""

    opacity: float | None
    depth_format: Literal["png", "npy"] | None
    intrinsics: tuple[float, float, float, float] | None
    trimap: Path | None
    batch_size: int | None
    growth: float | None
    max_compilations: int | None

    def check_only(self, kind: str, *names: str) -> None:
        """Raises a ValueError for an option that runs of this kind do not have."""
        for name, value in vars(self).items():
            option = name.replace("_", "-")
            need(value is None or name in names, f"--{option} is not for runs of {kind}")

    def batches(self) -> dict[str, Any]:
        """What of batches is given."""
        names = "batch_size", "growth", "max_compilations"
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class Results(abc.ABC):
    """A run's pipeline, and the files that its results become."""

    pipeline: Any
    windows: "Inference | None" = None  # in which large images are seen, if nobody chose

    def stream(self, images: tuple[Path, ...]) -> Iterator[Any]:
        """Each photo's result, or an error."""
        return self.pipeline.stream(images)

    @abc.abstractmethod
    def write(self, result: Any, image: Any) -> str:
        """Writes a result; says in words what it is."""


def results(run: Run, out: Path, asked: Asked, on_compile: Any) -> Results:
    """Those of the run's task.

    Raises:
      ValueError: an option that its runs do not have, or a run of a task without predictions.
    """
    kinds = {"depth": Depths, "matting": Mattes}
    return kinds.get(run.kind(), Labels)(run, out, asked, on_compile)


class Labels(Results):
    """OUT/labels and OUT/overlays."""

    pipeline: "Predictor"

    def __init__(self, run: Run, out: Path, asked: Asked, on_compile: Any):
        batches = asked.batches()
        asked.check_only("segmentation", "opacity", *batches)
        self._out, self._opacity = out, 0.5 if asked.opacity is None else asked.opacity
        need(0 <= self._opacity <= 1, f"--opacity must be between 0 and 1, got {asked.opacity}")
        self.pipeline = run.load(**batches, on_compile=on_compile)
        if run.mode is None and self.pipeline.inference.mode == "whole":
            self.pipeline.inference = self.windows = _windows_for_large(self.pipeline, run)

    def write(self, result: "Prediction", image: Any) -> str:
        """The classes and their colours over the photo; their shares in words."""
        from resfu_jax import visualize

        names, palette = self.pipeline.class_names, self.pipeline.palette
        name = f"{result.id}.png"
        visualize.save_labels(self._out / "labels" / name, result.labels, palette)
        picture = visualize.overlay(image, result.labels, palette, opacity=self._opacity)
        there = [(names[i], palette[i]) for i in result.shares]
        picture = visualize.with_legend(picture, *zip(*there, strict=True))
        visualize.save_png(self._out / "overlays" / name, picture)
        return ", ".join(f"{names[i]} {_percent(x)}" for i, x in result.shares.items())


class Depths(Results):
    """OUT/depth, OUT/depth.json, OUT/pictures and, with a camera, OUT/normals."""

    pipeline: "DepthPipeline"

    def __init__(self, run: Run, out: Path, asked: Asked, on_compile: Any):
        from resfu_jax.depth import png_scale
        from resfu_jax.normals import check_intrinsics

        batches = asked.batches()
        asked.check_only("depth", "depth_format", "intrinsics", *batches)
        if asked.intrinsics is not None:
            check_intrinsics(asked.intrinsics)
        self._out, self._intrinsics = out, asked.intrinsics
        self.pipeline = run.load_depth(**batches, on_compile=on_compile)
        assert self.pipeline.config is not None  # as it comes from a run
        depth = self.pipeline.config.depth
        self._scale = None if asked.depth_format == "npy" else png_scale(depth.max_depth)
        said = {
            "scale": self._scale or 1.0,
            "min_depth": depth.min_depth,
            "max_depth": depth.max_depth,
            "dataset": self.pipeline.config.data.name,
            "step": self.pipeline.step,
        }
        (out / "depth").mkdir(parents=True, exist_ok=True)
        write_whole(out / "depth.json", json.dumps(said, indent=2) + "\n")

    def write(self, result: "ImageDepth", image: Any) -> str:
        """The depths, and pictures of them; their range in words."""
        import numpy as np
        from PIL import Image

        from resfu_jax.depth import as_numbers, depth_and_photo
        from resfu_jax.normals import normals_from_depth, normals_picture
        from resfu_jax.visualize import save_png

        depth, name = result.depth, f"{result.id}.png"
        if self._scale is None:
            np.save(self._out / "depth" / f"{result.id}.npy", depth)
        else:
            numbers = as_numbers(depth, self._scale)
            Image.fromarray(numbers).save(self._out / "depth" / name)
        save_png(self._out / "pictures" / name, depth_and_photo(image, depth))
        if self._intrinsics is not None:
            normals = normals_from_depth(depth, self._intrinsics)
            save_png(self._out / "normals" / name, normals_picture(normals))
        low, middle, high = np.percentile(depth, (0, 50, 100))
        return f"depth {low:.3g} to {high:.3g}, median {middle:.3g}"


class Mattes(Results):
    """OUT/alpha and OUT/cutouts."""

    pipeline: "MattingPipeline"

    def __init__(self, run: Run, out: Path, asked: Asked, on_compile: Any):
        asked.check_only("matting", "trimap")
        if asked.trimap is None:
            raise ValueError(
                "--trimap is missing: a run of matting needs it, a file for a single photo or a "
                "folder with one for every photo"
            )
        self._out, self._trimap = out, asked.trimap
        self.pipeline = run.load_matting(on_compile=on_compile)

    def stream(self, images: tuple[Path, ...]) -> Iterator[Any]:
        """Each photo's matte, or an error."""
        assert self._trimap is not None
        return self.pipeline.stream(images, self._trimap)

    def write(self, result: "ImageMatte", image: Any) -> str:
        """The matte, and the photo with it as its alpha channel; the share that is opaque."""
        import numpy as np
        from PIL import Image

        for folder, picture in (
            ("alpha", result.alpha),
            ("cutouts", np.dstack([image, result.alpha])),
        ):
            (self._out / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(self._out / folder / f"{result.id}.png")
        return f"{_percent(float(result.alpha.mean()) / 255)} foreground"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else "<0.1%"


def _windows_for_large(predictor: "Predictor", run: Run) -> "Inference":
    """The run's inference, but for images of more than 8 times the pixels of its training crops.

    In one pass, attention over a photo takes memory and time that grow with the square of its
    pixels, and a network sees sizes that it has not learned.
    """
    crop = run.crop or tuple(predictor.config.data.crop_size)
    return dataclasses.replace(
        predictor.inference,
        mode="slide",
        crop=crop,
        stride=run.stride or tuple(-(-2 * side // 3) for side in crop),
        whole_up_to=8 * math.prod(crop),
    )
