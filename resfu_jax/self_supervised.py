"""Upsamplers learned from photos alone, without labels, for a frozen backbone.

    extract = extractor(backbone)
    up = GuidedUpsampler("resfu", features=192, scale=4, rngs=nnx.Rngs(0))
    losses = fit(up, extract, [fitted(photo, side=896, multiple=64)])
    finer = up(extract(images), images)          # stride 4 from a backbone of stride 16

The backbone itself is the teacher, at another scale. With f the backbone, I an image and I/s the
image at 1/s of its size, the features of the small image, brought to s times their size under the
image's guidance, should be those of the whole image:

    loss = mean ((U(f(I/s), I) - f(I)) / sigma)^2

with sigma the standard deviation of each channel of f(I), so that channels count alike and the loss
is the share of the variance that is not explained: 0 is perfect, 1 as bad as a constant.

The objective is that of NAF (Chambon et al., "NAF: Zero-Shot Feature Upsampling via Neighborhood
Attention Filtering", 2025: squared errors) and of JAFAR (Couairon et al., "JAFAR: Jack up Any
Feature at Any Resolution", NeurIPS 2025: with a cosine, and random scales); LiFT (Suri et al., ECCV
2024) has it for x2. FeatUp (Fu et al., ICLR 2024) compares jittered views instead, LoftUp (Huang et
al., ICCV 2025) needs masks and a teacher. Theirs are trained on millions of images; here, the
interest is the same budget for every upsampler of the library, down to a single photo.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Num
from PIL import Image

from resfu_jax.heads.linear import ImageStem
from resfu_jax.model import IMAGENET_MEAN, IMAGENET_STD, evaluating, normalise
from resfu_jax.ops.resize import resize
from resfu_jax.upsamplers import FADE, SAPA, create_upsampler, pixel_weights, upsampler_entry

Extract = Callable[[Num[np.ndarray | Array, "b H W 3"]], Float[Array, "b h w c"]]


class GuidedUpsampler(nnx.Module):
    """Any upsampler, guided by the image where it takes a guide.

    The guide is the image at the size of the output through two 3x3 convolutions, which learn with
    the upsampler.

    Args:
      upsampler: a name of `list_upsamplers()`.
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
        upsampler: str,
        features: int,
        *,
        scale: int = 4,
        guide_features: int = 32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        if _same_width(upsampler, options):
            guide_features = features
        self.features, self.scale = features, scale
        self.upsample = create_upsampler(
            upsampler,
            features=features,
            guide_features=guide_features,
            scale=scale,
            rngs=rngs,
            **options,
        )
        types = dict(dtype=None, param_dtype=jnp.float32, rngs=rngs)
        guided = self.upsample.guide != "none"
        self.stem = ImageStem(64, guide_features, (1, 1), **types) if guided else None

    def __call__(
        self, features: Float[Array, "b h w c"], images: Num[Array, "b H W 3"]
    ) -> Float[Array, "b sh sw d"]:
        """Features `(B, h, w, C)` at `scale` times their size.

        Args:
          features: of a backbone.
          images: RGB in 0 .. 255, uint8 or floating point, of any size: they are resized to that of
            the output. Unguided upsamplers ignore them.
        """
        guide = self.guide(features, images)
        return self.upsample(features) if guide is None else self.upsample(features, guide)

    def weights(
        self,
        features: Float[Array, "b h w c"],
        images: Num[Array, "b H W 3"],
        pixel: tuple[int, int],
    ) -> Float[Array, "b h w"]:
        """What an output pixel is made of, as `upsamplers.pixel_weights`."""
        guide = self.guide(features, images)
        return pixel_weights(self.upsample, features, pixel, guide=guide)

    def guide(
        self, features: Float[Array, "b h w c"], images: Num[Array, "b H W 3"]
    ) -> Float[Array, "b sh sw g"] | None:
        """What guides the upsampler; None if nothing does."""
        if self.stem is None:
            return None
        images = normalise(images, IMAGENET_MEAN, IMAGENET_STD)
        return self.stem(_resized(images, self.scale, features.shape).astype(features.dtype))


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
    image: Num[np.ndarray, "h w 3"], *, side: int, multiple: int
) -> Num[np.ndarray, "H W 3"]:
    """The image with its longer side `side`, both sides resized to multiples of `multiple`.

    For `fit`, the multiple is the backbone's stride times the upsampler's scale. The proportions
    change by less than half a multiple.

    Args:
      image: uint8, RGB.
      side: rounded to a multiple, too.
      multiple: of the sides.
    """
    if side < multiple:
        raise ValueError(f"side must be at least {multiple} (the multiple), got {side}")
    factor = side / max(image.shape[:2])
    height, width = (max(1, round(factor * n / multiple)) * multiple for n in image.shape[:2])
    picture = Image.fromarray(np.asarray(image, np.uint8))
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def fit(
    module: nnx.Module,
    extract: Extract,
    images: Sequence[Num[np.ndarray, "_h _w 3"]],
    *,
    steps: int = 200,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> list[float]:
    """Fits a `GuidedUpsampler` to images, in place; a step sees one image.

    The features are computed once for each image, so a step costs what the upsampler costs.
    Images of different sizes compile a program each: better resize them to a few.

    Args:
      module: of the scale wanted and the features' channels.
      extract: images `(1, H, W, 3)` in 0 .. 255 to features `(1, h, w, C)`, as `extractor` makes.
      images: RGB in 0 .. 255. Their sides are multiples of the scale times the backbone's stride,
        for instance by `fitted`.
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
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
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
    """For every image, features of it at 1 / scale of its size, its own, and the guiding image.

    Raises:
      ValueError: as `fit`.
    """
    if not len(images):
        raise ValueError("images must be at least one, got none")
    pairs = []
    for i, image in enumerate(images):
        if image.ndim != 3 or image.shape[2] != 3 or any(n % scale for n in image.shape[:2]):
            raise ValueError(
                f"images[{i}] must be (height, width, 3) with sides that are multiples of the "
                f"scale, {scale}, times the backbone's stride, got shape {image.shape}"
            )
        whole = jnp.asarray(image, jnp.float32)[None]
        small = resize(whole, tuple(n // scale for n in image.shape[:2]), antialias=True)
        low, high = (jax.lax.stop_gradient(extract(x)) for x in (small, whole))
        expected = (1, *(scale * n for n in low.shape[1:3]), low.shape[3])
        if high.shape != expected:
            raise ValueError(
                f"features of images[{i}] must be {scale} times as large as those of the image at "
                f"1/{scale} of its size, {expected}, got {high.shape}"
            )
        pairs.append((low, high, _resized(whole, scale, low.shape)))
    return pairs


def _resized(images: Array, scale: int, features: tuple[int, ...]) -> Array:
    """Images at the size of the output."""
    size = tuple(scale * n for n in features[1:3])
    smaller = any(n < m for n, m in zip(size, images.shape[1:3], strict=True))
    return resize(images, size, antialias=smaller)


def _same_width(upsampler: str, options: dict[str, Any]) -> bool:
    """Whether guide and features must have as many channels: the two are mixed or compared."""
    entry = upsampler_entry(upsampler)
    options = entry.options | options
    mixed = entry.cls is FADE and options.get("gate", True)
    compared = entry.cls is SAPA and options.get("embedding_dim", 32) is None
    return mixed or compared
