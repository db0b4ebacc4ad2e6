"""`resfu probe`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from resfu_jax._checks import need
from resfu_jax._files import local_path, write_whole
from resfu_jax.cli._run import start_jax
from resfu_jax.probing.settings import ProbeSettings


def probe(
    dataset: tyro.conf.Positional[str],
    *,
    backbone: str | None = None,
    upsampler: tuple[str, ...] = ("bilinear",),
    weights: str | None = None,
    run: Path | None = None,
    normalisation: Literal["imagenet", "half", "clip", "unit"] | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
    images_at_once: int = 2,
    out: Path | None = None,
    table: Path | None = None,
    classes: tuple[str, ...] = (),
    settings: Annotated[ProbeSettings, tyro.conf.arg(name="")] = ProbeSettings(),  # noqa: B008
) -> None:
    """Scores upsamplers by what is read off a frozen backbone's upsampled features linearly.

    resfu probe camvid --backbone vit.safetensors --normalisation half --upsampler bilinear jbu

    resfu probe camvid --backbone facebook/dinov2-small --upsampler anyup --protocols features
    preserved probabilities --seeds 0 1 2 --out probes.json --table probes.md

    resfu probe camvid --run runs/features_naf --class-balance 0.5 --scale 2

    resfu probe nyu_depth_v2 --backbone facebook/dinov2-small --upsampler anyup --depth-crop eigen

    Classes or depths, whichever the dataset has. docs/probing.md says what is fitted on what, and
    what papers do differently.

    Args:
      dataset: a prepared dataset with classes or depth maps.
      backbone: weights of the frozen backbone: a file, or a repository of the Hugging Face hub.
      upsampler: names of upsamplers, one after the other.
      weights: of the upsampler, if not where they were released.
      run: workdir of a run that trained an upsampler without labels, instead of the three above.
      normalisation: how the backbone's images are normalised; by default as its files say.
      dtype: compute type of backbone and upsampler.
      data_dir: where the dataset was prepared.
      cache_dir: a folder where features are kept, for other upsamplers and for a probe that is
        stopped: 4 bytes for each channel of each cell and of each sampled pixel.
      images_at_once: images that are upsampled together.
      out: a JSON file that the results are added to; those of the same settings are replaced.
      table: a file for the table of all that `--out` holds, in Markdown.
      classes: names of classes that get a column in the table.
      settings: of the probe.
    """
    need(
        (backbone is None) != (run is None),
        "--backbone or --run must be given, and not both: the features of which network?",
    )
    need(
        weights is None or (run is None and len(upsampler) == 1),
        "--weights are those of one --upsampler; probe others in further commands with the same "
        "--out",
    )
    out = None if out is None else local_path(out, "--out")
    table = None if table is None else local_path(table, "--table")
    start_jax()
    from resfu_jax import data
    from resfu_jax import probe as probing
    from resfu_jax.features import FeaturePipeline

    probes = probing.read_results(out) if out is not None and out.exists() else []
    known = data.dataset_info(dataset, data_dir).class_names
    for name in classes:
        need(name in known, f"--classes must be some of {', '.join(known)}, got {name!r}")
    facts: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if run is not None:
        facts["run"] = run.name
        pipelines = [FeaturePipeline.from_checkpoint(local_path(run, "--run"))]
    else:
        facts["backbone"] = Path(backbone).name if Path(backbone).exists() else backbone
        if weights is not None:
            facts["weights"] = Path(weights).name
        pipelines = [
            FeaturePipeline(
                backbone, name, weights=weights, normalisation=normalisation, dtype=dtype
            )
            for name in upsampler
        ]
    for pipeline in pipelines:
        entry = probing.probe(
            pipeline,
            dataset,
            settings,
            data_dir=data_dir,
            cache_dir=cache_dir,
            images_at_once=images_at_once,
            facts=facts,
        )
        probes = [*probes, entry] if out is None else probing.record(out, entry)
        if table is not None:
            write_whole(table, probing.markdown(probes, classes))
    print(probing.markdown(probes, classes), end="")
