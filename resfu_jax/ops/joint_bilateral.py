"""Joint bilateral upsampling: means of the cells that are near a pixel, in place and in colour.

With x the values of the low-resolution cells q, I the guide at the output's size, and p' the
position (p + 1/2) n_in / n_out - 1/2 of output pixel p among the cells,

    out[p] = sum_q w x[q] / sum_q w,
    w = exp(-|p' - q|^2 / (2 sigma_spatial^2)) exp(-|I(p) - I(q)|^2 / (2 sigma_range^2)),

over the (2 r + 1)^2 cells around floor(p' + 1/2) that exist. I(q) is the guide at the cell's
centre, one pixel or an interpolation.

Source: Kopf, Cohen, Lischinski and Uyttendaele, "Joint Bilateral Upsampling", SIGGRAPH 2007.
"""

from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops import _gaussians
from resfu_jax.ops._forms import Forms, Implementation
from resfu_jax.ops._xla import gaussians as xla
from resfu_jax.ops.checks import takes_maps
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.resize import resize

LowGuide = Literal["sampled", "bilinear"]


@takes_maps("values", "guide")
def joint_bilateral(
    values: Float[Array, "b h w c"],
    guide: Float[Array, "b H W g"],
    *,
    radius: int,
    sigma_spatial: float,
    sigma_range: float,
    guide_at_low_resolution: LowGuide = "sampled",
    implementation: Implementation | None = None,
) -> Float[Array, "b H W c"]:
    """Joint bilateral upsampling of values to the size of a guide; see the module's docstring.

    Args:
      values: x, at low resolution.
      guide: I, at the output's size, of any number of channels.
      radius: r, in cells.
      sigma_spatial: standard deviation of the distance, in cells.
      sigma_range: standard deviation of the guide's difference, in its own units.
      guide_at_low_resolution: I(q): `"sampled"`, the pixel floor((q + 1/2) n_out / n_in); or
        `"bilinear"`, the guide resized, without antialiasing.
      implementation: `"reference"` gathers the window of every pixel; `"xla"` makes matrix products
        of tiles of pixels with all cells around them. `None` takes `"xla"`.

    Returns:
      The means at (H, W), in the dtype of the values. Weights are computed in float32 or better.

    Raises:
      ValueError: shapes that do not fit, or an argument out of range.
    """
    _gaussians.check_maps(values, guide)
    if not isinstance(radius, int) or radius < 0:
        raise ValueError(f"radius must be a whole number, 0 or more, got {radius!r}")
    for name, sigma in (("sigma_spatial", sigma_spatial), ("sigma_range", sigma_range)):
        if not sigma > 0:
            raise ValueError(f"{name} must be positive, got {sigma!r}")
    if guide_at_low_resolution not in get_args(LowGuide):
        raise ValueError(
            f"guide_at_low_resolution must be one of {', '.join(get_args(LowGuide))}, "
            f"got {guide_at_low_resolution!r}"
        )
    guide = guide.astype(at_least_float32(guide.dtype))
    method = "nearest-exact" if guide_at_low_resolution == "sampled" else "bilinear"
    low = resize(guide, values.shape[1:3], method=method)
    place, colour = 1 / (2 * sigma_spatial**2), 1 / (2 * sigma_range**2)
    forms = jnp.asarray([place, 0, place, colour], guide.dtype)
    forms = jnp.broadcast_to(forms, (*values.shape[:3], 4))
    options = dict(reach=radius, centre="nearest")
    return _FORMS(implementation, values, forms, low, guide, None, **options)


_FORMS = Forms("joint_bilateral", _gaussians.reference, xla=xla.weighted_means)
