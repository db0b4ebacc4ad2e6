"""Upsample Anything: kernels that restore the image from its own reduction, fitted to each image.

Every low-resolution pixel is an anisotropic Gaussian in place and colour, of which the output is a
normalised mixture, `ops.gaussian_splat`. With I the image at the output's size (H, W) and K the
rendering with the Gaussians' parameters phi at (h, w), the features' size:

    phi* = argmin_phi mean |K(phi, I) reduced(I) - I|               a few steps of Adam, per image
    out  = K(phi*, I) x                                             x: features, or anything else

where reduced(I) is I resized to (h, w), bicubically without antialiasing. phi are, for each pixel,

    sigma_x = exp(s_x), sigma_y = exp(s_y) in output pixels, theta = pi tanh(t), sigma_r = exp(s_r).

Nothing is learned from other images, and there are no weights. Gradients to the features and the
image are those of the rendering, with phi* held.

Source: Seo, Hamilton and Kim, "Upsample Anything: A Simple and Hard to Beat Baseline for Feature
Upsampling", 2025 (arXiv 2511.16301), with the semantics of the authors' code. That takes the ratio
from the heights and cuts it to a whole number; here each axis has its own ratio, so that the two
are the same where both ratios are the same whole number.
"""

import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resfu_jax._checks import check_choice, check_count, check_positive, check_whole
from resfu_jax.ops import Implementation
from resfu_jax.ops.checks import check_floating
from resfu_jax.ops.gaussian_splat import CenterMode, gaussian_splat
from resfu_jax.ops.resize import resize
from resfu_jax.ops.sizes import Size
from resfu_jax.upsamplers._inputs import (
    check_features,
    check_image,
    compute_dtype,
    image_of_size,
    reassembled,
    size_of_output,
)
from resfu_jax.upsamplers._registry import register
from resfu_jax.upsamplers._upsampler import Upsampler

Schedule = Literal["paper", "code"]

_BETA_1, _BETA_2 = 0.9, 0.999  # Adam's


class Kernels(NamedTuple):
    """The Gaussians' parameters phi, as Adam moves them: a number for each pixel."""

    s_x: Float[Array, "b h w"]
    s_y: Float[Array, "b h w"]
    t: Float[Array, "b h w"]
    s_r: Float[Array, "b h w"]


@register("upsample_anything")
class UpsampleAnything(Upsampler):
    """Upsamples features by kernels that are fitted to the image, in each call; no parameters.

    `optimise` and `render` are the two halves of a call, for kernels that are fitted once and
    applied to several maps.

    Args:
      features: channels C, kept.
      guide_features: ignored.
      scale: ignored; any ratio, whole or not.
      r_max: largest radius of a kernel, in pixels of the features.
      alpha: a pixel's radius is `alpha` times the larger sigma, rounded up. (As published, the
        radius counts pixels of the features, and sigma output pixels.)
      center_mode: how the middle of a window is rounded to a pixel of the features: `"nearest"`, or
        `"floor"`, the one above and left of the position.
      init_sigma: sigma_x and sigma_y at the start, in output pixels.
      init_sigma_r: sigma_r at the start, in the image's units.
      steps: of Adam. (The official loop of 50 steps makes 51.)
      schedule: the learning rate: `"paper"`, 0.001; or `"code"`, that of the released code, 0.1 and
        after each step less by the factor 1e-8^(1/5100), which changes the kernels much more. There
        rounding errors grow so that two devices, or a call compiled otherwise, give visibly
        different results of the same quality.
      implementation: as in `ops.gaussian_splat`.
      dtype: of the features and the result; the inputs' promoted dtype if not given. Kernels are
        fitted and computed in float32 or better.
      param_dtype: ignored.
      rngs: ignored.

    Raises:
      ValueError: an argument out of range.
    """

    guide = "image"
    image = "unit"
    weights_are_convex = True

    def __init__(
        self,
        features: int,
        guide_features: int | None = None,
        *,
        scale: int = 16,
        r_max: int = 8,
        alpha: float = 2.0,
        center_mode: CenterMode = "nearest",
        init_sigma: float = 16.0,
        init_sigma_r: float = 0.12,
        steps: int = 51,
        schedule: Schedule = "paper",
        implementation: Implementation | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        check_floating(dtype=dtype, param_dtype=param_dtype)
        check_whole(features=features, scale=scale, r_max=r_max)
        check_positive(alpha=alpha, init_sigma=init_sigma, init_sigma_r=init_sigma_r)
        check_count(steps=steps)
        check_choice(get_args(CenterMode), center_mode=center_mode)
        check_choice(get_args(Schedule), schedule=schedule)
        check_choice((*get_args(Implementation), None), implementation=implementation)
        self.features = features
        self.r_max, self.alpha, self.center_mode = r_max, alpha, center_mode
        self.init_sigma, self.init_sigma_r = init_sigma, init_sigma_r
        self.steps, self.schedule = steps, schedule
        self.implementation, self.dtype = implementation, dtype

    def __call__(
        self,
        features: Float[Array, "b h w c"],
        image: Float[Array, "b Hi Wi g"],
        output_size: tuple[Size, Size] | None = None,
        *,
        values: Float[Array, "b h w d"] | None = None,
    ) -> Float[Array, "b H W d"]:
        """Features `(B, h, w, C)`, or `values`, at `output_size`, by default the image's size.

        The image may have any number of channels. One of another size than the output is resized
        to it first, bilinearly, and with antialiasing where it shrinks.

        Raises:
          ValueError: shapes that do not fit.
        """
        check_features(features, self.features)
        check_image(features, image, channels=None)
        _, h, w, _ = features.shape
        kernels, _ = self.optimise(image, (h, w), output_size)
        x = features.astype(compute_dtype(self.dtype, features, image, values))
        return self.render(kernels, reassembled(x, values), image, output_size)

    def optimise(
        self,
        image: Float[Array, "b Hi Wi g"],
        size: tuple[Size, Size],
        output_size: tuple[Size, Size] | None = None,
    ) -> tuple[Kernels, Float[Array, "steps b"]]:
        """Fits kernels at `size` (h, w) to each image. No gradient passes through them.

        Returns:
          The kernels, and the images' errors before each step.
        """
        image = image_of_size(image, size_of_output(image, output_size))
        image = jax.lax.stop_gradient(image)
        reduced = resize(image, size, method="bicubic")

        def errors(phi):
            return jnp.abs(self.render(Kernels(*phi), reduced, image) - image).mean(axis=(1, 2, 3))

        def step(state, rates):
            phi, mean, square = state
            error, vjp = jax.vjp(errors, phi)
            (gradient,) = vjp(jnp.ones_like(error))
            mean = _BETA_1 * mean + (1 - _BETA_1) * gradient
            square = _BETA_2 * square + (1 - _BETA_2) * jnp.square(gradient)
            phi = phi - rates[0] * mean / (jnp.sqrt(rates[1] * square) + 1e-8)
            return (phi, mean, square), error

        # Rounded to float32 also where more is computed with, as the official numbers are.
        s, s_r = (np.float32(math.log(a)) for a in (self.init_sigma, self.init_sigma_r))
        zeros = jnp.zeros_like(reduced[..., 0])
        phi = jnp.stack([jnp.full_like(zeros, a) for a in (s, s, 0, s_r)])
        state = phi, jnp.zeros_like(phi), jnp.zeros_like(phi)
        rates = jnp.asarray(_rates(self.schedule, self.steps), phi.dtype)
        (phi, _, _), history = jax.lax.scan(step, state, rates)
        return Kernels(*phi), history

    def render(
        self,
        kernels: Kernels,
        features: Float[Array, "b h w d"],
        image: Float[Array, "b Hi Wi g"],
        output_size: tuple[Size, Size] | None = None,
    ) -> Float[Array, "b H W d"]:
        """Any maps of the kernels' size, at the output's size; differentiable in all arguments."""
        return gaussian_splat(
            features,
            image_of_size(image, size_of_output(image, output_size)),
            jnp.exp(kernels.s_x),
            jnp.exp(kernels.s_y),
            jnp.pi * jnp.tanh(kernels.t),
            jnp.exp(kernels.s_r),
            r_max=self.r_max,
            alpha=self.alpha,
            center_mode=self.center_mode,
            implementation=self.implementation,
        )


def _rates(schedule: Schedule, steps: int) -> np.ndarray:
    """Of each step of Adam: the factors of the means of gradients and of their squares."""
    k = np.arange(steps)
    rate = 1e-3 if schedule == "paper" else 0.1 * 1e-8 ** (k / 5100)
    return np.stack([rate / (1 - _BETA_1 ** (k + 1)), 1 / (1 - _BETA_2 ** (k + 1))], axis=1)
