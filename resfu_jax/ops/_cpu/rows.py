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
import numpy as np
from jaxtyping import Array

from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.sizes import Size

BLOCK_VALUES = 2**19
"""Values of the widest map of a block, over the batch: it stays in a core's cache."""


class Rows(NamedTuple):
    """Block i of an array: `length` slices along `axis` from i * step on.

    With offsets, a tuple of such pieces, each that many slices further on.
    """

    axis: int
    step: Size
    length: Size
    offsets: tuple[Size, ...] = ()


class Taps(NamedTuple):
    """Block i of an array (..., channels, rows, columns), as each tap of a convolution sees it.

    A tap sees `length` rows from i * step on and the first `width` columns, both moved by its
    offset (row, column). Taps are stacked before the channels.
    """

    step: Size
    length: Size
    width: Size
    offsets: tuple[tuple[Size, Size], ...]


class Bordered(NamedTuple):
    """Block i of an array (batch, rows, columns, ...) with `border` zeros around the image.

    `length` rows, of those with the border, from i * step on, and all columns. The border is made
    for the block alone.
    """

    step: Size
    length: Size
    border: int


class Normalised(NamedTuple):
    """Layers with a norm among them, for `map_row_blocks_normalised`.

    The norm's statistics come from sums over all blocks. What follows it is affine, given these.

    Attributes:
      hidden: `(params, blocks) -> (u, sums)`, a block of the wide array that the norm normalises,
        and a pytree that is summed over all blocks.
      narrow: `(params, u)`: what is kept of the block until the sums are known.
      finish: `(last, sums, narrow)`: the output from the narrow array, or a block from a block.
      fold: `(last, sums) -> folded`: the norm and what follows it, as the weights of one map.
      apply: `(folded, u)`: the block of the output, from the wide array.
    """

    hidden: Callable[[Any, tuple[Array, ...]], tuple[Array, Any]]
    narrow: Callable[[Any, Array], Array]
    finish: Callable[[Any, Any, Array], Array]
    fold: Callable[[Any, Any], Any]
    apply: Callable[[Any, Array], Array]


Block = Rows | Taps | Bordered
Function = Callable[[Any, tuple[Array, ...]], tuple[Array, ...]]


def block_rows(
    height: Size, row_values: Size, most: int | None = None, *, at_least: int = 0
) -> int:
    """Rows of a block, a divisor of `height`; 1 where a size is symbolic.

    Args:
      height: rows of all blocks.
      row_values: values of a row of the widest map, over the batch.
      most: rows that a block has at most, if the caller wants fewer than fit.
      at_least: values that a block may have even if it then leaves the cache, for a caller to
        whom more blocks cost more than that.
    """
    if not isinstance(height, int) or not isinstance(row_values, int):
        return 1
    fit = max(BLOCK_VALUES, at_least) // max(1, row_values)
    most = max(1, fit if most is None else min(fit, most))
    return max(n for n in range(1, min(most, height) + 1) if height % n == 0)


def map_row_blocks(
    f: Function,
    count: Size,
    inputs: tuple[Block, ...],
    outputs: tuple[Rows, ...],
    params: Any,
    arrays: tuple[Array, ...],
    *,
    forward: Function | None = None,
    in_place: bool = False,
) -> tuple[Array, ...]:
    """Run `f(params, blocks) -> blocks` over `count` blocks of rows.

    Args:
      f: a function of the parameters and of one block of every array, that gives one block of every
        output array.
      count: number of blocks.
      inputs: which rows of each array block i gets; they may overlap.
      outputs: which rows of each output array block i fills; they must not overlap.
      params: pytree of arrays that every block gets.
      arrays: the arrays.
      forward: gives the same from all rows at once. With it, blocks are for the gradient only. (If
        one block is all, `f` runs for both.)
      in_place: gradients to arrays whose blocks do not overlap are written over the arrays, block
        by block. For arrays that nothing else reads later: others would be copied.

    Returns:
      The output arrays.
    """
    if isinstance(count, int) and count == 1:
        # One block is all: nothing to loop over, nothing to recompute.
        return f(params, cut(arrays, 0, inputs))
    return _map(f, count, inputs, outputs, forward, in_place, params, arrays)


def map_row_blocks_normalised(
    layers: Normalised,
    count: Size,
    inputs: tuple[Block, ...],
    narrow: Rows,
    output: Rows,
    params: Any,
    last: Any,
    arrays: tuple[Array, ...],
    *,
    keep: bool = True,
) -> Array:
    """`map_row_blocks` with a normalisation: statistics of all blocks enter each of them.

    The wide array is made again, not kept: in the backward pass always.

    Args:
      layers: what is computed.
      count: number of blocks.
      inputs: which rows of each array block i gets; they may overlap.
      narrow: which rows of the narrow array it fills.
      output: which rows of the output.
      params: pytree of arrays, for what comes before the norm.
      last: pytree of arrays, for the norm and what follows it.
      arrays: the arrays.
      keep: whether the narrow array is kept until the sums are known, or the wide one made again.

    Returns:
      The output.
    """
    if isinstance(count, int) and count == 1:
        u, sums = layers.hidden(params, cut(arrays, 0, inputs))
        return layers.apply(layers.fold(last, sums), u)
    return _map_normalised(layers, count, inputs, narrow, output, keep, params, last, arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4, 5))
def _map(f, count, inputs, outputs, forward, in_place, params, arrays):
    if forward is not None:
        return forward(params, arrays)
    return _run(lambda *args: (f(*args), ()), count, inputs, outputs, params, arrays)[0]


def _map_bwd(f, count, inputs, outputs, forward, in_place, saved, d_outputs):
    params, arrays = saved

    def cotangents(i, _):
        return cut(d_outputs, i, outputs)

    return _run_backward(f, count, inputs, params, arrays, cotangents, in_place)


_map.defvjp(lambda *args: (_map(*args), args[6:]), _map_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4, 5))
def _map_normalised(layers, count, inputs, narrow, output, keep, params, last, arrays):
    return _map_normalised_fwd(layers, count, inputs, narrow, output, keep, params, last, arrays)[0]


def _map_normalised_fwd(layers, count, inputs, narrow, output, keep, params, last, arrays):
    def narrow_and_sums(params, blocks):
        u, sums = layers.hidden(params, blocks)
        return (layers.narrow(params, u),) if keep else (), sums

    kept, sums = _run(narrow_and_sums, count, inputs, (narrow,) * keep, params, arrays)
    if keep:

        def finished(args, blocks):
            return (layers.finish(*args, *blocks),), ()

        (out,), _ = _run(finished, count, (narrow,), (output,), (last, sums), kept)
    else:

        def applied(args, blocks):
            params, folded = args
            return (layers.apply(folded, layers.hidden(params, blocks)[0]),), ()

        args = params, layers.fold(last, sums)
        (out,), _ = _run(applied, count, inputs, (output,), args, arrays)
    return out, (params, last, arrays, kept, sums)


def _map_normalised_bwd(layers, count, inputs, narrow, output, keep, saved, d_out):
    params, last, arrays, kept, sums = saved
    folded, of_fold = jax.vjp(layers.fold, last, sums)

    # First the gradient to the sums, which enters that of every block.
    if keep:
        _, of_sums = jax.vjp(lambda sums: layers.finish(last, sums, *kept), sums)
        (d_sums,) = of_sums(d_out)
    else:

        def body(i, total):
            u, _ = layers.hidden(params, cut(arrays, i, inputs))
            _, vjp = jax.vjp(lambda folded: layers.apply(folded, u), folded)
            return add_to_sums(total, *vjp(*cut((d_out,), i, (output,))))

        _, d_sums = of_fold(_cast(loop(count, body, zero_sums(folded)), folded))

    def applied_and_sums(args, blocks):
        params, folded = args
        u, sums = layers.hidden(params, blocks)
        return layers.apply(folded, u), sums

    def cotangents(i, _):
        return *cut((d_out,), i, (output,)), d_sums

    (d_params, d_folded), d_arrays = _run_backward(
        applied_and_sums, count, inputs, (params, folded), arrays, cotangents
    )
    return d_params, of_fold(d_folded)[0], d_arrays


_map_normalised.defvjp(_map_normalised_fwd, _map_normalised_bwd)


def _run(f, count, inputs, outputs, params, arrays):
    """Output arrays, and sums over all blocks, of `f(params, blocks) -> (blocks, sums)`."""
    shapes, sum_shapes = jax.eval_shape(lambda p, a: f(p, cut(a, 0, inputs)), params, arrays)
    buffers = []
    for shape, rows in zip(shapes, outputs, strict=True):
        full = list(shape.shape)
        full[rows.axis] = rows.step * count
        buffers.append(jnp.zeros(tuple(full), shape.dtype))
    sums = zero_sums(sum_shapes)

    def body(i, state):
        buffers, sums = state
        blocks, parts = f(params, cut(arrays, i, inputs))
        buffers = [put(a, b, i, r) for a, b, r in zip(buffers, blocks, outputs, strict=True)]
        return buffers, add_to_sums(sums, parts)

    buffers, sums = loop(count, body, (buffers, sums))
    return tuple(buffers), sums


def _run_backward(f, count, inputs, params, arrays, cotangents, in_place=False):
    """Gradients of the blocks' `f(params, blocks)`, made again.

    `cotangents(i, results)` are those of the results of block i.
    """
    d_params = zero_sums(params)
    d_arrays, over = [], []
    for a, rows in zip(arrays, inputs, strict=True):
        filled = _are_apart(rows) and a.shape[rows.axis] == count * rows.step
        over.append(filled and in_place)
        dtype = a.dtype if filled else at_least_float32(a.dtype)
        d_arrays.append(a if over[-1] else jnp.zeros(a.shape, dtype))

    def body(i, state):
        d_params, d_arrays = state
        left = (d if o else a for a, d, o in zip(arrays, d_arrays, over, strict=True))
        blocks = cut(tuple(left), i, inputs)
        blocks = (
            as_dtype(b, a.dtype) if o else b for a, b, o in zip(arrays, blocks, over, strict=True)
        )
        results, vjp = jax.vjp(f, params, tuple(blocks))
        parts, blocks = vjp(cotangents(i, results))
        d_params = add_to_sums(d_params, parts)
        d_arrays = [add(a, b, i, r) for a, b, r in zip(d_arrays, blocks, inputs, strict=True)]
        return d_params, d_arrays

    d_params, d_arrays = loop(count, body, (d_params, d_arrays))
    return _cast(d_params, params), _cast(tuple(d_arrays), arrays)


def zero_sums(like: Any) -> Any:
    """Zeros to which the blocks' parts are added, in float32 or wider."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, at_least_float32(a.dtype)), like)


def add_to_sums(sums: Any, parts: Any) -> Any:
    """The sums with the parts of one more block."""
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, parts)


def _cast(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda a, b: a.astype(b.dtype), tree, like)


def loop(count: Size, body, state):
    """Run `state = body(i, state)` over the blocks.

    What the body sums up is float32 or wider; arrays that it fills by `put` or `add` may be
    narrower.
    """
    if isinstance(count, int) and count == 1:
        return body(0, state)
    bound = count if isinstance(count, int) else jnp.asarray(count, jnp.int32)
    dtypes = jax.tree.map(lambda a: a.dtype, state)
    state = jax.lax.fori_loop(0, bound, body, jax.tree.map(_words, state))
    return jax.tree.map(as_dtype, state, dtypes)


def _words(a: Array) -> Array:
    """bfloat16 as its bits before JAX 0.11.2.

    There XLA's CPU compiler reads and updates a slice by way of float32, and for that writes the
    whole array again. Of the bits, a loop's result is copied once.
    """
    needed = a.dtype == jnp.bfloat16 and jax.__version_info__ < (0, 11, 2)
    return as_dtype(a, jnp.dtype(jnp.uint16)) if needed else a


def as_dtype(a: Array, dtype: np.dtype) -> Array:
    """In the dtype of an array of a loop's state, or back from it."""
    if a.dtype == dtype:
        return a
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(a.astype(jnp.bfloat16), dtype)
    if a.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(a, dtype)
    return a.astype(dtype)


def cut(arrays: tuple[Array, ...], i, blocks: tuple[Block, ...]) -> tuple[Any, ...]:
    """Block i of every array. Differentiable where i is a number, as it is of a single block."""
    return tuple(_cut(a, i, rows) for a, rows in zip(arrays, blocks, strict=True))


def cut_parts(a: Array, i, rows: Rows, shape: tuple[Size, ...]) -> list[Array]:
    """Block i of an array, reshaped but for the rows' axis, in slices of the axis before last.

    Each is a slice of the array: if several slices of a block enter a fusion, XLA's CPU compiler
    reads the block's start anew for every value, and does not vectorise.
    """
    dtype, words = a.dtype, _words(a).reshape(shape)
    length = [*shape]
    length[rows.axis], length[-2] = rows.length, 1
    parts = []
    for k in range(shape[-2]):
        start = _start(words, i, rows)
        start[-2] = jnp.asarray(k, start[0].dtype)
        parts.append(as_dtype(jax.lax.dynamic_slice(words, start, length)[..., 0, :], dtype))
    return parts


def _cut(a: Array, i, rows: Block) -> Any:
    if isinstance(i, int):
        return _cut_words(a, i, rows)
    return jax.tree.map(lambda block: as_dtype(block, a.dtype), _cut_words(_words(a), i, rows))


def _cut_words(a: Array, i, rows: Block) -> Any:
    if isinstance(rows, Taps):
        shape = (*a.shape[:-2], rows.length, rows.width)

        def tap(offset):
            return jax.lax.dynamic_slice(a, _start_of_tap(a, i, rows, offset), shape)

        # One gather: slices that are concatenated are written twice on a CPU, then by one core.
        return jax.vmap(tap, out_axes=a.ndim - 3)(jnp.asarray(rows.offsets, jnp.int32))
    if isinstance(rows, Bordered):
        first, length, offset = _inside(a, i, rows)
        inside = jax.lax.dynamic_slice_in_dim(a, first, length, axis=1)
        border = [(0, 0), *[(rows.border,) * 2] * 2, *[(0, 0)] * (a.ndim - 3)]
        return jax.lax.dynamic_slice_in_dim(jnp.pad(inside, border), offset, rows.length, axis=1)
    shape = list(a.shape)
    shape[rows.axis] = rows.length
    starts = [_start(a, i, rows, offset) for offset in rows.offsets or (0,)]
    pieces = tuple(jax.lax.dynamic_slice(a, start, shape) for start in starts)
    return pieces if rows.offsets else pieces[0]


def _inside(a: Array, i, rows: Bordered) -> tuple[Array, Size, Array]:
    """First of the rows of `a` in block i, and how many; its start, once they have a border."""
    # Near the ends, where the block has fewer rows of `a`, others make up their number.
    length = jax.core.min_dim(rows.length, a.shape[1])
    start = jnp.asarray(i, jnp.int32) * rows.step - rows.border
    first = jnp.clip(start, 0, jnp.asarray(a.shape[1] - length, jnp.int32))
    return first, length, start - first + rows.border


def _start(a: Array, i, rows: Rows, offset: Size = 0) -> list[Array]:
    i = jnp.asarray(i, jnp.int32)
    start = [jnp.zeros_like(i)] * a.ndim
    start[rows.axis] = i * rows.step + offset
    return start


def _start_of_tap(a: Array, i, taps: Taps, offset) -> list[Array]:
    row = jnp.asarray(i, jnp.int32) * taps.step + offset[0]
    return [jnp.zeros_like(row)] * (a.ndim - 2) + [row, jnp.asarray(offset[1])]


def put(a: Array, block: Array, i, rows: Rows, offset: Size = 0) -> Array:
    """The array with its block i, or the block so many slices further on, replaced."""
    return jax.lax.dynamic_update_slice(a, as_dtype(block, a.dtype), _start(a, i, rows, offset))


def _are_apart(rows: Block) -> bool:
    """Whether blocks do not overlap, so that `add` replaces each."""
    return isinstance(rows, Rows) and not rows.offsets and rows.step == rows.length


def add(a: Array, block: Any, i, rows: Block) -> Array:
    """The array with its block i increased, from zero where blocks do not overlap."""
    if isinstance(rows, Taps):
        pieces = jnp.unstack(block, axis=a.ndim - 3)
        starts = [_start_of_tap(a, i, rows, offset) for offset in np.int32(rows.offsets)]
    elif isinstance(rows, Bordered):
        first, length, offset = _inside(a, i, rows)
        n, columns = rows.border, block.shape[2] - rows.border
        inside = jnp.zeros((*a.shape[:1], length + 2 * n, *a.shape[2:]), block.dtype)
        inside = jax.lax.dynamic_update_slice_in_dim(inside, block[:, :, n:columns], offset, 1)
        pieces = (inside[:, n : length + n],)
        starts = [[jnp.zeros_like(first), first, *[jnp.zeros_like(first)] * (a.ndim - 2)]]
    elif _are_apart(rows):
        return put(a, block, i, rows)
    else:
        pieces = block if rows.offsets else (block,)
        starts = [_start(a, i, rows, offset) for offset in rows.offsets or (0,)]
    for piece, start in zip(pieces, starts, strict=True):
        old = jax.lax.dynamic_slice(a, start, piece.shape)
        a = jax.lax.dynamic_update_slice(a, old + piece.astype(a.dtype), start)
    return a
