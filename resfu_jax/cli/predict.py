"""`resfu predict`."""

import sys
import time
from pathlib import Path
from typing import Literal

import tyro

from resfu_jax._checks import need
from resfu_jax._files import local_path
from resfu_jax._output import counted
from resfu_jax.cli._results import Asked, results
from resfu_jax.cli._run import RunOptions, Shown


def predict(
    images: tyro.conf.Positional[tuple[Path, ...]],
    run: RunOptions,
    *,
    out: Path = Path("predictions"),
    opacity: float | None = None,
    depth_format: Literal["png", "npy"] | None = None,
    intrinsics: tuple[float, float, float, float] | None = None,
    trimap: Path | None = None,
    batch_size: int | None = None,
    growth: float | None = None,
    max_compilations: int | None = None,
) -> int:
    """Segments images, tells their depth or mattes them, with a trained model.

    resfu predict photo.jpg --checkpoint runs/shapes_resfu --out results

    resfu predict photos/ more/*.png --checkpoint runs/camvid --flip True --dtype bfloat16

    resfu predict photo.jpg --trimap trimap.png --checkpoint runs/matting_fade

    Of a model that segments, writes OUT/labels/NAME.png, whose pixels are class indices with the
    classes' colours as palette, and OUT/overlays/NAME.png, with a legend of the classes that are
    there. Of one of depth, OUT/depth/NAME.png (16 bits; 0.001 times its numbers are depths, or what
    OUT/depth.json says) or NAME.npy, and OUT/pictures/NAME.png. Of one of matting,
    OUT/alpha/NAME.png, 255 where the foreground is opaque, and OUT/cutouts/NAME.png, the photo with
    that as its alpha channel. An image that cannot be read does not stop the others; the exit
    status is 1 then.

    Without --mode, images that are much larger than the crops of the training are segmented in
    windows of that size.

    Args:
      images: files and folders (their images, without subfolders).
      run: the trained model.
      out: folder of the results.
      opacity: of the classes' colours over the image, 0 to 1; by default 0.5.
      depth_format: of depths: png, the default, or npy, float32 in the unit of the run's depth
        maps.
      intrinsics: of depths: the camera's f_x, f_y, c_x, c_y in pixels of the images, to draw
        surface normals, too, OUT/normals/NAME.png.
      trimap: of matting: a file for one photo, or a folder with one for every photo, named alike;
        0 for background, 128 for unknown, 255 for foreground.
      batch_size: images at once; by default one per device, and of matting always one.
      growth: sizes are padded to steps of this ratio, by default 1.25; 1 pads least and compiles
        most. Of matting, to multiples of 16.
      max_compilations: most sizes that are compiled, by default 32; of matting any number.
    """
    need(bool(images), "no images: give files or folders, for instance: resfu predict photo.jpg")
    out = local_path(out, "--out")
    out.mkdir(parents=True, exist_ok=True)

    def compiling(shape: tuple[int, int, int]) -> None:
        text = f"compiling for {shape[1]}x{shape[2]} pixels"
        if made.windows is not None and made.windows.in_windows(*shape[1:]):
            height, width = made.windows.crop
            text += (
                f", seen in windows of {height}x{width} as in training; --mode whole sees them in "
                "one pass, which takes more memory"
            )
        shown.bar.write(text, file=sys.stderr)

    asked = Asked(
        opacity=opacity,
        depth_format=depth_format,
        intrinsics=intrinsics,
        trimap=trimap,
        batch_size=batch_size,
        growth=growth,
        max_compilations=max_compilations,
    )
    made = results(run, out, asked, compiling)
    from resfu_jax._running import count_images

    pipeline = made.pipeline
    last = start = time.perf_counter()
    compiled = 0.0
    shown = Shown(made.stream(images), count_images(images))
    for result in shown:
        image = pipeline.read_image(result.path)
        said = made.write(result, image)
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
