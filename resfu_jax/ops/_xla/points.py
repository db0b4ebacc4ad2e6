"""Samples at points as products with hat functions.

A bilinear sample at (r, s) is a sum over all pixels (t, v) of the map, its keys,

    x(r, s) = sum_tv hat(t - r) hat(v - s) x[t, v],         hat(d) = max(0, 1 - |d|),

so that samples are products of matrices, and so are their gradients: gathers, and scatters more so,
are slow on a TPU. The weights of all output pixels would be many: strips of rows of them come one
after the other, and backward again.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops._bilinear import positions
from resfu_jax.ops.dtypes import at_least_float32

_WEIGHTS = 2**22  # of a strip, at most

# Letters of axes: b images, x pixels of a strip, g groups, p points, t rows and v columns of keys,
# c channels.


def sample(x: Array, points: Array, *, padding_mode: str) -> Array:
    """Form of `ops.deformable_sample`."""
    groups = points.shape[3]
    maps = x.reshape(*x.shape[:3], groups, x.shape[3] // groups)

    def strip(rows, columns):
        rows, columns = _hats(x, rows, columns)
        weights = rows[:, :, :, :, None] * columns[:, :, :, None]
        out = jnp.einsum(
            "bgptvx,btvgc->bxgpc",
            weights.astype(x.dtype),
            maps,
            preferred_element_type=at_least_float32(x.dtype),
        )
        # With groups and points apart, the stacked strips would be padded.
        return out.astype(x.dtype).reshape(*out.shape[:2], math.prod(out.shape[2:]))

    out = _in_strips(strip, x, _planes(x, points, padding_mode))
    return out.reshape(*points.shape[:5], maps.shape[4])


def attention(
    q: Array, k: Array, v: Array, points: Array, bias: Array | None, *, heads: int
) -> Array:
    """Form of `ops.deformable_attention`."""
    groups = points.shape[3]
    units = math.lcm(heads, groups)  # blocks of channels that share a head and a group
    keys, values = (a.reshape(*a.shape[:3], units, a.shape[3] // units) for a in (k, v))
    wide = at_least_float32(q.dtype)

    def strip(rows, columns, q):
        b, pixels, channels = q.shape
        rows, columns = (
            jnp.repeat(hats, units // groups, axis=1) for hats in _hats(k, rows, columns)
        )
        weights = rows[:, :, :, :, None] * columns[:, :, :, None]  # b u p t v x
        of_units = q.reshape(b, pixels, units, channels // units)
        similarity = jnp.einsum("btvuc,bxuc->butvx", keys, of_units, preferred_element_type=wide)
        scores = (weights.astype(wide) * similarity[:, :, None]).sum(axis=(3, 4))
        scores = scores.reshape(b, heads, units // heads, scores.shape[2], pixels).sum(axis=2)
        if bias is not None:
            of_heads = q.reshape(b, pixels, heads, channels // heads)
            scores = scores + jnp.einsum(
                "bxhc,hpc->bhpx", of_heads, bias, preferred_element_type=wide
            )
        attn = jnp.repeat(jax.nn.softmax(scores, axis=2), units // heads, axis=1)
        band = (weights * attn[:, :, :, None, None].astype(weights.dtype)).sum(axis=2)
        out = jnp.einsum(
            "butvx,btvuc->bxuc",
            band.astype(v.dtype),
            values,
            preferred_element_type=at_least_float32(v.dtype),
        )
        return out.astype(v.dtype).reshape(b, pixels, v.shape[3])

    return _in_strips(strip, k, _planes(k, points, "zeros"), q)


def _planes(x: Array, points: Array, padding_mode: str) -> list[Float[Array, "b g p H W"]]:
    """Rows and columns of the points, with pixels last: pairs and points last would be padded."""
    return [jnp.moveaxis(u, (1, 2), (3, 4)) for u in positions(x, points, padding_mode)]


def _hats(
    x: Array, rows: Float[Array, "b g p x"], columns: Float[Array, "b g p x"]
) -> tuple[Float[Array, "b g p t x"], Float[Array, "b g p v x"]]:
    """Weights of the rows and of the columns of x."""
    hats = []
    for u, n in zip((rows, columns), x.shape[1:3], strict=True):
        u = u[:, :, :, None]
        lower = jnp.floor(u)
        key = jnp.arange(n, dtype=jnp.int32).astype(u.dtype)[None, None, None, :, None]
        # As the literal form, whose slope at a pixel's centre is that beyond it.
        t = u - lower
        hats.append(jnp.where(key == lower, 1 - t, 0) + jnp.where(key == lower + 1, t, 0))
    return tuple(hats)


def _in_strips(f: Callable[..., Array], x: Array, planes: list[Array], *maps: Array) -> Array:
    """`f` of strips of rows of planes and maps, with the pixels of a strip in one axis."""
    b, groups, number, height, width = planes[0].shape
    count = height
    if all(isinstance(n, int) for n in (*x.shape[:3], height, width)):
        a_row = b * width * groups * number * x.shape[1] * x.shape[2]
        most = max(1, _WEIGHTS // max(1, a_row))
        count = height // max(n for n in range(1, min(most, height) + 1) if height % n == 0)

    def split(a, axis):
        pixels = height // count * width
        return jnp.moveaxis(
            a.reshape(*a.shape[:axis], count, pixels, *a.shape[axis + 2 :]), axis, 0
        )

    strips = [*(split(a, 3) for a in planes), *(split(a, 1) for a in maps)]
    out = jax.lax.map(jax.checkpoint(lambda strip: f(*strip)), tuple(strips))
    return jnp.moveaxis(out, 0, 1).reshape(b, height, width, out.shape[3])
