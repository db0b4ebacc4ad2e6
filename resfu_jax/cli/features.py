"""`resfu features`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from resfu_jax._checks import need
from resfu_jax._files import local_path
from resfu_jax._output import counted
from resfu_jax.cli import _correspondence as correspondence
from resfu_jax.cli._run import Shown, start_jax

if TYPE_CHECKING:
    from resfu_jax.features import FeaturePipeline, ImageFeatures

Format = Literal["npz", "safetensors", "none"]


def features(
    images: tyro.conf.Positional[tuple[Path, ...]],
    *,
    backbone: str | None = None,
    upsampler: str = "bilinear",
    weights: str | None = None,
    run: Path | None = None,
    out: Path = Path("features"),
    stride: int = 1,
    format: Format = "npz",  # noqa: A002
    pictures: bool = True,
    pixel: tuple[int, int] | None = None,
    click: bool = False,
    normalisation: Literal["imagenet", "half", "clip", "unit"] | None = None,
    layers: tuple[int, ...] = (),
    class_token: bool = False,
    resize_to: tuple[int, int] | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    batch_size: int | None = None,
    orientation: bool = True,
) -> int:
    """Writes a backbone's features of photos at full resolution, and pictures of them.

    resfu features photo.jpg --backbone facebook/dinov2-small --upsampler anyup --out features

    resfu features photos/ --backbone vit.safetensors --normalisation half --stride 4

    resfu features a.jpg b.jpg --backbone facebook/dinov2-small --upsampler naf --pixel 120 200

    resfu features photos/ --run runs/features_naf --dtype bfloat16 --format safetensors

    Writes OUT/NAME.npz with the arrays `features`, (H, W, C), and `low`, what the backbone gave,
    and OUT/pictures/NAME.png with both in the colours of their principal components. With --pixel,
    also a picture of the cosine similarity of that pixel's feature to all those of its photo, and
    of a second one, with the pixel and the best match marked; with --click, that picture in a
    window, drawn anew for every pixel of the first photo that is clicked, and one file for each. An
    image that cannot be read does not stop the others; the exit status is 1 then. More:
    docs/features.md.

    Args:
      images: files and folders (their images, without subfolders).
      backbone: weights of the frozen backbone: a file, or a repository of the Hugging Face hub.
      upsampler: its name, or that of released weights (resfu upsamplers --weights).
      weights: of the upsampler, if not where they were released.
      run: workdir of a run that trained an upsampler without labels, instead of the three above.
      out: folder of the results.
      stride: pixels of the photo from one vector to the next.
      format: of the arrays; none writes pictures alone. In .npz files bfloat16 becomes float32.
      pictures: draw the features, too.
      pixel: row and column of a pixel of the first of one or two photos.
      click: show one or two photos in a window, to click the pixels of the first.
      normalisation: how the backbone's images are normalised; by default as its files say.
      layers: blocks of a ViT whose maps to take, counted from 0; by default the last.
      class_token: write `class_token`, too.
      resize_to: the backbone sees photos with this shorter side, or smaller where the longer side
        would exceed the second number.
      dtype: compute type.
      batch_size: images of the same size at once; by default one per device.
      orientation: turn photos as their EXIF data say, and so as viewers show them.
    """
    need(bool(images), "no images: give files or folders: resfu features photo.jpg --backbone FILE")
    need(
        (backbone is None) != (run is None),
        "--backbone or --run must be given, and not both: the features of which network?",
    )
    need(stride >= 1, f"--stride must be at least 1, got {stride}")
    out = local_path(out, "--out")
    run = None if run is None else local_path(run, "--run")
    from resfu_jax import visualize
    from resfu_jax._running import count_images
    from resfu_jax.images import image_size

    count = count_images(images)
    asked = "--click" if click else "--pixel"
    need(not (click and pixel is not None), "give --pixel or --click, not both")
    if click or pixel is not None:
        need(count in (1, 2), f"{asked} is for one photo or two, got {count}")
    if click:
        correspondence.check_display()
    if pixel is not None:
        first = next(iter(_files(images)))
        size = image_size(first, orientation=orientation)
        need(
            all(0 <= i < n for i, n in zip(pixel, size, strict=True)),
            f"--pixel must lie in {first} of {size[0]} rows and {size[1]} columns, got "
            f"{pixel[0]} {pixel[1]}",
        )
    start_jax()
    pipeline = _pipeline(
        backbone,
        upsampler,
        weights,
        run,
        normalisation,
        layers=layers or None,
        dtype=dtype,
        batch_size=batch_size,
        orientation=orientation,
        **({} if resize_to is None else dict(resize_to=resize_to)),
    )
    out.mkdir(parents=True, exist_ok=True)
    last = start = time.perf_counter()
    kept = {}
    shown = Shown(pipeline.stream(images, stride, class_token=class_token), count)
    for result in shown:
        _save(out, result, format)
        if pictures:
            visualize.save_png(out / "pictures" / f"{result.id}.png", _picture(pipeline, result))
        if click or pixel is not None:
            kept[str(result.path)] = result
        now = time.perf_counter()
        rows, columns, channels = result.features.shape
        seen = "x".join(map(str, result.low.shape[:2]))
        shown.bar.write(
            f"{result.path}: {seen} cells to {rows}x{columns} of {channels} channels, "
            f"{result.features.nbytes / 1e6:.1f} MB; {now - last:.2f} s"
        )
        last = now
    if kept and not shown.failed:
        pair = correspondence.Correspondence(
            [kept[str(file)] for file in _files(images)], stride, orientation=orientation
        )
        if pixel is None:
            pair.show(out)
        else:
            print(pair.save(out, pixel))
    said = f"{counted(len(shown.written), 'image')} in {out}, {shown.failed} failed"
    print(f"{said}; {time.perf_counter() - start:.1f} s")
    return 1 if shown.failed else 0


def _files(images: tuple[Path, ...]) -> list[Path]:
    """The photos in order, those of folders among them."""
    from resfu_jax._running import find_images

    return [item.path for item in find_images(images) if item.path is not None]


def _pipeline(
    backbone: str | None,
    upsampler: str,
    weights: str | None,
    run: Path | None,
    normalisation: str | None,
    **options: Any,
) -> "FeaturePipeline":
    from resfu_jax.features import FeaturePipeline

    if run is None:
        return FeaturePipeline(
            backbone, upsampler, weights=weights, normalisation=normalisation, **options
        )
    for name, value, default in (
        ("--upsampler", upsampler, "bilinear"),
        ("--weights", weights, None),
        ("--normalisation", normalisation, None),
    ):
        need(value == default, f"{name} is that of the run")
    return FeaturePipeline.from_checkpoint(run, **options)


def _save(out: Path, result: "ImageFeatures", format: Format) -> None:  # noqa: A002
    import numpy as np

    arrays = {"features": result.features, "low": result.low}
    if result.class_token is not None:
        arrays["class_token"] = result.class_token
    if format == "npz":
        # NumPy's files have no bfloat16, and would keep bytes that nothing reads.
        narrow = {name: a.dtype.name == "bfloat16" for name, a in arrays.items()}
        arrays = {n: a.astype(np.float32) if narrow[n] else a for n, a in arrays.items()}
        np.savez(out / f"{result.id}.npz", **arrays)
    elif format == "safetensors":
        from safetensors.numpy import save_file

        arrays = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
        save_file(arrays, out / f"{result.id}.safetensors")


def _picture(pipeline: "FeaturePipeline", result: "ImageFeatures") -> Any:
    """The backbone's map and the result, side by side in the colours of the map's components.

    What an upsampler makes anew, in another space, has its own.
    """
    import numpy as np

    from resfu_jax.visualize import PCA

    high = result.features
    pca = PCA.fit(result.low)
    colours = (pca if pipeline.value_groups else PCA.fit(high))(high)
    cells = zip(high.shape[:2], result.low.shape[:2], strict=True)
    rows, columns = (np.arange(n) * m // n for n, m in cells)
    space = np.full((len(colours), 4, 3), 255, np.uint8)
    return np.concatenate([pca(result.low)[np.ix_(rows, columns)], space, colours], axis=1)
