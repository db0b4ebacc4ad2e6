"""Monocular depth: images and depth maps to a depth for every pixel."""

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num
from rich.table import Table
from rich.text import Text

from resfu_jax import data
from resfu_jax._checks import need
from resfu_jax.data import transforms
from resfu_jax.model import Features, SegmentationModel, create_model, evaluating
from resfu_jax.tasks.task import Arrays, Batch, Task
from resfu_jax.training.config import Config, model_arguments
from resfu_jax.training.depth import (
    METRICS,
    Align,
    Crop,
    DepthSums,
    depth_metrics,
    gradient_loss,
    sig_loss,
    silog_loss,
    valid_pixels,
)
from resfu_jax.training.devices import local_rows
from resfu_jax.training.pretrained import initial_weights
from resfu_jax.training.reporting import print_with_facts
from resfu_jax.visualize import heatmap, panels_with_scales

_LOOKED_AT = 32  # examples of a split before training
_NAMES = dict(abs_rel="AbsRel", sq_rel="SqRel", rmse="RMSE", rmse_log="RMSE log", silog="SILog")


class DepthModel(SegmentationModel):
    """A backbone and a head of `DEPTH_HEADS`: images to the depth of every pixel, one channel."""

    def features(self, images: Num[Array, "b h w 3"]) -> Features:
        """The backbone's maps of the normalised images, then the class token if the head has it."""
        if getattr(self.head, "token", None) is None:
            return super().features(images)
        backbone: Any = evaluating(self.backbone) if self.frozen else self.backbone
        maps, tokens = backbone.maps_and_class_tokens(self.normalise(images))
        found = (*maps, tokens[-1][:, None, None, :])
        return jax.lax.stop_gradient(found) if self.frozen else found


class Depth(Task):
    """The losses and metrics of `training/depth.py`; the best checkpoint by AbsRel."""

    metric = "abs_rel"
    blamed = "config.model or config.depth"
    summary = dict(abs_rel="AbsRel", rmse="RMSE", delta1="delta1")
    sees_whole_images = True

    def __init__(self, config: Config):
        super().__init__(config)
        depth = config.depth
        self._range = _range(config)
        cap = depth.max_depth if depth.cap is None else depth.cap
        self._counted: dict[str, Any] = dict(
            min_depth=depth.min_depth, max_depth=cap, crop=cast(Crop, depth.crop)
        )

    def create_model(self, rngs: nnx.Rngs) -> DepthModel:
        """A `DepthModel`."""
        return depth_model(self.config, rngs)

    def initial_weights(self) -> tuple[Any, str]:
        """Of `init_from`, then of `model.backbone.pretrained`."""
        return initial_weights(self.config, 1, lambda _, rngs: self.create_model(rngs))

    # ---------------------------------------------------------------------------------------- data
    def open(self) -> None:
        """Opens the dataset, and looks at some depth maps.

        Raises:
          DataError: none of them has a depth in the range of the config.
        """
        super().open()
        for source in (self.train_source, self.val_source):
            self._check_depths(source)

    def _check_depths(self, source: data.Source) -> None:
        looked_at = np.unique(np.linspace(0, len(source) - 1, _LOOKED_AT).astype(int))
        found = []
        for index in looked_at:
            example = source[int(index)]
            _, label = transforms.decode(example, self.info, source.where(example))
            depths = np.asarray(label)
            found.append(depths[depths > 0])
        known = np.concatenate(found)
        low, high = self.config.depth.min_depth, self.config.depth.max_depth
        inside = float(((known > low) & (known < high)).mean()) if known.size else 0.0
        if inside >= 0.05:
            return
        where = f"{source.name}, split {source.split!r}: in {len(looked_at)} depth maps"
        if not known.size:
            raise data.DataError(f"{where} no pixel has a depth; is the invalid value right?")
        raise data.DataError(
            f"{where} {inside:.1%} of the known depths are between config.depth.min_depth {low:g} "
            f"and max_depth {high:g}; their median is {np.median(known):.4g}. If the unit is not "
            "what the config means, prepare the dataset with another --scale (0.001 for "
            "millimetres), or change the range"
        )

    def draw(self, batch: Batch, step: int) -> Batch:
        """With the weight that the variance has in `sig_loss` at this step."""
        variance = float(step > self.config.depth.warmup_steps)
        return batch | {"variance": np.full(len(batch["label"]), variance, np.float32)}

    # ---------------------------------------------------------------------------------------- loss
    def weight(self, batch: Arrays) -> jax.Array:
        """Valid pixels, for which the losses look themselves."""
        return valid_pixels(batch["label"], **self._range).sum().astype(jnp.float32)

    def loss(self, model: Any, batch: Arrays, weight: jax.Array) -> jax.Array:
        """The weighted sum of the losses, of the whole batch."""
        del weight
        config, depth = self.config.depth, batch["label"]
        prediction = _depth(model, batch)
        given = prediction, depth, valid_pixels(depth, **self._range)
        loss = jnp.zeros(())
        if config.sig:
            loss += config.sig * sig_loss(*given, variance=batch["variance"][0])
        if config.silog:
            loss += config.silog * silog_loss(*given)
        if config.gradient:
            loss += config.gradient * gradient_loss(*given)
        return loss

    # ---------------------------------------------------------------------------------- evaluation
    def evaluate(self, model: Any, batch: Arrays) -> tuple[DepthSums, jax.Array]:
        """Sums of the metrics, and predicted depths."""
        prediction = _depth(model, batch)
        sums = depth_metrics(
            prediction,
            batch["label"],
            align=cast(Align, self.config.depth.align),
            sizes=batch["size"],
            **self._counted,
        )
        return sums, prediction

    def no_counts(self) -> DepthSums:
        """Of no images."""
        return DepthSums.zeros()

    def metrics(self, counts: DepthSums) -> dict[str, float]:
        """Means over the images."""
        return counts.compute()

    def draw_pictures(self, batch: Batch, drawn: Any, most: int) -> list[np.ndarray]:
        """Image, depth, prediction and error side by side, with their scales."""
        rows = min(most, np.count_nonzero(batch["size"][:, 0]))
        pictures = []
        for i, prediction in enumerate(local_rows(drawn)[:rows] if rows else []):
            height, width = batch["size"][i]
            image, depth = (batch[name][i, :height, :width] for name in ("image", "label"))
            pictures.append(depth_picture(image, depth, prediction[:height, :width]))
        return pictures

    def score(self, metrics: Mapping[str, float]) -> float:
        """AbsRel, turned round."""
        return -metrics["abs_rel"]

    def print_table(
        self, title: str, metrics: Mapping[str, float], facts: Mapping[str, str]
    ) -> None:
        """All metrics in a row."""
        table = Table(title=Text(title), title_justify="left")
        for name in METRICS:
            table.add_column(_NAMES.get(name, name), justify="right")
        table.add_row(*(f"{metrics[name]:.4f}" for name in METRICS))
        print_with_facts(table, facts)


def depth_model(config: Config, rngs: nnx.Rngs) -> DepthModel:
    """The model of a config, which `training.validate` has checked."""
    given = model_arguments(config.model)
    head = given.pop("head") | _range(config)
    model = create_model(**given, head=head, num_classes=1, rngs=rngs)
    need(
        getattr(model.head, "token", None) is None
        or hasattr(model.backbone, "maps_and_class_tokens"),
        "class_token must be False unless the backbone is a ViT",
    )
    kept = {name: given[name] for name in ("frozen", "mean", "std")}
    return DepthModel(model.backbone, model.head, **kept)


def depth_picture(
    image: np.ndarray, depth: Float[np.ndarray, "h w"], prediction: Float[np.ndarray, "h w"]
) -> np.ndarray:
    """Image | depth | prediction | absolute error, each with its scale; unknown depths are grey."""
    prediction = np.asarray(prediction, np.float32)
    known = depth > 0
    shown = depth[known] if known.any() else prediction
    low, high = (float(x) for x in np.percentile(shown, (1, 99)))
    error = np.where(known, np.abs(prediction - depth), np.nan)
    most = float(np.nanpercentile(error, 99)) if known.any() else 1.0
    return panels_with_scales(
        [
            (image, None),
            (heatmap(np.where(known, depth, np.nan), low, high), (low, high, "viridis")),
            (heatmap(prediction, low, high), (low, high, "viridis")),
            (heatmap(error, 0.0, most, "magma"), (0.0, most, "magma")),
        ]
    )


def _range(config: Config) -> dict[str, Any]:
    return dict(min_depth=config.depth.min_depth, max_depth=config.depth.max_depth)


def _depth(model: Any, batch: Arrays) -> Float[Array, "b h w"]:
    return model(batch["image"], batch.get("features"))[..., 0]
