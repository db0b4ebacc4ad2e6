"""Batches of matting: composed on the fly for training, as they are stored for evaluation.

Datasets of mattes (`DatasetInfo.mattes`) have three splits. An example of "train" is a foreground
and its alpha matte, one of "background" an image, one of "validation" a composed image with alpha
and trimap.
"""

import functools
from typing import Any

import numpy as np
from PIL import Image

from resfu_jax import images
from resfu_jax.data.composition import Compose, Layer, check_same_size
from resfu_jax.data.info import CorruptExampleError, DataError, DatasetInfo
from resfu_jax.data.load import Source
from resfu_jax.data.pipeline import EvalBatches, TrainBatches, augmented_batches, eval_batches
from resfu_jax.preprocess import Preprocess

Example = dict[str, bytes]


def matting_train_batches(
    source: Source,
    backgrounds: Source,
    *,
    batch_size: int,
    crop_size: tuple[int, int],
    scale_range: tuple[float, float] = (0.8, 1.25),
    trimap_width: tuple[int, int] = (1, 29),
    flip: bool = True,
    photometric: bool = True,
    seed: int,
    num_workers: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> TrainBatches:
    """An endless iterator of composed examples; see `Compose`, and `train_batches` for the stream.

    Args:
      source: the split "train" of a dataset of mattes.
      backgrounds: its split "background".
      batch_size: examples in each batch of this process.
      crop_size: (height, width) of the crops.
      scale_range: bounds of the random scale along each axis.
      trimap_width: bounds of the diameters by which known regions are eroded.
      flip: mirror along each axis with probability 1/2.
      photometric: jitter the colours of the foreground.
      seed: of all randomness.
      num_workers: worker processes; 0 reads in threads of this process.
      shard: (index, count) of this process among those that share the dataset.

    Returns:
      Iterator over `{"image", "foreground", "background": uint8 (B, h, w, 3), "alpha", "trimap":
      uint8 (B, h, w), "id": bytes (B,)}`.
    """
    draw = Compose(crop_size, scale_range, trimap_width, flip, photometric)
    composed = functools.partial(_composed, source=source, backgrounds=backgrounds, draw=draw)
    return augmented_batches(
        source,
        composed,
        batch_size=batch_size,
        seed=seed,
        num_workers=num_workers,
        shard=shard,
    )


def _composed(
    example: Example,
    rng: np.random.Generator,
    *,
    source: Source,
    backgrounds: Source,
    draw: Compose,
) -> dict[str, Any]:
    second = None
    if draw.wants_second(rng):
        other = source[int(rng.integers(len(source)))]
        second = read_layer(other, source.where(other))
    behind = backgrounds[int(rng.integers(len(backgrounds)))]
    background = _open(behind, "image", backgrounds.where(behind))
    layer = read_layer(example, source.where(example))
    return draw(layer, second, background, rng) | {"id": example["id"]}


class MattingEvalBatches(EvalBatches):
    """Batches of composed images, with `trimap` and `alpha` in place of `label`.

    Padding repeats what is reflected in the border, so that the network sees no edge there; the
    trimap has no unknown pixels in it.
    """

    def _row(self, slot: int) -> dict[str, Any]:
        index, (height, width) = self.slots[slot]
        if index is None:
            grey = np.zeros((height, width), np.uint8)
            empty = dict(image=np.stack([grey] * 3, axis=-1), trimap=grey, alpha=grey)
            return empty | {"id": b"", "size": np.zeros(2, np.int32)}
        example = self.source[index]
        where = self.source.where(example)
        image, alpha, trimap = read_composed(example, where)
        size = np.array(alpha.shape, np.int32)
        if size[0] > height or size[1] > width:
            raise DataError(
                f"{where} is {size[0]}x{size[1]} (height x width) and does not fit "
                f"pad_to=({height}, {width})."
            )
        sides = (0, height - size[0]), (0, width - size[1])
        return dict(
            image=np.pad(image, (*sides, (0, 0)), "symmetric"),
            trimap=np.pad(trimap, sides),
            alpha=np.pad(alpha, sides),
            id=example["id"],
            size=size,
        )


def matting_eval_batches(
    source: Source,
    info: DatasetInfo,
    *,
    batch_size: int,
    pad_to: tuple[int, int] | int = 16,
    group_sizes: bool = False,
    shard: tuple[int, int] = (0, 1),
) -> MattingEvalBatches:
    """Batches of every example of the split "validation", in order; arguments of `eval_batches`.

    Returns:
      An iterable, with a length, of `{"image": uint8 (B, h, w, 3), "alpha", "trimap": uint8
      (B, h, w), "id": bytes (B,), "size": int32 (B, 2)}`.
    """
    plain = eval_batches(
        source,
        info,
        batch_size=batch_size,
        preprocess=Preprocess(orientation=False),
        pad_to=pad_to,
        group_sizes=group_sizes,
        shard=shard,
    )
    return MattingEvalBatches(**vars(plain))


# ----------------------------------------------------------------------------------------- decoding
def read_layer(example: Example, where: str) -> Layer:
    """The foreground and alpha matte of an example of "train".

    Raises:
      CorruptExampleError: a file cannot be decoded.
      DataError: the alpha matte is of another size than the image.
    """
    colours, alpha = _open(example, "image", where), _open_grey(example, "alpha", where)
    check_same_size(colours, alpha, f"the alpha matte of {where}")
    return Layer(colours, alpha)


def read_composed(example: Example, where: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, alpha and trimap of an example of "validation"; errors as for `read_layer`."""
    colours, alpha = read_layer(example, where)
    trimap = _open_grey(example, "trimap", where)
    check_same_size(colours, trimap, f"the trimap of {where}")
    return np.asarray(colours), np.asarray(alpha), np.asarray(trimap)


def _open(example: Example, key: str, where: str) -> Image.Image:
    try:
        return images.open_image(example[key], f"the {key} of {where}", orientation=False)
    except images.ImageError as error:
        raise CorruptExampleError(str(error)) from error


def _open_grey(example: Example, key: str, where: str) -> Image.Image:
    """The first channel of an image, whose others are equal: mattes are stored so, too."""
    return _open(example, key, where).getchannel(0)
