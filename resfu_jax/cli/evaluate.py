"""`resfu evaluate`."""

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
    """Computes mIoU, boundary IoU and pixel accuracy of a trained model on a dataset.

    resfu evaluate --checkpoint runs/camvid

    resfu evaluate --checkpoint runs/camvid --dataset camvid/clean --scales 0.75 1 1.25 --flip True

    The numbers are those of `python train.py --mode eval`, without the config file.

    Args:
      run: the trained model.
      dataset: a prepared dataset with the same classes; by default that of the run.
      split: validation or train, or a slice of them, such as "train[:10%]".
      batch_size: images at once; by default as in the run.
      out: a JSON file for the numbers.
    """
    out = None if out is None else local_path(out, "--out")
    predictor = run.load()

    import jax
    from flax import nnx
    from tqdm import tqdm

    from resfu_jax import data, tasks, training

    config = predictor.config
    name, directory = dataset or config.data.name, run.data_dir or config.data.dir
    info = data.dataset_info(name, directory)
    if info.class_names != predictor.class_names:
        raise ValueError(
            f"--dataset {name} has the classes {', '.join(info.class_names)}; the model has "
            f"{', '.join(predictor.class_names)}"
        )
    devices = jax.local_device_count()
    pad_to = config.eval.pad_to if name == config.data.name else None
    batches = data.eval_batches(
        data.open_source(name, split, directory),
        info,
        batch_size=batch_size or -(-config.eval.batch_size // devices) * devices,
        preprocess=predictor.preprocess,
        pad_to=pad_to,
        group_sizes=config.eval.group_sizes,
        on_corrupt=config.data.on_corrupt,
    )
    if batches.batch_size % devices:
        raise ValueError(
            f"--batch-size must be a multiple of {devices} (the devices), got {batch_size}"
        )
    layout = training.Layout(training.ParallelConfig(), jax.local_devices())
    graphdef, weights = nnx.split(predictor.model)

    def step(weights, batch):
        model = nnx.merge(graphdef, weights)
        ratio = config.eval.dilation_ratio
        return tasks.evaluate_batch(model, predictor.inference, batch, info, dilation_ratio=ratio)[
            0
        ]

    step = jax.jit(step, out_shardings=layout.replicated)
    counts = training.SegmentationCounts.zeros(info.num_classes)
    for batch in tqdm(batches, unit="batch", disable=None, file=sys.stderr):
        counts = counts.merge(step(weights, layout.to_devices(batch)))
    metrics = counts.compute(info.class_names)
    title = f"{name}, {split}: checkpoint {predictor.step}"
    training.print_table(title, metrics, info.class_names, {})
    if out is not None:
        write_whole(out, json.dumps({"step": predictor.step} | metrics, indent=2) + "\n")
