"""Vision Transformer (ViT): plain, DINO, DINOv2 with or without registers, DINOv3, MIRL.

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
* MIRL (Huang et al., NeurIPS 2023): 24 to 54 blocks, positions of fixed sines and cosines.

Blocks, attention and positions are in `transformer.py`, a loop over equal blocks in `stacked.py`.
Values equal timm's `VisionTransformer` and the models of Hugging Face transformers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

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
from resfu_jax.backbones.stacked import create_stacked, scan_blocks, stack, unstack
from resfu_jax.backbones.transformer import (
    Block,
    Initial,
    Rotation,
    rope_rotation,
    sincos_positions,
)
from resfu_jax.ops.checks import check_floating
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.resize import resize
from resfu_jax.preprocess import is_integer

Positions = Literal["learned", "rope", "sincos"]


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
    initial: Initial = "normal"
    scan: bool = False


_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}
_SIZES["large"] = (1024, 24, 16)
_DINO: dict[str, dict[str, Any]] = {
    "dinov2": dict(patch_size=14, image_size=518, antialias=False, layer_scale=True),
    "dinov2_registers": dict(patch_size=14, image_size=518, registers=4, layer_scale=True),
    "dinov3": dict(
        positions="rope", registers=4, layer_scale=True, key_bias=False, norm_epsilon=1e-5
    ),
}
_MIRL = {"s54": (384, 54, 12), "b24": (768, 24, 12), "b48": (768, 48, 12)}
VARIANTS = {size: Variant(*sizes) for size, sizes in _SIZES.items()} | {
    f"{family}_{size}": Variant(*_SIZES[size], **parts)
    for family, parts in _DINO.items()
    for size in ("small", "base", "large")
}
VARIANTS |= {
    size: Variant(*sizes, positions="sincos", initial="xavier", scan=True)
    for size, sizes in _MIRL.items()
}

# Of the patches' embedding and the tokens, by the rule for the blocks' weights.
_EMBED_INIT = {
    "normal": nnx.initializers.lecun_normal(),
    # Xavier's rule on the matrix from a patch to its token: the axes before are its rows.
    "xavier": nnx.initializers.xavier_uniform(in_axis=(0, 1, 2)),
}
_TOKEN_STD = {"normal": 1e-6, "xavier": 0.02}


class ViT(nnx.Module):
    """Vision Transformer: images to feature maps at the stride of its patches.

    Args:
      variant: published model: `"tiny"`, `"small"`, `"base"`, `"large"` (ViT and DINO);
        `"dinov2_"`, `"dinov2_registers_"` or `"dinov3_"` and `"small"`, `"base"` or `"large"`; or
        `"s54"`, `"b24"`, `"b48"` (MIRL). The other arguments up to `scan` override it part by
        part.
      patch_size: side of a patch, hence stride of the features.
      image_size: side, or height and width, of the images that the learned positions are for; a
        checkpoint must have as many. Positions are interpolated for images of another size.
      width: channels.
      depth: number of blocks.
      heads: attention heads; divide the width.
      mlp_ratio: hidden width of the feed-forward part over the width.
      positions: `"learned"`; `"rope"`, which rotates queries and keys; or `"sincos"`, fixed sines
        and cosines, no parameters, computed for the grid of the images at hand.
      antialias: interpolate learned positions by the antialiased bicubic rule, as timm and DINOv2
        with registers do, or by the plain one, as ViT and DINOv2 of transformers do (and their
        authors, but for a ratio of (n + 0.1) / m from m to n patches). The rules differ for
        larger grids, too: PyTorch's antialiased kernel has a = -1/2, the plain one a = -3/4.
      registers: number of register tokens.
      layer_scale: multiply every branch by a learned factor per channel, initially 1e-5.
      key_bias: give the keys a bias, as queries and values have.
      norm_epsilon: epsilon of the LayerNorms (1e-12 in ViT and DINO of transformers).
      initial: of the weights: `"normal"`, or `"xavier"`, Xavier's uniform rule, as in MAE and MIRL.
      scan: keep all blocks as one, with a leading axis for the depth, and run them in a loop of
        XLA: the time to compile does not grow with the depth. Results are the same.
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
        initial: Initial | None = None,
        scan: bool | None = None,
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
            initial=initial,
            scan=scan,
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
        self.depth = sizes.depth
        self.scan = sizes.scan
        self.antialias = sizes.antialias
        self.in_channels = in_channels
        self.remat = remat
        self.dtype = dtype

        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        def token(std: float, *shape: int) -> nnx.Param:
            return nnx.Param(std * jax.random.normal(rngs.params(), (*shape, width), param_dtype))

        embed_init, token_std = _EMBED_INIT[sizes.initial], _TOKEN_STD[sizes.initial]
        self.embed = PatchConv(in_channels, width, patch, kernel_init=embed_init, **types)
        self.class_token = token(token_std)
        self.registers = token(token_std, sizes.registers) if sizes.registers else None
        learned = sizes.positions == "learned"
        self.rotates = sizes.positions == "rope"
        self.class_position = token(0.02) if learned else None
        self.positions = token(0.02, *(n // patch for n in image_size)) if learned else None

        # Stochastic depth: from 0 at the first block to `drop_path` at the last.
        rates = [drop_path * i / max(sizes.depth - 1, 1) for i in range(sizes.depth)]
        self.drop_path = tuple(rates) if drop_path else None

        def block(rate: float, rngs: nnx.Rngs) -> Block:
            return Block(
                width,
                sizes.heads,
                int(width * sizes.mlp_ratio),
                layer_scale=sizes.layer_scale,
                key_bias=sizes.key_bias,
                norm_epsilon=sizes.norm_epsilon,
                drop_path=rate,
                initial=sizes.initial,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.blocks: Any
        if sizes.scan:
            self.blocks = create_stacked(lambda rngs: block(0.0, rngs), sizes.depth, rngs)
        else:
            self.blocks = nnx.List([block(rate, rngs) for rate in rates])
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
        outputs = [self.norm(x) for x in self._run(images, layers)]
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
        (x,) = self._run(images, (self.depth - 1,))
        return head(self.norm(x)[:, 0])

    def encode_visible(
        self,
        images: Float[Array, "b H W c"],
        visible: Int[Array, "b v"],
        layers: Sequence[int] | None = None,
    ) -> tuple[Float[Array, "b _n d"], ...]:
        """Tokens of some patches alone, as masked autoencoders encode an image.

        The patches keep their positions in the whole image; class token and registers come first,
        as ever. None of the tokens went through the final LayerNorm.

        Args:
          images: as for `__call__`.
          visible: numbers of the visible patches, row by row from 0, as many in every image.
          layers: blocks, as in the constructor, which need not be those; None: those.

        Returns:
          The tokens that enter the first block, and those after each of the `layers`.

        Raises:
          ValueError: images or numbers of another shape or type, or blocks that there are not.
        """
        layers = self.layers if layers is None else check_layers(self, layers)
        self._check_images(images)
        if visible.ndim != 2 or not jnp.issubdtype(visible.dtype, jnp.integer):
            raise ValueError(
                "visible must be whole numbers (batch, visible patches), got "
                f"{visible.dtype} {visible.shape}"
            )
        x, rotation = self._tokens(images if self.dtype is None else images.astype(self.dtype))
        count = self._prefix_length()
        prefix = jnp.arange(count, dtype=visible.dtype)[None]
        prefix = jnp.broadcast_to(prefix, (visible.shape[0], count))
        taken = jnp.concatenate([prefix, visible + count], axis=1)
        x = jnp.take_along_axis(x, taken[..., None], axis=1)
        if rotation is not None:
            cos, sin = (jnp.take(r, taken, axis=0) for r in rotation)
            rotation = cos, sin
        return (x, *self._after(x, rotation, layers))

    def block(self, index: int) -> Block:
        """One of the blocks; with `scan`, a copy of its variables."""
        return unstack(self.blocks, index) if self.scan else self.blocks[index]

    def set_blocks(self, blocks: Sequence[Block]) -> None:
        """Puts the variables of all blocks in the place of the model's own."""
        stacked = stack(blocks) if self.scan else nnx.List(blocks)
        nnx.update(self.blocks, nnx.state(stacked))

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
        if self.depth > 1:
            (x,) = self._after(x, rotation, (self.depth - 2,))
        last = self.block(self.depth - 1)
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
        """The tokens after these blocks."""
        self._check_images(images)
        x, rotation = self._tokens(images if self.dtype is None else images.astype(self.dtype))
        return self._after(x, rotation, layers)

    def _after(self, x: Array, rotation: Rotation | None, layers: Sequence[int]) -> list[Array]:
        """The same, from what enters the first block."""
        if self.scan:
            return scan_blocks(
                self.blocks, x, rotation, layers, rates=self.drop_path, remat=self.remat
            )
        outputs = []
        for i in range(layers[-1] + 1):
            block = self.blocks[i]
            x = nnx.remat(Block.__call__)(block, x, rotation) if self.remat else block(x, rotation)
            if i in layers:
                outputs.append(x)
        return outputs

    def _tokens(self, images: Array) -> tuple[Array, Rotation | None]:
        """What enters the first block: the tokens, and the rotation of queries and keys."""
        x = self.embed(images)
        b, h, w, c = x.shape
        class_token, rotation = self.class_token[...], None
        if self.rotates:
            size = c // self.heads
            rotation = rope_rotation(h, w, self._prefix_length(), size, at_least_float32(x.dtype))
        elif self.positions is None or self.class_position is None:
            fixed = sincos_positions(h, w, c, at_least_float32(x.dtype))
            x = x + fixed[None].astype(x.dtype)
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
    for name in ("antialias", "layer_scale", "key_bias", "scan"):
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
    if sizes.positions == "sincos" and sizes.width % 4:
        raise ValueError(
            f"positions='sincos' needs a width that is a multiple of 4, got width={sizes.width}"
        )
    if sizes.initial not in get_args(Initial):
        raise ValueError(
            f"initial must be one of {', '.join(get_args(Initial))}, got {sizes.initial!r}"
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
    return _check_layers(layers, vit.depth)


def _check_layers(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    need(
        isinstance(layers, tuple | list)
        and len(layers) > 0
        and all(is_whole(i) and 0 <= i < depth for i in layers)
        and list(layers) == sorted(set(layers)),
        f"layers must be ascending numbers of blocks, 0 .. {depth - 1}, got {layers}",
    )
    return tuple(layers)
