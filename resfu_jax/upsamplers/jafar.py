"""JAFAR: features of any resolution by attention from the image to the features.

With I the image, x the features, N a GroupNorm without scale and bias, and pooling to the sizes of
the output (Q) and of the features (K'):

    E = RoPE(encode(I))                               positions with learned frequencies
    Q = N(pool(encode_q(E)))
    f = encode_f(x / |x|)
    K = gamma(f) N(K') + beta(f),  K' = pool(encode_k(E))      keys modulated by the features
    q = Linear(RMS(Conv(Q))),  k = Linear(RMS(K))
    out[p] = sum_j mean over heads (softmax_j(<q[p], k_j> / sqrt(d))) x_j

j runs over all low-resolution pixels. The weights are averaged over the heads before they are
applied to the features as they are: an output pixel is a convex sum of features.

Source: Couairon, Chambon et al., "JAFAR: Jack up Any Feature at Any Resolution", NeurIPS 2025,
section 3; the semantics are those of the official module. In the two members of a channel pair,
its RoPE has different angles, so that it is no rotation.
"""

from typing import Any, get_args

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resfu_jax import ops
from resfu_jax._checks import check_choice, check_odd, check_whole
from resfu_jax._layers import PYTORCH_UNIFORM, XAVIER_UNIFORM, Linear
from resfu_jax.ops import Implementation
from resfu_jax.ops.checks import check_floating
from resfu_jax.ops.sizes import Size
from resfu_jax.upsamplers._cross_attention import (
    FUSED_XAVIER_UNIFORM,
    CrossAttention,
    ImageEncoder,
    check_heads,
    unit,
)
from resfu_jax.upsamplers._encoder import Encoder
from resfu_jax.upsamplers._inputs import (
    check_features,
    check_image,
    compute_dtype,
    reassembled,
    size_of_output,
)
from resfu_jax.upsamplers._registry import register
from resfu_jax.upsamplers._upsampler import Upsampler

_GROUPS = 8


@register("jafar")
class JAFAR(Upsampler):
    """Upsamples features to any size by attention of an image's pixels to all of theirs.

    Args:
      features: channels C of the features, the official `v_dim`.
      guide_features: ignored.
      scale: nominal ratio; image or `output_size` decide the size.
      input_dim: channels of the image.
      qk_dim: channels of queries and keys, a multiple of 8 and of `num_heads`.
      kernel_size: side of the image encoder's first convolution, odd.
      num_heads: heads of the attention.
      implementation: as in `ops.cross_attention`.
      dtype: of the computation; the inputs' promoted dtype if not given. Statistics, angles and the
        softmax are float32 or better.
      param_dtype: of the parameters.
      rngs: source of the initial weights: PyTorch's defaults, and Xavier uniform for the attention.

    Raises:
      ValueError: an argument out of range.
    """

    guide = "image"
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
        num_heads: int = 4,
        implementation: Implementation | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_floating(dtype=dtype, param_dtype=param_dtype)
        check_whole(
            features=features, scale=scale, input_dim=input_dim, qk_dim=qk_dim, num_heads=num_heads
        )
        check_odd(kernel_size=kernel_size)
        check_choice((*get_args(Implementation), None), implementation=implementation)
        check_heads(qk_dim, num_heads)
        self.features, self.input_dim = features, input_dim
        self.implementation, self.dtype = implementation, dtype
        types: dict[str, Any] = dict(param_dtype=param_dtype, rngs=rngs)
        self.encode = ImageEncoder(input_dim, qk_dim, kernel_size, **types)
        self.encode_features = Encoder(features, qk_dim, **types)
        plain: dict[str, Any] = dict(use_bias=False, kernel_init=PYTORCH_UNIFORM, **types)
        self.gamma = Linear(qk_dim, qk_dim, **plain)
        self.beta = Linear(qk_dim, qk_dim, **plain)
        # With as many channels of values, PyTorch's attention keeps one matrix for all.
        fused = features == qk_dim
        self.attention = CrossAttention(
            qk_dim,
            num_heads,
            kernel_init=FUSED_XAVIER_UNIFORM if fused else XAVIER_UNIFORM,
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
        check_features(features, self.features)
        check_image(features, image, self.input_dim)
        size = size_of_output(image, output_size)
        dtype = compute_dtype(self.dtype, features, image, values)
        x, image = features.astype(dtype), image.astype(dtype)
        queries, keys = self.encode(image, size, x.shape[1:3])
        f = self.encode_features(unit(x))
        keys = self.gamma(f) * _norm(keys) + self.beta(f)
        v = reassembled(x, values)
        return self.attention(_norm(queries), keys, v, implementation=self.implementation)


def _norm(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    one = jnp.ones(x.shape[3:], x.dtype)
    return ops.group_norm(x, one, jnp.zeros_like(one), groups=_GROUPS)
