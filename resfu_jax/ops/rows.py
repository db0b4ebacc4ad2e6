"""Functions that treat every pixel alike, in the memory of a few rows."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from resfu_jax.ops._rows import Rows, block_rows, map_row_blocks
from resfu_jax.ops.pad import pad
from resfu_jax.ops.sizes import Size


def map_rows(
    f: Callable[..., Float[Array, "b rows w d"]],
    *maps: Float[Array, "_b H _w _c"],
    shared: Any = (),
    values: Size,
    halo: int = 0,
) -> Float[Array, "b H w d"]:
    """`f(*maps, shared)`, block of rows by block of rows, for an f that looks at no other pixel.

    What f makes for one block is gone before the next begins. Backward f runs again, block by
    block, and what the blocks give to `shared` is summed up in float32 or better.

    Args:
      f: of the same rows of each map, and of `shared`, makes these rows of the result. All arrays
        that it needs come by these arguments: it must not close over any that is traced.
      maps: `(batch, height, width, channels)`, all of one height; other axes may be 1.
      shared: a pytree of arrays that every block gets, such as weights.
      values: how many values f makes for a pixel where it makes most.
      halo: for an f that also looks at pixels some rows above and below, how many: it then gets so
        many more rows of each map at both ends, zeros beyond the border, and gives none for these.

    Returns:
      What `f` gives for all rows.
    """
    (batch, height), width = maps[0].shape[:2], max((a.shape[2] for a in maps), key=_known)
    rows = block_rows(height, batch * width * values, least=max(1, 8 * halo))
    if halo:
        maps = tuple(pad(a, (halo, 0)) for a in maps)
    (out,) = map_row_blocks(
        lambda shared, *blocks: (f(*blocks, shared),),
        height // rows,
        (None, *(Rows(1, rows, rows + 2 * halo) for _ in maps)),
        (Rows(1, rows, rows),),
        shared,
        *maps,
    )
    return out


def _known(n: Any) -> float:
    return n if isinstance(n, int) else float("inf")
