"""Learned upsampling of a frozen backbone's features, without labels."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.struct import dataclass
from jaxtyping import Array, Float, Num
from PIL import Image
from rich.table import Table
from rich.text import Text

from resfu_jax._checks import need
from resfu_jax.backbones import create_backbone
from resfu_jax.data import transforms
from resfu_jax.model import evaluating, normalise
from resfu_jax.ops.resize import resize
from resfu_jax.self_supervised import GuidedUpsampler
from resfu_jax.tasks.objectives import Objective, cosine, create_objective
from resfu_jax.tasks.task import Arrays, Batch, Task
from resfu_jax.training.config import Config, model_arguments, size_multiple
from resfu_jax.training.devices import local_rows
from resfu_jax.training.pretrained import initial_weights
from resfu_jax.training.reporting import print_with_facts
from resfu_jax.training.state import blaming
from resfu_jax.visualize import PCA


class FeatureModel(nnx.Module):
    """A frozen backbone, an upsampler of its last map, and what an objective learns beside it.

    Args:
      backbone: images `(B, H, W, 3)` to feature maps.
      head: upsamples the last one.
      parts: of the objective, if any.
      mean: mean of the three colours, in 0 .. 255.
      std: their standard deviation.
      stride: of the backbone.
      channel_norm: features are normalised over their channels, without parameters.
    """

    def __init__(
        self,
        backbone: nnx.Module,
        head: GuidedUpsampler,
        parts: nnx.Module | None,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        stride: int,
        channel_norm: bool = False,
    ):
        self.backbone: Any = backbone
        self.head = head
        self.parts: Any = parts
        self.mean, self.std, self.stride = tuple(mean), tuple(std), stride
        self.channel_norm = channel_norm
        self.frozen = True

    def __call__(self, images: Num[Array, "b H W 3"]) -> Float[Array, "b oh ow c"]:
        """Features at `head.scale` times the backbone's resolution.

        Args:
          images: RGB in 0 .. 255, uint8 or floating point.
        """
        return self.head(self.features(images), images)

    def features(self, images: Num[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        """The backbone's last map, in float32."""
        maps = evaluating(self.backbone)(self.normalise(images))
        x = jax.lax.stop_gradient(maps[-1].astype(jnp.float32))
        return jax.nn.standardize(x, axis=-1, epsilon=1e-5) if self.channel_norm else x

    def normalise(self, images: Num[Array, "b H W 3"]) -> Float[Array, "b H W 3"]:
        """(images - mean) / std, float32."""
        return normalise(images, self.mean, self.std)

    def trainable(self, path: tuple, variable: Any) -> bool:
        """Filter for `nnx.split`: all parameters but the backbone's."""
        return isinstance(variable, nnx.Param) and path[0] != "backbone"


@dataclass
class ErrorSums:
    """Sums over the places of maps, of every channel, from which `Features.metrics` follow.

    Attributes:
      places: how many there are.
      target: sum of the target.
      squares: of its square.
      errors: of squared errors, of every channel.
      bilinear: likewise, with bilinear upsampling in the upsampler's place.
      cosine: sum of the cosines of prediction and target.
    """

    places: Float[Array, ""]
    target: Float[Array, "c"]
    squares: Float[Array, "c"]
    errors: Float[Array, "c"]
    bilinear: Float[Array, "c"]
    cosine: Float[Array, ""]

    def merge(self, other: "ErrorSums") -> "ErrorSums":
        """Of both."""
        return jax.tree.map(lambda a, b: a + b, self, other)


class Features(Task):
    """An objective of `objectives.py`; the best checkpoint has the smallest held-out error.

    The error is the share of the target's variance that is not explained, its mean over the
    channels: 0 is perfect, 1 as bad as a constant. Targets are the objective's own.

    Evaluation sees the middle of every image, resized so that the crop size fits into it.
    """

    metric = "error"
    blamed = "config.model or config.objective"
    summary = dict(error="error", bilinear_error="of bilinear", cosine="cosine")

    def __init__(self, config: Config):
        super().__init__(config)
        self._stride = size_multiple(config.model.backbone)
        with blaming("config.objective"):
            self._objective: Objective = create_objective(
                config.objective.name, config.objective.options
            )

    def create_model(self, rngs: nnx.Rngs) -> FeatureModel:
        """Backbone, upsampler and the objective's parts."""
        given, head = model_arguments(self.config.model), self.config.model.head
        types: dict[str, Any] = dict(dtype=given["dtype"], param_dtype=jnp.float32)
        backbone: Any = create_backbone(**given["backbone"], **types, rngs=rngs)
        width = backbone.features[-1]
        guide = {} if head.width is None else dict(guide_features=head.width)
        upsampler = GuidedUpsampler(
            head.upsampler,
            width,
            scale=head.scale or 2,
            rngs=rngs,
            **guide,
            **head.upsampler_options,
        )
        upsampler.set_attributes(use_running_average=False, raise_if_not_found=False)
        parts = self._objective.create_parts(width, self._stride, rngs)
        return FeatureModel(
            backbone,
            upsampler,
            parts,
            mean=given["mean"],
            std=given["std"],
            stride=self._stride,
            channel_norm=self._objective.channel_norm,
        )

    def initial_weights(self) -> tuple[Any, str]:
        """Of `init_from`, `model.backbone.pretrained` and `model.head.pretrained`."""
        return initial_weights(self.config, 0, lambda _, rngs: self.create_model(rngs))

    # ---------------------------------------------------------------------------------------- data
    def draw(self, batch: Batch, step: int) -> Batch:
        """With the objective's views."""
        process = jax.process_index()
        return self._drawn(batch, (self.config.seed, step, process), (self.config.seed, step))

    def draw_for_evaluation(self, batch: Batch) -> Batch:
        """The middle of the images, with views that are always the same."""
        size = self.config.data.crop_size
        there = batch["size"][:, 0] > 0
        rows = [
            (
                transforms.middle(image[:h, :w], size, Image.Resampling.BILINEAR),
                transforms.middle(label[:h, :w], size, Image.Resampling.NEAREST),
            )
            if h
            else (np.zeros((*size, 3), np.uint8), np.full(size, 255, np.uint8))
            for image, label, (h, w) in zip(
                batch["image"], batch["label"], batch["size"], strict=True
            )
        ]
        images, labels = (np.stack(x) for x in zip(*rows, strict=True))
        middle = batch | {"image": images, "label": labels}
        return self._drawn(middle, (0,), (0,)) | {"there": there, "size": batch["size"]}

    def _drawn(self, batch: Batch, seed: tuple[int, ...], shared: tuple[int, ...]) -> Batch:
        rng, sizes = np.random.default_rng(seed), np.random.default_rng(shared)
        views = self._objective.draw(batch["image"], batch["label"], self._stride, rng, sizes)
        kept = {name: x for name, x in batch.items() if name not in ("label", "size")}
        return kept | views

    # ---------------------------------------------------------------------------------------- loss
    def weight(self, batch: Arrays) -> jax.Array:
        """Images."""
        return jnp.asarray(batch["image"].shape[0], jnp.float32)

    def loss(self, model: Any, batch: Arrays, weight: jax.Array) -> jax.Array:
        """The objective's."""
        return self._objective.loss(model, batch).sum() / weight

    def try_out(self, model: Any, batch: Batch) -> Any:
        """A step, and whether the upsampler can follow the objective to all sizes."""
        low, high = getattr(self._objective, "ratios", (1.0, 1.0))
        need(
            low == high or not model.head.upsample.needs_whole_scale,
            f"ratios must be one ratio, twice {1 / model.head.scale:.4g}, for "
            f"{self.config.model.head.upsampler}, which has one scale, {model.head.scale}; got "
            f"{(low, high)}",
        )
        return super().try_out(model, batch)

    # ---------------------------------------------------------------------------------- evaluation
    def evaluate(self, model: Any, batch: Arrays) -> tuple[ErrorSums, dict[str, jax.Array]]:
        """Errors; and maps before and after upsampling, with the target."""
        prediction, target = self._objective.pair(model, model.head, batch)
        bilinear, _ = self._objective.pair(model, _bilinear, batch)
        # An image may have several maps, of parts of it.
        there = jnp.repeat(batch["there"], target.shape[0] // batch["there"].shape[0])
        weight = there.astype(jnp.float32)[:, None, None, None]

        def total(x: Array) -> Array:
            return (weight * x).sum(axis=(0, 1, 2))

        sums = ErrorSums(
            places=total(jnp.ones_like(target[..., :1]))[0],
            target=total(target),
            squares=total(jnp.square(target)),
            errors=total(jnp.square(prediction - target)),
            bilinear=total(jnp.square(bilinear - target)),
            cosine=total(cosine(prediction, target)[..., None])[0],
        )
        every = target.shape[0] // batch["image"].shape[0]
        maps = dict(before=bilinear, after=prediction, teacher=target)
        return sums, {"image": batch["image"]} | {n: x[::every] for n, x in maps.items()}

    def no_counts(self) -> ErrorSums:
        """Of no places."""
        model: Any = nnx.eval_shape(lambda: self.create_model(nnx.Rngs(0)))
        zero, channels = jnp.zeros(()), jnp.zeros(model.head.features)
        return ErrorSums(zero, channels, channels, channels, channels, zero)

    def metrics(self, counts: ErrorSums) -> dict[str, float]:
        """Shares of the variance, and the mean cosine."""
        places, target, squares, errors, bilinear, cosine = (
            np.asarray(getattr(counts, field.name), np.float64)
            for field in dataclasses.fields(counts)
        )
        variance = np.maximum(squares - target**2 / places, 1e-12)
        return {
            "error": float((errors / variance).mean()),
            "bilinear_error": float((bilinear / variance).mean()),
            "cosine": float(cosine / places),
        }

    def draw_pictures(self, batch: Batch, drawn: Any, most: int) -> list[np.ndarray]:
        """Image, bilinear, upsampled and target, in the principal components of the target."""
        rows = min(most, int(np.count_nonzero(batch["there"])))
        maps = {name: local_rows(x)[:rows] for name, x in drawn.items()} if rows else {}
        pictures = []
        for i in range(rows):
            image = np.asarray(maps["image"][i], np.uint8)
            pca = PCA.fit(maps["teacher"][i])
            colours = (pca(maps[name][i]) for name in ("before", "after", "teacher"))
            size = image.shape[1], image.shape[0]
            shown = [Image.fromarray(c).resize(size, Image.Resampling.NEAREST) for c in colours]
            pictures.append(np.concatenate([image, *map(np.asarray, shown)], axis=1))
        return pictures

    def score(self, metrics: Mapping[str, float]) -> float:
        """The error, turned round."""
        return -metrics["error"]

    def print_table(
        self, title: str, metrics: Mapping[str, float], facts: Mapping[str, str]
    ) -> None:
        """The metrics, beside bilinear upsampling."""
        table = Table(title=Text(title), title_justify="left")
        for name in ("", "error", "cosine"):
            table.add_column(name, justify="right" if name else "left")
        name = self.config.model.head.upsampler
        table.add_row(Text(name), f"{metrics['error']:.4f}", f"{metrics['cosine']:.4f}")
        table.add_row("bilinear", f"{metrics['bilinear_error']:.4f}", "")
        print_with_facts(table, facts)


def _bilinear(
    features: Array, images: Array, size: tuple[int, int], guide_size: tuple[int, int] | None = None
) -> Array:
    """Called as a `GuidedUpsampler`."""
    del images, guide_size
    return resize(features, size)
