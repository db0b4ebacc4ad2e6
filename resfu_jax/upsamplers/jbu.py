"""JBU: joint bilateral upsampling.

With x the features, I the image at the output's size, and p' the position of output pixel p among
the pixels q of the features, p' = (p + 1/2) n_in / n_out - 1/2,

    out[p] = sum_q w x[q] / sum_q w                                 `ops.joint_bilateral`
    w = exp(-|p' - q|^2 / (2 sigma_spatial^2)) exp(-|I(p) - I(q)|^2 / (2 sigma_range^2)),

over the (2 r + 1)^2 pixels q around p' that exist: a pixel takes what lies near and looks alike.
Nothing is learned.

Source: Kopf, Cohen, Lischinski and Uyttendaele, "Joint Bilateral Upsampling", SIGGRAPH 2007. The
paper leaves open where low-resolution pixels lie, what happens at borders, and what I(q) is; the
answers here are the convention of `align_corners=False`, weights that still sum to 1, and the
image's pixel at the centre of q. (FeatUp's JBU, with learned weights, is another upsampler.)
"""

from typing import get_args

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resfu_jax._checks import check_choice, check_count, check_positive, check_whole
from resfu_jax.ops import Implementation
from resfu_jax.ops.checks import check_floating
from resfu_jax.ops.joint_bilateral import LowGuide, joint_bilateral
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


@register("jbu")
class JBU(Upsampler):
    """Upsamples features by a joint bilateral filter that an image guides; it has no parameters.

    Args:
      features: channels C, kept.
      guide_features: ignored.
      scale: ignored; any ratio, whole or not, also below 1.
      radius: r, of the window, in pixels of the features.
      sigma_spatial: standard deviation of the distance, in pixels of the features.
      sigma_range: standard deviation of the colour's difference, a Euclidean distance over the
        channels, in the image's units. The default is for images with ImageNet's deviations taken
        out, which are about 0.226: it is a distance of about 0.11 in images of 0 .. 1.
      guide_at_low_resolution: I(q): `"sampled"`, the image's pixel at the centre of q, or
        `"bilinear"`, the image resized without antialiasing.
      implementation: as in `ops.joint_bilateral`.
      dtype: of the features and the result; the inputs' promoted dtype if not given. Weights are
        computed in float32 or better.
      param_dtype: ignored.
      rngs: ignored.

    Raises:
      ValueError: an argument out of range.
    """

    guide = "image"
    weights_are_convex = True

    def __init__(
        self,
        features: int,
        guide_features: int | None = None,
        *,
        scale: int = 16,
        radius: int = 2,
        sigma_spatial: float = 1.0,
        sigma_range: float = 0.5,
        guide_at_low_resolution: LowGuide = "sampled",
        implementation: Implementation | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        check_floating(dtype=dtype, param_dtype=param_dtype)
        check_whole(features=features, scale=scale)
        check_count(radius=radius)
        check_positive(sigma_spatial=sigma_spatial, sigma_range=sigma_range)
        check_choice(get_args(LowGuide), guide_at_low_resolution=guide_at_low_resolution)
        check_choice((*get_args(Implementation), None), implementation=implementation)
        self.features, self.radius = features, radius
        self.sigma_spatial, self.sigma_range = sigma_spatial, sigma_range
        self.guide_at_low_resolution = guide_at_low_resolution
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
        size = size_of_output(image, output_size)
        x = features.astype(compute_dtype(self.dtype, features, image, values))
        return joint_bilateral(
            reassembled(x, values),
            image_of_size(image, size),
            radius=self.radius,
            sigma_spatial=self.sigma_spatial,
            sigma_range=self.sigma_range,
            guide_at_low_resolution=self.guide_at_low_resolution,
            implementation=self.implementation,
        )
