"""Image matting: an image and a trimap to the opacity of every pixel."""

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt8
from rich.table import Table
from rich.text import Text

from resfu_jax import data
from resfu_jax.model import MattingModel, create_matting_model
from resfu_jax.tasks.task import Arrays, Batch, Task
from resfu_jax.training.config import Config, model_arguments
from resfu_jax.training.devices import local_rows
from resfu_jax.training.matting_losses import matting_losses
from resfu_jax.training.matting_metrics import METRICS, MattingCounts, count_mattes
from resfu_jax.training.pretrained import initial_weights
from resfu_jax.training.reporting import print_with_facts

_STEM = ("backbone", "stem", 0, "conv", "kernel")
_HEAD = ("upsampler", "upsampler_options", "dropout")


class Matting(Task):
    """Alpha and composition loss; SAD, MSE, Grad and Conn, and the best checkpoint by SAD.

    Evaluation sees whole images, and counts their mattes in 8 bits, as files hold them.
    """

    metric = "sad"
    summary = dict(sad="SAD", mse="MSE", grad="Grad", conn="Conn")

    def create_model(self, rngs: nnx.Rngs) -> MattingModel:
        """A `MattingModel`."""
        return matting_model(self.config, rngs)

    def initial_weights(self) -> tuple[Any, str]:
        """Of `init_from`, then of `model.backbone.pretrained`, a ResNet that has seen no trimaps.

        Its first convolution begins with zeros for the trimap, as in A2U's code.
        """
        weights, said = initial_weights(self.config, 0, lambda _, rngs: self.create_model(rngs))
        if weights is None:
            return weights, said
        flat = dict(nnx.to_flat_state(weights))
        kernel = flat.get(_STEM)
        if kernel is not None and kernel.shape[2] == 3:
            flat[_STEM] = jnp.pad(kernel, ((0, 0), (0, 0), (0, 1), (0, 0)))
        return nnx.as_pure(nnx.from_flat_state(list(flat.items()))), said

    # ---------------------------------------------------------------------------------------- data
    def open(self) -> None:
        """Opens the dataset, backgrounds included."""
        super().open()
        name, directory = self.config.data.name, self.config.data.dir
        self._backgrounds = data.open_source(name, "background", directory)

    def blank_batch(self) -> Batch:
        """Composed images of the size of crops."""
        size = self.config.batch_size // jax.process_count(), *self.config.data.crop_size
        colours = dict.fromkeys(
            ("image", "foreground", "background"), np.zeros((*size, 3), np.uint8)
        )
        return colours | dict.fromkeys(("alpha", "trimap"), np.zeros(size, np.uint8))

    def train_batches(self) -> data.TrainBatches:
        """Foregrounds composed over backgrounds."""
        settings = self.config.data
        return data.matting_train_batches(
            self.train_source,
            self._backgrounds,
            batch_size=self.config.batch_size // jax.process_count(),
            crop_size=cast(tuple[int, int], tuple(settings.crop_size)),
            scale_range=cast(tuple[float, float], settings.scale_range),
            trimap_width=cast(tuple[int, int], self.config.matting.trimap_width),
            flip=settings.flip,
            photometric=settings.photometric,
            seed=self.config.seed,
            num_workers=settings.num_workers,
            shard=(jax.process_index(), jax.process_count()),
        )

    def eval_batches(self) -> data.MattingEvalBatches:
        """The composed images of the dataset."""
        settings = self.config.eval
        return data.matting_eval_batches(
            self.val_source,
            self.info,
            batch_size=settings.batch_size // jax.process_count(),
            pad_to=cast(tuple[int, int], settings.pad_to) or 16,
            group_sizes=settings.group_sizes,
            shard=(jax.process_index(), jax.process_count()),
        )

    # ---------------------------------------------------------------------------------------- loss
    def weight(self, batch: Arrays) -> jax.Array:
        """Images."""
        return jnp.asarray(batch["image"].shape[0], jnp.float32)

    def loss(self, model: Any, batch: Arrays, weight: jax.Array) -> jax.Array:
        """Alpha and composition loss."""
        losses = matting_losses(
            model(batch["image"], batch["trimap"]),
            *(batch[name] for name in ("alpha", "trimap", "foreground", "background")),
            composition_weight=self.config.matting.composition_weight,
        )
        return losses.sum() / weight

    # ---------------------------------------------------------------------------------- evaluation
    def evaluate(self, model: Any, batch: Arrays) -> tuple[tuple, UInt8[Array, "b h w"]]:
        """Nothing to count yet, and the mattes, which `complete` counts."""
        alpha = model.matte(batch["image"], batch["trimap"])
        return (), jnp.round(255 * alpha).astype(jnp.uint8)

    def complete(self, counts: Any, batch: Batch, drawn: Any) -> MattingCounts:
        """The errors of the mattes of all processes; connected parts are found on the host."""
        del counts
        examples = [
            tuple(x[:height, :width] for x in (alpha, batch["alpha"][i], batch["trimap"][i]))
            for i, ((height, width), alpha) in enumerate(
                zip(batch["size"], local_rows(drawn), strict=True)
            )
            if height
        ]
        found = count_mattes(examples)
        if jax.process_count() == 1:
            return found
        values = [found.images, *(found.sums.get(name, 0.0) for name in METRICS)]
        images, *sums = multihost_utils.process_allgather(np.array(values)).sum(0).tolist()
        return MattingCounts(round(images), dict(zip(METRICS, sums, strict=True)))

    def no_counts(self) -> MattingCounts:
        """Of no images."""
        return MattingCounts()

    def metrics(self, counts: MattingCounts) -> dict[str, float]:
        """Means over the images."""
        return counts.compute()

    def draw_pictures(self, batch: Batch, drawn: Any, most: int) -> list[np.ndarray]:
        """Image, trimap, alpha and matte side by side."""
        rows = min(most, np.count_nonzero(batch["size"][:, 0]))
        pictures = []
        for i, matte in enumerate(local_rows(drawn)[:rows] if rows else []):
            height, width = batch["size"][i]
            greys = (batch["trimap"][i], batch["alpha"][i], matte)
            parts = [batch["image"][i], *(np.stack([grey] * 3, axis=-1) for grey in greys)]
            pictures.append(np.concatenate([part[:height, :width] for part in parts], axis=1))
        return pictures

    def score(self, metrics: Mapping[str, float]) -> float:
        """SAD, turned round."""
        return -metrics["sad"]

    def print_table(
        self, title: str, metrics: Mapping[str, float], facts: Mapping[str, str]
    ) -> None:
        """The four metrics."""
        table = Table(title=Text(title), title_justify="left")
        for name in ("", *self.summary.values()):
            table.add_column(name, justify="right" if name else "left")
        values = (f"{metrics[name]:.4f}" for name in self.summary)
        table.add_row(Text(self.config.model.head.upsampler), *values)
        print_with_facts(table, facts)


def matting_model(config: Config, rngs: nnx.Rngs) -> MattingModel:
    """The model of a config, which `training.validate` has checked."""
    arguments = model_arguments(config.model)
    backbone = {name: value for name, value in arguments["backbone"].items() if name != "name"}
    head = {name: value for name, value in arguments["head"].items() if name in _HEAD}
    return create_matting_model(**arguments | {"backbone": backbone, "head": head}, rngs=rngs)
