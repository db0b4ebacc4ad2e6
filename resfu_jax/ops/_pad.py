"""Borders around maps."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from resfu_jax.ops.sizes import Size


def pad(
    x: Shaped[Array, "b h w c"], border: tuple[Size, Size], mode: str = "constant"
) -> Shaped[Array, "b h2 w2 c"]:
    """Maps with so many rows and columns more on each side, as `jnp.pad` makes them."""
    return _edge(x, border) if mode == "edge" else _pad(x, border, mode)


def _pad(x: Array, border: tuple[Size, Size], mode: str) -> Array:
    # Image by image: of a whole batch, `jnp.pad` takes the first and the last image apart as well,
    # to add none, and devices that share the batch would communicate for it.
    widths = (*((n, n) for n in border), (0, 0))
    return jax.vmap(lambda image: jnp.pad(image, widths, mode=mode))(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _edge(x: Array, border: tuple[Size, Size]) -> Array:
    return _pad(x, border, "edge")


def _edge_bwd(border, _, g):
    # In place: differentiated as it stands, it would be a sum of padded maps.
    for axis, n in zip((1, 2), border, strict=True):
        last = g.shape[axis] - n
        x = jax.lax.slice_in_dim(g, n, last, axis=axis)
        for at, start in ((0, 0), (last - n - 1, last)):
            edge = jax.lax.slice_in_dim(g, start, start + n, axis=axis).sum(axis, keepdims=True)
            edge = edge + jax.lax.slice_in_dim(x, at, at + 1, axis=axis)
            x = jax.lax.dynamic_update_slice_in_dim(x, edge, at, axis)
        g = x
    return (g,)


_edge.defvjp(lambda x, border: (_edge(x, border), None), _edge_bwd)
