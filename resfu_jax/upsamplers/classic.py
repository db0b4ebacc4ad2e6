"""The classic upsamplers: interpolation, transposed convolution, sub-pixel convolution.

They take no guide. Sources: Zeiler et al., "Deconvolutional Networks", CVPR 2010, for transposed
convolution; Shi et al., "Real-Time Single Image and Video Super-Resolution Using an Efficient
Sub-Pixel Convolutional Neural Network", CVPR 2016, for sub-pixel convolution. Semantics and
initial weights are PyTorch's.
"""

import math
from typing import get_args

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resfu_jax._checks import (
    check_choice,
    check_count,
    check_flag,
    check_odd,
    check_positive,
    check_whole,
)
from resfu_jax.ops.checks import check_floating
from resfu_jax.ops.pixel_shuffle import pixel_shuffle
from resfu_jax.ops.resize import Method, resize
from resfu_jax.ops.sizes import Size
from resfu_jax.upsamplers._inputs import (
    check_features,
    check_output_size,
    compute_dtype,
    reassembled,
)
from resfu_jax.upsamplers._registry import register
from resfu_jax.upsamplers._upsampler import Upsampler


@register("nearest", method="nearest")
@register("bilinear", method="bilinear")
@register("bicubic", method="bicubic")
class Interpolation(Upsampler):
    """Fixed interpolation, `ops.resize`; it has no parameters.

    Args:
      features: channels, kept.
      guide_features: ignored.
      scale: output size as a multiple of the input size, where the call does not give one; any
        positive number.
      method: as in `ops.resize`.
      align_corners: as in `ops.resize`; for bilinear and bicubic.
      dtype: of the result; that of the features if not given.
      param_dtype: ignored.
      rngs: ignored.

    Raises:
      ValueError: an argument out of range, or `align_corners` with a nearest method.
    """

    guide = "none"

    def __init__(
        self,
        features: int,
        guide_features: int | None = None,
        *,
        scale: int | float = 4,
        method: Method = "bilinear",
        align_corners: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        check_floating(dtype=dtype, param_dtype=param_dtype)
        check_whole(features=features)
        check_positive(scale=scale)
        check_choice(get_args(Method), method=method)
        check_flag(align_corners=align_corners)
        if align_corners and method not in ("bilinear", "bicubic"):
            raise ValueError(f"align_corners does not apply to method {method!r}")
        self.features, self.scale = features, scale
        self.method, self.align_corners = method, align_corners
        self.weights_are_convex = method != "bicubic"
        self.dtype = dtype

    def __call__(
        self,
        features: Float[Array, "b h w c"],
        output_size: tuple[Size, Size] | None = None,
        *,
        values: Float[Array, "b h w d"] | None = None,
    ) -> Float[Array, "b H W d"]:
        """Resize `features`, or `values`, to `output_size`, or by `scale`.

        Raises:
          ValueError: a wrong number of channels.
        """
        check_features(features, self.features)
        x = features.astype(compute_dtype(self.dtype, features, values))
        return resize(
            reassembled(x, values),
            output_size,
            scale=self.scale if output_size is None else None,
            method=self.method,
            align_corners=self.align_corners,
        )


@register("deconv")
class Deconvolution(Upsampler):
    """Transposed convolution of stride `scale`.

    With s the stride, P the padding and k the kernel, input pixel a adds k[u] x[a] to output pixel
    a s + u - P, on both axes.

    Args:
      features: input channels C.
      guide_features: ignored.
      scale: stride and whole upsampling ratio.
      out_features: output channels, C if not given.
      kernel_size: side of the kernel, `scale` if not given.
      padding: pixels cropped at every border of the full result.
      output_padding: pixels of the full result kept (or added) at the bottom and right only.
      dtype: of the computation; that of the features and parameters if not given.
      param_dtype: of the parameters.
      rngs: source of the initial weights, uniform within 1 / sqrt(out_features * kernel_size**2).

    Raises:
      ValueError: an argument out of range, or the kernel, padding and stride do not give exactly
        `scale` times the size.
    """

    guide = "none"
    needs_whole_scale = True

    def __init__(
        self,
        features: int,
        guide_features: int | None = None,
        *,
        scale: int = 4,
        out_features: int | None = None,
        kernel_size: int | None = None,
        padding: int = 0,
        output_padding: int = 0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_floating(dtype=dtype, param_dtype=param_dtype)
        out_features = features if out_features is None else out_features
        kernel_size = scale if kernel_size is None else kernel_size
        check_whole(
            features=features, scale=scale, out_features=out_features, kernel_size=kernel_size
        )
        check_count(padding=padding, output_padding=output_padding)
        if (
            kernel_size - 2 * padding + output_padding != scale
            or padding >= kernel_size
            or output_padding >= scale
        ):
            raise ValueError(
                "kernel_size - 2 * padding + output_padding must equal scale, with 0 <= padding < "
                f"kernel_size and 0 <= output_padding < scale; got kernel_size={kernel_size}, "
                f"padding={padding}, output_padding={output_padding}, scale={scale}"
            )
        self.features, self.scale = features, scale
        self.padding, self.output_padding = padding, output_padding
        self.dtype = dtype
        bound = 1 / math.sqrt(out_features * kernel_size**2)
        shape = (kernel_size, kernel_size, features, out_features)
        self.kernel = nnx.Param(_uniform(rngs, shape, param_dtype, bound))
        self.bias = nnx.Param(_uniform(rngs, (out_features,), param_dtype, bound))

    def __call__(
        self, features: Float[Array, "b h w c"], output_size: tuple[Size, Size] | None = None
    ) -> Float[Array, "b H W d"]:
        """Upsample by `scale`.

        Raises:
          ValueError: a wrong number of channels, or an `output_size` that is not `scale` times the
            size of `features`.
        """
        check_features(features, self.features)
        check_output_size("deconv", features, output_size, self.scale)
        x, kernel, bias = promote_dtype(
            (features, self.kernel[...], self.bias[...]), dtype=self.dtype
        )
        # Output pixel q s + p gets k[p + P + d s] from input pixel q - d: a convolution to s^2
        # channels per output channel, one for each p, then a pixel shuffle.
        s, k = self.scale, kernel.shape[0]
        before, after = (
            (k - 1 - self.padding) // s,
            -(-self.padding // s),
        )  # d <= before, -d <= after
        n = before + 1 + after
        front = after * s - self.padding
        border = (front, n * s - front - k)
        blocks = jnp.pad(kernel, (border, border, (0, 0), (0, 0)))
        blocks = blocks.reshape(n, s, n, s, *kernel.shape[2:])[::-1, :, ::-1]
        blocks = blocks.transpose(0, 2, 4, 5, 1, 3).reshape(n, n, self.features, -1)
        y = _convolve(x, blocks, (before, after))
        return pixel_shuffle(y, s) + bias[None, None, None]


@register("pixel_shuffle")
class PixelShuffle(Upsampler):
    """Sub-pixel convolution: a 3x3 convolution to C scale^2 channels, then `ops.pixel_shuffle`.

    Args:
      features: channels C, kept.
      guide_features: ignored.
      scale: whole upsampling ratio.
      kernel_size: side of the convolution's kernel, odd; zero padding keeps the size.
      dtype: of the computation; that of the features and parameters if not given.
      param_dtype: of the parameters.
      rngs: source of the initial weights, uniform within 1 / sqrt(C * kernel_size**2).

    Raises:
      ValueError: an argument out of range.
    """

    guide = "none"
    needs_whole_scale = True

    def __init__(
        self,
        features: int,
        guide_features: int | None = None,
        *,
        scale: int = 4,
        kernel_size: int = 3,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_floating(dtype=dtype, param_dtype=param_dtype)
        check_whole(features=features, scale=scale)
        check_odd(kernel_size=kernel_size)
        self.features, self.scale = features, scale
        self.dtype = dtype
        bound = 1 / math.sqrt(features * kernel_size**2)
        shape = (kernel_size, kernel_size, features, features * scale**2)
        self.kernel = nnx.Param(_uniform(rngs, shape, param_dtype, bound))
        self.bias = nnx.Param(_uniform(rngs, shape[-1:], param_dtype, bound))

    def __call__(
        self, features: Float[Array, "b h w c"], output_size: tuple[Size, Size] | None = None
    ) -> Float[Array, "b H W c"]:
        """Upsample by `scale`.

        Raises:
          ValueError: a wrong number of channels, or an `output_size` that is not `scale` times the
            size of `features`.
        """
        check_features(features, self.features)
        check_output_size("pixel_shuffle", features, output_size, self.scale)
        x, kernel, bias = promote_dtype(
            (features, self.kernel[...], self.bias[...]), dtype=self.dtype
        )
        border = kernel.shape[0] // 2
        y = _convolve(x, kernel, (border, border))
        return pixel_shuffle(y + bias[None, None, None], self.scale)


def _convolve(x, kernel, padding: tuple[int, int]) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), (padding, padding), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _uniform(rngs: nnx.Rngs, shape, dtype: DTypeLike, bound: float) -> Array:
    return jax.random.uniform(rngs.params(), shape, dtype, -bound, bound)
