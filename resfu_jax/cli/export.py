"""`resfu export`."""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import tyro

from resfu_jax._files import local_path
from resfu_jax.cli._run import RunOptions


def export(
    path: tyro.conf.Positional[Path],
    run: RunOptions,
    *,
    output: Literal["labels", "probabilities", "logits"] = "labels",
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    platforms: tuple[str, ...] = ("cpu", "cuda", "tpu"),
) -> None:
    """Writes a trained model as one file that runs without this library.

    resfu export camvid.zip --checkpoint runs/camvid

    resfu export camvid.zip --checkpoint runs/camvid --size 384 480 --output probabilities

    The file holds StableHLO and weights; docs/export.md tells how to load and serve it.

    Args:
      path: the file to write.
      run: the trained model.
      output: what the model returns.
      size: height and width of the images; any by default, which is slower for some upsamplers.
        Windows have their own.
      batch: number of images at once; any by default.
      platforms: what it can run on: cpu, cuda, rocm, tpu.
    """
    path = local_path(path, "the file to write")
    predictor = run.load()
    from resfu_jax.export import export_model

    inference = dataclasses.replace(predictor.inference, scales=(1.0,), flip=False)
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
        inference=inference,
    )
    if inference != predictor.inference:
        print(
            f"the file sees an image once; the mirrored or rescaled views of {predictor.inference} "
            "are not in it",
            file=sys.stderr,
        )
    print(f"{written}: {written.stat().st_size / 1e6:.1f} MB, for {', '.join(platforms)}")
