"""Borders around maps."""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from resfu_jax.ops.checks import takes_maps
from resfu_jax.ops.sizes import Size

Mode = Literal["constant", "edge", "reflect"]


@takes_maps("x", real=False)
def pad(
    x: Shaped[Array, "b h w c"], border: tuple[Size, Size], mode: Mode = "constant"
) -> Shaped[Array, "b h2 w2 c"]:
    """Maps with more rows and columns on each side.

    Args:
      x: maps.
      border: rows added above and below, and columns added left and right.
      mode: `"constant"`, zeros; `"edge"`, the map's border repeated; `"reflect"`, the map reflected
        in its border pixels.

    Raises:
      ValueError: another mode, a border below 0, or one that the map is too small to be reflected
        in.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    for n, size in zip(border, x.shape[1:3], strict=True):
        if isinstance(n, int) and n < 0:
            raise ValueError(f"border must not be negative, got {border}")
        if mode == "reflect" and isinstance(n, int) and isinstance(size, int) and n >= size:
            raise ValueError(
                f"border must be smaller than x {x.shape[1:3]} to reflect it, got {border}"
            )
    return _edge(x, border) if mode == "edge" else _pad(x, border, mode)


def pad_axis(x: Array, width: int, axis: int, mode: Mode = "constant") -> Array:
    """`pad` along rows (axis 1) or columns (axis 2) alone."""
    return pad(x, (width, 0) if axis == 1 else (0, width), mode)


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
