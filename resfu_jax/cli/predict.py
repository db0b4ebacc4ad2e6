"""`resfu predict`."""

import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from resfu_jax._files import local_path
from resfu_jax._output import counted
from resfu_jax.cli._run import Run, RunOptions, Shown

if TYPE_CHECKING:
    from resfu_jax.inference import Inference
    from resfu_jax.predictor import Predictor


def predict(
    images: tyro.conf.Positional[tuple[Path, ...]],
    run: RunOptions,
    *,
    out: Path = Path("predictions"),
    opacity: float = 0.5,
    batch_size: int | None = None,
    growth: float = 1.25,
    max_compilations: int = 32,
) -> int:
    """Segments images with a trained model.

    resfu predict photo.jpg --checkpoint runs/shapes_resfu --out results

    resfu predict photos/ more/*.png --checkpoint runs/camvid --flip True --dtype bfloat16

    Writes OUT/labels/NAME.png, whose pixels are class indices with the classes' colours as palette,
    and OUT/overlays/NAME.png, with a legend of the classes that are there. An image that cannot be
    read does not stop the others; the exit status is 1 then.

    Without --mode, images that are much larger than the crops of the training are seen in windows
    of that size.

    Args:
      images: files and folders (their images, without subfolders).
      run: the trained model.
      out: folder of the results.
      opacity: of the colours over the image, 0 to 1.
      batch_size: images at once; by default one per device.
      growth: sizes are padded to steps of this ratio; 1 pads least and compiles most.
      max_compilations: most sizes that are compiled.
    """
    if not images:
        raise ValueError("no images: give files or folders, for instance: resfu predict photo.jpg")
    if not 0 <= opacity <= 1:
        raise ValueError(f"--opacity must be between 0 and 1, got {opacity}")
    out = local_path(out, "--out")
    for kind in ("labels", "overlays"):
        (out / kind).mkdir(parents=True, exist_ok=True)

    def compiling(shape: tuple[int, int, int]) -> None:
        text = f"compiling for {shape[1]}x{shape[2]} pixels"
        if large and predictor.inference.in_windows(*shape[1:]):
            height, width = predictor.inference.crop
            text += (
                f", seen in windows of {height}x{width} as in training; --mode whole sees them in "
                "one pass, which takes more memory"
            )
        shown.bar.write(text, file=sys.stderr)

    predictor = run.load(
        batch_size=batch_size,
        growth=growth,
        max_compilations=max_compilations,
        on_compile=compiling,
    )
    from resfu_jax import visualize
    from resfu_jax._running import count_images

    large = run.mode is None and predictor.inference.mode == "whole"
    if large:
        predictor.inference = _windows_for_large(predictor, run)
    names, palette = predictor.class_names, predictor.palette
    last = start = time.perf_counter()
    compiled = 0.0
    shown = Shown(predictor.stream(images), count_images(images))
    for result in shown:
        name = f"{result.id}.png"
        visualize.save_labels(out / "labels" / name, result.labels, palette)
        image = predictor.read_image(result.path)
        picture = visualize.overlay(image, result.labels, palette, opacity=opacity)
        there = [(names[i], palette[i]) for i in result.shares]
        picture = visualize.with_legend(picture, *zip(*there, strict=True))
        visualize.save_png(out / "overlays" / name, picture)
        now, total = time.perf_counter(), sum(predictor.compile_seconds)
        seconds, last, compiled = now - last - (total - compiled), now, total
        shares = ", ".join(f"{names[i]} {_percent(x)}" for i, x in result.shares.items())
        size = f"{image.shape[1]}x{image.shape[0]}"
        shown.bar.write(f"{result.path}: {size}, {shares}; {seconds:.2f} s")
    sizes = counted(len(predictor.compiled_shapes), "size")
    print(
        f"{counted(len(shown.written), 'image')} in {out}, {shown.failed} failed; "
        f"{time.perf_counter() - start:.1f} s, of which "
        f"{sum(predictor.compile_seconds):.1f} s for compiling {sizes}"
    )
    return 1 if shown.failed else 0


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
