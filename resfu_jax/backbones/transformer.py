"""Blocks of a plain transformer, and positions of image patches.

With norms before the branches (Xiong et al., ICML 2020), a block is

    x' = x  + scale * attention(norm(x))
    x  = x' + scale * feed-forward(norm(x'))

(Dosovitskiy et al., ICLR 2021, equations 2 and 3).
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from resfu_jax.backbones._layers import LayerNorm
from resfu_jax.ops.dtypes import at_least_float32

Initial = Literal["normal", "xavier"]
Rotation = tuple[Array, Array]

INITIALISERS = {
    "normal": nnx.initializers.normal(0.02),
    "xavier": nnx.initializers.xavier_uniform(),
}
_INITIAL_LAYER_SCALE = 1e-5
_ROPE_BASE = 100.0
_MOST_SCORES = 2**28  # of an attention at once: 1 GiB of float32, of 1152 images of 6 x 197 x 197


class Block(nnx.Module):
    """x + scale attention(norm(x)), then x + scale feed-forward(norm(x)); branches may be dropped.

    `scale`, a factor per channel, is 1 without layer scale.

    Args:
      features: channels.
      heads: attention heads; divide the channels.
      hidden: channels inside the feed-forward part.
      layer_scale: learn `scale`, initially 1e-5.
      key_bias: give the keys a bias.
      norm_epsilon: epsilon of the LayerNorms.
      drop_path: probability that a branch is skipped.
      initial: of the weights: `"normal"`, with a deviation of 0.02, or `"xavier"`.
      dtype: compute type.
      param_dtype: type of the parameters.
      rngs: source of the initial weights and of the dropped paths.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        hidden: int,
        *,
        layer_scale: bool = False,
        key_bias: bool = True,
        norm_epsilon: float = 1e-6,
        drop_path: float = 0.0,
        initial: Initial = "normal",
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        def scale() -> nnx.Param | None:
            if not layer_scale:
                return None
            return nnx.Param(jnp.full((features,), _INITIAL_LAYER_SCALE, param_dtype))

        self.attention_norm = LayerNorm(features, epsilon=norm_epsilon, **types)
        self.attention = Attention(features, heads, key_bias=key_bias, initial=initial, **types)
        self.attention_scale = scale()
        self.ffn_norm = LayerNorm(features, epsilon=norm_epsilon, **types)
        self.ffn = FFN(features, hidden, initial=initial, **types)
        self.ffn_scale = scale()
        self.drop_path = DropPath(drop_path, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b n c"],
        rotation: Rotation | None = None,
        rate: Float[Array, ""] | None = None,
    ) -> Float[Array, "b n c"]:
        """Both residual branches.

        Args:
          x: tokens.
          rotation: of queries and keys, from `rope_rotation`.
          rate: probability that a branch is skipped, where it is an array.
        """
        return self.branches(x, self.attention_norm(x), rotation, rate)

    def branches(
        self,
        x: Float[Array, "b n c"],
        normalised: Float[Array, "b n c"],
        rotation: Rotation | None,
        rate: Float[Array, ""] | None = None,
    ) -> Float[Array, "b n c"]:
        """The same with norm(x), which attention reads, given apart."""

        def scaled(y: Array, scale: nnx.Param | None) -> Array:
            if scale is not None:
                y = y * jnp.expand_dims(scale[...].astype(y.dtype), (0, 1))
            return self.drop_path(y, rate=rate)

        x = x + scaled(self.attention(normalised, rotation=rotation), self.attention_scale)
        return x + scaled(self.ffn(self.ffn_norm(x)), self.ffn_scale)


class CrossBlock(nnx.Module):
    """Self-attention, attention to a context, feed-forward: the block of MIRL's decoders.

        x'  = x   + attention(norm(x))
        x'' = x'  + attention(norm(x'), norm(context))
        x   = x'' + feed-forward(norm(x''))

    Args: as `Block`.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        hidden: int,
        *,
        norm_epsilon: float = 1e-6,
        initial: Initial = "normal",
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.attention_norm, self.cross_norm, self.context_norm, self.ffn_norm = (
            LayerNorm(features, epsilon=norm_epsilon, **types) for _ in range(4)
        )
        self.attention = Attention(features, heads, initial=initial, **types)
        self.cross_attention = Attention(features, heads, initial=initial, fused=2, **types)
        self.ffn = FFN(features, hidden, initial=initial, **types)

    def __call__(
        self, x: Float[Array, "b n c"], context: Float[Array, "b m c"]
    ) -> Float[Array, "b n c"]:
        """The three residual branches."""
        x = x + self.attention(self.attention_norm(x))
        x = x + self.cross_attention(self.cross_norm(x), context=self.context_norm(context))
        return x + self.ffn(self.ffn_norm(x))


class DropPath(nnx.Dropout):
    """Stochastic depth (Huang et al., ECCV 2016): one draw per image drops a branch as a whole."""

    def __init__(self, rate: float, *, rngs: nnx.Rngs):
        super().__init__(rate, broadcast_dims=(1, 2), rngs=rngs)

    def __call__(  # type: ignore[override]
        self, inputs: Float[Array, "b n c"], *, rate: Float[Array, ""] | None = None
    ) -> Float[Array, "b n c"]:
        """The branch over its probability to stay, or zeros; `rate` in place of the layer's own."""
        if rate is None or self.deterministic:
            return super().__call__(inputs)
        keep = 1 - rate
        mask = jax.random.bernoulli(self.rngs(), keep, (inputs.shape[0], 1, 1))
        return jnp.where(mask, inputs / keep.astype(inputs.dtype), jnp.zeros_like(inputs))


class Attention(nnx.Module):
    """Attention of all tokens to all tokens, their own or those of a context.

    Args:
      features: channels.
      heads: attention heads; divide the channels.
      key_bias: give the keys a bias.
      initial: of the weights, as in `Block`.
      fused: how many of query, key and value Xavier's rule sees as one matrix: 3 all, 2 the latter.
      dtype: compute type.
      param_dtype: type of the parameters.
      rngs: source of the initial weights.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        key_bias: bool = True,
        initial: Initial = "normal",
        fused: int = 3,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        init = INITIALISERS[initial]
        together = init
        if initial == "xavier":  # var = 2 / (c + fused c)
            together = nnx.initializers.variance_scaling(2 / (1 + fused), "fan_in", "uniform")
        self.heads = heads
        alone = init if fused == 2 else together
        self.query = nnx.Linear(features, features, kernel_init=alone, **types)
        types["kernel_init"] = together
        self.key = nnx.Linear(features, features, use_bias=key_bias, **types)
        self.value = nnx.Linear(features, features, **types)
        self.out = nnx.Linear(features, features, **(types | dict(kernel_init=init)))

    def __call__(
        self,
        x: Float[Array, "b n c"],
        *,
        rotation: Rotation | None = None,
        context: Float[Array, "b m c"] | None = None,
    ) -> Float[Array, "b n c"]:
        """Softmax(query · key / sqrt(c / heads)) · value, per head."""
        b, n, c = x.shape
        context = x if context is None else context

        def split(y: Array) -> Array:
            return y.reshape(b, y.shape[1], self.heads, c // self.heads)

        query = split(self.query(x))
        key, value = split(self.key(context)), split(self.value(context))
        if rotation is not None:
            query, key = _rotate(query, rotation), _rotate(key, rotation)
        return self.out(_attend_in_parts(query, key, value).reshape(b, n, c))


def _attend(
    query: Float[Array, "b n h d"], key: Float[Array, "b m h d"], value: Float[Array, "b m h d"]
) -> Float[Array, "b n h d"]:
    wide = at_least_float32(value.dtype)
    scores = jnp.einsum("bnhd,bmhd->bhnm", query, key, preferred_element_type=wide)
    highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp((scores - highest) * query.shape[-1] ** -0.5)
    # Softmax's division comes after the product, where it has d numbers per token to divide and
    # not n: on a CPU, that saves a third of the gradient's time.
    total = jnp.einsum("bhnm->bnh", weights)
    y = jnp.einsum(
        "bhnm,bmhd->bnhd", weights.astype(value.dtype), value, preferred_element_type=wide
    )
    return (y / total[..., None]).astype(value.dtype)


def _attend_in_parts(
    query: Float[Array, "b n h d"], key: Float[Array, "b m h d"], value: Float[Array, "b m h d"]
) -> Float[Array, "b n h d"]:
    """The same, some queries after the others where all at once would have very many scores.

    The scores grow with the fourth power of an image's side: of 2048 x 2048 pixels in patches of
    16, six heads have 6.4 GB of them. Backward, a part's are computed again.
    """
    b, n, h, d = query.shape
    sizes = (b, n, key.shape[1])
    if not all(isinstance(size, int) for size in sizes):  # symbolic: the number of parts is fixed
        return _attend(query, key, value)
    parts = -(-b * h * n * key.shape[1] // _MOST_SCORES)
    if parts <= 1:
        return _attend(query, key, value)
    rows = -(-n // parts)
    query = jnp.pad(query, ((0, 0), (0, parts * rows - n), (0, 0), (0, 0)))
    query = jnp.moveaxis(query.reshape(b, parts, rows, h, d), 1, 0)
    attend = jax.checkpoint(lambda part: _attend(part, key, value))
    y = jnp.moveaxis(jax.lax.map(attend, query), 0, 1)
    return y.reshape(b, parts * rows, h, d)[:, :n]


class FFN(nnx.Module):
    """linear -> GELU -> linear, `hidden` channels wide inside."""

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        initial: Initial = "normal",
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = dict(
            kernel_init=INITIALISERS[initial], dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.expand = nnx.Linear(features, hidden, **types)
        self.contract = nnx.Linear(hidden, features, **types)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """The feed-forward branch."""
        return self.contract(jax.nn.gelu(self.expand(x), approximate=False))


def rope_rotation(h, w, prefix: int, size: int, dtype: Dtype) -> Rotation:
    """Cosines and sines, `(tokens, size)`, of the angles by which RoPE rotates a head's channels.

    A patch whose centre is (y, x), in -1 .. 1 from border to border whatever the number of patches,
    has the angles 2 pi y / 100^(4 k / size), then those of x, for k = 0 .. size / 4 - 1. Each
    rotates channel i with channel i + size / 2. The tokens before the patches are not rotated. The
    random shifts and scales of the centres in DINOv3's pre-training are left out.
    """
    period = _ROPE_BASE ** (np.arange(size // 4) * 4 / size)
    frequencies = jnp.asarray(2 * math.pi / period, dtype)
    angles = []
    for axis, n in enumerate((h, w)):
        centres = (jnp.arange(n, dtype=dtype) + 0.5) / jnp.asarray(n, dtype) * 2 - 1
        a = jnp.expand_dims(centres[:, None] * frequencies[None], 1 - axis)
        angles.append(jnp.broadcast_to(a, (h, w, size // 4)))
    angles = jnp.concatenate(angles * 2, axis=-1).reshape(h * w, size)
    angles = jnp.concatenate([jnp.zeros((prefix, size), dtype), angles])
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: Float[Array, "b n k d"], rotation: Rotation) -> Float[Array, "b n k d"]:
    """Rotate the pairs of channels (i, i + d / 2) by the angles (n, d) or (b, n, d) of tokens."""
    cos, sin = (jnp.expand_dims(r, (0, 2) if r.ndim == 2 else 2) for r in rotation)
    y = x.astype(cos.dtype)
    first, second = jnp.split(y, 2, axis=-1)
    return (y * cos + jnp.concatenate([-second, first], axis=-1) * sin).astype(x.dtype)


def sincos_positions(h, w, width: int, dtype: Dtype) -> Float[Array, "h w c"]:
    """Fixed positions of patches: sines and cosines of their column, then of their row.

    With frequencies f_k = 10000^(-4 k / width), k = 0 .. width / 4 - 1, the patch (y, x) has

        [sin(x f), cos(x f), sin(y f), cos(y f)]

    as MAE (He et al., CVPR 2022) and MoCo v3 have it: x and y count patches, whatever the grid.

    Args:
      h: rows, which may be symbolic.
      w: columns, likewise.
      width: channels, a multiple of 4.
      dtype: of the result.
    """
    frequencies = jnp.asarray(10000.0 ** (-np.arange(width // 4) * 4 / width), dtype)
    parts = []
    for axis, n in ((1, w), (0, h)):
        angles = jnp.arange(n, dtype=dtype)[:, None] * frequencies[None]
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        parts.append(jnp.broadcast_to(jnp.expand_dims(waves, 1 - axis), (h, w, width // 2)))
    return jnp.concatenate(parts, axis=-1)
