"""Datasets and the input pipeline: tfds builders, read through grain, without TensorFlow.

prepare("shapes")                                  # once
info = dataset_info("shapes")
batches = train_batches(open_source("shapes", "train"), info, batch_size=16,
                        crop_size=(128, 128), seed=0)
batch = next(batches)                              # image, label, id
"""

from resfu_jax._extras import extra

with extra("train"):
    from resfu_jax.data.depth_folder import OwnDepth
    from resfu_jax.data.image_folder import OwnImages
    from resfu_jax.data.info import (
        ClassMap,
        CorruptExampleError,
        DataError,
        DatasetInfo,
        DatasetNotPrepared,
        DepthMap,
    )
    from resfu_jax.data.load import (
        Source,
        damaged_datasets,
        dataset_info,
        default_data_dir,
        is_prepared,
        label_pixels,
        list_datasets,
        open_source,
        prepare,
    )
    from resfu_jax.data.matting_folder import OwnMattes
    from resfu_jax.data.matting_pipeline import (
        MattingEvalBatches,
        matting_eval_batches,
        matting_train_batches,
    )
    from resfu_jax.data.pipeline import (
        EvalBatches,
        TrainBatches,
        eval_batches,
        skip_corrupt,
        train_batches,
    )
    from resfu_jax.data.statistics import balanced_weights, label_counts

__all__ = [
    "ClassMap",
    "CorruptExampleError",
    "DataError",
    "DatasetInfo",
    "DatasetNotPrepared",
    "DepthMap",
    "EvalBatches",
    "MattingEvalBatches",
    "OwnDepth",
    "OwnImages",
    "OwnMattes",
    "Source",
    "TrainBatches",
    "balanced_weights",
    "damaged_datasets",
    "dataset_info",
    "default_data_dir",
    "eval_batches",
    "is_prepared",
    "label_counts",
    "label_pixels",
    "list_datasets",
    "matting_eval_batches",
    "matting_train_batches",
    "open_source",
    "prepare",
    "skip_corrupt",
    "train_batches",
]
