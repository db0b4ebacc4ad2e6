"""AnyUp: features of any encoder, of any number of channels, by attention from the image to them.

With I the image, x the features, psi_1 .. psi_M learned filters, and pooling to the sizes of the
output (Q) and of the features (K'):

    E = RoPE(encode(I)),  Q = pool(encode_q(E)),  K' = pool(encode_k(E))
    f = blocks(mean_c softmax_m (psi_m * x_c / |x|))         of one width for any number of channels
    K = encode([K', f])
    q = Linear(RMS(Conv(Q))),  k = Linear(RMS(K))
    out[p] = sum_{j in window(p)} mean over heads (softmax_j(<q[p], k_j> / sqrt(d))) x_j

The window has the low-resolution pixels that are, along each axis, within `window_ratio` of the map
around p. The weights are averaged over the heads before they are applied to the features as they
are: an output pixel is a convex sum of features.

**The channels' order.** The official module filters every channel with every psi, to channels
c M + m, and then reads these as (position, group) with c M + m = position C + group. So the softmax
is not over the filters of a channel, but over what lies C apart, a fixed mixture of both, and the
result depends on the order of the channels of x. The released weights were trained with it, and it
is kept here.

Source: Wimmer et al., "AnyUp: Universal Feature Upsampling", 2025 (arXiv 2510.12764), section 3;
the semantics are those of the official module.
"""

import itertools
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resfu_jax import ops
from resfu_jax._checks import (
    check_choice,
    check_flag,
    check_not_negative,
    check_odd,
    check_whole,
    need,
)
from resfu_jax._layers import PYTORCH_UNIFORM
from resfu_jax.ops import Implementation
from resfu_jax.ops.checks import check_floating
from resfu_jax.ops.cross_attention import repeated_windows
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.sizes import Size
from resfu_jax.upsamplers._cross_attention import (
    FUSED_XAVIER_UNIFORM,
    CrossAttention,
    ImageEncoder,
    Windows,
    check_heads,
    unit,
)
from resfu_jax.upsamplers._encoder import Block, Encoder
from resfu_jax.upsamplers._inputs import (
    check_image,
    compute_dtype,
    reassembled,
    size_of_output,
)
from resfu_jax.upsamplers._registry import register
from resfu_jax.upsamplers._upsampler import Upsampler

Window = Literal["mask", "natten"]


@register("anyup")
class AnyUp(Upsampler):
    """Upsamples features of any width to any size by attention of an image's pixels to theirs.

    Args:
      features: channels of the features; ignored, each call may have its own.
      guide_features: ignored.
      scale: nominal ratio; image or `output_size` decide the size.
      input_dim: channels of the image.
      qk_dim: channels of queries and keys, a multiple of 8 and of `num_heads`.
      kernel_size: side of the image encoder's first convolution, odd.
      kernel_size_lfu: side of the filters of the features, odd.
      window_ratio: how far a pixel sees, as a part of the map's sides; 0 is everywhere.
      num_heads: heads of the attention.
      init_gaussian_derivatives: the filters are derivatives of a Gaussian at first, not random.
      window: `"mask"`, the paper's windows; `"natten"`, those of the official `use_natten=True`,
        which approximate them by NATTEN's (see `natten_windows`) and need sizes that are known.
      lfu_dim: M, how many filters, a multiple of 8; `qk_dim` if not given.
      implementation: as in `ops.cross_attention`.
      dtype: of the computation; the inputs' promoted dtype if not given. Statistics, angles and
        softmax are float32 or better.
      param_dtype: of the parameters.
      rngs: source of the initial weights: PyTorch's defaults, normal filters, and Xavier uniform
        for the attention.

    Raises:
      ValueError: an argument out of range.
    """

    guide = "image"
    any_width = True
    image = "imagenet"
    weights_are_convex = True

    def __init__(
        self,
        features: int,
        guide_features: int | None = None,
        *,
        scale: int = 16,
        input_dim: int = 3,
        qk_dim: int = 128,
        kernel_size: int = 1,
        kernel_size_lfu: int = 5,
        window_ratio: float = 0.1,
        num_heads: int = 4,
        init_gaussian_derivatives: bool = False,
        window: Window = "mask",
        lfu_dim: int | None = None,
        implementation: Implementation | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_floating(dtype=dtype, param_dtype=param_dtype)
        lfu_dim = qk_dim if lfu_dim is None else lfu_dim
        check_whole(
            features=features,
            scale=scale,
            input_dim=input_dim,
            qk_dim=qk_dim,
            lfu_dim=lfu_dim,
            num_heads=num_heads,
        )
        check_odd(kernel_size=kernel_size, kernel_size_lfu=kernel_size_lfu)
        check_not_negative(window_ratio=window_ratio)
        check_flag(init_gaussian_derivatives=init_gaussian_derivatives)
        check_choice(get_args(Window), window=window)
        check_choice((*get_args(Implementation), None), implementation=implementation)
        check_heads(qk_dim, num_heads)
        self.input_dim = input_dim
        self.implementation, self.dtype = implementation, dtype
        types: dict[str, Any] = dict(param_dtype=param_dtype, rngs=rngs)
        self.encode = ImageEncoder(input_dim, qk_dim, kernel_size, **types)
        self.encode_features = FeatureEncoder(
            lfu_dim, qk_dim, kernel_size_lfu, gaussian=init_gaussian_derivatives, **types
        )
        self.aggregate = Encoder(2 * qk_dim, qk_dim, 3, **types)
        self.attention = WindowAttention(
            qk_dim,
            num_heads,
            window=window,
            window_ratio=window_ratio,
            **types,
        )

    def __call__(
        self,
        features: Float[Array, "b h w c"],
        image: Float[Array, "b hi wi n"],
        output_size: tuple[Size, Size] | None = None,
        *,
        values: Float[Array, "b h w d"] | None = None,
    ) -> Float[Array, "b H W d"]:
        """Features `(B, h, w, C)`, or `values`, at `output_size`, that of the image by default.

        Raises:
          ValueError: a wrong number of channels or images.
        """
        need(
            features.ndim == 4,
            f"features must be (batch, height, width, channels), got shape {features.shape}",
        )
        check_image(features, image, self.input_dim)
        output_size = size_of_output(image, output_size)
        dtype = compute_dtype(self.dtype, features, image, values)
        x, image = features.astype(dtype), image.astype(dtype)
        queries, keys = self.encode(image, output_size, x.shape[1:3])
        keys = jnp.concatenate([keys, self.encode_features(unit(x))], axis=-1)
        keys = _as_if_larger(self.aggregate, keys)
        v = reassembled(x, values)
        return self.attention(queries, keys, v, implementation=self.implementation)


class FeatureEncoder(nnx.Module):
    """Features of any width to `features` channels, by `basis` filters of each channel."""

    def __init__(
        self,
        basis: int,
        features: int,
        kernel_size: int,
        *,
        gaussian: bool,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        shape = (kernel_size**2, basis)
        self.basis = nnx.Param(
            jnp.asarray(gaussian_derivatives(basis, kernel_size), param_dtype)
            if gaussian
            else jax.random.normal(rngs.params(), shape, param_dtype)
        )
        types: dict[str, Any] = dict(param_dtype=param_dtype, rngs=rngs)
        self.blocks = nnx.List([Block(n, features, **types) for n in (basis, features)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """The encoded features."""
        x = unify(x, self.basis[...].astype(x.dtype))
        for block in self.blocks:
            x = block(x)
        return x


def unify(x: Float[Array, "b h w c"], basis: Float[Array, "k m"]) -> Float[Array, "b h w m"]:
    """Mean over groups of the softmax of psi_m * x_c, in the official order of channels.

    Filters see zeros beyond the map, and are divided by the number of pixels that they see in it.
    """
    kernel, channels = math.isqrt(basis.shape[0]), x.shape[3]

    def windows(x):
        return ops.unfold(x, kernel, padding=kernel // 2)

    def mean_of_softmax(patches, basis):
        size = patches.shape[:3]
        y = jnp.einsum(
            "bhwkc,km->bhwcm",
            patches.reshape(*size, -1, channels),
            basis,
            preferred_element_type=at_least_float32(patches.dtype),
        )
        y = jax.nn.softmax(y.reshape(*size, -1, channels), axis=3)
        return y.mean(axis=4).astype(patches.dtype)

    seen = windows(jnp.ones_like(x[:1, ..., :1])).sum(axis=3, keepdims=True)
    patches = (windows(x) / seen).reshape(*x.shape[:3], -1)
    values = channels * basis.shape[1]
    return ops.map_rows(mean_of_softmax, patches, shared=basis, values=values)


def gaussian_derivatives(basis: int, kernel_size: int) -> Float[np.ndarray, "k m"]:
    """The first derivatives of a Gaussian, by order and then along the columns, not scaled.

    Of order n along an axis, (-1)^n He_n(z) g(z) with the Hermite polynomials He and z in standard
    deviations, of which kernel_size // 2 pixels are 1.645.
    """
    need(
        kernel_size > 1,
        f"init_gaussian_derivatives needs kernel_size_lfu of at least 3, got {kernel_size}",
    )
    sigma = (kernel_size // 2) / 1.645
    z = (np.arange(kernel_size) - kernel_size // 2) / sigma
    order = next(n for n in itertools.count() if (n + 1) * (n + 2) // 2 >= basis)
    hermite = [np.ones_like(z), z]
    for n in range(1, order):
        hermite.append(z * hermite[-1] - n * hermite[-2])
    gauss = np.exp(-(z**2) / 2) / (sigma * math.sqrt(2 * math.pi))
    axis = [(-1) ** n * polynomial * gauss for n, polynomial in enumerate(hermite)]
    orders = [(n - i, i) for n in range(order + 1) for i in range(n + 1)]
    return np.stack([np.outer(axis[i], axis[j]).ravel() for i, j in orders[:basis]], axis=1)


class WindowAttention(CrossAttention):
    """Attention to what lies around each pixel; the arguments are those of `AnyUp`."""

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        window: Window,
        window_ratio: float,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            features,
            heads,
            kernel_init=FUSED_XAVIER_UNIFORM if window == "mask" else PYTORCH_UNIFORM,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.window, self.window_ratio = window, float(window_ratio)

    def windows(self, size: tuple[Size, ...], output_size: tuple[Size, ...]) -> Windows:
        """What each pixel of the output sees."""
        make = mask_windows if self.window == "mask" else natten_windows
        return make(size, output_size, self.window_ratio)


def mask_windows(size: tuple[Size, ...], output_size: tuple[Size, ...], ratio: float) -> Windows:
    """The paper's: pixel i of m sees floor(low n) .. ceil(high n) - 1 of n, in float32, with

        low, high = (i + 1/2) / m -+ ratio, within 0 .. 1.

    In this order, as the official module computes it on a CPU: where an edge falls on the border of
    a pixel, rounding decides. Of symbolic sizes the device computes them: on a CPU the same, where
    division is not correctly rounded perhaps not on such borders.
    """

    def seen(n, m):
        known = isinstance(n, int) and isinstance(m, int)
        np_ = np if known else jnp
        i = np_.arange(m, dtype=np.float32)
        pixels, size = (np.float32(n) if known else jnp.asarray(n, jnp.float32) for n in (n, m))
        # The product is 0: XLA would multiply by the reciprocal of a divisor that is one number.
        centre = (i + np.float32(0.5)) / (size + 0 * i)
        low = np_.clip(centre - np.float32(ratio), 0, 1) * pixels
        high = np_.clip(centre + np.float32(ratio), 0, 1) * pixels
        pixel = np_.arange(n, dtype=np.float32)[None]
        return (np_.floor(low)[:, None] <= pixel) & (pixel < np_.ceil(high)[:, None])

    return Windows(*map(seen, size, output_size)) if ratio else Windows()


def natten_windows(size: tuple[Size, ...], output_size: tuple[Size, ...], ratio: float) -> Windows:
    """Those of `ops.cross_scale_attention`: about 2 ratio n pixels, an odd number, at least 3.

    They are shifted inwards at the borders. A ratio of 0, or 1/2 and more, is the whole map, as is
    a window that would be larger. (The official module has the heads' outputs averaged, and not
    their weights, which is the same.)
    """

    def shown(n, m):
        need(
            isinstance(n, int) and isinstance(m, int),
            "window='natten' needs sizes that are known, for they decide its windows' sizes; got "
            f"{size} and {output_size}; export with fixed sizes, or take window='mask'",
        )
        kernel = max(3, round(2 * ratio * n)) | 1 if 0 < ratio < 0.5 else n
        return repeated_windows(n, m, min(kernel, m // max(1, m // n)))

    return Windows(*map(shown, size, output_size))


def _as_if_larger(encode: Encoder, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    """`encode(x)`; a single row or column, which cannot be reflected, counts as two equal ones."""
    single = [i for i in (1, 2) if isinstance(x.shape[i], int) and x.shape[i] == 1]
    for axis in single:
        x = jnp.repeat(x, 2, axis)
    x = encode(x)
    for axis in single:
        x = jax.lax.slice_in_dim(x, 0, 1, axis=axis)
    return x
