"""`resfu explain`."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from resfu_jax._checks import need
from resfu_jax._files import local_path, write_whole
from resfu_jax._output import counted
from resfu_jax.cli._run import start_jax

if TYPE_CHECKING:
    from resfu_jax.explain import Classifier, Explanation
    from resfu_jax.features import FeaturePipeline


def explain(
    images: tyro.conf.Positional[tuple[Path, ...]],
    *,
    backbone: str,
    upsampler: tuple[str, ...] = ("bilinear",),
    weights: str | None = None,
    normalisation: Literal["imagenet", "half", "clip", "unit"] | None = None,
    classes: Path | None = None,
    mask: Literal["hard", "soft"] = "hard",
    masked: Literal["before", "after"] = "after",
    size: int = 224,
    out: Path = Path("explanations"),
) -> None:
    """Shows and scores what a ViT classifier looked at: Grad-CAM on upsampled activations.

    resfu explain photos/ --backbone vit.safetensors --normalisation half --upsampler bilinear jbu

    resfu explain photos/ --backbone vit.safetensors --normalisation half --upsampler nearest anyup
    --weights anyup.npz --classes names.txt --mask soft --masked before --out explanations

    Of each photo the square in the middle, and the class that is predicted. Writes OUT/explain.json
    and OUT/explain.md, with the convention of the metrics in words, and OUT/pictures/NAME.png, the
    photo with the class's probability, and the map of each upsampler with that once it is masked.
    More: docs/explain.md.

    Args:
      images: files and folders (their images, without subfolders).
      backbone: weights of a ViT with its classifier: a file, or a repository of the Hugging Face
        hub.
      upsampler: names of upsamplers, which are compared.
      weights: of the one upsampler that has released ones, if not where these are.
      normalisation: how the backbone's images are normalised; by default as its files say.
      classes: a text file of the classes' names, one in a line.
      mask: hard keeps the pixels where the map is above 0, soft weights them by the map.
      masked: before the colours are normalised, what is masked is black; after, their mean.
      size: side of the squares in pixels, a multiple of the backbone's patch.
      out: folder of the results.
    """
    need(bool(images), "no images: give files or folders: resfu explain photo.jpg --backbone FILE")
    need(
        0 < len(upsampler) == len(set(upsampler)),
        f"--upsampler must be different names, at least one, got {' '.join(upsampler) or 'none'}",
    )
    need(size >= 1, f"--size must be at least 1, got {size}")
    out = local_path(out, "--out")
    names = None
    if classes is not None:
        file = local_path(classes, "--classes")
        names = [line.strip() for line in file.read_text("utf-8").strip().splitlines()]
    photos = _squares(images, size)
    start_jax()
    from tqdm import tqdm

    from resfu_jax import explain as explaining
    from resfu_jax._running import versions
    from resfu_jax.visualize import save_grid

    convention = explaining.Convention(mask, masked)
    classifier, pipelines = _networks(backbone, upsampler, weights, normalisation)
    (patch, *_), count = classifier.vit.strides, classifier.vit.head.kernel.shape[-1]
    need(size % patch == 0, f"--size must be a multiple of the patch, {patch}, got {size}")
    need(
        names is None or len(names) == count,
        f"--classes must have a line for each of the {count} classes, got {len(names or ())}",
    )
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    records: list[dict[str, Any]] = []
    with tqdm(total=len(photos) * len(pipelines), unit="map", disable=None) as bar:
        for path, pixels in photos.items():
            found = {}
            for name, pipeline in pipelines.items():
                found[name] = explaining.explain(
                    classifier, pipeline, pixels[None], convention=convention
                )
                bar.update()
            records.append(_record(path, found, names))
            panels = [(_title(records[-1]), pixels), *_overlays(pixels, found)]
            save_grid(out / "pictures" / f"{path.stem}.png", panels, columns=len(panels), width=2.4)
    averages = _averages(records)
    said = (
        f"{counted(len(photos), 'photo')}, {size} x {size} pixels, Grad-CAM of the predicted class "
        f"on activations upsampled to every pixel; {convention}; averages in percent, ADCC of the "
        "averages."
    )
    result = {
        "convention": {"mask": mask, "masked": masked, "in_words": said},
        "backbone": Path(backbone).name if Path(backbone).exists() else backbone,
        "weights": None if weights is None else Path(weights).name,
        "averages": averages,
        "images": records,
        "seconds": round(time.perf_counter() - start, 1),
        "versions": versions(),
    }
    write_whole(out / "explain.json", json.dumps(result, indent=1) + "\n")
    table = f"{explaining.markdown(averages)}\n{said}\n"
    write_whole(out / "explain.md", table)
    print(f"{table}\n{counted(len(photos), 'photo')} in {out}; {result['seconds']} s")


def _networks(
    backbone: str, upsampler: tuple[str, ...], weights: str | None, normalisation: Any
) -> "tuple[Classifier, dict[str, FeaturePipeline]]":
    """The classifier, and a pipeline for each name; the names are checked first."""
    from resfu_jax._feature_sources import check_upsampler, is_released
    from resfu_jax.explain import Classifier
    from resfu_jax.features import FeaturePipeline

    for name in upsampler:
        check_upsampler(name, None)
    released = [name for name in upsampler if is_released(name)]
    need(
        weights is None or len(released) == 1,
        "--weights are those of the one --upsampler that has released ones, got "
        f"{', '.join(released) or 'none'} of these",
    )
    classifier = Classifier(backbone, normalisation=normalisation)
    colours = classifier.mean, classifier.std
    pipelines = {
        name: FeaturePipeline(
            classifier.vit,
            name,
            weights=weights if name in released else None,
            normalisation=colours,
        )
        for name in upsampler
    }
    return classifier, pipelines


def _averages(records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each upsampler over all photos."""
    import numpy as np

    from resfu_jax.explain import METRICS, averages

    found = {}
    for name in records[0]["upsamplers"]:
        metrics = [record["upsamplers"][name] for record in records]
        found[name] = averages({key: np.array([m[key] for m in metrics]) for key in METRICS})
    return found


def _squares(images: tuple[Path, ...], size: int) -> dict[Path, Any]:
    """The square in the middle of each photo, of so many pixels a side."""
    import numpy as np
    from PIL import Image

    from resfu_jax._running import find_images
    from resfu_jax.images import read_image

    found: dict[Path, Any] = {}
    stems: dict[str, Path] = {}
    for item in find_images(images):
        if item.error is not None:
            raise item.error
        assert item.path is not None
        other = stems.setdefault(item.id, item.path)
        need(
            len(stems) > len(found),
            f"{item.path}: its picture would replace that of {other}; rename one of them",
        )
        photo = Image.fromarray(read_image(item.path))
        side = min(photo.size)
        left, top = ((n - side) / 2 for n in photo.size)
        box = (left, top, left + side, top + side)
        found[item.path] = np.asarray(photo.resize((size, size), Image.Resampling.BICUBIC, box))
    return found


def _record(path: Path, found: "dict[str, Explanation]", names: list[str] | None) -> dict[str, Any]:
    """What JSON holds of a photo; all upsamplers explain the same class."""
    first = next(iter(found.values()))
    index = int(first.classes[0])
    return {
        "image": str(path),
        "class": index,
        **({} if names is None else {"name": names[index]}),
        "probability": float(first.score[0]),
        "upsamplers": {
            name: {
                "probability_masked": float(one.score_of_masked[0]),
                **{key: float(value[0]) for key, value in one.metrics().items()},
            }
            for name, one in found.items()
        },
    }


def _title(record: dict[str, Any]) -> str:
    name = record.get("name", f"class {record['class']}").partition(",")[0]
    return f"{name}, {100 * record['probability']:.0f} %"


def _overlays(pixels: Any, found: "dict[str, Explanation]") -> list[tuple[str, Any]]:
    """The map of each upsampler, from its least to its largest value, over the photo in grey."""
    import numpy as np

    from resfu_jax.explain import scaled
    from resfu_jax.visualize import heatmap

    grey = pixels.astype(np.float32).mean(axis=-1, keepdims=True)
    panels = []
    for name, one in found.items():
        heat = heatmap(np.asarray(scaled(one.cam)[0]), 0.0, 1.0, "inferno")
        shown = (0.4 * grey + 0.6 * heat).round().astype(np.uint8)
        panels.append((f"{name}, {100 * float(one.score_of_masked[0]):.0f} %", shown))
    return panels
