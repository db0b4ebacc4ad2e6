"""Every low-resolution cell is an anisotropic Gaussian, which spreads its value over the output.

With x the values of the cells q, I the guide at the output's size, u(p) = (p + 1/2) n_in / n_out -
1/2 the position of output pixel p among the cells, and (x', y') the offset in output pixels from
the centre of cell q to pixel p, turned by the cell's theta,

    x' = dx cos(theta) + dy sin(theta),    y' = -dx sin(theta) + dy cos(theta),
    out[p] = sum_q w x[q] / sum_q w,
    w = exp(-x'^2 / (2 sigma_x^2) - y'^2 / (2 sigma_y^2) - |I(p) - I(q)|^2 / (2 sigma_r^2)),

with the sigmas of cell q. I(q) is the guide resized bilinearly, without antialiasing. The sum is
over the offsets (i, j) in cells with i^2 + j^2 <= R(p)^2 from the cell in which u(p) lies. One that
leads out of the map leads to the last cell of that row or column, which so counts several times.
R = ceil(alpha max(sigma_x, sigma_y)), at least 1 and at most `r_max`, of the maxima of the cells
resized bilinearly to the output's size. (As published, R counts cells, and sigma output pixels.)

Source: Seo, Hamilton and Kim, "Upsample Anything: A Simple and Hard to Beat Baseline for Feature
Upsampling", 2025 (arXiv 2511.16301), with the semantics of the authors' code.
"""

from typing import get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops import _gaussians
from resfu_jax.ops._forms import Forms, Implementation
from resfu_jax.ops._xla import gaussians as xla
from resfu_jax.ops.checks import takes_maps
from resfu_jax.ops.dtypes import at_least_float32, promote
from resfu_jax.ops.resize import resize

CenterMode = _gaussians.Centre


@takes_maps("values", "guide", "sigma_x", "sigma_y", "theta", "sigma_r")
def gaussian_splat(
    values: Float[Array, "b h w c"],
    guide: Float[Array, "b H W g"],
    sigma_x: Float[Array, "b h w"],
    sigma_y: Float[Array, "b h w"],
    theta: Float[Array, "b h w"],
    sigma_r: Float[Array, "b h w"],
    *,
    r_max: int = 8,
    alpha: float = 2.0,
    center_mode: CenterMode = "nearest",
    implementation: Implementation | None = None,
) -> Float[Array, "b H W c"]:
    """Values spread by the Gaussians of their cells; see the module's docstring.

    Args:
      values: x, at low resolution.
      guide: I, at the output's size.
      sigma_x: standard deviation along the turned x axis, in output pixels.
      sigma_y: likewise, y axis.
      theta: angle of the axes, radians.
      sigma_r: standard deviation of the guide's difference, in its own units.
      r_max: largest radius, in cells.
      alpha: of the radius.
      center_mode: the cell in which u(p) lies: `"nearest"`, floor(u + 1/2), or `"floor"`, floor(u).
      implementation: `"reference"` gathers the window of every pixel; `"xla"` makes matrix products
        of tiles of pixels with all cells around them. `None` takes `"xla"`.

    Returns:
      The values at (H, W), in their dtype. Weights are computed in float32 or better. (No gradient
      passes through the radius.)

    Raises:
      ValueError: shapes that do not fit, or an argument out of range.
    """
    _gaussians.check_maps(values, guide)
    maps = dict(sigma_x=sigma_x, sigma_y=sigma_y, theta=theta, sigma_r=sigma_r)
    for name, a in maps.items():
        if a.shape != values.shape[:3]:
            raise ValueError(
                f"{name} must have a number for each cell, {values.shape[:3]}, got shape {a.shape}"
            )
    if not isinstance(r_max, int) or r_max < 1:
        raise ValueError(f"r_max must be a positive whole number, got {r_max!r}")
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha!r}")
    modes = get_args(CenterMode)
    if center_mode not in modes:
        raise ValueError(f"center_mode must be one of {', '.join(modes)}, got {center_mode!r}")
    dtype = at_least_float32(promote(guide.dtype, *(a.dtype for a in maps.values())))
    guide = guide.astype(dtype)
    sigma_x, sigma_y, theta, sigma_r = (a.astype(dtype) for a in maps.values())

    widest = jax.lax.stop_gradient(jnp.maximum(sigma_x, sigma_y))
    widest = resize(widest[..., None], guide.shape[1:3])
    radius = jnp.clip(jnp.ceil(alpha * widest), 1, r_max)

    # x'^2 / (2 sigma_x^2) + y'^2 / (2 sigma_y^2) = xx dx^2 + xy dx dy + yy dy^2. Written so, the
    # gradient to theta is exactly zero where sigma_x = sigma_y, as it should.
    along, across, colour = (
        1 / (2 * jnp.square(jnp.maximum(sigma, 1e-6)) + 1e-8)
        for sigma in (sigma_x, sigma_y, sigma_r)
    )
    mean, half = (along + across) / 2, (along - across) / 2
    xx, yy = mean + half * jnp.cos(2 * theta), mean - half * jnp.cos(2 * theta)
    xy = 2 * half * jnp.sin(2 * theta)
    forms = jnp.stack([xx, xy, yy, colour], axis=-1)
    low = resize(guide, values.shape[1:3])
    options = dict(reach=r_max, centre=center_mode)
    return _FORMS(implementation, values, forms, low, guide, radius, **options)


_FORMS = Forms("gaussian_splat", _gaussians.reference, xla=xla.weighted_means)
