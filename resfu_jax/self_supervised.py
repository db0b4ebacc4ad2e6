"""Upsamplers learned from photos alone, without labels, for a frozen backbone.

    extract = extractor(backbone)
    up = GuidedUpsampler("resfu", features=192, scale=4, rngs=nnx.Rngs(0))
    losses = fit(up, extract, [fitted(photo, side=448, multiple=16)])
    finer = up(extract(images), images)          # stride 4 from a backbone of stride 16

The backbone itself is the teacher. With f the backbone, P its stride, I an image and s the scale,
the features of the image shifted by fractions of P, interleaved, are a map s times as large:

    dense[s a + p, s b + q] = f(I shifted by (P/s) (p - (s-1)/2, q - (s-1)/2))[a, b]
    loss = mean ((U(f(I), I) - dense) / sigma)^2

with U the upsampler and sigma the standard deviation of each channel of the dense map, so that
channels count alike and the loss is the share of the variance that is not explained: 0 is perfect,
1 as bad as a constant. One pass of the backbone and the upsampler thus learn to stand for s^2
passes.

Interleaving is the "shift-and-stitch" of Long et al., "Fully Convolutional Networks for Semantic
Segmentation", CVPR 2015, section 3.2; shifted views of one image as the teacher of an upsampler are
FeatUp's (Fu et al., ICLR 2024), which also zooms, and models how the backbone pools. The other
habit is to let the features of a small version of the image explain those of the image itself: LiFT
(Suri et al., ECCV 2024), JAFAR (Couairon et al., NeurIPS 2025), NAF (Chambon et al., 2025). It asks
of a backbone that features do not depend on the size of things: between 224 and 896 pixels those of
a ViT-Ti differ so much that bilinear upsampling explains none of the variance. Shifts keep the
size. The published upsamplers of this kind are trained on up to millions of images; here, the
interest is the same budget for every upsampler of the library, down to a single photo.
"""

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num

from resfu_jax._checks import need
from resfu_jax._extras import extra
from resfu_jax.heads.linear import ImageStem
from resfu_jax.images import read_image
from resfu_jax.model import IMAGENET_MEAN, IMAGENET_STD, evaluating, normalise
from resfu_jax.ops.resize import resize
from resfu_jax.upsamplers import create_upsampler, pixel_weights

with extra("train"):
    import optax
    from PIL import Image

Extract = Callable[[Num[np.ndarray | Array, "b H W 3"]], Float[Array, "b h w c"]]


class GuidedUpsampler(nnx.Module):
    """Any upsampler, guided by the image where it takes a guide.

    The guide is the image at the size of the output: as it is, for upsamplers that are guided by
    the image, or through two 3x3 convolutions, which learn with the upsampler.

    Args:
      upsampler: a name of `list_upsamplers()`; or an upsampler, such as `load_upsampler` gives,
        that is guided by the image or not at all.
      features: channels C of the features.
      scale: whole ratio of the output to them.
      guide_features: channels of the guide; those of the features where an upsampler mixes or
        compares the two.
      rngs: source of the initial weights.
      **options: options of the upsampler.

    Raises:
      ValueError: an unknown upsampler or option, or a value that it does not support.
    """

    def __init__(
        self,
        upsampler: str | nnx.Module,
        features: int,
        *,
        scale: int = 4,
        guide_features: int = 32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        def create(guide_features: int, rngs: nnx.Rngs) -> Any:
            widths = dict(features=features, guide_features=guide_features)
            return create_upsampler(name, **widths, scale=scale, rngs=rngs, **options)

        self.features, self.scale = features, scale
        if isinstance(upsampler, nnx.Module):
            need(
                not options and getattr(upsampler, "guide", None) in ("none", "image"),
                "upsampler must be a name, or a module that is guided by the image or not at all, "
                f"without options; got {type(upsampler).__name__} and {options}",
            )
            self.upsample: Any = upsampler
            self.stem = None
            return

        name = upsampler

        # One that does not take a guide of this width at all does not need it either.
        with contextlib.suppress(ValueError):
            if nnx.eval_shape(lambda: create(features, nnx.Rngs(0))).same_width:
                guide_features = features
        self.upsample = create(guide_features, rngs)
        types = dict(dtype=None, param_dtype=jnp.float32, rngs=rngs)
        by_map = self.upsample.guide == "features"
        self.stem = ImageStem(64, guide_features, (1, 1), **types) if by_map else None

    def __call__(
        self,
        features: Float[Array, "b h w c"],
        images: Num[Array, "b H W 3"],
        size: tuple[int, int] | None = None,
        guide_size: tuple[int, int] | None = None,
        *,
        values: Float[Array, "b h w v"] | None = None,
    ) -> Float[Array, "b oh ow d"]:
        """Features `(B, h, w, C)` at a larger size.

        Args:
          features: of a backbone.
          images: RGB in 0 .. 255, uint8 or floating point, of any size: they are resized to that of
            the guide. Unguided upsamplers ignore them.
          size: height and width of the output; None: `scale` times those of the features, the only
            ones that an upsampler with `needs_whole_scale` can give.
          guide_size: of the image as the upsampler sees it; None: `size`. Only an upsampler that is
            guided by the image itself can have another one.
          values: stand in for the features, which then only decide the weights, for upsamplers that
            take them.

        Raises:
          ValueError: a size that the upsampler cannot give.
        """
        size = self.nearest_size(features, size) if size is None else size
        need(
            size == self.nearest_size(features, size),
            f"size must be {self.nearest_size(features, size)}, {self.scale} times that of the "
            f"features, for {type(self.upsample).__name__}; got {size}",
        )
        guide = self.guide(features, images, size, guide_size)
        options: dict[str, Any] = {} if values is None else dict(values=values)
        if self.upsample.guide != "features":
            options["output_size"] = size
        return self.upsample(features, *guide, **options)

    def nearest_size(
        self, features: Float[Array, "b h w c"], size: tuple[int, int] | None
    ) -> tuple[int, int]:
        """The size that the upsampler can give where this one is wanted."""
        if size is None or self.upsample.needs_whole_scale:
            return self.scale * features.shape[1], self.scale * features.shape[2]
        return size

    def weights(
        self,
        features: Float[Array, "b h w c"],
        images: Num[Array, "b H W 3"],
        pixel: tuple[Any, Any],
    ) -> Float[Array, "b h w"]:
        """What an output pixel is made of, as `upsamplers.pixel_weights`."""
        return pixel_weights(self.upsample, features, pixel, *self.guide(features, images))

    def guide(
        self,
        features: Float[Array, "b h w c"],
        images: Num[Array, "b H W 3"],
        size: tuple[int, int] | None = None,
        guide_size: tuple[int, int] | None = None,
    ) -> tuple[Float[Array, "b gh gw g"], ...]:
        """What guides the upsampler to the size; nothing for an unguided one."""
        if self.upsample.guide == "none":
            return ()
        unit = self.stem is None and self.upsample.image == "unit"
        mean, std = ((0.0,) * 3, (255.0,) * 3) if unit else (IMAGENET_MEAN, IMAGENET_STD)
        size = self.nearest_size(features, size)
        guide_size = size if guide_size is None or self.stem is not None else guide_size
        images = _resized(normalise(images, mean, std), guide_size).astype(features.dtype)
        return (images if self.stem is None else self.stem(images),)


def extractor(
    backbone: nnx.Module,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Extract:
    """The backbone, frozen and compiled: images in 0 .. 255 to its last map.

    Args:
      backbone: of `create_backbone`, with its weights.
      mean: what it expects images to be normalised with, in 0 .. 255.
      std: likewise.
    """
    graphdef, state = nnx.split(evaluating(backbone))

    @jax.jit
    def extract(state, images):
        return nnx.merge(graphdef, state)(normalise(images, mean, std))[-1]

    return lambda images: extract(state, jnp.asarray(images))


def fitted(
    image: str | os.PathLike[str] | Num[np.ndarray, "h w 3"], *, side: int, multiple: int
) -> Num[np.ndarray, "H W 3"]:
    """The image with its longer side `side`, both sides resized to multiples of `multiple`.

    For `fit`, the multiple is the backbone's stride. The proportions change by less than half a
    multiple.

    Args:
      image: a file, or uint8, RGB.
      side: rounded to a multiple, too.
      multiple: of the sides.

    Raises:
      ImageError: a file that cannot be read.
      ValueError: a side smaller than the multiple.
    """
    if isinstance(image, str | os.PathLike):
        image = read_image(image)
    if side < multiple:
        raise ValueError(f"side must be at least {multiple} (the multiple), got {side}")
    factor = side / max(image.shape[:2])
    height, width = (max(1, round(factor * n / multiple)) * multiple for n in image.shape[:2])
    picture = Image.fromarray(np.asarray(image, np.uint8))
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def fit(
    module: Any,
    extract: Extract,
    images: Sequence[Num[np.ndarray, "_h _w 3"]],
    *,
    steps: int = 200,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> list[float]:
    """Fits a `GuidedUpsampler` to images, in place; a step sees one image.

    The features are computed once for each image, in 1 + scale^2 passes of the backbone, so a step
    costs what the upsampler costs. Images of different sizes compile a program each: better resize
    them to a few.

    Args:
      module: of the scale wanted and the features' channels.
      extract: images `(1, H, W, 3)` in 0 .. 255 to features `(1, h, w, C)`, as `extractor` makes.
      images: RGB in 0 .. 255. Their sides are multiples of the backbone's stride, for instance by
        `fitted`.
      steps: of Adam, on one image each; every image once before any comes again.
      learning_rate: peak; it rises for a tenth of the steps and falls to zero as a cosine.
      seed: of the images' order.

    Returns:
      The loss of every step, before it. A module without parameters has a loss for every image.

    Raises:
      ValueError: no images, sides that do not divide, or features that do not fit the module.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    pairs = training_pairs(extract, images, module.scale)
    channels = {high.shape[3] for _, high, _ in pairs}
    if channels != {module.features}:
        raise ValueError(
            f"extract must give the {module.features} channels that the module takes, got "
            f"{', '.join(map(str, sorted(channels)))}"
        )
    every = np.concatenate([np.asarray(high).reshape(-1, module.features) for _, high, _ in pairs])
    deviation = jnp.asarray(every.std(axis=0) + 1e-6)[None, None, None]
    # As it will be used: without dropout, by the running statistics that BatchNorm has.
    graphdef, *states = nnx.split(evaluating(module), nnx.Param, ...)
    params, rest = states
    params = nnx.as_pure(params)

    def loss_fn(params, low, high, image):
        error = nnx.merge(graphdef, params, rest)(low, image) - high
        return jnp.square(error / deviation).mean()

    if not jax.tree.leaves(params):
        return [float(jax.jit(loss_fn)(params, *pair)) for pair in pairs]
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, -(-steps // 10), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    @jax.jit
    def step(params, state, pair):
        loss, gradient = jax.value_and_grad(loss_fn)(params, *pair)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    rng = np.random.default_rng(seed)
    rounds = [rng.permutation(len(pairs)) for _ in range(-(-steps // len(pairs)))]
    state, losses = optimizer.init(params), []
    for i in np.concatenate(rounds)[:steps]:
        params, state, loss = step(params, state, pairs[i])
        losses.append(loss)
    nnx.update(module, params)
    return [float(loss) for loss in losses]


def training_pairs(
    extract: Extract, images: Sequence[Num[np.ndarray, "_h _w 3"]], scale: int
) -> list[tuple[Array, Array, Array]]:
    """For every image, its features, their dense map, and the image at that map's size.

    Raises:
      ValueError: as `fit`.
    """
    if not len(images):
        raise ValueError("images must be at least one, got none")
    pairs = []
    for i, image in enumerate(images):
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"images[{i}] must be (height, width, 3), got shape {image.shape}")
        image = jnp.asarray(image, jnp.float32)[None]
        low = extract(image)
        high = dense_features(extract, image, scale, stride=image.shape[1] / low.shape[1])
        pairs.append((low, high, _resized(image, tuple(high.shape[1:3]))))
    return pairs


def dense_features(
    extract: Extract, images: Float[Array, "b H W 3"], scale: int, *, stride: float
) -> Float[Array, "b sh sw c"]:
    """Features at `scale` times the resolution of the backbone's, from scale^2 shifted images.

    Shifts by fractions of a pixel interpolate linearly; beyond the image, its edge is repeated.

    Args:
      extract: images to features.
      images: RGB in 0 .. 255, with sides that are multiples of the backbone's stride.
      scale: s, whole.
      stride: of the backbone, in pixels.
    """

    def shifted(images: Array, axis: int, by: float) -> Array:
        lower = math.floor(by)
        places = np.arange(images.shape[axis]) + lower
        below, above = (jnp.take(images, places + i, axis, mode="clip") for i in (0, 1))
        return below + (by - lower) * (above - below)

    by = [stride / scale * (p - (scale - 1) / 2) for p in range(scale)]
    rows = [shifted(images, 1, y) for y in by]
    maps = [[extract(shifted(row, 2, x)) for x in by] for row in rows]
    dense = jnp.stack([jnp.stack(columns, axis=3) for columns in maps], axis=2)
    b, h, _, w, _, c = dense.shape
    return dense.reshape(b, scale * h, scale * w, c)


def _resized(images: Array, size: tuple[int, ...]) -> Array:
    """Images at this size."""
    smaller = any(n < m for n, m in zip(size, images.shape[1:3], strict=True))
    return resize(images, size, antialias=smaller)
