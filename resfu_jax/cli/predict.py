"""`resfu predict`."""

import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from resfu_jax._files import local_path, write_whole
from resfu_jax._output import counted
from resfu_jax.cli._run import Run, RunOptions, Shown

if TYPE_CHECKING:
    from resfu_jax.depth import DepthPipeline, ImageDepth
    from resfu_jax.inference import Inference
    from resfu_jax.predictor import Prediction, Predictor


def predict(
    images: tyro.conf.Positional[tuple[Path, ...]],
    run: RunOptions,
    *,
    out: Path = Path("predictions"),
    opacity: float = 0.5,
    depth_format: Literal["png", "npy"] = "png",
    intrinsics: tuple[float, float, float, float] | None = None,
    batch_size: int | None = None,
    growth: float = 1.25,
    max_compilations: int = 32,
) -> int:
    """Segments images, or tells their depth, with a trained model.

    resfu predict photo.jpg --checkpoint runs/shapes_resfu --out results

    resfu predict photos/ more/*.png --checkpoint runs/camvid --flip True --dtype bfloat16

    Of a model that segments, writes OUT/labels/NAME.png, whose pixels are class indices with the
    classes' colours as palette, and OUT/overlays/NAME.png, with a legend of the classes that are
    there. Of one of depth, OUT/depth/NAME.png (16 bits; 0.001 times its numbers are depths, or what
    OUT/depth.json says) or NAME.npy, and OUT/pictures/NAME.png. An image that cannot be read does
    not stop the others; the exit status is 1 then.

    Without --mode, images that are much larger than the crops of the training are segmented in
    windows of that size.

    Args:
      images: files and folders (their images, without subfolders).
      run: the trained model.
      out: folder of the results.
      opacity: of the classes' colours over the image, 0 to 1.
      depth_format: of depths: png, or npy, float32 in the unit of the run's depth maps.
      intrinsics: of depths: the camera's f_x, f_y, c_x, c_y in pixels of the images, to draw
        surface normals, too, OUT/normals/NAME.png.
      batch_size: images at once; by default one per device.
      growth: sizes are padded to steps of this ratio; 1 pads least and compiles most.
      max_compilations: most sizes that are compiled.
    """
    if not images:
        raise ValueError("no images: give files or folders, for instance: resfu predict photo.jpg")
    if not 0 <= opacity <= 1:
        raise ValueError(f"--opacity must be between 0 and 1, got {opacity}")
    if intrinsics is not None:
        from resfu_jax.normals import check_intrinsics

        check_intrinsics(intrinsics)
    out = local_path(out, "--out")
    out.mkdir(parents=True, exist_ok=True)
    windows: Any = None  # for large images

    def compiling(shape: tuple[int, int, int]) -> None:
        text = f"compiling for {shape[1]}x{shape[2]} pixels"
        if windows is not None and windows.in_windows(*shape[1:]):
            height, width = windows.crop
            text += (
                f", seen in windows of {height}x{width} as in training; --mode whole sees them in "
                "one pass, which takes more memory"
            )
        shown.bar.write(text, file=sys.stderr)

    pipeline = run.load_any(
        batch_size=batch_size,
        growth=growth,
        max_compilations=max_compilations,
        on_compile=compiling,
    )
    from resfu_jax._running import count_images
    from resfu_jax.predictor import Predictor

    write: Callable[[Any, Any], str]
    if isinstance(pipeline, Predictor):
        if intrinsics is not None:
            raise ValueError("--intrinsics is for runs of depth, and this one segments")
        if run.mode is None and pipeline.inference.mode == "whole":
            pipeline.inference = windows = _windows_for_large(pipeline, run)
        write = functools.partial(_write_labels, out, pipeline, opacity)
    else:
        scale = _scale(out, pipeline, depth_format)
        write = functools.partial(_write_depth, out, scale, intrinsics)
    last = start = time.perf_counter()
    compiled = 0.0
    shown = Shown(pipeline.stream(images), count_images(images))
    for result in shown:
        image = pipeline.read_image(result.path)
        said = write(result, image)
        now, total = time.perf_counter(), sum(pipeline.compile_seconds)
        seconds, last, compiled = now - last - (total - compiled), now, total
        size = f"{image.shape[1]}x{image.shape[0]}"
        shown.bar.write(f"{result.path}: {size}, {said}; {seconds:.2f} s")
    sizes = counted(len(pipeline.compiled_shapes), "size")
    print(
        f"{counted(len(shown.written), 'image')} in {out}, {shown.failed} failed; "
        f"{time.perf_counter() - start:.1f} s, of which "
        f"{sum(pipeline.compile_seconds):.1f} s for compiling {sizes}"
    )
    return 1 if shown.failed else 0


def _write_labels(
    out: Path, predictor: "Predictor", opacity: float, result: "Prediction", image: Any
) -> str:
    """The classes and the shares of a photo; the latter also in words."""
    from resfu_jax import visualize

    names, palette, name = predictor.class_names, predictor.palette, f"{result.id}.png"
    visualize.save_labels(out / "labels" / name, result.labels, palette)
    picture = visualize.overlay(image, result.labels, palette, opacity=opacity)
    there = [(names[i], palette[i]) for i in result.shares]
    picture = visualize.with_legend(picture, *zip(*there, strict=True))
    visualize.save_png(out / "overlays" / name, picture)
    return ", ".join(f"{names[i]} {_percent(x)}" for i, x in result.shares.items())


def _scale(out: Path, pipeline: "DepthPipeline", depth_format: str) -> float | None:
    """What the number 1 in the files stands for, which OUT/depth.json says; None: they are .npy."""
    from resfu_jax.depth import png_scale

    assert pipeline.config is not None  # as it comes from a run
    depth = pipeline.config.depth
    scale = png_scale(depth.max_depth) if depth_format == "png" else None
    said = {
        "scale": scale or 1.0,
        "min_depth": depth.min_depth,
        "max_depth": depth.max_depth,
        "dataset": pipeline.config.data.name,
        "step": pipeline.step,
    }
    (out / "depth").mkdir(exist_ok=True)
    write_whole(out / "depth.json", json.dumps(said, indent=2) + "\n")
    return scale


def _write_depth(
    out: Path, scale: float | None, intrinsics: Any, result: "ImageDepth", image: Any
) -> str:
    """The depths of a photo, and pictures; their range in words."""
    import numpy as np
    from PIL import Image

    from resfu_jax.depth import as_numbers, depth_and_photo
    from resfu_jax.normals import normals_from_depth, normals_picture
    from resfu_jax.visualize import save_png

    depth, name = result.depth, f"{result.id}.png"
    if scale is None:
        np.save(out / "depth" / f"{result.id}.npy", depth)
    else:
        Image.fromarray(as_numbers(depth, scale)).save(out / "depth" / name)
    save_png(out / "pictures" / name, depth_and_photo(image, depth))
    if intrinsics is not None:
        normals = normals_from_depth(depth, intrinsics)
        save_png(out / "normals" / name, normals_picture(normals))
    low, middle, high = np.percentile(depth, (0, 50, 100))
    return f"depth {low:.3g} to {high:.3g}, median {middle:.3g}"


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
