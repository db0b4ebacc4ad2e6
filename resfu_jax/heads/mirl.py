"""The decoders of MIRL: visible patches' tokens, segment by segment, to pixels of all patches.

Huang, Fu and Bors, "Masked Image Residual Learning for Scaling Deeper Vision Transformers", NeurIPS
2023 (arXiv 2309.14136), section 3, with the wiring of the authors' code. An encoder of S segments
gives the tokens z_0 that enter its first block and z_1 .. z_S after every segment, of the class
token and of the visible patches. Every segment s = 0 .. S - 1 has a decoder of its own:

    l_s = embed(norm(z_{s+1}))                                what the segment has found
    c_s = [l_{s-1}, .., l_0, embed(norm(z_0))]                what all that is shallower has found
    q_s = positions + (l_s at the visible patches, a learned mask token m_s at the others)
    q_s = block(q_s, c_s), once or more                       self-attention, attention to c_s
    x_s = predict(norm(q_s))                                  pixels of all patches

The shallow x_s predicts the image and the deep x_{S-1-s} what is left of it, so that their sum is
compared with the target t, and the loss is the mean over the pairs, over the masked patches M and
over the numbers of a patch:

    L = mean_{s < S/2} mean_{p in M} mean (x_s[p] + x_{S-1-s}[p] - t[p])^2

With S = 1 there is no pair, x_0 predicts the image, and this is the loss of a masked autoencoder
(MAE: He et al., CVPR 2022). t is the patch itself, normalised by its own mean and deviation.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from resfu_jax._checks import check_whole, need
from resfu_jax.backbones._layers import LayerNorm
from resfu_jax.backbones.transformer import INITIALISERS, CrossBlock, sincos_positions
from resfu_jax.ops.checks import check_floating
from resfu_jax.ops.dtypes import at_least_float32

_EPSILON = 1e-6
_MLP_RATIO = 4


class MIRLHead(nnx.Module):
    """One decoder for every segment of an encoder.

    Args:
      in_features: channels of the encoder's tokens.
      out_features: numbers of a patch, its pixels times three.
      segments: S; even, or 1.
      width: channels of the decoders, a multiple of 4.
      depth: blocks of every decoder.
      heads: attention heads; divide the width.
      dtype: compute type. Predictions are float32 at least.
      param_dtype: type of the parameters.
      rngs: source of the initial weights.

    Raises:
      ValueError: numbers that do not fit together.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        segments: int = 6,
        width: int = 384,
        depth: int = 1,
        heads: int = 12,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_floating(dtype=dtype, param_dtype=param_dtype)
        check_whole(in_features=in_features, out_features=out_features, segments=segments)
        check_whole(width=width, depth=depth, heads=heads)
        need(segments == 1 or segments % 2 == 0, f"segments must be even, or 1, got {segments}")
        need(width % 4 == 0, f"width must be a multiple of 4, got {width}")
        need(width % heads == 0, f"heads must divide width, got heads={heads}, width={width}")
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.segments, self.width = segments, width
        # The deepest segment's norm is the encoder's own.
        self.image_norm = LayerNorm(in_features, epsilon=_EPSILON, **types)
        self.norms = nnx.List(
            [LayerNorm(in_features, epsilon=_EPSILON, **types) for _ in range(segments - 1)]
        )
        self.image_embed = _linear(in_features, width, **types)
        self.decoders = nnx.List(
            [
                Decoder(in_features, out_features, width=width, depth=depth, heads=heads, **types)
                for _ in range(segments)
            ]
        )

    def __call__(
        self,
        tokens: Sequence[Float[Array, "b _v c"]],
        visible: Int[Array, "b v"],
        grid: tuple[int, int],
    ) -> list[Float[Array, "b n d"]]:
        """x_0 .. x_{S-1}, of all patches.

        Args:
          tokens: z_0 .. z_S, class token first; the last one after the encoder's norm, the others
            as they are.
          visible: numbers of the visible patches.
          grid: rows and columns of patches.

        Raises:
          ValueError: another number of segments.
        """
        need(
            len(tokens) == self.segments + 1,
            f"tokens must be of the image and {self.segments} segments, got {len(tokens)}",
        )
        image, *segments = tokens
        positions = sincos_positions(*grid, self.width, at_least_float32(image.dtype))
        context = self.image_embed(self.image_norm(image))
        predictions = []
        for s, decoder in enumerate(self.decoders):
            z = segments[s] if s == self.segments - 1 else self.norms[s](segments[s])
            found = decoder.embed(z)
            predictions.append(decoder(found, context, visible, positions))
            context = jnp.concatenate([found, context], axis=1)
        return predictions


class Decoder(nnx.Module):
    """One segment's: the equations of l_s, q_s and x_s above.

    Args: as `MIRLHead`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        width: int,
        depth: int,
        heads: int,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.embed = _linear(in_features, width, **types)
        token = 0.02 * jax.random.normal(rngs.params(), (1, width), param_dtype)
        self.mask_token = nnx.Param(token)
        self.blocks = nnx.List(
            [
                CrossBlock(
                    width,
                    heads,
                    _MLP_RATIO * width,
                    norm_epsilon=_EPSILON,
                    initial="xavier",
                    **types,
                )
                for _ in range(depth)
            ]
        )
        self.norm = LayerNorm(width, epsilon=_EPSILON, **types)
        self.predict = WeightNormLinear(width, out_features, **types)

    def __call__(
        self,
        found: Float[Array, "b t c"],
        context: Float[Array, "b m c"],
        visible: Int[Array, "b v"],
        positions: Float[Array, "h w c"],
    ) -> Float[Array, "b n d"]:
        """x_s from l_s and c_s, at all places of `positions`."""
        b, t, c = found.shape
        prefix, n = t - visible.shape[1], positions.shape[0] * positions.shape[1]
        hidden = jnp.broadcast_to(self.mask_token[...].astype(found.dtype)[None], (b, n, c))
        rows = jnp.arange(b, dtype=visible.dtype)[:, None]
        x = hidden.at[rows, visible].set(found[:, prefix:])
        x = x + positions.reshape(1, n, c).astype(x.dtype)
        x = jnp.concatenate([found[:, :prefix], x], axis=1)
        for block in self.blocks:
            x = block(x, context)
        return self.predict(self.norm(x)[:, prefix:])


class WeightNormLinear(nnx.Module):
    """y = x W / |W| + bias, every input channel's row of W at length 1 (Salimans & Kingma, 2016).

    The length itself is not learned. That rows belong to input channels is how the authors' code
    has it: PaddlePaddle's `weight_norm` takes the first axis of a matrix (in, out).
    """

    def __init__(
        self,
        features: int,
        out_features: int,
        *,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        init = INITIALISERS["xavier"]
        self.direction = nnx.Param(init(rngs.params(), (features, out_features), param_dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype))

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n d"]:
        """The projection, in float32 at least."""
        wide = at_least_float32(x.dtype)
        direction = self.direction[...].astype(wide)
        length = jnp.sqrt(jnp.sum(jnp.square(direction), axis=1, keepdims=True) + 1e-12)
        weight = (direction / length).astype(x.dtype)
        y = jnp.matmul(x, weight, preferred_element_type=wide)
        return y + jnp.expand_dims(self.bias[...].astype(wide), (0, 1))


def _linear(features: int, out_features: int, **types: Any) -> nnx.Linear:
    return nnx.Linear(features, out_features, kernel_init=INITIALISERS["xavier"], **types)


def patches_of(images: Float[Array, "b H W c"], size: int) -> Float[Array, "b n d"]:
    """The pixels of every patch, row by row: d = size * size * c."""
    b, height, width, c = images.shape
    h, w = height // size, width // size
    x = images.reshape(b, h, size, w, size, c).swapaxes(2, 3)
    return x.reshape(b, h * w, size * size * c)


def images_of(
    patches: Float[Array, "b n d"], grid: tuple[int, int], size: int
) -> Float[Array, "b H W c"]:
    """Images from their patches."""
    b, _, d = patches.shape
    h, w = grid
    x = patches.reshape(b, h, w, size, size, d // size**2).swapaxes(2, 3)
    return x.reshape(b, h * size, w * size, d // size**2)


def normalise_patches(
    patches: Float[Array, "b n d"],
) -> tuple[Float[Array, "b n d"], Float[Array, "b n 1"], Float[Array, "b n 1"]]:
    """t, and the mean and deviation of every patch: patch = t deviation + mean.

    The variance is the unbiased one, over d - 1, as in MAE's code and MIRL's.
    """
    mean = patches.mean(axis=-1, keepdims=True)
    variance = patches.var(axis=-1, keepdims=True, ddof=1)
    deviation = jnp.sqrt(variance + 1e-6)
    return (patches - mean) / deviation, mean, deviation


def pair_sums(predictions: Sequence[Float[Array, "b n d"]]) -> list[Float[Array, "b n d"]]:
    """x_s + x_{S-1-s} of every pair, s < S/2; a single prediction as it is."""
    count = len(predictions)
    if count == 1:
        return [predictions[0]]
    return [predictions[s] + predictions[count - 1 - s] for s in range(count // 2)]
