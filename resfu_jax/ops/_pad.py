"""Borders around maps."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from resfu_jax.ops.sizes import Size


def pad(
    x: Shaped[Array, "b h w c"], border: tuple[Size, Size], mode: str = "constant"
) -> Shaped[Array, "b h2 w2 c"]:
    """Maps with so many rows and columns more on each side, as `jnp.pad` makes them.

    Image by image: of a whole batch, `jnp.pad` takes the first and the last image apart as well, to
    add none, and devices that share the batch would communicate for it.
    """
    widths = (*((n, n) for n in border), (0, 0))
    return jax.vmap(lambda image: jnp.pad(image, widths, mode=mode))(x)
