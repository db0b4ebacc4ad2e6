"""What teaches an upsampler without labels: the objectives of the papers, on one frozen backbone.

With f the backbone, P its stride, U the upsampler, I an image and I' a version of it:

    naf       U(f(I small), I) = f(I)                          squared error
    jafar     the same, for random sizes of I small            1 - cosine + squared error
    anyup     U(f(I small), I small), cut out = f(I cut out)   the same
    featup    pooled(U(f(I), I) jittered) = f(I jittered)      squared error over learned variance
    loftup    U(f(I), I) = f(I), bicubic, averaged over masks  squared error
    stitch    U(f(I), I) = f of shifted I, interleaved         squared error over variance

Each is as its authors released it, where nothing else is said: JAFAR (Couairon et al., NeurIPS
2025), AnyUp (Wimmer et al., 2025), NAF (Chambon et al., 2025), FeatUp (Fu et al., ICLR 2024), stage
1 of LoftUp (Huang et al., ICCV 2025). `stitch` is `resfu_jax.self_supervised`'s.

What is random is drawn on the host for each image of a batch, so that a run that continues, or uses
other devices, draws the same.
"""

import abc
import dataclasses
import functools
import io
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from resfu_jax._checks import (
    check_count,
    check_flag,
    check_not_negative,
    check_rate,
    check_whole,
    is_number,
    need,
)
from resfu_jax._names import lookup
from resfu_jax.data.transforms import photometric_jitter
from resfu_jax.ops.filters import gaussian_blur
from resfu_jax.ops.pool import adaptive_avg_pool
from resfu_jax.ops.resize import resize
from resfu_jax.self_supervised import dense_features

Map = Float[Array, "_b _h _w c"]
Batch = Mapping[str, Any]
Images = UInt8[np.ndarray, "b H W 3"]
Upsample = Callable[..., Map]  # as a `GuidedUpsampler` is called


class Objective(abc.ABC):
    """What an upsampler learns from.

    The model has `features(images)`, the backbone's map, without gradient; `stride`; `head`, the
    upsampler; and `parts`, what `create_parts` made.
    """

    channel_norm: bool = False
    """Whether features are normalised over their channels before all else."""

    def create_parts(self, features: int, stride: int, rngs: nnx.Rngs) -> nnx.Module | None:
        """What learns beside the upsampler."""
        del features, stride, rngs
        return None

    def draw(
        self,
        images: Images,
        labels: UInt8[np.ndarray, "b H W"],
        stride: int,
        rng: np.random.Generator,
        sizes: np.random.Generator,
    ) -> dict[str, np.ndarray]:
        """What is random in a step, for each image.

        Args:
          images: of the batch.
          labels: of the dataset, if it has any.
          stride: of the backbone.
          rng: for this process.
          sizes: for what all processes must draw alike: shapes.
        """
        del images, labels, stride, rng, sizes
        return {}

    @abc.abstractmethod
    def pair(self, model: Any, upsample: Upsample, batch: Batch) -> tuple[Map, Map]:
        """What an upsampler makes of the batch, and what it should be."""

    @abc.abstractmethod
    def loss(self, model: Any, batch: Batch) -> Float[Array, "b"]:
        """The loss of each image."""


# ------------------------------------------------------------------------------------------ losses
def squared_error(prediction: Map, target: Map) -> Float[Array, "b"]:
    """Its mean over the channels of all places."""
    return jnp.square(prediction - target).mean(axis=(1, 2, 3))


def cosine_and_error(prediction: Map, target: Map) -> Float[Array, "b"]:
    """1 - cosine, and the squared error where the target's channels go from 0 to 1 at each place.

    JAFAR's loss, and AnyUp's:  mean (1 - <p, t> / |p| |t|)  +  mean ((p - t) / (max t - min t))^2
    """
    low, high = (f(target, axis=3, keepdims=True) for f in (jnp.min, jnp.max))
    scale = 1 / (high - low + 1e-6)
    apart = (1 - cosine(prediction, target)).mean(axis=(1, 2))
    return apart + squared_error(prediction * scale, target * scale)


def cosine(a: Map, b: Map) -> Float[Array, "b h w"]:
    """<a, b> / |a| |b| at each place."""
    squares = (jnp.square(a).sum(axis=3) + 1e-12) * (jnp.square(b).sum(axis=3) + 1e-12)
    return (a * b).sum(axis=3) / jnp.sqrt(squares)


# -------------------------------------------------------------------------------- smaller versions
@dataclasses.dataclass(frozen=True)
class NAF(Objective):
    """The features of a smaller version of the image explain those of the image itself.

    Attributes:
      ratios: bounds of the smaller sides over the image's, drawn anew at each step and rounded to
        the backbone's stride; each size that comes compiles a program.
      guide: largest side of the image as the upsampler sees it, which is at most four times that of
        the target.
    """

    ratios: tuple[float, float] = (0.5, 0.5)
    guide: int = 224

    def __post_init__(self) -> None:
        _check_ratios(self.ratios)
        check_whole(guide=self.guide)

    def draw(self, images, labels, stride, rng, sizes):
        """The small image."""
        return {"small": _smaller(images, _sides(images, self.ratios, stride, sizes))}

    def pair(self, model: Any, upsample: Upsample, batch: Batch) -> tuple[Map, Map]:
        """The small image's features, upsampled; the image's."""
        low, high = model.features(batch["small"]), model.features(batch["image"])
        size = high.shape[1:3]
        guide_size = tuple(min(self.guide, 4 * n) for n in size)
        return upsample(low, batch["image"], size, guide_size), high

    def loss(self, model: Any, batch: Batch) -> Float[Array, "b"]:
        """Squared error."""
        return squared_error(*self.pair(model, model.head, batch))


@dataclasses.dataclass(frozen=True)
class JAFAR(Objective):
    """Likewise, from a random size, with the image at half its size as the guide.

    And U(f(I), I') = U(f(I), I) for images I' with blur and noise, at the guide's size.

    Attributes:
      ratios: as of `NAF`.
      consistency: weight of the second.
      blur: probability of a Gaussian blur (5 x 5, sigma 1) of I'.
      noise: probability of noise (deviation 0.02 of the range).
    """

    ratios: tuple[float, float] = (0.25, 0.5)
    consistency: float = 0.1
    blur: float = 0.5
    noise: float = 0.3

    def __post_init__(self) -> None:
        _check_ratios(self.ratios)
        check_not_negative(consistency=self.consistency, blur=self.blur, noise=self.noise)

    def draw(self, images, labels, stride, rng, sizes):
        """The small image, and what happens to I'."""
        count = len(images)
        return {
            "small": _smaller(images, _sides(images, self.ratios, stride, sizes)),
            "blur": rng.random(count) < self.blur,
            "noise": rng.random(count) < self.noise,
            "seed": rng.integers(2**32, size=count, dtype=np.uint32),
        }

    def pair(self, model: Any, upsample: Upsample, batch: Batch) -> tuple[Map, Map]:
        """The small image's features, upsampled; the image's."""
        low, high = model.features(batch["small"]), model.features(batch["image"])
        guide = _half(batch["image"])
        return upsample(low, guide, high.shape[1:3], guide.shape[1:3]), high

    def loss(self, model: Any, batch: Batch) -> Float[Array, "b"]:
        """Cosine and squared error, and consistency."""
        prediction, high = self.pair(model, model.head, batch)
        loss = cosine_and_error(prediction, high)
        if self.consistency:
            guide = _half(batch["image"])
            changed = _with_blur_and_noise(guide, batch["blur"], batch["noise"], batch["seed"])
            loss += self.consistency * _inconsistency(model.head, high, guide, changed)
        return loss


@dataclasses.dataclass(frozen=True)
class AnyUp(Objective):
    """Parts of the image, each with the features that it has by itself, teach the whole.

    The upsampler sees the image and its features at a fraction of its size; what it makes of a part
    is compared with the features of that part, cut out of the image at full size. And, as in
    `JAFAR`, guides I' with other colours and noise give the same; and so do upsampled features that
    are averaged back to the size of the given ones.

    Colours of I' change by this library's photometric jitter where AnyUp's change by two of
    torchvision's; the rest is theirs.

    Attributes:
      crops: parts of each image.
      reduction: sides of the image over those of the parts, and of its small version; whole.
      consistency: weight of the second.
      preservation: weight of the third.
    """

    crops: int = 4
    reduction: int = 2
    consistency: float = 0.1
    preservation: float = 0.1

    def __post_init__(self) -> None:
        check_whole(crops=self.crops, reduction=self.reduction)
        check_not_negative(consistency=self.consistency, preservation=self.preservation)

    def draw(self, images, labels, stride, rng, sizes):
        """The small image, I', and the parts with the places where they begin, in cells."""
        height, width = (n // self.reduction // stride * stride for n in images.shape[1:3])
        need(min(height, width) > 0, f"reduction must leave {stride} pixels of {images.shape[1:3]}")
        count, last = len(images), np.array(images.shape[1:3]) - (height, width)
        places = rng.integers(last // stride + 1, size=(count, self.crops, 2), dtype=np.int32)
        crops = [
            image[y : y + height, x : x + width]
            for image, corners in zip(images, stride * places, strict=True)
            for y, x in corners
        ]
        small = _smaller(images, (height, width), antialias=True)
        return {
            "small": small,
            "changed": np.stack([changed(image, rng) for image in small]),
            "crops": np.stack(crops).reshape(count, self.crops, height, width, 3),
            "places": places,
        }

    def pair(self, model: Any, upsample: Upsample, batch: Batch) -> tuple[Map, Map]:
        """What is upsampled, and cut out; the features of what is cut out."""
        return self._parts(model, self._whole(model, upsample, batch), batch)

    def _whole(self, model: Any, upsample: Upsample, batch: Batch) -> Map:
        small, images = batch["small"], batch["image"]
        size = tuple(n // model.stride for n in images.shape[1:3])
        return upsample(model.features(small), small, size, small.shape[1:3])

    def _parts(self, model: Any, whole: Map, batch: Batch) -> tuple[Map, Map]:
        crops, places = batch["crops"], batch["places"]
        target = model.features(crops.reshape(-1, *crops.shape[2:]))
        window = (*target.shape[1:3], whole.shape[3])

        def cut(features: Array, place: Array) -> Array:
            return jax.lax.dynamic_slice(features, (*place, jnp.zeros_like(place[0])), window)

        parts = jax.vmap(jax.vmap(cut, in_axes=(None, 0)))(whole, places)
        return parts.reshape(-1, *window), target

    def loss(self, model: Any, batch: Batch) -> Float[Array, "b"]:
        """Cosine and squared error of all three."""
        low = model.features(batch["small"])
        whole = self._whole(model, model.head, batch)
        parts = cosine_and_error(*self._parts(model, whole, batch))
        loss = parts.reshape(-1, self.crops).mean(axis=1)
        if self.consistency:
            guides = batch["small"], batch["changed"]
            loss += self.consistency * _inconsistency(model.head, low, *guides)
        if self.preservation:
            pooled = adaptive_avg_pool(whole, low.shape[1:3])
            loss += self.preservation * cosine_and_error(pooled, low)
        return loss


def _inconsistency(head: Any, features: Map, guide: Array, other: Array) -> Float[Array, "b"]:
    """How far the output of another guide is from that of the guide, which does not learn here."""
    size = head.nearest_size(features, guide.shape[1:3])
    target = jax.lax.stop_gradient(head(features, guide, size, guide.shape[1:3]))
    return cosine_and_error(head(features, other, size, guide.shape[1:3]), target)


def _half(images: Array) -> Array:
    return resize(images.astype(jnp.float32), tuple(n // 2 for n in images.shape[1:3]))


def _with_blur_and_noise(
    images: Array, blur: Bool[Array, "b"], noise: Bool[Array, "b"], seed: Array
) -> Array:
    noises = jax.vmap(lambda s: jax.random.normal(jax.random.key(s), images.shape[1:]))(seed)
    images = jnp.where(_each(blur), _blurred(images), images)
    return jnp.clip(images + jnp.where(_each(noise), 0.02 * 255 * noises, 0.0), 0.0, 255.0)


def _each(x: Array) -> Array:
    return x[:, None, None, None]


def _sides(
    images: Images, ratios: tuple[float, float], stride: int, sizes: np.random.Generator
) -> tuple[int, int]:
    ratio = sizes.uniform(*ratios)
    height, width = (max(1, round(ratio * n / stride)) * stride for n in images.shape[1:3])
    return height, width


def _smaller(
    images: Images, size: tuple[int, int], *, antialias: bool = False
) -> Float[np.ndarray, "b h w 3"]:
    """Images at this size, bilinearly, without the device, which has other things to do."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return np.asarray(_resize_images(images, size, antialias))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _resize_images(images: Array, size: tuple[int, int], antialias: bool) -> Array:
    return resize(images.astype(jnp.float32), size, antialias=antialias)


def changed(
    image: Float[np.ndarray, "h w 3"], rng: np.random.Generator
) -> Float[np.ndarray, "h w 3"]:
    """The image I' of `AnyUp`: other colours, blur, JPEG's artefacts, noise, each by chance."""
    draws = rng.random(10)
    picture = Image.fromarray(np.clip(np.rint(image), 0, 255).astype(np.uint8))
    if draws[0] < 0.5:
        picture = photometric_jitter(picture, rng)
    if draws[1] < 0.1:
        picture = ImageOps.grayscale(picture).convert("RGB")
    if draws[2] < 0.35:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.5)))
    content = io.BytesIO()
    picture.save(
        content, "JPEG", quality=int(rng.choice([95, 80, 60, 40], p=[0.25, 0.35, 0.25, 0.15]))
    )
    picture = Image.open(content).convert("RGB")
    if draws[3] < 0.2:
        picture = ImageOps.autocontrast(picture)
    if draws[4] < 0.15:
        picture = ImageOps.equalize(picture)
    if draws[5] < 0.2:
        picture = ImageEnhance.Sharpness(picture).enhance(1.5)
    if draws[6] < 0.1:
        picture = ImageOps.posterize(picture, 5)
    if draws[7] < 0.05:
        picture = ImageOps.solarize(picture, round(0.9 * 255))
    if draws[8] < 0.02:
        picture = ImageOps.invert(picture)
    values = np.asarray(picture, np.float32)
    if draws[9] < 0.6:
        values = values + rng.normal(0, 0.03 * 255, values.shape).astype(np.float32)
    return np.clip(values, 0, 255)


# ---------------------------------------------------------------------------------- jittered views
@dataclasses.dataclass(frozen=True)
class FeatUp(Objective):
    """Views of an image teach: upsampled features, jittered and pooled, are those of the view.

        loss = mean over views of  e^2 / 2 s^2 + log s
        e = pooled(jitter(U(f(I), I))) - f(jitter(I))

    in `projection` random directions of the features, with a learned deviation s of each place. A
    jitter reflects borders of `pad` pixels, zooms by up to `zoom` every other time, cuts out a
    window of the image's size and mirrors every other one. Pooling is an attention over the pixels
    of a cell, as the backbone's pooling is unknown, and learns. For the first view, features of
    places that are close and look alike are drawn together (`crf`). The released code compares the
    jittered features there with the image before the jitter, here it is the jittered image.

    Attributes:
      views: of each image.
      pad: pixels that borders are reflected by.
      zoom: largest.
      projection: random directions; 0 compares all channels.
      crf: weight of the last term.
      dropout: share of places that pooling does without attention.
      channel_norm: features are normalised over their channels before all else.
    """

    views: int = 5
    pad: int = 20
    zoom: float = 2.0
    projection: int = 30
    crf: float = 0.001
    dropout: float = 0.2
    channel_norm: bool = True

    def __post_init__(self) -> None:
        check_whole(views=self.views, pad=self.pad)
        check_count(projection=self.projection)
        check_not_negative(zoom=self.zoom, crf=self.crf)
        check_rate(dropout=self.dropout)
        check_flag(channel_norm=self.channel_norm)
        need(self.zoom >= 1, f"zoom must be at least 1, got {self.zoom}")

    def create_parts(self, features: int, stride: int, rngs: nnx.Rngs) -> nnx.Module:
        """Pooling, and deviations."""
        return FeatUpParts(features, stride, rngs=rngs)

    def draw(self, images, labels, stride, rng, sizes):
        """How each view is made."""
        shape = len(images), self.views
        zoom = np.where(rng.random(shape) < 0.5, rng.uniform(1, self.zoom, shape), 1.0)
        room = [
            np.floor((n + 2 * self.pad) * zoom).astype(np.int64) - n + 1 for n in images.shape[1:3]
        ]
        return {
            "zoom": zoom.astype(np.float32),
            "start": np.stack([rng.integers(n) for n in room], axis=2).astype(np.int32),
            "flip": rng.random(shape) < 0.5,
            "seed": rng.integers(2**32, size=shape[0], dtype=np.uint32),
        }

    def pair(self, model: Any, upsample: Upsample, batch: Batch) -> tuple[Map, Map]:
        """Of the first view, what is pooled, and the features."""
        view, features = self._view(batch, 0), self._upsampled(model, upsample, batch)
        target = model.features(view(batch["image"].astype(jnp.float32)))
        return model.parts.pooled(view(features)), target

    def _upsampled(self, model: Any, upsample: Upsample, batch: Batch) -> Map:
        """At the size of the image."""
        images = batch["image"]
        low, size = model.features(images), images.shape[1:3]
        features = upsample(low, images, model.head.nearest_size(low, size), size)
        return features if features.shape[1:3] == size else resize(features, size)

    def _view(self, batch: Batch, i: int) -> Callable[[Array], Array]:
        given = batch["zoom"][:, i], batch["start"][:, i], batch["flip"][:, i]
        return lambda x: jittered(x, *given, pad=self.pad)

    def loss(self, model: Any, batch: Batch) -> Float[Array, "b"]:
        """Of all views."""
        images = batch["image"].astype(jnp.float32)
        features = self._upsampled(model, model.head, batch)
        keys = jax.vmap(jax.random.key)(batch["seed"])
        loss = jnp.zeros(images.shape[0])
        for i in range(self.views):
            view = self._view(batch, i)
            seen, target = view(features), model.features(view(images))
            of_view = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, i)
            pooled = model.parts.pooled(seen, keys=of_view, dropout=self.dropout)
            project = self._projection(features.shape[3], of_view)
            error, s = project(pooled - target), model.parts.deviation(target)
            terms = jnp.square(error) / (2 * jnp.square(s)) + jnp.log(s)
            loss += terms.mean(axis=(1, 2, 3)) / self.views
            if self.crf and i == 0:
                loss += self.crf * crf(model.normalise(view(images)), project(seen), of_view)
        return loss

    def _projection(self, channels: int, keys: Array) -> Callable[[Map], Map]:
        if not self.projection:
            return lambda x: x
        shape = (channels, self.projection)
        directions = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        directions /= jnp.sqrt(jnp.square(directions).sum(axis=1, keepdims=True))
        return lambda x: jnp.einsum("bhwc,bcd->bhwd", x, directions)


class FeatUpParts(nnx.Module):
    """What learns with `FeatUp`: how a cell of the backbone pools, and how sure its features are.

    Args:
      features: channels C.
      stride: of the backbone, the side P of a cell.
      rngs: source of the initial weights.
    """

    def __init__(self, features: int, stride: int, *, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, features, 1, rngs=rngs)
        bound = features**-0.5
        self.attend = linear(kernel_init=_uniform(bound), bias_init=_uniform(bound))
        near = nnx.initializers.normal(0.01)
        self.weight = nnx.Param(1 + near(rngs.params(), (stride**2,)))
        self.bias = nnx.Param(near(rngs.params(), (stride**2,)))
        self.scale = linear(kernel_init=_uniform(0.1 * bound), bias_init=_uniform(0.1 * bound))

    def pooled(
        self, x: Float[Array, "b H W c"], *, keys: Array | None = None, dropout: float = 0.0
    ) -> Float[Array, "b h w c"]:
        """Attention over the pixels of each cell; with keys, some cells do without."""
        side = math.isqrt(self.weight.shape[0])
        b, height, width, c = x.shape
        x = _blurred(x)
        cells = x.reshape(b, height // side, side, width // side, side, c)
        cells = cells.transpose(0, 1, 3, 2, 4, 5).reshape(b, height // side, width // side, -1, c)
        logits = self.attend(cells)[..., 0]
        if keys is not None:
            shape = (*logits.shape[1:3], 1)
            kept = jax.vmap(lambda key: jax.random.uniform(key, shape))(keys) >= dropout
            logits *= kept.astype(logits.dtype)
        logits = logits * self.weight[...][None, None, None] + self.bias[...][None, None, None]
        return jnp.einsum("bhwp,bhwpc->bhwc", jax.nn.softmax(logits), cells)

    def deviation(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w 1"]:
        """S of each place."""
        return jnp.maximum(jnp.exp(self.scale(x) + 0.1), 1e-4)


def _uniform(bound: float) -> Callable:
    """An initialiser: PyTorch's of linear layers, with its bound."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def _blurred(x: Array) -> Array:
    """5 x 5, sigma 1, reflected borders, as torchvision's and kornia's."""
    x = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    return gaussian_blur(x, kernel_size=5, sigma=1.0)[:, 2:-2, 2:-2]


def jittered(
    x: Float[Array, "b h w c"],
    zoom: Float[Array, "b"],
    start: Int[Array, "b 2"],
    flip: Bool[Array, "b"],
    *,
    pad: int,
) -> Float[Array, "b h w c"]:
    """FeatUp's jitter: reflected borders, zoomed bilinearly, a window of it, mirrored.

    Args:
      x: images or maps.
      zoom: at least 1, of each.
      start: first row and column of the window in the zoomed map.
      flip: which are mirrored.
      pad: width of the borders, less than h and w.
    """
    rows, columns = (
        jax.vmap(functools.partial(_taken, x.shape[axis], pad))(zoom, start[:, axis - 1])
        for axis in (1, 2)
    )
    columns = jnp.where(flip[:, None, None], columns[:, ::-1], columns)
    return jnp.einsum("bik,bjl,bklc->bijc", rows, columns, x)


def _taken(n: int, pad: int, zoom: Array, start: Array) -> Float[Array, "n n"]:
    """How much of each pixel of an axis is in each pixel of the window."""
    padded = n + 2 * pad
    source = ((start + jnp.arange(n)).astype(jnp.float32) + 0.5) / zoom - 0.5
    source = jnp.clip(source, 0, padded - 1)
    # A hat around each place, on the padded axis, folded back to the axis that was reflected.
    hat = jnp.maximum(1 - jnp.abs(source[:, None] - jnp.arange(padded, dtype=jnp.float32)[None]), 0)
    mirrored = np.pad(np.arange(n), pad, mode="reflect")
    return hat @ np.eye(n, dtype=np.float32)[mirrored]


def crf(
    guide: Float[Array, "b h w 3"], features: Float[Array, "b h w d"], keys: Array
) -> Float[Array, "b"]:
    """FeatUp's sampled CRF: squared differences of features, by how close and alike places are.

        10 exp(-d^2 / 0.2 - g^2 / 0.3) + 3 exp(-d^2 / 0.01),

    with d the distance of two of 1000 places, the image's sides being 1, and g that of the colours.
    """
    height, width = guide.shape[1:3]

    def of_image(guide: Array, features: Array, key: Array) -> Array:
        y, x = (
            jax.random.randint(k, (1000,), 0, n)
            for k, n in zip(jax.random.split(key), (height, width), strict=True)
        )
        place = jnp.stack([y / height, x / width], axis=1)
        d, g, f = (_distances(z) for z in (place, guide[y, x], features[y, x]))
        return (f * (10 * jnp.exp(-d / 0.2 - g / 0.3) + 3 * jnp.exp(-d / 0.01))).mean()

    return jax.vmap(of_image)(guide, features, keys)


def _distances(x: Float[Array, "n c"]) -> Float[Array, "n n"]:
    """Squared, of all pairs."""
    squares = jnp.square(x).sum(axis=1)
    return jnp.maximum(squares[:, None] + squares[None] - 2 * x @ x.T, 0)


# -------------------------------------------------------------------------------- one full-size map
@dataclasses.dataclass(frozen=True)
class LoftUp(Objective):
    """LoftUp's first stage: bicubically upsampled features, averaged over the masks of an image.

        target = share * mean over the mask + (1 - share) * bicubic

    The masks are the dataset's label maps, in which every number is a mask; 255 is none.

    Attributes:
      share: of the average.
    """

    share: float = 0.8

    def __post_init__(self) -> None:
        check_not_negative(share=self.share)

    def draw(self, images, labels, stride, rng, sizes):
        """The masks."""
        need(bool((labels != 255).any()), "loftup needs masks: the dataset's labels are all 255")
        return {"label": labels}

    def pair(self, model: Any, upsample: Upsample, batch: Batch) -> tuple[Map, Map]:
        """Upsampled features, and the target."""
        images = batch["image"]
        low = model.features(images)
        size = model.head.nearest_size(low, images.shape[1:3])
        target = _averaged(resize(low, size, method="bicubic"), batch["label"], self.share)
        return upsample(low, images, size, images.shape[1:3]), target

    def loss(self, model: Any, batch: Batch) -> Float[Array, "b"]:
        """Squared error."""
        return squared_error(*self.pair(model, model.head, batch))


def _averaged(features: Map, masks: Array, share: float) -> Map:
    rows, columns = (
        (2 * np.arange(n) + 1) * m // (2 * n)
        for n, m in zip(features.shape[1:3], masks.shape[1:3], strict=True)
    )
    masks = masks[:, rows][:, :, columns].astype(jnp.int32)

    def of_image(x: Array, mask: Array) -> Array:
        flat, index = x.reshape(-1, x.shape[2]), mask.reshape(-1)
        sums = jax.ops.segment_sum(flat, index, 256)
        counts = jax.ops.segment_sum(jnp.ones_like(flat[:, :1]), index, 256)
        means = (sums / jnp.maximum(counts, 1))[index].reshape(x.shape)
        return jnp.where((mask < 255)[..., None], share * means + (1 - share) * x, x)

    return jax.vmap(of_image)(features, masks)


@dataclasses.dataclass(frozen=True)
class Stitch(Objective):
    """The dense map of shifted images, see `self_supervised`; the share of it not explained.

    Attributes:
      scale: of the dense map, in scale^2 passes of the backbone.
    """

    scale: int = 4

    def __post_init__(self) -> None:
        check_whole(scale=self.scale)

    def pair(self, model: Any, upsample: Upsample, batch: Batch) -> tuple[Map, Map]:
        """Upsampled features, and the dense map."""
        images = batch["image"].astype(jnp.float32)
        low = model.features(images)
        dense = dense_features(model.features, images, self.scale, stride=model.stride)
        return upsample(low, images, dense.shape[1:3]), dense

    def loss(self, model: Any, batch: Batch) -> Float[Array, "b"]:
        """Squared error over the variance of each channel in the image."""
        prediction, dense = self.pair(model, model.head, batch)
        deviation = dense.std(axis=(1, 2), keepdims=True) + 1e-6
        return squared_error(prediction / deviation, dense / deviation)


# ---------------------------------------------------------------------------------------- by name
_OBJECTIVES: dict[str, type[Objective]] = {
    "naf": NAF,
    "jafar": JAFAR,
    "anyup": AnyUp,
    "featup": FeatUp,
    "loftup": LoftUp,
    "stitch": Stitch,
}


def create_objective(name: str, options: Mapping[str, Any]) -> Any:
    """An objective by name.

    Raises:
      ValueError: unknown name or option (near matches are named), or a value out of range.
    """
    cls: Any = lookup("objective", _OBJECTIVES, name)
    for option in options:
        lookup(
            f"option of objective {name!r}:", {f.name: f for f in dataclasses.fields(cls)}, option
        )
    return cls(**options)


def _check_ratios(ratios: Any) -> None:
    two = isinstance(ratios, tuple | list) and len(ratios) == 2 and all(map(is_number, ratios))
    need(
        two and 0 < ratios[0] <= ratios[1] <= 1,
        f"ratios must be (smallest, largest), above 0 and at most 1, got {ratios!r}",
    )
