"""Mix Transformer (MiT), the hierarchical encoder of SegFormer.

Xie et al., "SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers",
NeurIPS 2021, section 3.1. Four stages at strides 4, 8, 16 and 32, each

    patch embedding (overlapping strided convolution) -> blocks -> LayerNorm

where a block is efficient self-attention (keys and values from a map that is `sr_ratio` times
smaller per side) and Mix-FFN, a feed-forward part with a depthwise 3x3 convolution inside, whose
zero padding also tells the network where it is: there are no positional embeddings.

Values equal `SegformerModel` of Hugging Face transformers, whose LayerNorms all have epsilon 1e-5
(the authors' code has 1e-6 in the blocks and at the end of a stage).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from resfu_jax._checks import check_flag, check_rate, check_sizes, check_whole
from resfu_jax._layers import DepthwiseConv
from resfu_jax.backbones._layers import LayerNorm, PatchConv, check_images
from resfu_jax.ops.checks import check_floating
from resfu_jax.ops.dtypes import at_least_float32


@dataclasses.dataclass(frozen=True)
class Variant:
    """Sizes of the four stages."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...] = (1, 2, 5, 8)
    mlp_ratios: tuple[int, ...] = (4, 4, 4, 4)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)


VARIANTS = {
    "b0": Variant((32, 64, 160, 256), (2, 2, 2, 2)),
    "b1": Variant((64, 128, 320, 512), (2, 2, 2, 2)),
    "b2": Variant((64, 128, 320, 512), (3, 4, 6, 3)),
    "b3": Variant((64, 128, 320, 512), (3, 4, 18, 3)),
    "b4": Variant((64, 128, 320, 512), (3, 8, 27, 3)),
    "b5": Variant((64, 128, 320, 512), (3, 6, 40, 3)),
}

_EPSILON = 1e-5  # of all LayerNorms

# As the official code initialises. PyTorch's trunc_normal_ cuts at the values +-2, that is 100
# standard deviations: never.
_linear_init = nnx.initializers.normal(0.02)
_conv_init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
_depthwise_init = nnx.initializers.normal((2 / 9) ** 0.5)  # fan-out of a depthwise 3x3 kernel: 9


class MiT(nnx.Module):
    """Mix Transformer: images to a pyramid of four feature maps.

    Args:
      variant: published size, `"b0"` .. `"b5"`; the other arguments override it part by part.
      widths: channels of the four stages.
      depths: number of blocks of the four stages.
      heads: attention heads of the four stages; each divides the stage's width.
      mlp_ratios: hidden width of Mix-FFN over the stage's width.
      sr_ratios: by how much attention shrinks the sides of its keys and values.
      drop_path: probability of skipping the last block's branches; grows linearly from 0 at the
        first block (stochastic depth).
      in_channels: channels of the images.
      dtype: compute type; that of the input by default. LayerNorm and softmax are float32 at least.
      param_dtype: type of the parameters.
      remat: recompute every block's activations in the backward pass instead of keeping them.
      rngs: source of the initial weights and of the dropped paths.

    Raises:
      ValueError: an unknown variant, or sizes that do not fit together.
    """

    def __init__(
        self,
        variant: str = "b0",
        *,
        widths: Sequence[int] | None = None,
        depths: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        mlp_ratios: Sequence[int] | None = None,
        sr_ratios: Sequence[int] | None = None,
        drop_path: float = 0.1,
        in_channels: int = 3,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        check_floating(dtype=dtype, param_dtype=param_dtype)
        if variant not in tuple(VARIANTS):
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        given: dict[str, Any] = dict(
            widths=widths, depths=depths, heads=heads, mlp_ratios=mlp_ratios, sr_ratios=sr_ratios
        )
        given = {name: value for name, value in given.items() if value is not None}
        check_sizes(4, **given)
        given = {name: tuple(value) for name, value in given.items()}
        sizes = dataclasses.replace(VARIANTS[variant], **given)
        for width, n in zip(sizes.widths, sizes.heads, strict=True):
            if width % n:
                raise ValueError(
                    f"heads must divide widths, got heads={sizes.heads}, widths={sizes.widths}"
                )
        check_rate(drop_path=drop_path)
        check_whole(in_channels=in_channels)
        check_flag(remat=remat)

        self.features = sizes.widths
        self.strides = (4, 8, 16, 32)
        self.in_channels = in_channels
        self.remat = remat
        self.dtype = dtype
        total = sum(sizes.depths)
        stages, block = [], 0
        for i in range(4):
            rates = [
                drop_path * n / max(total - 1, 1) for n in range(block, block + sizes.depths[i])
            ]
            block += sizes.depths[i]
            stages.append(
                Stage(
                    in_channels if i == 0 else sizes.widths[i - 1],
                    sizes.widths[i],
                    patch_size=7 if i == 0 else 3,
                    stride=4 if i == 0 else 2,
                    heads=sizes.heads[i],
                    mlp_ratio=sizes.mlp_ratios[i],
                    sr_ratio=sizes.sr_ratios[i],
                    drop_path=rates,
                    dtype=dtype,
                    param_dtype=param_dtype,
                    rngs=rngs,
                )
            )
        self.stages = nnx.List(stages)

    def __call__(
        self, images: Float[Array, "b h w c"]
    ) -> tuple[
        Float[Array, "b h4 w4 c1"],
        Float[Array, "b h8 w8 c2"],
        Float[Array, "b h16 w16 c3"],
        Float[Array, "b h32 w32 c4"],
    ]:
        """Feature maps at strides 4, 8, 16, 32: sides are halved rounding up, from ceil(H / 4) on.

        Raises:
          ValueError: images that are not `(B, H, W, in_channels)`, or too small for `sr_ratios`.
        """
        check_images(images, self.in_channels)
        self._check_size(images.shape[1:3])
        x = images if self.dtype is None else images.astype(self.dtype)
        pyramid = []
        for stage in self.stages:
            x = stage(x, remat=self.remat)
            pyramid.append(x)
        c1, c2, c3, c4 = pyramid
        return c1, c2, c3, c4

    def _check_size(self, size: tuple) -> None:
        if not all(isinstance(n, int) for n in size):
            return  # symbolic
        sides, shortest = size, 1
        for i, stage in enumerate(self.stages):
            stride = 4 if i == 0 else 2
            sides = [-(-n // stride) for n in sides]
            shortest = max(shortest, (stage.sr_ratio - 1) * 4 * 2**i + 1)
            if min(sides) < stage.sr_ratio:
                raise ValueError(
                    f"images of {size[0]}x{size[1]} are too small: stage {i + 1} attends to a map "
                    f"{stage.sr_ratio} times smaller than its {sides[0]}x{sides[1]}; "
                    f"both sides must be at least {shortest}, or sr_ratios smaller"
                )


class Stage(nnx.Module):
    """Patch embedding, blocks, LayerNorm: from one level of the pyramid to the next."""

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        patch_size: int,
        stride: int,
        heads: int,
        mlp_ratio: int,
        sr_ratio: int,
        drop_path: Sequence[float],
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.sr_ratio = sr_ratio
        self.embed = nnx.Conv(
            in_features,
            features,
            (patch_size, patch_size),
            strides=stride,
            padding=patch_size // 2,  # symmetric, as PyTorch pads; "SAME" is not with a stride
            kernel_init=_conv_init,
            **types,
        )
        self.embed_norm = LayerNorm(features, epsilon=_EPSILON, **types)
        self.blocks = nnx.List(
            [
                Block(features, heads, mlp_ratio, sr_ratio, drop_path=rate, **types)
                for rate in drop_path
            ]
        )
        self.norm = LayerNorm(features, epsilon=_EPSILON, **types)

    def __call__(self, x: Float[Array, "b h w c"], *, remat: bool) -> Float[Array, "b H W d"]:
        """One level of the pyramid; with `remat`, blocks keep their inputs only."""
        x = self.embed_norm(self.embed(x))
        for block in self.blocks:
            x = nnx.remat(Block.__call__)(block, x) if remat else block(x)
        return self.norm(x)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); both branches may be dropped."""

    def __init__(
        self,
        features: int,
        heads: int,
        mlp_ratio: int,
        sr_ratio: int,
        *,
        drop_path: float,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.attention_norm = LayerNorm(features, epsilon=_EPSILON, **types)
        self.attention = Attention(features, heads, sr_ratio, **types)
        self.ffn_norm = LayerNorm(features, epsilon=_EPSILON, **types)
        self.ffn = MixFFN(features, mlp_ratio * features, **types)
        # One draw per image: the branch is dropped as a whole.
        self.drop_path = nnx.Dropout(drop_path, broadcast_dims=(1, 2, 3), rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Both residual branches."""
        x = x + self.drop_path(self.attention(self.attention_norm(x)))
        return x + self.drop_path(self.ffn(self.ffn_norm(x)))


class Attention(nnx.Module):
    """Self-attention of all pixels to a map that is `sr_ratio` times smaller per side (eq. 2)."""

    def __init__(
        self,
        features: int,
        heads: int,
        sr_ratio: int,
        *,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.heads = heads
        self.query = nnx.Linear(features, features, kernel_init=_linear_init, **types)
        self.key = nnx.Linear(features, features, kernel_init=_linear_init, **types)
        self.value = nnx.Linear(features, features, kernel_init=_linear_init, **types)
        self.out = nnx.Linear(features, features, kernel_init=_linear_init, **types)
        self.reduces = sr_ratio > 1
        if self.reduces:
            self.reduce = PatchConv(features, features, sr_ratio, kernel_init=_conv_init, **types)
            self.reduce_norm = LayerNorm(features, epsilon=_EPSILON, **types)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Softmax(query · key / sqrt(c / heads)) · value, per head."""
        small = self.reduce_norm(self.reduce(x)) if self.reduces else x

        def tokens(x: Array) -> Array:  # (b, h w, heads, c / heads)
            b, h, w, c = x.shape
            return x.reshape(b, h * w, self.heads, c // self.heads)

        query, key, value = (
            tokens(self.query(x)),
            tokens(self.key(small)),
            tokens(self.value(small)),
        )
        wide = at_least_float32(x.dtype)
        scores = jnp.einsum("bnhd,bmhd->bhnm", query, key, preferred_element_type=wide)
        weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5).astype(value.dtype)
        y = jnp.einsum("bhnm,bmhd->bnhd", weights, value)
        return self.out(y.reshape(x.shape))


class MixFFN(nnx.Module):
    """linear -> depthwise 3x3 -> GELU -> linear (eq. 3)."""

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.expand = nnx.Linear(features, hidden, kernel_init=_linear_init, **types)
        self.depthwise = DepthwiseConv(
            hidden, kernel_init=_depthwise_init, param_dtype=param_dtype, rngs=rngs
        )
        self.contract = nnx.Linear(hidden, features, kernel_init=_linear_init, **types)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The feed-forward branch."""
        return self.contract(jax.nn.gelu(self.depthwise(self.expand(x)), approximate=False))
