"""UPLiFT: pixel-dense features in passes that double them.

With x the features, I the image, E_1 .. E_n the encoder's maps of I, all of its size, n(E) one of
them at the size needed (nearest neighbour), and T a transposed convolution of kernel and stride 2
plus bilinear doubling, one pass is

    g = Group_1([T(Group_0([x, n(E_n)])), n(E_n-1)])                    decoder, twice as large
    a = softmax over taps ((W + 1) g + b)                               LocalAttender
    x'[p] = sum_t a[p, t] x[cell(p) + offset_t]                         `ops.local_attention`

and x' is the next pass's x: log2(scale) passes, of the same weights. 17 taps are the 3 x 3 pixels
around the cell and those of the 5 x 5 whose offsets are both even. Beyond the border x is continued
by it, so that every output is a mean of features. (1 is the skip: g's own first channels are added
to the scores.) The published form for VAEs appends random channels to what is joined, and refines
x' by convolutions of [x', n(E_n)]: these make new features.

A block is 3 x 3 convolution, norm and ReLU, once or twice, then a 1 x 1 convolution, plus what it
was given, cut to its width or filled up with zeros.

If the passes' result has another size than what is asked for, it is resized bilinearly, with
antialiasing where it shrinks. So does the official module; its "fast" mode leaves antialiasing out.

Source: Walmer et al., "UPLiFT: Efficient Pixel-Dense Feature Upsampling with Local Attenders",
2026, section 3.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from resfu_jax import ops
from resfu_jax._checks import check_choice, check_count, check_flag, check_sizes, check_whole, need
from resfu_jax._layers import PYTORCH_UNIFORM, BatchNorm, Conv, LayerNorm, Linear
from resfu_jax.ops import Implementation
from resfu_jax.ops.checks import check_floating
from resfu_jax.ops.sizes import Size
from resfu_jax.upsamplers._inputs import (
    check_features,
    check_image,
    compute_dtype,
    reassembled,
    size_of_output,
)
from resfu_jax.upsamplers._registry import register
from resfu_jax.upsamplers._upsampler import Upsampler

NormKind = Literal["batch", "layer"]
Widths = Sequence[Sequence[int]]
Noise = Key[Array, ""] | Sequence[Float[Array, "b _h _w n"]]

# Which (row, column) around a cell are its taps.
_TAPS: dict[int, Callable[[int, int], bool]] = {
    5: lambda i, j: abs(i) + abs(j) <= 1,
    9: lambda i, j: max(abs(i), abs(j)) <= 1,
    13: lambda i, j: abs(i) + abs(j) <= 2,
    17: lambda i, j: max(abs(i), abs(j)) <= 1 or (i % 2 == 0 and j % 2 == 0),
    25: lambda i, j: True,
}


@register("uplift")
class UPLiFT(Upsampler):
    """Upsamples features by a power of two, guided by an image, and resizes them to any size.

    BatchNorm normalises by its running statistics, as in evaluation, unless
    `nnx.view(up, use_running_average=False)` is called.

    Args:
      features: channels C, kept.
      guide_features: ignored.
      scale: 2 to the number of passes.
      patch: of the backbone, in pixels. With 14, the encoder sees the image 16 / 14 times as large.
      encoder: widths of the blocks of each group of the encoder.
      encoder_convs: 3 x 3 convolutions of a block of the encoder, 1 or 2.
      decoder: likewise of the decoder's two groups.
      decoder_convs: likewise.
      norm: `"batch"` or `"layer"`, over channels.
      attender: taps, 5, 9, 13, 17 or 25.
      noise: random channels that are appended to what the decoder and the refiner join.
      refiner: widths of the blocks after the attender, of one 3 x 3 convolution each; without any,
        there is no refiner.
      implementation: as in `ops.local_attention`.
      dtype: of the computation; the inputs' promoted dtype if not given. Norms' statistics and the
        softmax are float32 or better.
      param_dtype: of the parameters.
      rngs: source of the initial weights, PyTorch's default.

    Raises:
      ValueError: an argument out of range, or a scale that is no power of two.
    """

    guide = "image"
    image = "imagenet"

    def __init__(
        self,
        features: int,
        guide_features: int | None = None,
        *,
        scale: int = 16,
        patch: int = 16,
        encoder: Widths = ((16,), (32,), (64,), (128,), (128,)),
        encoder_convs: int = 1,
        decoder: Widths = ((64,), (64,)),
        decoder_convs: int = 2,
        norm: NormKind = "batch",
        attender: int = 17,
        noise: int = 0,
        refiner: Sequence[int] = (),
        implementation: Implementation | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_floating(dtype=dtype, param_dtype=param_dtype)
        check_whole(features=features, scale=scale, patch=patch)
        need(
            scale > 1 and scale & (scale - 1) == 0,
            f"scale must be a power of two, as each pass doubles the size, got {scale}",
        )
        check_count(noise=noise)
        check_choice((1, 2), encoder_convs=encoder_convs)
        check_choice((1, 2), decoder_convs=decoder_convs)
        check_choice(get_args(NormKind), norm=norm)
        check_choice((*get_args(Implementation), None), implementation=implementation)
        check_sizes(refiner=refiner)
        for name, groups in (("encoder", encoder), ("decoder", decoder)):
            need(
                isinstance(groups, tuple | list) and len(groups) >= 2 and all(groups),
                f"{name} must be groups of widths, two or more, got {groups!r}",
            )
            for widths in groups:
                check_sizes(**{name: widths})
        need(len(decoder) == 2, f"decoder must be two groups of widths, got {decoder!r}")
        self.features, self.passes = features, scale.bit_length() - 1
        self.patch, self.noise, self.dtype = patch, noise, dtype
        self.mixes = bool(refiner)
        self.weights_are_convex = not refiner
        types: dict[str, Any] = dict(norm=norm, param_dtype=param_dtype, rngs=rngs)
        own = [group[-1] for group in encoder]
        self.encoder = nnx.List(
            [
                Group(n, widths, convs=encoder_convs, **types)
                for n, widths in zip([3, *own], encoder, strict=False)
            ]
        )
        joined = own[-1] + noise
        self.decoder = Decoder(
            (features + joined, own[-2] + noise), decoder, convs=decoder_convs, **types
        )
        self.attender = LocalAttender(
            decoder[1][-1],
            attender,
            implementation=implementation,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.refiner = Group(features + joined, refiner, convs=1, **types) if refiner else None
        self.refined = (
            _pointwise(refiner[-1], features, param_dtype=param_dtype, rngs=rngs)
            if refiner
            else None
        )

    def __call__(
        self,
        features: Float[Array, "b h w c"],
        image: Float[Array, "b Hi Wi 3"],
        output_size: tuple[Size, Size] | None = None,
        *,
        values: Float[Array, "b h w d"] | None = None,
        noise: Noise | None = None,
    ) -> Float[Array, "b H W d"]:
        """Features `(B, h, w, C)`, or `values`, at the size asked for or the image's.

        Args:
          features: of any size.
          image: `(B, Hi, Wi, 3)`, of any size.
          output_size: (H, W); the image's if not given.
          values: upsampled in the place of the features; without a refiner only.
          noise: of a module with noise, a key to draw it from; or the draws, normal, in the order
            in which they are joined (a pass joins at the size of its features, then twice at twice
            that size). Without, each call draws the same.

        Raises:
          ValueError: wrong shapes, or values that a refiner would change.
        """
        check_features(features, self.features)
        check_image(features, image)
        size = size_of_output(image, output_size)
        need(values is None or not self.mixes, "values must not be given: the refiner changes them")
        dtype = compute_dtype(self.dtype, features, image, values)
        x, image = features.astype(dtype), image.astype(dtype)
        maps = self.encode(image)
        append = self._noise(noise)
        v = None if values is None else reassembled(x, values)
        for _ in range(self.passes):
            scores = self.attender.scores(self.decoder(x, maps, append))
            x = self.attender.pool(scores, x)
            v = None if v is None else self.attender.pool(scores, v)
            if self.refiner is not None and self.refined is not None:
                x = self.refined(self.refiner(_join(x, maps[-1], append)))
        y = x if v is None else v
        return y if y.shape[1:3] == size else ops.resize(y, size, antialias=True)

    def encode(self, image: Float[Array, "b Hi Wi 3"]) -> list[Float[Array, "b _h _w _c"]]:
        """The encoder's maps, from the image on."""
        if self.patch == 14:
            height, width = (16 * n // 14 for n in image.shape[1:3])
            image = ops.resize(image, (height, width))
        maps = [image]
        for group in self.encoder:
            maps.append(group(maps[-1]))
        return maps[1:]

    def _noise(self, noise: Noise | None) -> "Append":
        """What appends the next random channels to a map."""
        if not self.noise:
            need(noise is None, "noise must not be given: the module has no random channels")
            return lambda x: x
        if isinstance(noise, Sequence):
            given = iter(noise)
            return lambda x: _append(x, next(given))
        key = jax.random.key(0) if noise is None else noise
        keys = (jax.random.fold_in(key, i) for i in itertools.count())

        def draw(x: Array) -> Array:
            return _append(x, jax.random.normal(next(keys), (*x.shape[:3], self.noise), x.dtype))

        return draw


Append = Callable[[Array], Array]


class LocalAttender(nnx.Module):
    """Attention to the pixels around a cell, whose scores are a linear map of a guide alone.

    Args:
      features: channels of the guide.
      taps: 5, 9, 13, 17 or 25.
      skip: add the guide's own first channels to the scores, as far as it has any.
      implementation: as in `ops.local_attention`.
      param_dtype: of the parameters.
      rngs: source of the initial weights, PyTorch's default.

    Raises:
      ValueError: another number of taps.
    """

    def __init__(
        self,
        features: int,
        taps: int = 17,
        *,
        skip: bool = True,
        implementation: Implementation | None = None,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        check_choice(tuple(_TAPS), attender=taps)
        check_flag(skip=skip)
        self.taps, self.skip, self.implementation = taps, skip, implementation
        draw = _uniform(features, param_dtype, rngs)
        self.kernel, self.bias = draw(features, taps), draw(taps)

    def __call__(
        self, guide: Float[Array, "b H W g"], v: Float[Array, "b h w c"]
    ) -> Float[Array, "b H W c"]:
        """The values v at the guide's size."""
        return self.pool(self.scores(guide), v)

    def scores(self, guide: Float[Array, "b H W g"]) -> Float[Array, "b H W window"]:
        """Of all pixels of the square around the taps; -inf of those that are none."""
        reach = 1 if self.taps <= 9 else 2
        side = range(-reach, reach + 1)
        window = [_TAPS[self.taps](i, j) for i in side for j in side]
        places = np.flatnonzero(window)
        kernel, bias = self.kernel[...], self.bias[...]
        if self.skip:
            kernel = kernel + jnp.eye(kernel.shape[0], self.taps, dtype=kernel.dtype)
        kernel = jnp.zeros((kernel.shape[0], len(window)), kernel.dtype).at[:, places].set(kernel)
        bias = jnp.full(len(window), -jnp.inf, bias.dtype).at[places].set(bias)
        dtype = guide.dtype
        return guide @ kernel.astype(dtype) + bias.astype(dtype)[None, None, None]

    def pool(
        self, scores: Float[Array, "b H W window"], v: Float[Array, "b h w c"]
    ) -> Float[Array, "b H W c"]:
        """The means of the values around every pixel's cell."""
        return ops.local_attention(scores, v, border="edge", implementation=self.implementation)


class Decoder(nnx.Module):
    """From features and the encoder's maps to the attender's guide, twice as large.

    Args:
      joined: channels of the features with the deepest map, and of the map before it, with noise.
      widths: of the blocks of both groups.
      convs, norm, param_dtype, rngs: as in `Group`.
    """

    def __init__(
        self,
        joined: tuple[int, int],
        widths: Widths,
        *,
        convs: int,
        norm: NormKind,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = dict(param_dtype=param_dtype, rngs=rngs)
        blocks: dict[str, Any] = dict(convs=convs, norm=norm, **types)
        inner = widths[0][-1]
        self.group_0 = Group(joined[0], widths[0], **blocks)
        self.double = Double(inner, **types)
        self.group_1 = Group(inner + joined[1], widths[1], **blocks)

    def __call__(
        self, x: Float[Array, "b h w c"], maps: Sequence[Array], append: Append = lambda x: x
    ) -> Float[Array, "b H W g"]:
        """The guide."""
        x = self.double(self.group_0(_join(x, maps[-1], append)))
        return self.group_1(_join(x, maps[-2], append))


class Double(nnx.Module):
    """A transposed convolution of kernel and stride 2 plus bilinear doubling, corners aligned.

    Args:
      features: channels, kept.
      param_dtype: of the parameters.
      rngs: source of the initial weights, PyTorch's default.
    """

    def __init__(self, features: int, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
        draw = _uniform(4 * features, param_dtype, rngs)
        self.kernel, self.bias = draw(2, 2, features, features), draw(features)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
        """The map, twice as large."""
        b, h, w, channels = x.shape
        y = jnp.einsum("bhwc,uvcd->bhuwvd", x, self.kernel[...].astype(x.dtype))
        y = y.reshape(b, 2 * h, 2 * w, channels) + self.bias[...].astype(x.dtype)[None, None, None]
        return y + ops.resize(x, (2 * h, 2 * w), align_corners=True)


class Group(nnx.Module):
    """Blocks.

    Args:
      in_features: channels of the map.
      widths: of the blocks.
      convs, norm, param_dtype, rngs: as in `Block`.
    """

    def __init__(self, in_features: int, widths: Sequence[int], **options: Any):
        check_sizes(widths=widths)
        both = zip([in_features, *widths], widths, strict=False)
        self.blocks = nnx.List([Block(n, m, **options) for n, m in both])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """The map of the last block's width."""
        for block in self.blocks:
            x = block(x)
        return x


class Block(nnx.Module):
    """3 x 3 convolution, norm and ReLU, once or twice, and a 1 x 1 convolution; plus the map.

    Args:
      in_features: channels of the map.
      features: channels of the result.
      convs: 1 or 2.
      norm: `"batch"` or `"layer"`.
      param_dtype: of the parameters.
      rngs: source of the initial weights, PyTorch's default.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        convs: int,
        norm: NormKind,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        check_choice((1, 2), convs=convs)
        types: dict[str, Any] = dict(param_dtype=param_dtype, rngs=rngs)
        layer: dict[str, Any] = dict(use_bias=False, kernel_init=PYTORCH_UNIFORM, **types)
        widths = [in_features, *[features] * (convs - 1)]
        self.convs = nnx.List([Conv(n, features, 3, **layer) for n in widths])
        self.norms = nnx.List([_norm(norm, features, **types) for _ in widths])
        self.last = _pointwise(features, features, **types)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """The map, of as many channels as the block has."""
        y = x
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = jax.nn.relu(norm(conv(y)))
        y = self.last(y)
        given, width = x.shape[3], y.shape[3]
        if given > width:
            return y + x[..., :width]
        return y + jnp.pad(x, ((0, 0),) * 3 + ((0, width - given),))


def _norm(kind: NormKind, features: int, *, param_dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
    if kind == "layer":
        return LayerNorm(features, epsilon=1e-6, param_dtype=param_dtype)
    norm = BatchNorm(features, param_dtype=param_dtype, rngs=rngs)
    norm.use_running_average = True
    return norm


def _uniform(fan: int, dtype: DTypeLike, rngs: nnx.Rngs) -> Callable[..., nnx.Param]:
    """Draws parameters of a given shape, within 1 / sqrt(fan)."""

    def draw(*shape: int) -> nnx.Param:
        return nnx.Param(jax.random.uniform(rngs.params(), shape, dtype, -(fan**-0.5), fan**-0.5))

    return draw


def _pointwise(n: int, m: int, *, param_dtype: DTypeLike, rngs: nnx.Rngs) -> Linear:
    return Linear(n, m, kernel_init=PYTORCH_UNIFORM, param_dtype=param_dtype, rngs=rngs)


def _join(
    x: Float[Array, "b h w c"], encoded: Float[Array, "b _h _w _c"], append: Append
) -> Float[Array, "b h w d"]:
    """A map, one of the encoder's at its size, and noise."""
    encoded = ops.resize(encoded, (x.shape[1], x.shape[2]), method="nearest")
    return append(_append(x, encoded))


def _append(x: Float[Array, "b h w c"], y: Float[Array, "b h w d"]) -> Array:
    return jnp.concatenate([x, y.astype(x.dtype)], axis=-1)
