"""Maps over blocks of rows: what is wide between two narrow maps never exists for the whole image.

`map_row_blocks` runs a function over blocks of rows one after the other and keeps only its narrow
results. Its gradient runs the blocks again instead of keeping what lies between, so that a block
stays in the cache, forward and backward, and memory is that of one block.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from resfu_jax.ops._dtypes import at_least_float32
from resfu_jax.ops._interp import Size

BLOCK_PIXELS = 2048  # of a block, over the batch: its wide maps then fit into a core's cache


class Rows(NamedTuple):
    """Block i of an array: `length` slices along `axis` from i * step on."""

    axis: int
    step: int
    length: int


Function = Callable[[Any, tuple[Array, ...]], tuple[tuple[Array, ...], Any]]


def block_rows(height: Size, pixels_per_row: Size) -> int:
    """Rows of a block, a divisor of `height`; 1 where a size is symbolic."""
    if not isinstance(height, int) or not isinstance(pixels_per_row, int):
        return 1
    most = max(1, BLOCK_PIXELS // max(1, pixels_per_row))
    return max(n for n in range(1, min(most, height) + 1) if height % n == 0)


def map_row_blocks(
    f: Function,
    count: Size,
    inputs: tuple[Rows, ...],
    outputs: tuple[Rows, ...],
    params: Any,
    arrays: tuple[Array, ...],
) -> tuple[tuple[Array, ...], Any]:
    """Run `f(params, blocks) -> (blocks, sums)` over `count` blocks of rows.

    Args:
      f: a function of the parameters and of one block of every array. Its first results are blocks
        of the output arrays, its second a pytree that is summed over all blocks.
      count: number of blocks.
      inputs: which rows of each array block i gets; they may overlap.
      outputs: which rows of each output array block i fills; they must not overlap.
      params: pytree of arrays that every block gets.
      arrays: the arrays.

    Returns:
      The output arrays, and the sums.
    """
    if isinstance(count, int) and count == 1:
        return f(params, arrays)  # one block is all: nothing to loop over, nothing to recompute
    return _map(f, count, inputs, outputs, params, arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _map(f, count, inputs, outputs, params, arrays):
    shapes, sum_shapes = jax.eval_shape(lambda p, a: f(p, cut(a, 0, inputs)), params, arrays)
    buffers = []
    for shape, rows in zip(shapes, outputs, strict=True):
        full = list(shape.shape)
        full[rows.axis] = rows.step * count
        buffers.append(jnp.zeros(full, shape.dtype))
    sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sum_shapes)

    def body(i, state):
        buffers, sums = state
        blocks, parts = f(params, cut(arrays, i, inputs))
        buffers = [_put(a, b, i, r) for a, b, r in zip(buffers, blocks, outputs, strict=True)]
        return buffers, jax.tree.map(jnp.add, sums, parts)

    buffers, sums = loop(count, body, (buffers, sums))
    return tuple(buffers), sums


def _forward(f, count, inputs, outputs, params, arrays):
    return _map(f, count, inputs, outputs, params, arrays), (params, arrays)


def _backward(f, count, inputs, outputs, saved, cotangents):
    params, arrays = saved
    d_outputs, d_sums = cotangents
    wide = jax.tree.map(
        lambda a: jnp.zeros(a.shape, at_least_float32(a.dtype)), (params, list(arrays))
    )

    def body(i, state):
        d_params, d_arrays = state
        _, vjp = jax.vjp(f, params, cut(arrays, i, inputs))
        parts, blocks = vjp((cut(d_outputs, i, outputs), d_sums))
        d_params = jax.tree.map(lambda a, b: a + b.astype(a.dtype), d_params, parts)
        d_arrays = [add(a, b, i, r) for a, b, r in zip(d_arrays, blocks, inputs, strict=True)]
        return d_params, d_arrays

    d_params, d_arrays = loop(count, body, wide)
    cast = functools.partial(jax.tree.map, lambda a, b: a.astype(b.dtype))
    return cast(d_params, params), cast(tuple(d_arrays), arrays)


_map.defvjp(_forward, _backward)


def loop(count: Size, body, state):
    """Run `state = body(i, state)` over the blocks."""
    bound = count if isinstance(count, int) else jnp.asarray(count, jnp.int32)
    return jax.lax.fori_loop(0, bound, body, state)


def _place(a: Array, i, rows: Rows):
    i = jnp.asarray(i, jnp.int32)
    start = [jnp.zeros_like(i)] * a.ndim
    start[rows.axis] = i * rows.step
    shape = list(a.shape)
    shape[rows.axis] = rows.length
    return start, shape


def cut(arrays: tuple[Array, ...], i, blocks: tuple[Rows, ...]) -> tuple[Array, ...]:
    """Block i of every array."""
    return tuple(
        jax.lax.dynamic_slice(a, *_place(a, i, rows))
        for a, rows in zip(arrays, blocks, strict=True)
    )


def _put(a: Array, block: Array, i, rows: Rows) -> Array:
    return jax.lax.dynamic_update_slice(a, block.astype(a.dtype), _place(a, i, rows)[0])


def add(a: Array, block: Array, i, rows: Rows) -> Array:
    """The array with its block i increased."""
    if rows.step == rows.length:
        return _put(a, block, i, rows)
    old = jax.lax.dynamic_slice(a, *_place(a, i, rows))
    return _put(a, old + block.astype(a.dtype), i, rows)
