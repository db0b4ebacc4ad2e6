"""Maps over blocks of rows: what is wide between narrow maps never exists for the whole image.

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
from jax.typing import DTypeLike
from jaxtyping import Array

from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.sizes import Size, to_int32

BLOCK_VALUES = 2**19
"""Values of the widest map of a block, over the batch: it stays in a core's cache."""


class Rows(NamedTuple):
    """Block i of an array: `length` slices along `axis` from i * step, or from starts[i], on."""

    axis: int
    step: Size
    length: Size
    starts: tuple[int, ...] | None = None

    @property
    def apart(self) -> bool:
        """Whether blocks do not overlap."""
        return self.starts is None and self.step == self.length


def block_rows(height: Size, row_values: Size, most: int | None = None, *, least: int = 1) -> int:
    """Rows of a block, a divisor of `height`; at most `least` where a size is symbolic.

    Args:
      height: rows of all blocks.
      row_values: values of a row of the widest map, over the batch.
      most: rows that a block has at most, if the caller wants fewer than fit.
      least: rows that are taken although they do not fit: of blocks that overlap, small ones would
        compute most of what they need twice.
    """
    if not isinstance(height, int) or not isinstance(row_values, int):
        return max((n for n in range(2, least + 1) if height % n == 0), default=1)
    fit = BLOCK_VALUES // max(1, row_values)
    most = max(least, fit if most is None else min(fit, most))
    return max(n for n in range(1, min(most, height) + 1) if height % n == 0)


def map_row_blocks(
    f: Callable[..., tuple],
    count: Size,
    inputs: tuple[Rows | None, ...],
    outputs: tuple[Rows | None, ...],
    *arrays: Any,
    whole_forward: bool = False,
) -> tuple:
    """Run `f(*blocks) -> blocks` over `count` blocks of rows.

    Args:
      f: of one block of every argument, gives one block of every result.
      count: number of blocks.
      inputs: which rows of each argument block i gets; they may overlap. None: every block gets it
        all, which may be any pytree of arrays.
      outputs: which rows of each result block i fills; they must not overlap. None: what blocks
        give is summed up, in float32 or wider.
      arrays: the arguments.
      whole_forward: forward, `f` gets all rows at once, and blocks are for the gradient alone.

    Returns:
      The results.
    """
    if isinstance(count, int) and count == 1:
        return f(*arrays)  # one block is all: nothing to loop over, nothing to compute again
    return _map(f, count, inputs, outputs, whole_forward, *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _map(f, count, inputs, outputs, whole_forward, *arrays):
    if whole_forward:
        return f(*arrays)

    def body(i, results):
        return _add(results, f(*_cut(arrays, i, inputs)), i, outputs)

    shapes = jax.eval_shape(lambda *arrays: f(*_cut(arrays, 0, inputs)), *arrays)
    full = tuple(
        shape if rows is None else _of_all_blocks(shape, rows, count)
        for shape, rows in zip(shapes, outputs, strict=True)
    )
    leaves = jax.tree.leaves(arrays)
    begun = [_unfilled(a, rows, leaves) for a, rows in zip(full, outputs, strict=True)]
    return loop(count, body, tuple(begun))


def _map_bwd(f, count, inputs, outputs, _, arrays, g):
    def chosen(of_own, of_others):
        """For each argument: of one whose blocks do not overlap, or of another."""
        apart = [rows is not None and rows.apart for rows in inputs]
        return tuple(a if c else b for a, b, c in zip(of_own, of_others, apart, strict=True))

    # An argument whose blocks do not overlap gives way to its gradient, block by block. Each turn
    # cuts that block of the next from what it has written: were it cut in the next turn, XLA would
    # not know that this comes before the writing, and would copy the whole array to be sure.
    def body(i, state):
        sums, own = state
        _, vjp = jax.vjp(f, *chosen(own, _cut(arrays, i, inputs)))
        sums = _add(sums, vjp(_cut(g, i, outputs)), i, inputs)
        return sums, own_blocks(sums, jnp.minimum(i + 1, to_int32(count) - 1))

    def own_blocks(arrays, i):
        return chosen(_cut(arrays, i, inputs), (None,) * len(inputs))

    sums = chosen(arrays, map(_zeros, arrays, inputs))
    sums, _ = loop(count, body, (sums, own_blocks(sums, 0)))
    return jax.tree.map(lambda a, b: a.astype(b.dtype), sums, arrays)


_map.defvjp(lambda *args: (_map(*args), args[5:]), _map_bwd)


def _of_all_blocks(block: Any, rows: Rows, count: Size) -> jax.ShapeDtypeStruct:
    shape = [*block.shape]
    shape[rows.axis] = rows.step * count
    return jax.ShapeDtypeStruct(tuple(shape), block.dtype)


def _unfilled(like: Any, rows: Rows | None, arguments: list[Array]) -> Any:
    """What blocks fill, or zeros that they add to.

    What they fill is made of numbers of all arguments, so that it is there when these are. XLA
    makes the constants of all loops of a program as it begins, and holds them.
    """
    batch = None if rows is None else like.shape[:1]
    some = [_first_values(a).astype(like.dtype) for a in arguments if a.shape[:1] == batch]
    if not some:
        return _zeros(like, rows)
    begin = functools.reduce(jnp.add, some)
    return jnp.broadcast_to(jnp.expand_dims(begin, range(1, like.ndim)), like.shape)


def _first_values(a: Array) -> Array:
    """One of each image."""
    for axis in range(1, a.ndim):
        a = jax.lax.slice_in_dim(a, 0, 1, axis=axis)
    return a.reshape(a.shape[0])


def _zeros(like: Any, rows: Rows | None) -> Any:
    """To which blocks are added; in float32 or wider where several blocks add to one number."""

    def zeros(a):
        dtype = a.dtype if rows is not None and rows.apart else at_least_float32(a.dtype)
        return jnp.zeros(a.shape, dtype)

    return jax.tree.map(zeros, like)


def _cut(arrays: tuple, i: Any, rows: tuple[Rows | None, ...]) -> tuple:
    return tuple(a if r is None else cut(a, i, r) for a, r in zip(arrays, rows, strict=True))


def _add(sums: tuple, blocks: tuple, i: Any, rows: tuple[Rows | None, ...]) -> tuple:
    return tuple(
        jax.tree.map(lambda a, b: a + b.astype(a.dtype), a, b) if r is None else add(a, b, i, r)
        for a, b, r in zip(sums, blocks, rows, strict=True)
    )


def cut(a: Array, i: Any, rows: Rows) -> Array:
    """Block i of an array."""
    block = jax.lax.dynamic_slice_in_dim(_words(a), _start(i, rows), rows.length, rows.axis)
    return _as_dtype(block, a.dtype)


def add(a: Array, block: Array, i: Any, rows: Rows) -> Array:
    """The array with its block i increased, from zero where blocks do not overlap."""
    block = block.astype(a.dtype)
    if not rows.apart:
        block = jax.lax.dynamic_slice_in_dim(a, _start(i, rows), rows.length, rows.axis) + block
    words, block = _words(a), _words(block)
    words = jax.lax.dynamic_update_slice_in_dim(words, block, _start(i, rows), rows.axis)
    return _as_dtype(words, a.dtype)


def _start(i: Any, rows: Rows) -> Array:
    i = jnp.asarray(i, jnp.int32)
    return i * rows.step if rows.starts is None else jnp.asarray(rows.starts, jnp.int32)[i]


def loop(count: Size, body: Callable[[Any, Any], Any], state: Any) -> Any:
    """Run `state = body(i, state)` over the blocks."""
    bound = count if isinstance(count, int) else jnp.asarray(count, jnp.int32)
    dtypes = jax.tree.map(lambda a: a.dtype, state)

    def step(i, words):
        return jax.tree.map(_words, body(i, jax.tree.map(_as_dtype, words, dtypes)))

    words = jax.lax.fori_loop(0, bound, step, jax.tree.map(_words, state))
    return jax.tree.map(_as_dtype, words, dtypes)


# Before JAX 0.11.2, bfloat16 arrays of a loop are held as their bits: XLA's CPU compiler widens all
# of a bfloat16 array for every block that is cut from it or put into it.
_HELD_AS_BITS = jax.__version_info__ < (0, 11, 2)


def _words(a: Array) -> Array:
    narrow = _HELD_AS_BITS and a.dtype == jnp.bfloat16
    return jax.lax.bitcast_convert_type(a, jnp.uint16) if narrow else a


def _as_dtype(a: Array, dtype: DTypeLike) -> Array:
    return a if a.dtype == np.dtype(dtype) else jax.lax.bitcast_convert_type(a, dtype)
