"""DySample: upsampling by learned sampling points.

With x the features, s the scale and G groups of channels, every output pixel p of group g samples x
once, bilinearly, near its own position:

    out_g[p] = x_g((p + 1/2) / s - 1/2 + O_g[p])                    `ops.deformable_sample`, border

    O = 0.25 L(x)                                static scope
    O = 0.5 sigmoid(L'(x)) L(x)                  dynamic scope, the "+" variants

L is linear with a pixel shuffle after it ("lp", from C to 2 G s^2 channels) or before it ("pl",
from C / s^2 to 2 G). It starts near zero, so that training starts from bilinear upsampling.

Source: Liu et al., "Learning to Upsample by Learning to Sample", ICCV 2023, section 3.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resfu_jax import ops
from resfu_jax._checks import check_choice, check_flag, check_whole, need
from resfu_jax._layers import Linear
from resfu_jax.ops import Implementation
from resfu_jax.ops.checks import check_floating
from resfu_jax.ops.deformable_sample import deformable_sample
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.pixel_shuffle import pixel_shuffle
from resfu_jax.ops.sizes import Size
from resfu_jax.upsamplers._inputs import (
    check_features,
    check_output_size,
    compute_dtype,
    reassembled,
)
from resfu_jax.upsamplers._registry import register
from resfu_jax.upsamplers._upsampler import Upsampler

Style = Literal["lp", "pl"]


@register("dysample", style="lp", groups=4)
@register("dysample_plus", style="lp", groups=4, dyscope=True)
@register("dysample_s", style="pl", groups=8)
@register("dysample_s_plus", style="pl", groups=8, dyscope=True)
class DySample(Upsampler):
    """Upsamples features by a whole scale, one sampling point per output pixel and group.

    Args:
      features: channels C, kept.
      guide_features: ignored.
      scale: s, whole upsampling ratio.
      style: `"lp"`, linear then pixel shuffle, or `"pl"`, pixel shuffle then linear: fewer
        parameters, and C must be a multiple of s^2.
      groups: G, contiguous groups of channels with points of their own; it divides C.
      dyscope: predict the offsets' range too.
      implementation: as in `ops.deformable_sample`.
      dtype: of the computation; the features' dtype if not given. Positions are float32 or better.
      param_dtype: of the parameters.
      rngs: source of the initial weights: normal of standard deviation 0.001 for the offsets, zero
        for their range and the bias.

    Raises:
      ValueError: an argument out of range, channels that `groups` or the pixel shuffle do not
        divide.
    """

    guide = "none"
    needs_whole_scale = True
    weights_are_convex = True

    def __init__(
        self,
        features: int,
        guide_features: int | None = None,
        *,
        scale: int = 2,
        style: Style = "lp",
        groups: int = 4,
        dyscope: bool = False,
        implementation: Implementation | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_floating(dtype=dtype, param_dtype=param_dtype)
        check_whole(features=features, scale=scale, groups=groups)
        check_choice(get_args(Style), style=style)
        check_flag(dyscope=dyscope)
        check_choice((*get_args(Implementation), None), implementation=implementation)
        need(features % groups == 0, f"groups must divide features={features}, got {groups}")
        need(
            style == "lp" or features % scale**2 == 0,
            f"style 'pl' needs features divisible by scale**2 = {scale**2}, got {features}; "
            "use style 'lp'",
        )
        self.features, self.scale, self.value_groups = features, scale, groups
        self.style = style
        self.implementation, self.dtype = implementation, dtype
        out = 2 * groups
        widths = (features, out * scale**2) if style == "lp" else (features // scale**2, out)
        types: dict[str, Any] = dict(param_dtype=param_dtype, rngs=rngs)
        self.offset = Linear(*widths, kernel_init=nnx.initializers.normal(0.001), **types)
        self.scope = (
            Linear(*widths, use_bias=False, kernel_init=nnx.initializers.zeros, **types)
            if dyscope
            else None
        )

    def __call__(
        self,
        features: Float[Array, "b h w c"],
        output_size: tuple[Size, Size] | None = None,
        *,
        values: Float[Array, "b h w d"] | None = None,
    ) -> Float[Array, "b H W d"]:
        """Features `(B, h, w, C)`, or `values`, at `scale` times their size.

        Raises:
          ValueError: a wrong number of channels, or an `output_size` other than that.
        """
        check_features(features, self.features)
        check_output_size("dysample", features, output_size, self.scale)
        x = features.astype(compute_dtype(self.dtype, features, values))
        if values is not None:
            values = reassembled(x, values, groups=self.value_groups)
        samples = deformable_sample(
            x if values is None else values,
            self.points(x),
            padding_mode="border",
            implementation=self.implementation,
        )
        return samples.reshape(*samples.shape[:3], -1)

    def points(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W g 1 2"]:
        """Where every output pixel samples: (row, column) in pixels of x."""
        offset = self._project(x, self.offset)
        offset = offset.astype(at_least_float32(offset.dtype))
        if self.scope is None:
            offset = 0.25 * offset
        else:
            scope = self._project(x, self.scope)
            offset = 0.5 * jax.nn.sigmoid(scope.astype(offset.dtype)) * offset
        b, hh, ww, _ = offset.shape
        # The channels are (column, row) times group.
        offset = offset.reshape(b, hh, ww, 2, self.value_groups)[..., ::-1, :].swapaxes(-1, -2)

        def centres(n: Size) -> Array:
            p = jnp.arange(n, dtype=jnp.int32)
            return (2 * p + (1 - self.scale)).astype(offset.dtype) / (2 * self.scale)

        own = jnp.stack(jnp.meshgrid(centres(hh), centres(ww), indexing="ij"), axis=-1)
        return (offset + own[None, :, :, None])[..., None, :]

    def _project(self, x: Float[Array, "b h w c"], layer: Linear) -> Float[Array, "b H W d"]:
        if self.style == "pl":
            return layer(pixel_shuffle(x, self.scale))
        # As a convolution, whose gradients have a form for CPUs.
        y = ops.conv(x, layer.kernel[...].astype(x.dtype)[None, None])
        y = y if layer.bias is None else y + layer.bias[...].astype(x.dtype)[None, None, None]
        return pixel_shuffle(y, self.scale)
