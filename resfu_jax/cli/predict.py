"""`resfu predict`."""

import sys
import time
from pathlib import Path

import tyro

from resfu_jax._files import local_path
from resfu_jax.cli._run import RunOptions


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
    and OUT/overlays/NAME.png. An image that cannot be read does not stop the others; the exit
    status is 1 then.

    Args:
      images: files and folders (their images, without subfolders).
      run: the trained model.
      out: folder of the results.
      opacity: of the colours over the image, 0 to 1.
      batch_size: images at once; by default one per device.
      growth: sizes are padded to steps of this ratio; 1 pads least and compiles most.
      max_compilations: most sizes that are compiled.
    """
    from tqdm import tqdm

    if not images:
        raise ValueError("no images: give files or folders, for instance: resfu predict photo.jpg")
    if not 0 <= opacity <= 1:
        raise ValueError(f"--opacity must be between 0 and 1, got {opacity}")
    out = local_path(out, "--out")
    for kind in ("labels", "overlays"):
        (out / kind).mkdir(parents=True, exist_ok=True)

    def compiling(shape: tuple[int, int, int]) -> None:
        bar.write(f"compiling for {shape[1]}x{shape[2]} pixels", file=sys.stderr)

    predictor = run.load(
        batch_size=batch_size,
        growth=growth,
        max_compilations=max_compilations,
        on_compile=compiling,
    )
    from resfu_jax import visualize
    from resfu_jax.images import ImageError, read_image
    from resfu_jax.predictor import count_images

    start, written, failed = time.perf_counter(), {}, 0
    with tqdm(total=count_images(images), unit="image", disable=None) as bar:
        for result in predictor.stream(images):
            bar.update()
            if not isinstance(result, ImageError) and result.id in written:
                result = ImageError(
                    f"{result.path}: its results would replace those of {written[result.id]}; give "
                    "it another --out"
                )
            if isinstance(result, ImageError):
                failed += 1
                bar.write(f"error: {result}", file=sys.stderr)
                continue
            written[result.id] = result.path
            name = f"{result.id}.png"
            visualize.save_labels(out / "labels" / name, result.labels, predictor.palette)
            picture = visualize.overlay(
                read_image(result.path), result.labels, predictor.palette, opacity=opacity
            )
            visualize.save_png(out / "overlays" / name, picture)
    print(
        f"{len(written)} images in {out}, {failed} failed; {time.perf_counter() - start:.1f} s, of "
        f"which {sum(predictor.compile_seconds):.1f} s for compiling "
        f"{len(predictor.compiled_shapes)} sizes"
    )
    return 1 if failed else 0
