"""SAD, MSE, gradient and connectivity error of mattes, over the unknown pixels of the trimap.

Rhemann et al., "A Perceptually Motivated Online Benchmark for Image Matting", CVPR 2009, by the
conventions of the MATLAB code that came with Deep Image Matting (Xu et al., CVPR 2017), which the
published numbers of Composition-1K are made with.
"""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Bool, Float64, UInt8
from scipy import ndimage

from resfu_jax._checks import need
from resfu_jax._trimap import UNKNOWN

_SIGMA, _HALF_SIZE = 1.4, 4  # half size: where the Gaussian falls below 0.01
_STEPS, _THETA = 10, 0.15

Matte = UInt8[np.ndarray, "h w"]


@dataclasses.dataclass(frozen=True)
class MattingCounts:
    """Sums over images, from which the metrics are the means.

    Attributes:
      images: how many there are.
      sums: of the metrics of each, by name.
    """

    images: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)

    def merge(self, other: "MattingCounts") -> "MattingCounts":
        """Of both."""
        names = self.sums.keys() | other.sums.keys()
        sums = {name: self.sums.get(name, 0.0) + other.sums.get(name, 0.0) for name in names}
        return MattingCounts(self.images + other.images, sums)

    def compute(self) -> dict[str, float]:
        """The means; 0 of no images."""
        return {name: self.sums.get(name, 0.0) / max(self.images, 1) for name in METRICS}


def count_mattes(examples: list[tuple[Matte, Matte, Matte]]) -> MattingCounts:
    """Of (prediction, alpha, trimap) of every image, in threads."""
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda example: matting_errors(*example), examples))
    sums = {name: sum(result[name] for result in results) for name in METRICS} if results else {}
    return MattingCounts(len(results), sums)


METRICS = ("sad", "mse", "grad", "conn", "grad_python")


def matting_errors(prediction: Matte, alpha: Matte, trimap: Matte) -> dict[str, float]:
    """The errors of one matte.

    Args:
      prediction: the matte, 0 .. 255.
      alpha: the true one.
      trimap: 128 where alpha is unknown.

    Returns:
      `sad`, in thousands of pixels; `mse`, the mean; `grad` and `conn`, in thousands, see
      `gradient_error` and `connectivity_error`; and `grad_python`, see `python_gradient_error`.

    Raises:
      ValueError: arrays of different sizes or other types, or a trimap without unknown pixels.
    """
    for name, array in dict(prediction=prediction, alpha=alpha, trimap=trimap).items():
        need(
            array.shape == alpha.shape and array.ndim == 2 and array.dtype == np.uint8,
            f"{name} must be uint8 (height, width) of the size of alpha, {alpha.shape}, got "
            f"{array.dtype} of {array.shape}",
        )
    unknown = trimap == UNKNOWN
    need(bool(unknown.any()), f"trimap must have unknown pixels, of value {UNKNOWN}, got none")
    difference = (prediction[unknown].astype(np.float64) - alpha[unknown]) / 255
    return dict(
        sad=float(np.abs(difference).sum() / 1000),
        mse=float(np.square(difference).mean()),
        grad=gradient_error(prediction, alpha, unknown) / 1000,
        conn=connectivity_error(prediction, alpha, unknown) / 1000,
        grad_python=python_gradient_error(prediction, alpha, unknown) / 10,
    )


def gradient_error(prediction: Matte, alpha: Matte, unknown: Bool[np.ndarray, "h w"]) -> float:
    """Sum of squared differences of the gradients' magnitudes.

    Mattes are scaled so that their least and largest values are 0 and 1. The derivative filter of
    an axis is the outer product of a Gaussian and its derivative, of standard deviation 1.4 and 9
    taps, divided by its L2 norm; the border is replicated.
    """
    x = np.arange(-_HALF_SIZE, _HALF_SIZE + 1)
    gauss = np.exp(-(x**2) / (2 * _SIGMA**2)) / (_SIGMA * np.sqrt(2 * np.pi))
    kernels = gauss, -x * gauss / _SIGMA**2
    norm = np.linalg.norm(np.outer(*kernels))

    def magnitude(matte: Matte) -> Float64[np.ndarray, "h w"]:
        scaled, along = _min_max(matte), []
        for axis in (0, 1):
            smooth = ndimage.convolve1d(scaled, kernels[0], 1 - axis, mode="nearest")
            along.append(ndimage.convolve1d(smooth, kernels[1], axis, mode="nearest"))
        return np.hypot(*along) / norm

    return float(np.square(magnitude(prediction) - magnitude(alpha))[unknown].sum())


def python_gradient_error(
    prediction: Matte, alpha: Matte, unknown: Bool[np.ndarray, "h w"]
) -> float:
    """The same by the Python code of IndexNet and A2U: SciPy's Gaussian derivatives as they are.

    A tenth of it is close to a thousandth of `gradient_error`, but is not the published metric.
    """

    def magnitude(matte: Matte) -> Float64[np.ndarray, "h w"]:
        scaled = _min_max(matte)
        along = [ndimage.gaussian_filter(scaled, _SIGMA, order=o) for o in ((1, 0), (0, 1))]
        return np.hypot(*along)

    return float(np.square(magnitude(prediction) - magnitude(alpha))[unknown].sum())


def connectivity_error(prediction: Matte, alpha: Matte, unknown: Bool[np.ndarray, "h w"]) -> float:
    """Sum of |phi(prediction) - phi(alpha)|.

    At the thresholds t = 0.1, 0.2, .. 1, omega is the largest 4-connected part of the pixels with
    prediction >= t and alpha >= t, and the level l of a pixel is the threshold before the first one
    at which it is not in omega, 1 if it always is. phi(a) = 1 - d if d = a - l is at least 0.15,
    else 1.
    """
    values = [matte.astype(np.float64) / 255 for matte in (prediction, alpha)]
    both = np.minimum(*values)
    level, inside = np.zeros_like(both), np.ones_like(both, bool)
    for step in range(1, _STEPS + 1):
        inside &= _largest_part(both >= step / _STEPS)
        level[inside] = step / _STEPS
    distances = (value - level for value in values)
    phi = [1 - np.where(d >= _THETA, d, 0) for d in distances]
    return float(np.abs(phi[0] - phi[1])[unknown].sum())


def _largest_part(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    parts, _ = ndimage.label(mask)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return (parts == sizes.argmax()) & mask


def _min_max(matte: Matte) -> Float64[np.ndarray, "h w"]:
    values = matte.astype(np.float64)
    low, high = values.min(), values.max()
    return (values - low) / max(high - low, 1.0)
