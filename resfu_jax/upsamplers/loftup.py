"""LoftUp: every pixel of the image asks the features what they say about it.

With x the features and I the image, whose channels are scaled to -1/2 .. 1/2 (I'):

    c = [row, column, I'],  rows and columns from -1 to 1           coordinates of every pixel
    F = [sin(f_1 c + a_1), ..., cos(f_1 c + b_1), ..., I'],  f from e^-2 to e^10
    q = ReLU(BN(Conv(ReLU(BN(Conv(LN(F)))))))                        3x3, zeros around
    t = [x, sin(f c + a), cos(f c + b)] or x + table                 tokens: all of x, with places
    q <- q + Attention(LN(q), LN'(t), LN'(t)),  q <- q + MLP(LN(q))  `num_layers` times
    out = LN(Linear(LN(q)))

a and b are learned. The output is made anew and is no sum of features: a classifier of the features
cannot read it.

The highest frequency turns a rounding error of float32 in I' into a phase of 10^-3: results of
float32 are reproducible to about that.

Source: Huang et al., "LoftUp: Learning a Coordinate-Based Feature Upsampler for Vision Foundation
Models", ICCV 2025, section 3.1; the semantics are those of the authors' repository.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resfu_jax import ops
from resfu_jax._checks import check_choice, check_flag, check_whole, need
from resfu_jax._layers import PYTORCH_UNIFORM, BatchNorm, Conv, LayerNorm, Linear
from resfu_jax.ops.checks import check_floating
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.sizes import Size, to_int32
from resfu_jax.upsamplers._inputs import (
    check_features,
    check_image,
    compute_dtype,
    size_of_output,
)
from resfu_jax.upsamplers._registry import register
from resfu_jax.upsamplers._upsampler import Upsampler

Position = Literal["sine", "learnable"]

_POSITION_FREQUENCIES = 5  # of the tokens' places
# PyTorch's for the joint matrix of queries, keys and values: Xavier uniform, fans E and 3 E.
_ATTENTION_INIT = nnx.initializers.variance_scaling(0.5, "fan_in", "uniform")
_OUT_INIT = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # with a bias of zero


@register("loftup")
class LoftUp(Upsampler):
    """Makes features for every pixel of an image by cross-attention to low-resolution ones.

    Built for evaluation: BatchNorm normalises by its running statistics. `up.train()`, or
    `nnx.view(up, use_running_average=False)`, makes that the batch's, as in training.

    Args:
      features: channels C, kept.
      guide_features: ignored.
      scale: ignored: the image, or `output_size`, decides the size.
      color_feats: whether the queries see the image's colours, or its size alone.
      n_freqs: frequencies f.
      num_heads: of the attention; they divide its width, C + 20 for `"sine"`, else C.
      num_layers: of the transformer.
      lr_size: side of the table of places, for `"learnable"`.
      lr_pe_type: places of the tokens: `"sine"`, features of their coordinates, or `"learnable"`, a
        table, which is resized (bicubic) to another number of tokens.
      norm: layer normalisation of the features first, as in all released models.
      scale_per_image: scale the colours of each image by itself. Officially (False), it is all
        images of a batch together, and a result depends on its neighbours; for one image, that is
        the same.
      dtype: of the computation; that of the features if not given. Coordinates, statistics and the
        softmax are float32 or better.
      param_dtype: of the parameters.
      rngs: source of the initial weights: PyTorch's defaults; phases and table standard normal.

    Raises:
      ValueError: an argument out of range, or heads that do not divide the width.
    """

    guide = "image"
    mixes = True

    def __init__(
        self,
        features: int,
        guide_features: int | None = None,
        *,
        scale: int = 16,
        color_feats: bool = True,
        n_freqs: int = 20,
        num_heads: int = 4,
        num_layers: int = 2,
        lr_size: int = 16,
        lr_pe_type: Position = "sine",
        norm: bool = False,
        scale_per_image: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_floating(dtype=dtype, param_dtype=param_dtype)
        check_whole(
            features=features,
            scale=scale,
            n_freqs=n_freqs,
            num_heads=num_heads,
            num_layers=num_layers,
            lr_size=lr_size,
        )
        check_choice(get_args(Position), lr_pe_type=lr_pe_type)
        check_flag(color_feats=color_feats, norm=norm, scale_per_image=scale_per_image)
        sine = lr_pe_type == "sine"
        width = features + (4 * _POSITION_FREQUENCIES if sine else 0)
        need(
            width % num_heads == 0,
            f"num_heads must divide the attention's width {width}, got {num_heads}",
        )
        self.features, self.width, self.num_heads = features, width, num_heads
        self.scale_per_image, self.dtype = scale_per_image, dtype

        types: dict[str, Any] = dict(param_dtype=param_dtype)
        drawn: dict[str, Any] = dict(kernel_init=PYTORCH_UNIFORM, rngs=rngs, **types)
        self.norm_features = LayerNorm(features, **types) if norm else None
        self.queries = Queries(width, color_feats, n_freqs, rngs=rngs, **types)
        self.places = (
            FourierFeatures(2, _POSITION_FREQUENCIES, rngs=rngs, **types) if sine else None
        )
        self.table = (
            None
            if sine
            else nnx.Param(
                jax.random.normal(rngs.params(), (lr_size, lr_size, features), param_dtype)
            )
        )
        self.layers = nnx.List(
            [Layer(width, features, num_heads, rngs=rngs, **types) for _ in range(num_layers)]
        )
        self.norm_queries = LayerNorm(width, **types)
        self.project = Linear(width, features, **drawn) if sine else None
        self.norm_out = LayerNorm(features, epsilon=1e-6, **types)

    def __call__(
        self,
        features: Float[Array, "b h w {self.features}"],
        image: Float[Array, "b hi wi 3"],
        output_size: tuple[Size, Size] | None = None,
    ) -> Float[Array, "b H W {self.features}"]:
        """Features `(B, h, w, C)` at the size of the image `(B, Hi, Wi, 3)`.

        For another `output_size`, the image is resized first (bilinear, without antialiasing), as
        the authors do.
        """
        check_features(features, self.features)
        check_image(features, image)
        size = size_of_output(image, output_size)
        x = features.astype(compute_dtype(self.dtype, features))
        image = image.astype(at_least_float32(image.dtype))
        if size != image.shape[1:3]:
            image = ops.resize(image, size)

        t = self.tokens(x)
        kv = tuple(layer.keys_and_values(t) for layer in self.layers)
        q = self.queries(scaled(image, per_image=self.scale_per_image), x.dtype)
        q = jnp.broadcast_to(q, (x.shape[0], *q.shape[1:]))
        graphdef, state = nnx.split((self.layers, self.norm_queries, self.project, self.norm_out))

        def answer(q: Array, shared: Any) -> Array:
            state, kv = shared
            layers, norm, project, norm_out = nnx.merge(graphdef, state)
            for layer, (k, v) in zip(layers, kv, strict=True):
                q = layer(q, k, v)
            q = norm(q)
            return norm_out(q if project is None else project(q))

        tokens = x.shape[1] * x.shape[2]
        return ops.map_rows(answer, q, shared=(state, kv), values=self.num_heads * tokens)

    def tokens(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w e"]:
        """The features, and where they are."""
        b, h, w, _ = x.shape
        x = x if self.norm_features is None else self.norm_features(x)
        if self.places is not None:
            grid = jnp.broadcast_arrays(*coordinates((h, w), at_least_float32(x.dtype)))
            places = self.places(jnp.concatenate(grid, axis=-1)).astype(x.dtype)
            return jnp.concatenate([x, jnp.broadcast_to(places, (b, *places.shape[1:]))], axis=-1)
        assert self.table is not None
        table = self.table[...].astype(at_least_float32(x.dtype))
        side = table.shape[0]
        if h * w == side**2:  # of the same number of tokens as they are, whatever their shape
            table = table.reshape(1, h, w, -1)
        else:
            table = ops.resize(table[None], (h, w), method="bicubic")
        return x + table.astype(x.dtype)


class Queries(nnx.Module):
    """What every pixel of an image asks.

    Args:
      features: channels of the queries.
      color_feats: whether they see the colours.
      n_freqs: frequencies.
      param_dtype: of the parameters.
      rngs: source of the initial weights.
    """

    def __init__(
        self,
        features: int,
        color_feats: bool,
        n_freqs: int,
        *,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = dict(param_dtype=param_dtype)
        drawn: dict[str, Any] = dict(kernel_init=PYTORCH_UNIFORM, rngs=rngs, **types)
        self.color_feats = color_feats
        self.fourier = FourierFeatures(5 if color_feats else 2, n_freqs, rngs=rngs, **types)
        channels = self.fourier.features + (3 if color_feats else 0)
        self.norm = LayerNorm(channels, **types)
        self.conv1 = Conv(channels, features, 3, **drawn)
        self.bn1 = _batch_norm(features, rngs=rngs, **types)
        self.conv2 = Conv(features, features, 3, **drawn)
        self.bn2 = _batch_norm(features, rngs=rngs, **types)

    def __call__(
        self, image: Float[Array, "b H W 3"], dtype: DTypeLike
    ) -> Float[Array, "_b H W e"]:
        """Those of the scaled image; one map for all images where they do not see colours."""
        rows, columns = coordinates((image.shape[1], image.shape[2]), image.dtype)
        maps = (rows, image) if self.color_feats else (rows,)
        if not self.bn1.use_running_average:
            return self.of_rows(*maps, columns=columns, dtype=dtype)  # statistics of whole maps
        graphdef, state = nnx.split(self)

        def block(inside: Array, *maps_and_shared: Any) -> Array:
            *maps, (state, columns) = maps_and_shared
            queries = nnx.merge(graphdef, state)
            return queries.of_rows(*maps, columns=columns, dtype=dtype, inside=inside)

        inside, width = jnp.ones_like(rows), self.conv2.out_features
        shared = state, columns
        return ops.map_rows(block, inside, *maps, shared=shared, values=width, halo=2)

    def of_rows(
        self,
        rows: Float[Array, "1 H 1 1"],
        image: Float[Array, "b H W 3"] | None = None,
        *,
        columns: Float[Array, "1 1 W 1"],
        dtype: DTypeLike,
        inside: Float[Array, "1 H 1 1"] | None = None,
    ) -> Float[Array, "_b H2 W e"]:
        """Of some rows of the image.

        With `inside`, which is 0 beyond the image, of all but the two at both ends.
        """
        grid = [rows, columns] if image is None else [rows, columns, image]
        size = (1 if image is None else image.shape[0], rows.shape[1], columns.shape[2])
        c = jnp.concatenate([jnp.broadcast_to(a, (*size, a.shape[3])) for a in grid], axis=-1)
        x = self.fourier(c)
        x = x if image is None else jnp.concatenate([x, image], axis=-1)
        x = self.norm(x).astype(dtype)
        for conv, norm, border in ((self.conv1, self.bn1, 0), (self.conv2, self.bn2, 1)):
            if inside is not None:
                x *= inside[:, border : inside.shape[1] - border].astype(dtype)
            padding = ((0, 0) if inside is not None else (1, 1)), (1, 1)
            x = ops.conv(x, conv.kernel[...].astype(dtype), padding=padding)
            assert conv.bias is not None
            x = jax.nn.relu(norm(x + jnp.expand_dims(conv.bias[...].astype(dtype), (0, 1, 2))))
        return x


class FourierFeatures(nnx.Module):
    """Sines and cosines of coordinates times frequencies, in phases that are learned.

    Args:
      coordinates: how many.
      n_freqs: frequencies, from e^-2 to e^10.
      param_dtype: of the phases.
      rngs: source of the phases, standard normal.
    """

    def __init__(self, coordinates: int, n_freqs: int, *, param_dtype: Dtype, rngs: nnx.Rngs):
        self.n_freqs, self.features = n_freqs, 2 * coordinates * n_freqs
        shape = (2, n_freqs * coordinates)  # of sines, of cosines; the coordinate counts faster
        self.phases = nnx.Param(jax.random.normal(rngs.params(), shape, param_dtype))

    def __call__(self, c: Float[Array, "b h w d"]) -> Float[Array, "b h w features"]:
        """All sines, then all cosines."""
        frequencies = np.exp(np.linspace(-2, 10, self.n_freqs)).repeat(c.shape[3])
        turns = jnp.concatenate([c] * self.n_freqs, axis=-1)
        turns *= jnp.expand_dims(jnp.asarray(frequencies, c.dtype), (0, 1, 2))
        # sin(t + a) by the sum of angles: t + a, rounded once or twice, would depend on whether
        # the compiler contracts product and sum, and both are large.
        sin, cos = jnp.sin(turns), jnp.cos(turns)
        a, b = (jnp.expand_dims(p, (0, 1, 2)) for p in self.phases[...].astype(c.dtype))
        return jnp.concatenate(
            [sin * jnp.cos(a) + cos * jnp.sin(a), cos * jnp.cos(b) - sin * jnp.sin(b)], axis=-1
        )


class Layer(nnx.Module):
    """Attention of the queries to the tokens, and an MLP.

    Args:
      width: channels of both.
      hidden: of the MLP inside.
      num_heads: of the attention.
      param_dtype: of the parameters.
      rngs: source of the initial weights.
    """

    def __init__(
        self, width: int, hidden: int, num_heads: int, *, param_dtype: Dtype, rngs: nnx.Rngs
    ):
        types: dict[str, Any] = dict(param_dtype=param_dtype)
        own: dict[str, Any] = dict(rngs=rngs, **types)
        self.num_heads = num_heads
        self.norm_q = LayerNorm(width, **types)
        self.norm_kv = LayerNorm(width, **types)
        own_qkv: dict[str, Any] = dict(kernel_init=_ATTENTION_INIT, **own)
        self.q, self.v = (Linear(width, width, **own_qkv) for _ in range(2))
        self.k = Linear(width, width, use_bias=False, **own_qkv)  # the softmax would not see it
        self.out = Linear(width, width, kernel_init=_OUT_INIT, **own)
        self.norm = LayerNorm(width, **types)
        self.up = Linear(width, hidden, kernel_init=PYTORCH_UNIFORM, **own)
        self.down = Linear(hidden, width, kernel_init=PYTORCH_UNIFORM, **own)

    def keys_and_values(
        self, t: Float[Array, "b h w e"]
    ) -> tuple[Float[Array, "b t heads d"], Float[Array, "b t heads d"]]:
        """Of the tokens."""
        t = self.norm_kv(t)
        return self._heads(self.k(t)), self._heads(self.v(t))

    def __call__(
        self,
        x: Float[Array, "b r w e"],
        k: Float[Array, "b t heads d"],
        v: Float[Array, "b t heads d"],
    ) -> Float[Array, "b r w e"]:
        """The queries, answered."""
        q = self._heads(self.q(self.norm_q(x)) * k.shape[3] ** -0.5)
        wide = at_least_float32(x.dtype)
        scores = jnp.einsum("bqnd,btnd->bnqt", q, k, preferred_element_type=wide)
        # A softmax whose sum is divided by where there is less to divide.
        p = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        y = jnp.einsum("bnqt,btnd->bqnd", p.astype(v.dtype), v, preferred_element_type=wide)
        y /= jnp.moveaxis(p.sum(axis=-1), 1, 2)[..., None]
        x += self.out(y.reshape(x.shape).astype(x.dtype))
        return x + self.down(jax.nn.gelu(self.up(self.norm(x)), approximate=False))

    def _heads(self, x: Float[Array, "b h w e"]) -> Float[Array, "b t heads d"]:
        b, h, w, e = x.shape
        return x.reshape(b, h * w, self.num_heads, e // self.num_heads)


def scaled(image: Float[Array, "b h w 3"], *, per_image: bool) -> Float[Array, "b h w 3"]:
    """Every channel from -1/2 to 1/2, unless its range is below 10^-4."""
    axes = (1, 2) if per_image else (0, 1, 2)
    low, high = image.min(axis=axes, keepdims=True), image.max(axis=axes, keepdims=True)
    return (image - low) / jnp.maximum(high - low, 1e-4) - 0.5


def coordinates(
    size: tuple[Size, Size], dtype: DTypeLike
) -> tuple[Float[Array, "1 h 1 1"], Float[Array, "1 1 w 1"]]:
    """Rows and columns of a map, from -1 to 1; a single one is at -1."""

    def axis(n: Size) -> Array:
        last = jnp.maximum(to_int32(n) - 1, 1)
        return (2 * jnp.arange(n, dtype=jnp.int32) - last).astype(dtype) / last.astype(dtype)

    rows, columns = (axis(n) for n in size)
    return rows[None, :, None, None], columns[None, None, :, None]


def _batch_norm(features: int, *, param_dtype: Dtype, rngs: nnx.Rngs) -> BatchNorm:
    norm = BatchNorm(features, param_dtype=param_dtype, rngs=rngs)
    norm.use_running_average = True
    return norm
