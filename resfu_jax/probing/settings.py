"""Settings of a probe: on their own, so that `resfu probe --help` does not wait for JAX."""

import dataclasses
from typing import Literal, get_args

from resfu_jax._checks import (
    check_choice,
    check_flag,
    check_not_negative,
    check_positive,
    check_whole,
    is_number,
    is_whole,
    need,
)

Method = Literal["features", "preserved", "probabilities"]


@dataclasses.dataclass(frozen=True)
class ProbeSettings:
    """How a probe is made; what is not given is as the papers have it, or said to be otherwise."""

    protocols: tuple[Method, ...] = ("features",)
    """features, preserved, probabilities: see docs/probing.md."""
    seeds: tuple[int, ...] = (0,)
    """Of the initial classifier, the order of images and their mirroring; sampled pixels are the
    same for all."""
    crop: int | None = None
    """Side of the square in the middle of every image, of which the shorter side is resized to it
    (antialiased bilinear; labels nearest): 448 in most papers. None: whole images, whose labels
    are left as they are."""
    scale: float = 1.0
    """Size at which the backbone sees the image, over that of the labels; it is resized to the
    nearest multiples of the patch. The upsampler is guided by the image at the labels' size."""
    output_stride: int | None = None
    """Pixels of the backbone's input for one of the upsampled map; logits are resized to the labels
    bilinearly. None: features are upsampled to the labels' size."""
    pixels_per_image: int | None = 1024
    """Labelled pixels of a training image, drawn at random once, that the classifier is fitted to.
    None: all, computed anew in every epoch."""
    flip: bool = True
    """Every epoch sees every image as it is or mirrored, by chance."""
    cell_labels: Literal["share", "centre"] = "share"
    """At low resolution, a cell is fitted to all of its pixels, each with its own label (share), or
    to the label at its centre, which is nearest-neighbour reduction (centre)."""
    epochs: int = 20
    """Times that all images are seen."""
    batch_size: int = 2
    """Images of a step."""
    learning_rate: float = 5e-4
    """Of AdamW at the first step; a cosine takes it to zero over all steps."""
    weight_decay: float = 1e-5
    """Of AdamW, kernel and bias alike, as PyTorch's."""
    class_balance: float = 0.0
    """Weight of a class in the loss: (median frequency / frequency) to this power, counted on the
    training labels. 0: none, as in the papers."""
    dilation_ratio: float = 0.02
    """Width of the boundary of boundary IoU over the image's diagonal."""
    bins: int = 256
    """Of depth: outputs of the linear layer, which weigh as many depths, evenly spaced from
    min_depth to max_depth."""
    min_depth: float = 1e-3
    """Smaller depths do not count."""
    max_depth: float = 10.0
    """Larger depths do not count."""
    depth_crop: Literal["none", "eigen", "garg"] = "none"
    """Part of the images whose depths are scored: eigen for NYU, garg for KITTI."""
    train_split: str = "train"
    """Split to fit on, or a slice of it, such as "train[:50%]"."""
    validation_split: str = "validation"
    """Split to score on."""

    def __post_init__(self):
        for name in ("protocols", "seeds"):
            value = getattr(self, name)
            need(
                isinstance(value, tuple | list) and len(value) == len(set(value)) > 0,
                f"{name} must be one or more, none twice, got {value!r}",
            )
            object.__setattr__(self, name, tuple(value))
        for method in self.protocols:
            check_choice(get_args(Method), protocols=method)
        for seed in self.seeds:
            need(is_whole(seed) and seed >= 0, f"seeds must be whole numbers from 0, got {seed!r}")
        for name in ("crop", "output_stride", "pixels_per_image"):
            if getattr(self, name) is not None:
                check_whole(**{name: getattr(self, name)})
        check_choice(("share", "centre"), cell_labels=self.cell_labels)
        check_flag(flip=self.flip)
        check_whole(epochs=self.epochs, batch_size=self.batch_size)
        check_positive(
            scale=self.scale, learning_rate=self.learning_rate, dilation_ratio=self.dilation_ratio
        )
        check_not_negative(weight_decay=self.weight_decay)
        check_whole(bins=self.bins)
        check_positive(min_depth=self.min_depth, max_depth=self.max_depth)
        need(
            self.min_depth < self.max_depth,
            f"min_depth must be below max_depth, got {self.min_depth:g} and {self.max_depth:g}",
        )
        check_choice(("none", "eigen", "garg"), depth_crop=self.depth_crop)
        need(
            is_number(self.class_balance),
            f"class_balance must be a number, got {self.class_balance!r}",
        )
