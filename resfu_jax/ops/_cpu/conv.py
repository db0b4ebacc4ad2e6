"""A dense convolution on a CPU whose kernel has a gradient made of products, a tap at a time.

XLA makes that gradient as a convolution by a kernel as large as the map, for which it has no fast
code: in a loop over blocks of rows it takes 30 to 100 times as long as the products.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from resfu_jax.ops.conv import conv as plain
from resfu_jax.ops.dtypes import at_least_float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv(x: Array, kernel: Array, dilation: int) -> Array:
    """`ops.conv` without padding: out[i, j] = sum_uv x[i + d u, j + d v] @ kernel[u, v]."""
    return plain(x, kernel, dilation=dilation)


def _bwd(dilation: int, arrays: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = arrays
    (dx,) = jax.vjp(lambda x: plain(x, kernel, dilation=dilation), x)[1](g)
    h, w = g.shape[1:3]

    def of_tap(u: int, v: int) -> Array:
        seen = x[:, u * dilation :][:, :h, v * dilation :][:, :, :w]
        dtype = at_least_float32(x.dtype)
        return jnp.einsum("bhwc,bhwo->co", seen, g, preferred_element_type=dtype)

    rows, columns = (range(n) for n in kernel.shape[:2])
    dkernel = jnp.stack([jnp.stack([of_tap(u, v) for v in columns]) for u in rows])
    return dx, dkernel.astype(kernel.dtype)


conv.defvjp(lambda x, kernel, dilation: (conv(x, kernel, dilation), (x, kernel)), _bwd)
