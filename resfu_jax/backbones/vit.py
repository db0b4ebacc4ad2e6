"""Vision Transformer (ViT): plain, DINO, DINOv2 with or without registers, DINOv3.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, section 3.1:

    x_0 = [class token; registers; patches E + positions]              (eq. 1; registers: DINOv2)
    x'  = x  + scale * attention(norm(x))                              (eq. 2)
    x   = x' + scale * feed-forward(norm(x'))                          (eq. 3)

and the features are the patches' tokens of norm(x), all at the stride of the patches. The DINO
family differs from the plain ViT in few parts, which are options here, set by its variants:

* DINO (Caron et al., ICCV 2021): none.
* DINOv2 (Oquab et al., 2023): patches of 14, a learned `scale` per channel of every branch.
* DINOv2 with registers (Darcet et al., "Vision Transformers Need Registers", ICLR 2024): four
  more tokens, which have no position and are left out of the features.
* DINOv3 (Siméoni et al., 2025): instead of learned positions, queries and keys of the patches are
  rotated by angles that grow with their place (RoPE); no bias of the keys.

Values equal timm's `VisionTransformer` and the models of Hugging Face transformers.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from resfu_jax._checks import (
    check_count,
    check_flag,
    check_positive,
    check_rate,
    check_sizes,
    check_whole,
    is_whole,
    need,
)
from resfu_jax.backbones._layers import LayerNorm, PatchConv, check_images
from resfu_jax.ops.checks import check_floating
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.resize import resize
from resfu_jax.preprocess import is_integer

Positions = Literal["learned", "rope"]


@dataclasses.dataclass(frozen=True)
class Variant:
    """Sizes and parts of a published model."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4
    patch_size: int = 16
    image_size: int | tuple[int, int] = 224
    positions: Positions = "learned"
    antialias: bool = True
    registers: int = 0
    layer_scale: bool = False
    key_bias: bool = True
    norm_epsilon: float = 1e-6


_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}
_SIZES["large"] = (1024, 24, 16)
_DINO: dict[str, dict[str, Any]] = {
    "dinov2": dict(patch_size=14, image_size=518, antialias=False, layer_scale=True),
    "dinov2_registers": dict(patch_size=14, image_size=518, registers=4, layer_scale=True),
    "dinov3": dict(
        positions="rope", registers=4, layer_scale=True, key_bias=False, norm_epsilon=1e-5
    ),
}
VARIANTS = {size: Variant(*sizes) for size, sizes in _SIZES.items()} | {
    f"{family}_{size}": Variant(*_SIZES[size], **parts)
    for family, parts in _DINO.items()
    for size in ("small", "base", "large")
}

_linear_init = nnx.initializers.normal(0.02)
_embed_init = nnx.initializers.lecun_normal()
_INITIAL_LAYER_SCALE = 1e-5
_ROPE_BASE = 100.0
_MOST_SCORES = 2**28  # of an attention at once: 1 GiB of float32, of 1152 images of 6 x 197 x 197


class ViT(nnx.Module):
    """Vision Transformer: images to feature maps at the stride of its patches.

    Args:
      variant: published model: `"tiny"`, `"small"`, `"base"`, `"large"` (ViT and DINO), or
        `"dinov2_"`, `"dinov2_registers_"` or `"dinov3_"` and `"small"`, `"base"` or `"large"`.
        The other arguments up to `norm_epsilon` override it part by part.
      patch_size: side of a patch, hence stride of the features.
      image_size: side, or height and width, of the images that the learned positions are for; a
        checkpoint must have as many. Positions are interpolated for images of another size.
      width: channels.
      depth: number of blocks.
      heads: attention heads; divide the width.
      mlp_ratio: hidden width of the feed-forward part over the width.
      positions: `"learned"`, or `"rope"`, which rotates queries and keys.
      antialias: interpolate learned positions by the antialiased bicubic rule, as timm and DINOv2
        with registers do, or by the plain one, as ViT and DINOv2 of transformers do (and their
        authors, but for a ratio of (n + 0.1) / m from m to n patches). The rules differ for
        larger grids, too: PyTorch's antialiased kernel has a = -1/2, the plain one a = -3/4.
      registers: number of register tokens.
      layer_scale: multiply every branch by a learned factor per channel, initially 1e-5.
      key_bias: give the keys a bias, as queries and values have.
      norm_epsilon: epsilon of the LayerNorms (1e-12 in ViT and DINO of transformers).
      layers: blocks whose output to return, in ascending order, counted from 0: `(2, 5, 8, 11)` are
        the quarters of a ViT with blocks 0 .. 11. The last one by default. Blocks after the
        last one named are not computed.
      num_classes: number of classes for `classify`; there is no classifier by default.
      drop_path: probability of skipping the last block's branches; grows linearly from 0 at the
        first block (stochastic depth).
      in_channels: channels of the images.
      dtype: compute type; that of the input by default. LayerNorm and softmax are float32 at least.
      param_dtype: type of the parameters.
      remat: recompute every block's activations in the backward pass instead of keeping them.
      rngs: source of the initial weights and of the dropped paths.

    Attributes:
      features: channels of the maps returned.
      strides: their strides.

    Raises:
      ValueError: an unknown variant, or sizes that do not fit together.
    """

    def __init__(
        self,
        variant: str = "tiny",
        *,
        patch_size: int | None = None,
        image_size: int | Sequence[int] | None = None,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        mlp_ratio: float | None = None,
        positions: Positions | None = None,
        antialias: bool | None = None,
        registers: int | None = None,
        layer_scale: bool | None = None,
        key_bias: bool | None = None,
        norm_epsilon: float | None = None,
        layers: Sequence[int] | None = None,
        num_classes: int | None = None,
        drop_path: float = 0.0,
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
            patch_size=patch_size,
            image_size=image_size,
            width=width,
            depth=depth,
            heads=heads,
            mlp_ratio=mlp_ratio,
            positions=positions,
            antialias=antialias,
            registers=registers,
            layer_scale=layer_scale,
            key_bias=key_bias,
            norm_epsilon=norm_epsilon,
        )
        sizes = dataclasses.replace(
            VARIANTS[variant], **{name: value for name, value in given.items() if value is not None}
        )
        check_whole(in_channels=in_channels)
        check_flag(remat=remat)
        image_size, layers = _check(sizes, layers, num_classes, drop_path)

        width, patch = sizes.width, sizes.patch_size
        self.features = (width,) * len(layers)
        self.strides = self.strides_of(patch_size=patch, layers=layers)
        self.layers = layers
        self.heads = sizes.heads
        self.antialias = sizes.antialias
        self.in_channels = in_channels
        self.remat = remat
        self.dtype = dtype

        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        def token(std: float, *shape: int) -> nnx.Param:
            return nnx.Param(std * jax.random.normal(rngs.params(), (*shape, width), param_dtype))

        self.embed = PatchConv(in_channels, width, patch, kernel_init=_embed_init, **types)
        self.class_token = token(1e-6)
        self.registers = token(1e-6, sizes.registers) if sizes.registers else None
        learned = sizes.positions == "learned"
        self.class_position = token(0.02) if learned else None
        self.positions = token(0.02, *(n // patch for n in image_size)) if learned else None
        self.blocks = nnx.List(
            [
                Block(
                    width,
                    sizes.heads,
                    int(width * sizes.mlp_ratio),
                    layer_scale=sizes.layer_scale,
                    key_bias=sizes.key_bias,
                    norm_epsilon=sizes.norm_epsilon,
                    drop_path=drop_path * i / max(sizes.depth - 1, 1),
                    **types,
                )
                for i in range(sizes.depth)
            ]
        )
        self.norm = LayerNorm(width, epsilon=sizes.norm_epsilon, **types)
        zeros = nnx.initializers.zeros_init()
        self.head = (
            nnx.Linear(width, num_classes, kernel_init=zeros, **types) if num_classes else None
        )

    @staticmethod
    def strides_of(
        variant: str = "tiny",
        *,
        patch_size: int | None = None,
        layers: Sequence[int] | None = None,
        **_: Any,
    ) -> tuple[int, ...]:
        """The strides of one built with these arguments."""
        if patch_size is None:
            if variant not in VARIANTS:
                raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
            patch_size = VARIANTS[variant].patch_size
        if not is_integer(patch_size) or patch_size < 1:
            raise ValueError(f"patch_size must be a whole number, at least 1, got {patch_size!r}")
        return (patch_size,) * (1 if layers is None else len(layers))

    def __call__(self, images: Float[Array, "b H W c"]) -> tuple[Float[Array, "b h w d"], ...]:
        """Feature maps of the patches, one per entry of `layers`, each after the final LayerNorm.

        Height and width may be symbolic (`jax.export`), as multiples of the patch size.

        Args:
          images: normalised images whose sides are multiples of the patch size.

        Raises:
          ValueError: images of another shape or type.
        """
        return self.maps_and_class_tokens(images)[0]

    def maps_and_class_tokens(
        self, images: Float[Array, "b H W c"], layers: Sequence[int] | None = None
    ) -> tuple[tuple[Float[Array, "b h w d"], ...], tuple[Float[Array, "b d"], ...]]:
        """What `__call__` returns, and the class token beside each map, after the same LayerNorm.

        Args:
          images: as there.
          layers: blocks, as in the constructor, which need not be those; None: those.

        Raises:
          ValueError: images of another shape or type, or blocks that there are not.
        """
        layers = self.layers if layers is None else check_layers(self, layers)
        outputs = self._run(images, layers)
        b, h, w, _ = images.shape
        h, w = h // self.strides[0], w // self.strides[0]
        prefix = self._prefix_length()
        maps = tuple(x[:, prefix:].reshape(b, h, w, x.shape[-1]) for x in outputs)
        return maps, tuple(x[:, 0] for x in outputs)

    def classify(self, images: Float[Array, "b H W c"]) -> Float[Array, "b k"]:
        """Logits of the classifier on the normalised class token of the last block.

        Raises:
          ValueError: a model without `num_classes`; images as for `__call__`.
        """
        head = self._classifier()
        (x,) = self._run(images, (len(self.blocks) - 1,))
        return head(x[:, 0])

    def last_activations(
        self, images: Float[Array, "b H W c"]
    ) -> tuple[Float[Array, "b h w d"], Callable[[Array], Array]]:
        """The patches' activations that decide a class, and the logits as a function of them.

        They are what the last block's attention reads, the output of its first LayerNorm: the
        classifier sees the class token alone, which the patches no longer reach behind it.

        Returns:
          The activations, and the function from activations of their shape to logits (B, K); of
          those that came with it, the logits are those of `classify`.

        Raises:
          ValueError: as for `classify`.
        """
        head = self._classifier()
        self._check_images(images)
        x, rotation = self._tokens(images if self.dtype is None else images.astype(self.dtype))
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, rotation)
        normalised, prefix = last.attention_norm(x), self._prefix_length()
        b, h, w, _ = images.shape
        h, w = h // self.strides[0], w // self.strides[0]

        def logits(maps: Array) -> Array:
            patches = maps.reshape(b, h * w, maps.shape[-1])
            tokens = jnp.concatenate([normalised[:, :prefix], patches], axis=1)
            return head(self.norm(last.branches(x, tokens, rotation))[:, 0])

        return normalised[:, prefix:].reshape(b, h, w, x.shape[-1]), logits

    def _classifier(self) -> Callable[[Array], Array]:
        if self.head is None:
            raise ValueError("there is no classifier: build the ViT with num_classes")
        return self.head

    def _run(self, images: Array, layers: tuple[int, ...]) -> list[Array]:
        """The normalised tokens after these blocks."""
        self._check_images(images)
        x, rotation = self._tokens(images if self.dtype is None else images.astype(self.dtype))
        outputs = []
        for i in range(layers[-1] + 1):
            block = self.blocks[i]
            x = nnx.remat(Block.__call__)(block, x, rotation) if self.remat else block(x, rotation)
            if i in layers:
                outputs.append(self.norm(x))
        return outputs

    def _tokens(self, images: Array) -> tuple[Array, tuple[Array, Array] | None]:
        """What enters the first block: the tokens, and the rotation of queries and keys."""
        x = self.embed(images)
        b, h, w, c = x.shape
        class_token, rotation = self.class_token[...], None
        if self.positions is None or self.class_position is None:
            size = c // self.heads
            rotation = _rotation(h, w, self._prefix_length(), size, at_least_float32(x.dtype))
        else:
            positions = self.positions[...][None]
            if positions.shape[1:3] != (h, w):
                positions = resize(positions, (h, w), method="bicubic", antialias=self.antialias)
            x = x + positions.astype(x.dtype)
            class_token = class_token + self.class_position[...]
        prefix = class_token[None]
        if self.registers is not None:
            prefix = jnp.concatenate([prefix, self.registers[...]])
        prefix = jnp.broadcast_to(prefix[None].astype(x.dtype), (b, *prefix.shape))
        return jnp.concatenate([prefix, x.reshape(b, h * w, c)], axis=1), rotation

    def _prefix_length(self) -> int:
        return 1 if self.registers is None else 1 + self.registers.shape[0]

    def _check_images(self, images: Array) -> None:
        check_images(images, self.in_channels)
        h, w = images.shape[1:3]
        patch = self.strides[0]
        if any(isinstance(n, int) and (n % patch or n < 1) for n in (h, w)):
            fits = "x".join(
                str(max(-(-n // patch), 1) * patch) if isinstance(n, int) else str(n)
                for n in (h, w)
            )
            raise ValueError(
                f"images of {h}x{w} do not divide into patches of {patch}x{patch}: "
                f"pad or resize them, to {fits} for instance"
            )


def _check(
    sizes: Variant, layers: Sequence[int] | None, num_classes: int | None, drop_path: float
) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Height and width for `image_size`, and `layers`; a `ValueError` if no ViT can be built."""
    for name in ("width", "depth", "heads", "patch_size"):
        check_whole(**{name: getattr(sizes, name)})
    check_positive(mlp_ratio=sizes.mlp_ratio, norm_epsilon=sizes.norm_epsilon)
    check_count(registers=sizes.registers)
    for name in ("antialias", "layer_scale", "key_bias"):
        check_flag(**{name: getattr(sizes, name)})
    if num_classes is not None:
        check_whole(num_classes=num_classes)
    check_rate(drop_path=drop_path)
    need(
        int(sizes.width * sizes.mlp_ratio) >= 1,
        f"mlp_ratio times width must be 1 or more, got {sizes.mlp_ratio} and {sizes.width}",
    )
    if sizes.width % sizes.heads:
        raise ValueError(f"heads must divide width, got heads={sizes.heads}, width={sizes.width}")
    if sizes.positions not in get_args(Positions):
        raise ValueError(
            f"positions must be one of {', '.join(get_args(Positions))}, got {sizes.positions!r}"
        )
    if sizes.positions == "rope" and sizes.width // sizes.heads % 4:
        raise ValueError(
            "positions='rope' needs heads of 4, 8, 12, .. channels, "
            f"got width={sizes.width}, heads={sizes.heads}"
        )
    image_size: Any = sizes.image_size
    if is_whole(image_size):
        image_size = (image_size, image_size)
    check_sizes(2, image_size=image_size)
    fits = all(n % sizes.patch_size == 0 for n in image_size)
    if sizes.positions == "learned" and not fits:
        raise ValueError(
            f"image_size must be one or two multiples of the patch size {sizes.patch_size}, "
            f"got {image_size}"
        )
    layers = (sizes.depth - 1,) if layers is None else layers
    return tuple(image_size), _check_layers(layers, sizes.depth)


def check_layers(vit: ViT, layers: Sequence[int]) -> tuple[int, ...]:
    """The layers, if they are blocks of the ViT; else a `ValueError`."""
    return _check_layers(layers, len(vit.blocks))


def _check_layers(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    need(
        isinstance(layers, tuple | list)
        and len(layers) > 0
        and all(is_whole(i) and 0 <= i < depth for i in layers)
        and list(layers) == sorted(set(layers)),
        f"layers must be ascending numbers of blocks, 0 .. {depth - 1}, got {layers}",
    )
    return tuple(layers)


def _rotation(h, w, prefix: int, size: int, dtype: Dtype) -> tuple[Array, Array]:
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


def _rotate(x: Float[Array, "b n k d"], rotation: tuple[Array, Array]) -> Float[Array, "b n k d"]:
    """Rotate the pairs of channels (i, i + d / 2) by the angles of each token."""
    cos, sin = (jnp.expand_dims(r, (0, 2)) for r in rotation)
    y = x.astype(cos.dtype)
    first, second = jnp.split(y, 2, axis=-1)
    return (y * cos + jnp.concatenate([-second, first], axis=-1) * sin).astype(x.dtype)


class Block(nnx.Module):
    """x + scale attention(norm(x)), then x + scale feed-forward(norm(x)); branches may be dropped.

    `scale`, a factor per channel, is 1 without layer scale.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        hidden: int,
        *,
        layer_scale: bool,
        key_bias: bool,
        norm_epsilon: float,
        drop_path: float,
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
        self.attention = Attention(features, heads, key_bias=key_bias, **types)
        self.attention_scale = scale()
        self.ffn_norm = LayerNorm(features, epsilon=norm_epsilon, **types)
        self.ffn = FFN(features, hidden, **types)
        self.ffn_scale = scale()
        # One draw per image: the branch is dropped as a whole.
        self.drop_path = nnx.Dropout(drop_path, broadcast_dims=(1, 2), rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n c"], rotation: tuple[Array, Array] | None
    ) -> Float[Array, "b n c"]:
        """Both residual branches."""
        return self.branches(x, self.attention_norm(x), rotation)

    def branches(
        self,
        x: Float[Array, "b n c"],
        normalised: Float[Array, "b n c"],
        rotation: tuple[Array, Array] | None,
    ) -> Float[Array, "b n c"]:
        """The same with norm(x), which attention reads, given apart."""

        def scaled(y: Array, scale: nnx.Param | None) -> Array:
            if scale is not None:
                y = y * jnp.expand_dims(scale[...].astype(y.dtype), (0, 1))
            return self.drop_path(y)

        x = x + scaled(self.attention(normalised, rotation), self.attention_scale)
        return x + scaled(self.ffn(self.ffn_norm(x)), self.ffn_scale)


class Attention(nnx.Module):
    """Self-attention of all tokens to all tokens."""

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        key_bias: bool,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = dict(
            kernel_init=_linear_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.heads = heads
        self.query = nnx.Linear(features, features, **types)
        self.key = nnx.Linear(features, features, use_bias=key_bias, **types)
        self.value = nnx.Linear(features, features, **types)
        self.out = nnx.Linear(features, features, **types)

    def __call__(
        self, x: Float[Array, "b n c"], rotation: tuple[Array, Array] | None
    ) -> Float[Array, "b n c"]:
        """Softmax(query · key / sqrt(c / heads)) · value, per head."""
        b, n, c = x.shape
        query, key, value = (
            project(x).reshape(b, n, self.heads, c // self.heads)
            for project in (self.query, self.key, self.value)
        )
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
    if not all(isinstance(size, int) for size in (b, n)):  # symbolic: the number of parts is fixed
        return _attend(query, key, value)
    parts = -(-b * h * n * n // _MOST_SCORES)
    if parts <= 1:
        return _attend(query, key, value)
    rows = -(-n // parts)
    query = jnp.pad(query, ((0, 0), (0, parts * rows - n), (0, 0), (0, 0)))
    query = jnp.moveaxis(query.reshape(b, parts, rows, h, d), 1, 0)
    attend = jax.checkpoint(lambda part: _attend(part, key, value))
    y = jnp.moveaxis(jax.lax.map(attend, query), 0, 1)
    return y.reshape(b, parts * rows, h, d)[:, :n]


class FFN(nnx.Module):
    """linear -> GELU -> linear."""

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = dict(
            kernel_init=_linear_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.expand = nnx.Linear(features, hidden, **types)
        self.contract = nnx.Linear(hidden, features, **types)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """The feed-forward branch."""
        return self.contract(jax.nn.gelu(self.expand(x), approximate=False))
