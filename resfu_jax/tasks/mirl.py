"""Pre-training of a ViT on images without labels: masked image residual learning, and MAE."""

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.struct import dataclass
from jaxtyping import Array, Float, Int, Num
from PIL import Image
from rich.table import Table
from rich.text import Text

from resfu_jax._checks import need
from resfu_jax.backbones import ViT
from resfu_jax.data import transforms
from resfu_jax.heads.mirl import (
    MIRLHead,
    images_of,
    normalise_patches,
    pair_sums,
    patches_of,
)
from resfu_jax.model import normalise
from resfu_jax.tasks.task import Arrays, Batch, Task
from resfu_jax.training.config import Config, masked_patches, model_arguments, size_multiple
from resfu_jax.training.devices import local_rows
from resfu_jax.training.pretrained import initial_weights
from resfu_jax.training.reporting import print_with_facts


class MIRLModel(nnx.Module):
    """An encoder of visible patches, and the decoders of its segments.

    Args:
      backbone: a ViT whose `layers` are the last blocks of the segments.
      head: the decoders.
      mean: mean of the three colours, in 0 .. 255.
      std: their standard deviation.
    """

    def __init__(
        self,
        backbone: ViT,
        head: MIRLHead,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ):
        self.backbone, self.head = backbone, head
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(
        self, images: Num[Array, "b H W 3"], visible: Int[Array, "b v"]
    ) -> list[Float[Array, "b n d"]]:
        """Predictions of all patches by every segment, from the visible ones.

        Args:
          images: RGB in 0 .. 255, uint8 or floating point.
          visible: numbers of the visible patches.
        """
        *tokens, last = self.backbone.encode_visible(self.normalise(images), visible)
        patch = self.backbone.strides[0]
        grid = images.shape[1] // patch, images.shape[2] // patch
        return self.head([*tokens, self.backbone.norm(last)], visible, grid)

    def patches(self, images: Num[Array, "b H W 3"]) -> Float[Array, "b n d"]:
        """The pixels of the normalised images, patch by patch."""
        return patches_of(self.normalise(images), self.backbone.strides[0])

    def normalise(self, images: Num[Array, "b H W 3"]) -> Float[Array, "b H W 3"]:
        """(images - mean) / std, float32 at least."""
        return normalise(images, self.mean, self.std)

    def trainable(self, path: tuple, variable: Any) -> bool:
        """Filter for `nnx.split`: all parameters."""
        del path
        return isinstance(variable, nnx.Param)


@dataclass
class LossSums:
    """Sums over images, from which `MIRL.metrics` follow.

    Attributes:
      images: how many there are.
      pairs: of the loss of every pair.
      first: of the loss of the first prediction alone.
    """

    images: Float[Array, ""]
    pairs: Float[Array, "p"]
    first: Float[Array, ""]

    def merge(self, other: "LossSums") -> "LossSums":
        """Of both."""
        return jax.tree.map(lambda a, b: a + b, self, other)


class MIRL(Task):
    """The loss of `heads/mirl.py`; the best checkpoint has the smallest on held-out images.

    Which patches are masked is drawn anew at every step, by the seed and the step alone; in an
    evaluation by the name of the image alone. Evaluation sees the middle of every image, resized
    so that the crop size fits into it.
    """

    metric = "loss"
    blamed = "config.model or config.mirl"
    summary = dict(loss="loss", first="of the first prediction alone")

    def __init__(self, config: Config):
        super().__init__(config)
        self._patch = size_multiple(config.model.backbone)
        height, width = config.data.crop_size
        self._patches = (height // self._patch) * (width // self._patch)
        self._masked = masked_patches(config)

    def create_model(self, rngs: nnx.Rngs) -> MIRLModel:
        """Encoder and decoders."""
        given, mirl = model_arguments(self.config.model), self.config.mirl
        types: dict[str, Any] = dict(dtype=given["dtype"], param_dtype=jnp.float32, rngs=rngs)
        options = {n: v for n, v in given["backbone"].items() if n != "name"}
        backbone = ViT(**options, remat=given["remat"], **types)
        length, rest = divmod(backbone.depth, mirl.segments)
        need(
            not rest,
            f"config.mirl.segments must divide the {backbone.depth} blocks of the backbone, got "
            f"{mirl.segments}",
        )
        backbone.layers = tuple(range(length - 1, backbone.depth, length))
        head = MIRLHead(
            backbone.features[-1],
            3 * self._patch**2,
            segments=mirl.segments,
            width=mirl.decoder_width,
            depth=mirl.decoder_depth,
            heads=mirl.decoder_heads,
            **types,
        )
        return MIRLModel(backbone, head, mean=given["mean"], std=given["std"])

    def initial_weights(self) -> tuple[Any, str]:
        """Of `init_from`, then of `model.backbone.pretrained`."""
        return initial_weights(self.config, 0, lambda _, rngs: self.create_model(rngs))

    # ---------------------------------------------------------------------------------------- data
    def draw(self, batch: Batch, step: int) -> Batch:
        """With the numbers of visible and masked patches of every image."""
        rows, process = len(batch["image"]), jax.process_index()
        rng = np.random.default_rng((self.config.seed, step))
        # Of all processes, so that the masks do not depend on how many there are.
        noise = rng.random((rows * jax.process_count(), self._patches), np.float32)
        return self._with_masks(batch, noise[process * rows : (process + 1) * rows])

    def draw_for_evaluation(self, batch: Batch) -> Batch:
        """The middle of the images, with masks that are always the same."""
        size = self.config.data.crop_size
        there = batch["size"][:, 0] > 0
        images = [
            transforms.middle(image[:h, :w], size, Image.Resampling.BICUBIC)
            if h
            else np.zeros((*size, 3), np.uint8)
            for image, (h, w) in zip(batch["image"], batch["size"], strict=True)
        ]
        noise = [
            np.random.default_rng(zlib.crc32(bytes(name))).random(self._patches, np.float32)
            for name in batch["id"]
        ]
        middle = batch | {"image": np.stack(images), "there": there}
        return self._with_masks(middle, np.stack(noise))

    def _with_masks(self, batch: Batch, noise: Float[np.ndarray, "b n"]) -> Batch:
        """The patches with the largest noise are masked."""
        order = np.argsort(noise, axis=1, kind="stable").astype(np.int32)
        kept = self._patches - self._masked
        parts = dict(visible=order[:, :kept], masked=order[:, kept:])
        parts = {name: np.sort(numbers, axis=1) for name, numbers in parts.items()}
        return {name: x for name, x in batch.items() if name not in ("label", "size")} | parts

    # ---------------------------------------------------------------------------------------- loss
    def weight(self, batch: Arrays) -> jax.Array:
        """Masked patches."""
        return jnp.asarray(batch["masked"].size, jnp.float32)

    def loss(self, model: Any, batch: Arrays, weight: jax.Array) -> jax.Array:
        """The mean over pairs, masked patches and their numbers."""
        predictions = model(batch["image"], batch["visible"])
        target, _, _ = normalise_patches(model.patches(batch["image"]))
        errors = [_squared_errors(x, target, batch["masked"]) for x in pair_sums(predictions)]
        return jnp.stack(errors).sum() / len(errors) / weight

    # ---------------------------------------------------------------------------------- evaluation
    def evaluate(self, model: Any, batch: Arrays) -> tuple[LossSums, dict[str, jax.Array]]:
        """Losses; and images, masked and as they are predicted, in 0 .. 255."""
        predictions = model(batch["image"], batch["visible"])
        patches = model.patches(batch["image"])
        target, mean, deviation = normalise_patches(patches)
        there = batch["there"].astype(jnp.float32)

        def total(x: Array) -> Array:
            errors = _squared_errors(x, target, batch["masked"]).mean(axis=1)
            return (errors * there).sum()

        pairs = pair_sums(predictions)
        sums = LossSums(there.sum(), jnp.stack([total(x) for x in pairs]), total(predictions[0]))

        patch = model.backbone.strides[0]
        grid = batch["image"].shape[1] // patch, batch["image"].shape[2] // patch
        rows = jnp.arange(len(there), dtype=jnp.int32)[:, None]
        seen = jnp.zeros(patches.shape[:2], bool).at[rows, batch["visible"]].set(True)[..., None]

        def shown(x: Array) -> Array:
            """Predicted patches in colour, around the visible ones."""
            x = jnp.where(seen, patches, x * deviation + mean)
            colours, scale = (
                jnp.asarray(v, x.dtype).reshape(1, 1, 1, 3) for v in (model.mean, model.std)
            )
            return jnp.clip(images_of(x, grid, patch) * scale + colours, 0, 255)

        # Grey is the mean colour.
        masked = shown(-mean / deviation)
        drawn = dict(image=batch["image"], masked=masked, first=shown(predictions[0]))
        return sums, drawn | dict(pair=shown(pairs[0]))

    def no_counts(self) -> LossSums:
        """Of no images."""
        pairs = max(1, self.config.mirl.segments // 2)
        return LossSums(jnp.zeros(()), jnp.zeros(pairs), jnp.zeros(()))

    def metrics(self, counts: LossSums) -> dict[str, float]:
        """Means over the images: the loss, that of every pair, that of the first prediction."""
        pairs = np.asarray(counts.pairs, np.float64) / float(counts.images)
        found = {"loss": float(pairs.mean()), "first": float(counts.first / counts.images)}
        return found | {f"pair_{i}": float(pair) for i, pair in enumerate(pairs)}

    def draw_pictures(self, batch: Batch, drawn: Any, most: int) -> list[np.ndarray]:
        """Image, masked image, first prediction, and the sum of the first pair."""
        rows = min(most, int(np.count_nonzero(batch["there"])))
        if not rows:
            return []
        panels = [local_rows(drawn[n])[:rows] for n in ("image", "masked", "first", "pair")]
        whole = np.concatenate([np.rint(x).astype(np.uint8) for x in panels], axis=2)
        return list(whole)

    def score(self, metrics: Mapping[str, float]) -> float:
        """The loss, turned round."""
        return -metrics["loss"]

    def print_table(
        self, title: str, metrics: Mapping[str, float], facts: Mapping[str, str]
    ) -> None:
        """The losses in a row."""
        mirl = self.config.mirl
        title = title.replace(
            f", {self.config.model.head.upsampler},", f", {mirl.segments} segments,"
        )
        table = Table(title=Text(title), title_justify="left")
        names = dict(loss="loss", first="first alone")
        names |= {name: name.replace("_", " ") for name in metrics if name.startswith("pair_")}
        for name in names.values():
            table.add_column(name, justify="right")
        table.add_row(*(f"{metrics[name]:.4f}" for name in names))
        print_with_facts(table, facts)


def _squared_errors(
    prediction: Float[Array, "b n d"], target: Float[Array, "b n d"], masked: Int[Array, "b m"]
) -> Float[Array, "b m"]:
    """The mean over a patch's numbers, of every masked patch."""
    there, wanted = (
        jnp.take_along_axis(x, masked[..., None], axis=1) for x in (prediction, target)
    )
    return jnp.square(there.astype(jnp.float32) - wanted.astype(jnp.float32)).mean(axis=-1)
