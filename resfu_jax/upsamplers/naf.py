"""NAF: neighbourhood attention filtering of any features.

With I the image, x the features, K = `kernel_size` and 2 d the width of a head of `heads_rope`:

    e = adaptive average pool to (H, W) of [enc_1(I), enc_3(I)]     1x1 and 3x3 convolutions
    q = R(e),   k = adaptive average pool of q to (h, w)            queries and keys
    out[p] = sum_j softmax_j(<q[p], k[j]> / sqrt(width)) x[j]       `ops.cross_scale_attention`

j runs over the K x K low-resolution pixels around p, in `heads_attn` blocks of channels that have
weights of their own. R turns channel c of a head and its partner c + d by where the pixel is
(`ops.rotate`), with y and z the place of its centre along height and width, in -1 .. 1:

    angle[c] = 2 pi y / base^(2 c / d)                   c < d / 2
    angle[c] = 2 pi z / base^(2 (c - d / 2) / d)         d / 2 <= c < d

There are no projections: only the encoders learn, so that the weights are the same for features of
any backbone and width. An image of more than four times the output is shrunk to that first, by the
smaller of the limits along both axes, as the official module does.

Source: Chambon et al., "NAF: Zero-Shot Feature Upsampling via Neighborhood Attention Filtering",
2025.
"""

import functools
import math
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resfu_jax import ops
from resfu_jax._checks import check_choice, check_flag, check_positive, check_whole, need
from resfu_jax.ops import Implementation
from resfu_jax.ops.checks import check_floating
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.sizes import Size, to_int32
from resfu_jax.upsamplers._across_scales import (
    attend,
    check_features_of_heads,
    check_heads,
)
from resfu_jax.upsamplers._encoder import Encoder, encode_in_turn
from resfu_jax.upsamplers._inputs import (
    check_image,
    compute_dtype,
    reassembled,
    size_of_output,
)
from resfu_jax.upsamplers._registry import register
from resfu_jax.upsamplers._upsampler import Upsampler


@register("naf")
class NAF(Upsampler):
    """Upsamples features to any size by attention that an image decides.

    Where the window is larger than the map, which the official module refuses, it is the map.

    Args:
      features: channels C of the features, a multiple of `heads_attn`; None: any such.
      guide_features: ignored.
      scale: ignored.
      dim: channels of queries and keys, a multiple of 16 and of 4 `heads_rope`.
      heads_attn: blocks of channels with weights of their own.
      heads_rope: blocks of channels of queries and keys that are turned alike.
      kernel_size: K, side of the window.
      rope_base: ratio of the longest period to, about, the shortest.
      rope_rescale: in training, positions are scaled by a random factor from 1 / `rope_rescale` to
        `rope_rescale` (its logarithm is uniform), another one each call; None for none.
      img_layers: blocks of each encoder.
      deterministic: no random factor. `nnx.view(up, deterministic=True)` takes it off a module that
        was made with False, and has random numbers for it from `rngs`.
      implementation: as in `ops.cross_scale_attention`.
      dtype: of the computation; the inputs' promoted dtype if not given. Statistics, angles and
        the softmax are float32 or better.
      param_dtype: of the parameters.
      rngs: source of the initial weights, PyTorch's default, and of the random factors.

    Raises:
      ValueError: an argument out of range, or widths that do not fit together.
    """

    guide = "image"
    weights_are_convex = True

    def __init__(
        self,
        features: int | None,
        guide_features: int | None = None,
        *,
        scale: int = 16,
        dim: int = 256,
        heads_attn: int = 4,
        heads_rope: int = 4,
        kernel_size: int = 9,
        rope_base: float = 100.0,
        rope_rescale: float | None = 2.0,
        img_layers: int = 2,
        deterministic: bool = True,
        implementation: Implementation | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_floating(dtype=dtype, param_dtype=param_dtype)
        check_whole(
            scale=scale,
            dim=dim,
            heads_attn=heads_attn,
            heads_rope=heads_rope,
            kernel_size=kernel_size,
            img_layers=img_layers,
        )
        check_positive(rope_base=rope_base)
        if rope_rescale is not None:
            check_positive(rope_rescale=rope_rescale)
            need(rope_rescale >= 1, f"rope_rescale must be at least 1, got {rope_rescale}")
        check_flag(deterministic=deterministic)
        check_choice((*get_args(Implementation), None), implementation=implementation)
        need(
            dim % 16 == dim % heads_attn == dim % (4 * heads_rope) == 0,
            f"dim must be a multiple of 16, of heads_attn={heads_attn} and of "
            f"4 heads_rope={4 * heads_rope}, got {dim}",
        )
        check_heads(features, heads_attn, "heads_attn")
        self.features, self.value_groups = features, heads_attn
        self.dim, self.heads_rope, self.kernel_size = dim, heads_rope, kernel_size
        self.rope_base, self.rope_rescale = rope_base, rope_rescale
        self.deterministic = deterministic
        self.implementation, self.dtype = implementation, dtype
        layers: dict[str, Any] = dict(
            blocks=img_layers, use_bias=True, skip=False, param_dtype=param_dtype, rngs=rngs
        )
        self.encoder = Encoder(3, dim // 2, 1, block_kernel=1, **layers)
        self.sem_encoder = Encoder(3, dim // 2, 3, block_kernel=3, **layers)
        self.rngs = nnx.data(None if deterministic else rngs["rope"].fork())

    def set_view(self, deterministic: bool | None = None) -> None:
        """What `nnx.view` sets: no random factor, as in evaluation."""
        if deterministic is not None:
            self.deterministic = deterministic

    def __call__(
        self,
        features: Float[Array, "b h w c"],
        image: Float[Array, "b Hi Wi rgb"],
        output_size: tuple[Size, Size] | None = None,
        *,
        values: Float[Array, "b h w d"] | None = None,
    ) -> Float[Array, "b H W d"]:
        """Features `(B, h, w, C)`, or `values`, at the size asked for, or else the image's.

        Raises:
          ValueError: arrays that do not fit together, or an `output_size` that is none.
        """
        check_features_of_heads(features, self.features, self.value_groups)
        check_image(features, image)
        size = size_of_output(image, output_size)
        dtype = compute_dtype(self.dtype, features, image, values)
        v = reassembled(features.astype(dtype), values, groups=self.value_groups)
        q = self.queries(image.astype(dtype), size)
        k = ops.adaptive_avg_pool(q, features.shape[1:3])
        return attend(
            q,
            k,
            v,
            heads=self.value_groups,
            kernel_size=self.kernel_size,
            implementation=self.implementation,
        )

    def queries(
        self, image: Float[Array, "b Hi Wi rgb"], size: tuple[Size, Size]
    ) -> Float[Array, "b H W d"]:
        """The encoded image at this size, turned."""
        image = _shrunk(image, size)
        encoded = encode_in_turn((self.encoder, self.sem_encoder), image)
        pooled = [ops.adaptive_avg_pool(e, size) for e in encoded]
        dtype = at_least_float32(image.dtype)
        factor = self._factor(dtype)
        y, z = (factor * _centres(n, dtype) for n in size)
        frequencies = jnp.asarray(2 * np.pi / self.periods(), dtype)
        angles = [
            y[None, :, None, None] * frequencies[None, None, None],
            z[None, None, :, None] * frequencies[None, None, None],
        ]
        turn = functools.partial(_turned, heads=self.heads_rope)
        return ops.map_rows(turn, *pooled, angles[0], shared=angles[1], values=self.dim)

    def periods(self) -> Float[np.ndarray, " n"]:
        """Of the positions along an axis, of each frequency."""
        half = self.dim // self.heads_rope // 2  # d
        return self.rope_base ** (2 * np.arange(half // 2, dtype=np.float32) / half)

    def _factor(self, dtype: DTypeLike) -> Float[Array, ""]:
        """What positions are scaled by."""
        if self.deterministic or self.rope_rescale is None:
            return jnp.ones((), dtype)
        if self.rngs is None:
            raise ValueError(
                "deterministic must be False where the module is made, for it to have random "
                "numbers, got a module that was made with True"
            )
        most = math.log(self.rope_rescale)
        return jnp.exp(jax.random.uniform(self.rngs(), (), dtype, -most, most))


def _centres(n: Size, dtype: DTypeLike) -> Float[Array, " n"]:
    """Of the pixels of an axis, in -1 .. 1."""
    twice = 2 * jnp.arange(n, dtype=jnp.int32) + 1
    return twice.astype(dtype) / to_int32(n).astype(dtype) - 1


def _turned(
    first: Float[Array, "b h w c"],
    second: Float[Array, "b h w c"],
    of_row: Float[Array, "1 h 1 n"],
    of_column: Float[Array, "1 1 w n"],
    *,
    heads: int,
) -> Float[Array, "b h w d"]:
    """R of both maps together, by the angles of rows and columns."""
    x = jnp.concatenate([first, second], axis=-1)
    x = x.reshape(*x.shape[:3], heads, -1)
    # The channels turned by the row's angles and those turned by the column's apart: of all pixels
    # together there would be many cosines.
    parts = jnp.split(x, 4, axis=-1)
    for i, angles in enumerate((of_row, of_column)):
        pairs = jnp.concatenate([parts[i], parts[i + 2]], axis=-1)
        angles = jax.lax.stop_gradient(jnp.concatenate([angles, angles], axis=-1)[:, :, :, None])
        parts[i], parts[i + 2] = jnp.split(ops.rotate(pairs, angles), 2, axis=-1)
    return jnp.concatenate(parts, axis=-1).reshape(*x.shape[:3], -1)


def _shrunk(image: Float[Array, "b h w c"], size: tuple[Size, Size]) -> Float[Array, "b h2 w2 c"]:
    """At most four times the output; then by the smaller of both limits along either axis."""
    own, most = image.shape[1:3], [4 * n for n in size]
    if all(n <= limit for n, limit in zip(own, most, strict=True)):
        return image
    return ops.resize(image, tuple(min(n, *most) for n in own))
