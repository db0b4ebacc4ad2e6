"""`resfu evaluate`."""

import dataclasses
import json
import sys
from pathlib import Path

from resfu_jax._files import local_path, write_whole
from resfu_jax.cli._run import RunOptions


def evaluate(
    run: RunOptions,
    *,
    dataset: str | None = None,
    split: str = "validation",
    batch_size: int | None = None,
    out: Path | None = None,
) -> None:
    """Computes mIoU, or the errors of depth, of a trained model on a dataset.

    resfu evaluate --checkpoint runs/camvid

    resfu evaluate --checkpoint runs/camvid --dataset camvid/clean --scales 0.75 1 1.25 --flip True

    The numbers are those of `python train.py --mode eval`, without the config file.

    Args:
      run: the trained model.
      dataset: a prepared dataset with the same classes, or of depth; by default that of the run.
      split: validation or train, or a slice of them, such as "train[:10%]".
      batch_size: images at once; by default as in the run.
      out: a JSON file for the numbers.
    """
    out = None if out is None else local_path(out, "--out")
    pipeline = run.load_depth() if run.kind() == "depth" else run.load()

    import jax
    from flax import nnx
    from tqdm import tqdm

    from resfu_jax import data, tasks, training
    from resfu_jax.predictor import Predictor

    assert pipeline.config is not None  # as it comes from a run
    config, of_run = pipeline.config, pipeline.config.data.name
    config.data.name = name = dataset or of_run
    config.data.dir = run.data_dir or config.data.dir
    if isinstance(pipeline, Predictor):
        views = vars(pipeline.inference)
        given = {key: value for key, value in views.items() if hasattr(config.eval, key)}
        config.eval = dataclasses.replace(config.eval, **given)
    task = tasks.create_task(config)
    if isinstance(pipeline, Predictor) and task.info.class_names != pipeline.class_names:
        raise ValueError(
            f"--dataset {name} has the classes {', '.join(task.info.class_names)}; the model has "
            f"{', '.join(pipeline.class_names)}"
        )
    if not isinstance(pipeline, Predictor) and task.info.depth is None:
        raise ValueError(f"--dataset {name} has no depth maps, and the run is one of depth")
    devices = jax.local_device_count()
    batches = data.eval_batches(
        data.open_source(name, split, config.data.dir),
        task.info,
        batch_size=batch_size or -(-config.eval.batch_size // devices) * devices,
        preprocess=pipeline.preprocess,
        pad_to=config.eval.pad_to if name == of_run else None,
        group_sizes=config.eval.group_sizes,
        on_corrupt=config.data.on_corrupt,
    )
    if batches.batch_size % devices:
        raise ValueError(
            f"--batch-size must be a multiple of {devices} (the devices), got {batch_size}"
        )
    layout = training.Layout(training.ParallelConfig(), jax.local_devices())
    graphdef, weights = nnx.split(pipeline.model)

    def step(weights, batch):
        return task.evaluate(nnx.merge(graphdef, weights), batch)[0]

    step = jax.jit(step, out_shardings=layout.replicated)
    counts = task.no_counts()
    for batch in tqdm(batches, unit="batch", disable=None, file=sys.stderr):
        counts = counts.merge(step(weights, layout.to_devices(batch)))
    metrics = task.metrics(counts)
    task.print_table(f"{name}, {split}: checkpoint {pipeline.step}", metrics, {})
    if out is not None:
        write_whole(out, json.dumps({"step": pipeline.step} | metrics, indent=2) + "\n")
