"""Adaptive pooling."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops.checks import takes_maps
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.sizes import Size, divide_products, whole_ratio


@takes_maps("x")
def adaptive_avg_pool(
    x: Float[Array, "b h w c"], output_size: tuple[Size, Size]
) -> Float[Array, "b H W c"]:
    """Average pooling to a given size, as `torch.nn.functional.adaptive_avg_pool2d`.

    Along an axis of n pixels pooled to o cells, cell i is the mean of the pixels

        floor(i n / o) .. ceil((i + 1) n / o) - 1.

    Cells may overlap, and o may exceed n.

    Means are computed in float32 or better; the result has the dtype of `x`.

    Raises:
      ValueError: `x` is not a batch of maps, or `output_size` is not two positive sizes.
    """
    if x.ndim != 4:
        raise ValueError(f"x must be (batch, height, width, channels), got shape {x.shape}")
    if len(output_size) != 2 or any(isinstance(o, int) and o < 1 for o in output_size):
        raise ValueError(f"output_size must be two positive sizes, got {output_size}")
    y = x.astype(at_least_float32(x.dtype))
    for axis, o in zip((1, 2), output_size, strict=True):
        y = _means(y, o, axis)
    return y.astype(x.dtype)


def _means(x: Array, o: Size, axis: int) -> Array:
    """Of the o cells of an axis."""
    n = x.shape[axis]
    if ratio := whole_ratio((o,), (n,)):
        if ratio == (1,):
            return x
        return x.reshape(*x.shape[:axis], o, *ratio, *x.shape[axis + 1 :]).mean(axis=axis + 1)
    start, _ = divide_products(o, n, o)
    end, rest = divide_products(o, n, o, first=1)
    end = end + (rest > 0).astype(end.dtype)
    most = -(-n // o) + 1  # pixels of a cell
    if not isinstance(most, int):  # a matrix: nobody knows how many to add
        pixel = jnp.arange(n, dtype=jnp.int32)[None]
        inside = (start[:, None] <= pixel) & (pixel < end[:, None])
        cells = inside.astype(x.dtype) / (end - start).astype(x.dtype)[:, None]
        means = jnp.tensordot(x, cells, (axis, 1), precision=jax.lax.Precision.HIGHEST)
        return jnp.moveaxis(means, -1, axis)

    def along(a):
        return jnp.expand_dims(a, [i for i in range(x.ndim) if i != axis])

    def pixels(i):
        pixel = jnp.take(x, start + i, axis=axis, mode="clip")
        return jnp.where(along(start + i < end), pixel, jnp.zeros((), x.dtype))

    return sum(pixels(i) for i in range(most)) / along(end - start).astype(x.dtype)
