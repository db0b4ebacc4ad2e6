"""Blocks of equal sizes as one, run in a loop of XLA.

The parameters of `depth` blocks are kept with a leading axis, and `lax.scan` goes along it: neither
the program nor the time to compile it grows with the depth. Nothing is kept of a block for the
backward pass but its input where `remat` says so.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from resfu_jax.backbones.transformer import Block, Rotation


def create_stacked(create: Callable[[nnx.Rngs], Block], depth: int, rngs: nnx.Rngs) -> Block:
    """`depth` blocks as one whose variables have a leading axis.

    Args:
      create: makes one block; all are alike but for their random numbers.
      depth: how many.
      rngs: what all draw from.
    """

    def variables(keys: Array) -> Any:
        return nnx.state(create(nnx.Rngs(params=keys[0], dropout=keys[1])))

    keys = jnp.stack([jax.random.split(rngs.params(), depth), jax.random.split(rngs(), depth)], 1)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: create(nnx.Rngs(params=0, dropout=0))))
    return nnx.merge(graphdef, jax.vmap(variables)(keys))


def stack(blocks: Sequence[Block]) -> Block:
    """Blocks that are alike as one whose variables have a leading axis."""
    graphdef = nnx.graphdef(blocks[0])
    states = [nnx.state(block) for block in blocks]
    return nnx.merge(graphdef, jax.tree.map(lambda *x: jnp.stack(x), *states))


def unstack(stacked: Block, index: int) -> Block:
    """The block at one place of the leading axis, whose variables may hold shapes only."""

    def one(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        return x[index]

    graphdef, state = nnx.split(stacked)
    return nnx.merge(graphdef, jax.tree.map(one, state))


def scan_blocks(
    stacked: Block,
    x: Float[Array, "b n c"],
    rotation: Rotation | None,
    layers: Sequence[int],
    *,
    rates: Sequence[float] | None,
    remat: bool,
) -> list[Float[Array, "b n c"]]:
    """The tokens after these blocks, block after block in a loop of XLA.

    Args:
      stacked: blocks with a leading axis, of `create_stacked` or `stack`.
      x: tokens that enter the first block.
      rotation: of queries and keys.
      layers: numbers of blocks, ascending; equal steps between them are one program, others one
        each.
      rates: probability that a branch is skipped, for every block; None: none is.
      remat: keep nothing of a block but its input for the backward pass, and compute it again.
    """
    graphdef, *states = nnx.split(stacked, nnx.Param, nnx.RngCount, ...)
    params, counts, rest = states
    random = rates is not None and not stacked.drop_path.deterministic

    linear = stacked.ffn.expand
    if linear.dtype is None:  # as the first block's parameters would: a loop keeps its type
        x = x.astype(jnp.promote_types(x.dtype, linear.kernel.get_value().dtype))

    def block(x: Array, variables: tuple) -> tuple[Array, Any]:
        params, counts, rest, rate = variables
        one = nnx.merge(graphdef, params, counts, rest)
        x = one(x, rotation, rate)
        return x, nnx.state(one, nnx.RngCount) if random else None

    if remat:
        block = jax.checkpoint(block, prevent_cse=False)  # a loop's body has nothing to merge with

    def segment(x: Array, variables: tuple) -> tuple[Array, tuple[Array, Any]]:
        x, counts = jax.lax.scan(block, x, variables)
        return x, (x, counts)

    probabilities = jnp.asarray(rates, jnp.float32) if random else None
    variables = (params, counts, rest, probabilities)
    ends = [i + 1 for i in layers]
    lengths = np.diff([0, *ends])
    if len(ends) > 1 and (lengths == lengths[0]).all():
        folded = jax.tree.map(
            lambda v: v[: ends[-1]].reshape(len(ends), lengths[0], *v.shape[1:]), variables
        )
        _, (found, counts) = jax.lax.scan(segment, x, folded)
        outputs = list(found)
        counts = jax.tree.map(lambda v: v.reshape(ends[-1], *v.shape[2:]), counts)
    else:
        outputs, parts = [], []
        for start, end in zip([0, *ends], ends, strict=False):
            part = jax.tree.map(lambda v, start=start, end=end: v[start:end], variables)
            x, (_, part) = segment(x, part)
            outputs.append(x)
            parts.append(part)
        counts = jax.tree.map(lambda *v: jnp.concatenate(v), *parts)
    if random:  # as the loop over modules leaves them: blocks that did not run drew nothing
        old = nnx.state(stacked, nnx.RngCount)
        now = jax.tree.map(lambda new, old: jnp.concatenate([new, old[ends[-1] :]]), counts, old)
        nnx.update(stacked, now)
    return outputs
