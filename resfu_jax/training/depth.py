"""Losses and metrics of monocular depth.

With p the predicted and g the true depth of a pixel, d = ln p - ln g, means over valid pixels:

    silog loss     10 sqrt(mean d^2 - 0.85 (mean d)^2)                                  (BTS)
    sig loss       sqrt(var d + 0.15 (mean d)^2), logarithms of p + 0.001 and g + 0.001 (AdaBins)
    gradient loss  sum over scales of sum |d[y] - d[y + 2]| + |d[x] - d[x + 2]|, over valid pixels

The first two are the same but for a factor, what keeps the logarithm finite, and the unbiased
variance: Eigen et al., "Depth Map Prediction from a Single Image using a Multi-Scale Deep Network",
NeurIPS 2014, equation 4; Lee et al., "From Big to Small", 2019; Bhat et al., "AdaBins", CVPR 2021.
The third is that of Li and Snavely, "MegaDepth", CVPR 2018.
"""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from resfu_jax._checks import check_choice, need

Crop = Literal["none", "eigen", "garg"]
Align = Literal["none", "scale_shift"]

# Top, bottom, left and right of what counts. Eigen's is of NYU's 480 x 640, Garg's of KITTI.
_CROPS: dict[str, tuple[float, float, float, float]] = {
    "none": (0.0, 1.0, 0.0, 1.0),
    "eigen": (45 / 480, 471 / 480, 41 / 640, 601 / 640),
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
}
_EPSILON = 1e-3  # of the sig and gradient losses
METRICS = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog", "delta1", "delta2", "delta3")


# ------------------------------------------------------------------------------------------ losses
def silog_loss(
    prediction: Float[Array, "b h w"],
    depth: Float[Array, "b h w"],
    valid: Bool[Array, "b h w"],
    *,
    variance_focus: float = 0.85,
) -> Float[Array, ""]:
    """10 sqrt(mean d^2 - variance_focus (mean d)^2) over all valid pixels of the batch; 0 of none.

    Args:
      prediction: positive, in the unit of `depth`.
      depth: the truth; not looked at where it is not valid.
      valid: pixels that count.
      variance_focus: 1 leaves the scale of the prediction free; lambda of the paper.
    """
    d = _log_ratio(prediction, depth, valid, 0.0)
    mean, squares = _mean(d, valid), _mean(jnp.square(d), valid)
    return 10 * _root(squares - variance_focus * jnp.square(mean))


def sig_loss(
    prediction: Float[Array, "b h w"],
    depth: Float[Array, "b h w"],
    valid: Bool[Array, "b h w"],
    *,
    variance: Float[Array, ""] | float = 1.0,
) -> Float[Array, ""]:
    """sqrt(variance var d + 0.15 (mean d)^2) over all valid pixels of the batch; 0 of none.

    Args:
      prediction: as for `silog_loss`.
      depth: as well.
      valid: as well.
      variance: 0 leaves the variance out, as AdaBins' successors do in their first steps.
    """
    d = _log_ratio(prediction, depth, valid, _EPSILON)
    mean, n = _mean(d, valid), valid.sum().astype(jnp.float32)
    squares = jnp.where(valid, jnp.square(d - mean[None, None, None]), 0.0).sum()
    return _root(variance * squares / jnp.maximum(n - 1, 1) + 0.15 * jnp.square(mean))


def gradient_loss(
    prediction: Float[Array, "b h w"],
    depth: Float[Array, "b h w"],
    valid: Bool[Array, "b h w"],
) -> Float[Array, ""]:
    """Differences of d between pixels two apart, at every, second, fourth and sixth pixel.

    At each scale their sum, down and across, is divided by the number of valid pixels. (In the code
    of JAFAR's probes the differences run along batch and channels instead, and so are empty.)

    Args:
      prediction: as for `silog_loss`.
      depth: as well.
      valid: as well.
    """
    total = jnp.zeros(())
    for step in (1, 2, 4, 6):
        p, g, v = (x[:, ::step, ::step] for x in (prediction, depth, valid))
        d = _log_ratio(p, g, v, _EPSILON)
        down = jnp.where(v[:, 2:] & v[:, :-2], jnp.abs(d[:, 2:] - d[:, :-2]), 0.0)
        across = jnp.where(v[:, :, 2:] & v[:, :, :-2], jnp.abs(d[:, :, 2:] - d[:, :, :-2]), 0.0)
        total += (down.sum() + across.sum()) / jnp.maximum(v.sum(), 1).astype(jnp.float32)
    return total


def _log_ratio(p: Array, g: Array, valid: Array, epsilon: float) -> Array:
    """Ln p - ln g, 0 where it does not count."""
    p, g = (jnp.where(valid, x.astype(jnp.float32), 1.0) for x in (p, g))
    return jnp.log(p + epsilon) - jnp.log(g + epsilon)


def _mean(x: Array, valid: Array) -> Array:
    return jnp.where(valid, x, 0.0).sum() / jnp.maximum(valid.sum(), 1).astype(jnp.float32)


def _root(x: Array) -> Array:
    """The square root, whose slope is 0 at 0."""
    return jnp.where(x > 1e-12, jnp.sqrt(jnp.maximum(x, 1e-12)), 0.0)


# ----------------------------------------------------------------------------------------- metrics
def valid_pixels(
    depth: Float[Array, "b h w"],
    *,
    min_depth: float,
    max_depth: float,
    crop: Crop = "none",
    sizes: Integer[Array, "b 2"] | None = None,
) -> Bool[Array, "b h w"]:
    """Pixels with min_depth < depth < max_depth, in the crop.

    Args:
      depth: the truth, 0 or not finite where it is not known.
      min_depth: smaller ones do not count.
      max_depth: larger ones do not count.
      crop: `"eigen"`: rows 45 to 470 and columns 41 to 600 of NYU's 480 x 640, in proportion for
        others; `"garg"`: the lower 59 % of KITTI's images; `"none"`: everything.
      sizes: height and width of each image before padding; None means no padding.
    """
    check_choice(get_args(Crop), crop=crop)
    valid = (depth > min_depth) & (depth < max_depth)
    if crop == "none":
        return valid
    if sizes is None:
        sizes = jnp.broadcast_to(jnp.array([depth.shape[1:]]), (depth.shape[0], 2))
    # A little more than the product, so that 45 / 480 of 480 is not 44.
    bounds = jnp.asarray(_CROPS[crop], jnp.float32).reshape(1, 2, 2)
    bounds = jnp.floor(bounds * sizes.astype(jnp.float32)[:, :, None] + 1e-3)
    y, x = (jnp.arange(n, dtype=jnp.float32)[None] for n in depth.shape[1:])
    rows, columns = (
        (i >= bounds[:, axis, :1]) & (i < bounds[:, axis, 1:]) for axis, i in enumerate((y, x))
    )
    return valid & rows[:, :, None] & columns[:, None, :]


def align_scale_shift(
    prediction: Float[Array, "b h w"],
    depth: Float[Array, "b h w"],
    valid: Bool[Array, "b h w"],
) -> Float[Array, "b h w"]:
    """Scales and shifts each image: s p + t with the least squared error over its valid pixels.

    Ranftl et al., "Towards Robust Monocular Depth Estimation", TPAMI 2022, section 5, here of
    depths instead of disparities.
    """
    n = jnp.maximum(valid.sum(axis=(1, 2), keepdims=True), 1).astype(jnp.float32)

    def mean(x: Array) -> Array:
        return jnp.where(valid, x, 0.0).sum(axis=(1, 2), keepdims=True) / n

    p, g = mean(prediction), mean(depth)
    variance = mean(jnp.square(prediction - p))
    covariance = mean((prediction - p) * (depth - g))
    return covariance / jnp.maximum(variance, 1e-12) * (prediction - p) + g


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DepthSums:
    """Sums of the metrics of images; those of sets add up.

    Attributes:
      images: images with a valid pixel.
      metrics: the sum of each of `METRICS` over them.
    """

    images: Any
    metrics: dict[str, Any]

    @classmethod
    def zeros(cls) -> "DepthSums":
        """Of no images, in float64 on the host."""
        return cls(np.zeros(()), dict.fromkeys(METRICS, np.zeros(())))

    def merge(self, other: "DepthSums") -> "DepthSums":
        """Of both sets of images, in float64 on the host."""
        return jax.tree.map(lambda a, b: np.asarray(a, np.float64) + np.asarray(b), self, other)

    def compute(self) -> dict[str, float]:
        """The mean of each metric over the images; not a number if there are none."""
        images = float(self.images)
        return {
            name: float(total) / images if images else float("nan")
            for name, total in self.metrics.items()
        }


def depth_metrics(
    prediction: Float[Array, "b h w"],
    depth: Float[Array, "b h w"],
    *,
    min_depth: float = 1e-3,
    max_depth: float = 10.0,
    crop: Crop = "none",
    align: Align = "none",
    sizes: Integer[Array, "b 2"] | None = None,
) -> DepthSums:
    """The metrics of each image, summed over the images that have a valid pixel.

    Predictions are limited to min_depth .. max_depth, then, over the valid pixels of an image:

        abs_rel   mean |p - g| / g          rmse      sqrt(mean (p - g)^2)
        sq_rel    mean (p - g)^2 / g        rmse_log  sqrt(mean d^2)
        log10     mean |log10 p - log10 g|  silog     100 sqrt(mean d^2 - (mean d)^2)
        deltaK    share of max(p / g, g / p) < 1.25^K

    Args:
      prediction: depths in the unit of `depth`.
      depth: the truth, 0 or not finite where it is not known.
      min_depth: as for `valid_pixels`.
      max_depth: as well; the "cap".
      crop: as well.
      align: `"scale_shift"`: first `align_scale_shift`, for relative depth.
      sizes: as for `valid_pixels`.

    Raises:
      ValueError: shapes that differ, or an option that there is not.
    """
    check_choice(get_args(Align), align=align)
    need(
        prediction.shape == depth.shape and depth.ndim == 3,
        "prediction and depth must both be (batch, height, width), got shapes "
        f"{prediction.shape} and {depth.shape}",
    )
    valid = valid_pixels(depth, min_depth=min_depth, max_depth=max_depth, crop=crop, sizes=sizes)
    p, g = (jnp.where(valid, x.astype(jnp.float32), 1.0) for x in (prediction, depth))
    if align == "scale_shift":
        p = align_scale_shift(p, g, valid)
    p = jnp.clip(p, min_depth, max_depth)
    pixels = valid.sum(axis=(1, 2))

    def mean(x: Array) -> Array:
        total = jnp.where(valid, x, 0.0).sum(axis=(1, 2))
        return total / jnp.maximum(pixels, 1).astype(jnp.float32)

    d = jnp.log(p) - jnp.log(g)
    squares = mean(jnp.square(d))
    metrics = {  # zeros of an image without valid pixels
        "abs_rel": mean(jnp.abs(p - g) / g),
        "sq_rel": mean(jnp.square(p - g) / g),
        "rmse": jnp.sqrt(mean(jnp.square(p - g))),
        "rmse_log": jnp.sqrt(squares),
        "log10": mean(jnp.abs(d)) / np.float32(np.log(10)),
        "silog": 100 * jnp.sqrt(jnp.maximum(squares - jnp.square(mean(d)), 0.0)),
    }
    ratio = jnp.maximum(p / g, g / p)
    for k in (1, 2, 3):
        metrics[f"delta{k}"] = mean((ratio < 1.25**k).astype(jnp.float32))
    return DepthSums((pixels > 0).sum(), {name: x.sum() for name, x in metrics.items()})
