"""`resfu export`."""

import sys
from pathlib import Path
from typing import Literal

import tyro

from resfu_jax._files import local_path
from resfu_jax.cli._run import Run


def export(
    path: tyro.conf.Positional[Path],
    *,
    checkpoint: Path,
    which: str = "best",
    output: Literal["labels", "probabilities", "logits"] = "labels",
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    platforms: tuple[str, ...] = ("cpu", "cuda", "tpu"),
    dtype: Literal["float32", "bfloat16"] | None = None,
    data_dir: Path | None = None,
) -> None:
    """Writes a trained model as one file that runs without this library.

    resfu export camvid.zip --checkpoint runs/camvid

    resfu export camvid.zip --checkpoint runs/camvid --size 384 480 --output probabilities

    The file holds StableHLO and weights; docs/export.md tells how to load and serve it.

    Args:
      path: the file to write.
      checkpoint: workdir of the run, or one checkpoint in it.
      which: checkpoint: best (by mIoU), latest, or a step.
      output: what the model returns.
      size: height and width of the images; any by default, which is slower for some upsamplers.
      batch: number of images at once; any by default.
      platforms: what it can run on: cpu, cuda, rocm, tpu.
      dtype: compute type; by default as in the run.
      data_dir: where the dataset was prepared, for the names of its classes.
    """
    path = local_path(path, "the file to write")
    predictor = Run(checkpoint, which, dtype=dtype, data_dir=data_dir).load()
    from resfu_jax.export import export_model

    written = export_model(
        predictor.model,
        path,
        output=output,
        size=size,
        batch=batch,
        platforms=platforms,
        class_names=predictor.class_names,
        palette=predictor.palette,
        preprocess=predictor.preprocess,
    )
    if not predictor.inference.plain:
        print(
            "the file makes one pass over the whole image; the run's windows or views "
            f"({predictor.inference}) are not in it",
            file=sys.stderr,
        )
    print(f"{written}: {written.stat().st_size / 1e6:.1f} MB, for {', '.join(platforms)}")
