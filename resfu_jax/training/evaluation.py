"""One batch of an evaluation: what `train.py` and `resfu evaluate` do with it."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, UInt8

from resfu_jax.data import DatasetInfo
from resfu_jax.inference import Inference
from resfu_jax.training.metrics import SegmentationCounts, count


def evaluate_batch(
    model: nnx.Module,
    infer: Inference,
    batch: dict[str, jax.Array],
    info: DatasetInfo,
    *,
    dilation_ratio: float = 0.02,
) -> tuple[SegmentationCounts, UInt8[Array, "b h w"]]:
    """Counts and predicted classes of a batch of `resfu_jax.data.eval_batches`; works inside `jit`.

    Args:
        model: set to evaluation.
        infer: how images become logits.
        batch: `image`, `label` and `size`; with `features` of the backbone they are used instead
            of computed, for which `infer` has to be plain.
        info: the classes of the labels.
        dilation_ratio: width of the boundary, see `count`.
    """
    if "features" in batch:
        logits = model(batch["image"], batch["features"])
    else:
        logits = infer(model, batch["image"], sizes=batch["size"])
    predictions = jnp.argmax(logits, axis=-1).astype(jnp.uint8)
    counts = count(
        predictions,
        batch["label"],
        num_classes=info.num_classes,
        ignore_label=info.ignore_label,
        dilation_ratio=dilation_ratio,
        sizes=batch["size"],
    )
    return counts, predictions
