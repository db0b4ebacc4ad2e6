"""Adaptive pooling."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resfu_jax.ops.checks import takes_maps
from resfu_jax.ops.sizes import Size, divide_products


@takes_maps("x")
def adaptive_avg_pool(
    x: Float[Array, "b h w c"], output_size: tuple[Size, Size]
) -> Float[Array, "b H W c"]:
    """Average pooling to a given size, as `torch.nn.functional.adaptive_avg_pool2d`.

    Along an axis of n pixels pooled to o cells, cell i is the mean of the pixels
    floor(i n / o) .. ceil((i + 1) n / o) - 1. Cells may overlap, and o may exceed n.

    Means are computed in float32 or better; the result has the dtype of `x`.

    Raises:
      ValueError: `x` is not a batch of maps, or `output_size` is not two positive sizes.
    """
    if x.ndim != 4:
        raise ValueError(f"x must be (batch, height, width, channels), got shape {x.shape}")
    if len(output_size) != 2 or any(isinstance(o, int) and o < 1 for o in output_size):
        raise ValueError(f"output_size must be two positive sizes, got {output_size}")
    dtype = np.promote_types(x.dtype, np.float32)
    rows, columns = (_cells(n, o, dtype) for n, o in zip(x.shape[1:3], output_size, strict=True))
    precision = jax.lax.Precision.HIGHEST
    y = jnp.einsum("Hh,bhwc->bHwc", rows, x.astype(dtype), precision=precision)
    return jnp.einsum("Ww,bHwc->bHWc", columns, y, precision=precision).astype(x.dtype)


def _cells(n: Size, o: Size, dtype: DTypeLike) -> Float[Array, "o n"]:
    """Averaging matrix of an axis: row i has 1 / (pixels in cell i) at the pixels of cell i."""
    start, _ = divide_products(o, n, o)
    end, rest = divide_products(o, n, o, first=1)
    end = end + (rest > 0).astype(end.dtype)
    pixel = jnp.arange(n, dtype=jnp.int32)[None, :]
    inside = (start[:, None] <= pixel) & (pixel < end[:, None])
    return inside.astype(dtype) / (end - start).astype(dtype)[:, None]
