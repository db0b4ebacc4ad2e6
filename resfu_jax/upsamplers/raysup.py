"""RaysUp: attention to the features around, of image encodings turned by the rays of the pixels.

With I the image, x the features and K = `kernel_size`:

    e = [enc_11(I), enc_13(I), enc_31(I), enc_22(I)]                encoders of centre, row, column
                                                                    and corners (dilation 2)
    q = R(adaptive average pool of e to (H, W))                     queries
    k = R(adaptive average pool of e to (h, w))                     keys
    out[p] = sum_j softmax_j(<q[p], k[j]> / sqrt(D)) x[j]           `ops.cross_scale_attention`

j runs over the K x K low-resolution pixels around p, in `num_heads` blocks of channels that have
weights of their own; D is the width of a head of queries and keys. R turns channel c and its
partner c + D / 2 by minus an angle (`ops.rotate`), the direction u of the pixel's ray times a
frequency: with n = floor(D / 12) frequencies, f < n and i < 3,

    angle[6 f + 3 + i] = 2 pi b^f / 8 u_i,    u = P v / |v|
    v = ((x - cx) / fx, (y - cy) / fy, 1)

P is the rotation of the camera's pose; all other angles are zero. (Channels 6 f + i turn by the
camera's place in the official module, queries and keys alike, which no product of the two can tell:
they are left as they are here.)

Source: "RaysUp", 2026; the official code at MAP-RaysUp/RaysUp.
"""

from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resfu_jax import ops
from resfu_jax._checks import check_choice, check_flag, check_positive, check_whole, need
from resfu_jax._layers import PYTORCH_UNIFORM, Conv
from resfu_jax.ops import Implementation
from resfu_jax.ops.checks import check_floating
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.sizes import Size, to_int32
from resfu_jax.upsamplers._across_scales import attend, check_features_of_heads, check_heads
from resfu_jax.upsamplers._encoder import Encoder, encode_in_turn
from resfu_jax.upsamplers._inputs import check_image, compute_dtype, reassembled, size_of_output
from resfu_jax.upsamplers._registry import register
from resfu_jax.upsamplers._upsampler import Upsampler

Cameras = tuple[Float[Array, "n 4 4"], Float[Array, "n 4"]]  # poses, and (fx, fy, cx, cy)


@register("raysup")
class RaysUp(Upsampler):
    """Upsamples features to any size by attention that an image and its camera decide.

    Where the window is larger than the map, which the official module refuses, it is the map.

    Args:
      features: channels C of the features, a multiple of `num_heads`; None: any such.
      guide_features: ignored.
      scale: ignored.
      qk_dim: channels of queries and keys, a multiple of 32 and of 2 `num_heads`.
      num_heads: blocks of channels with weights of their own.
      kernel_size: K, side of the window; if even, it has one pixel more before p than after it.
      use_spe: the four encoders; False is one 1x1 convolution.
      use_rope: R; False leaves queries and keys as they are.
      rope_freq_base: b.
      implementation: as in `ops.cross_scale_attention`.
      dtype: of the computation; the inputs' promoted dtype if not given. Statistics, rays, angles
        and the softmax are float32 or better.
      param_dtype: of the parameters.
      rngs: source of the initial weights, PyTorch's default.

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
        qk_dim: int = 256,
        num_heads: int = 4,
        kernel_size: int = 6,
        use_spe: bool = True,
        use_rope: bool = True,
        rope_freq_base: float = 3.0,
        implementation: Implementation | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_floating(dtype=dtype, param_dtype=param_dtype)
        check_whole(scale=scale, qk_dim=qk_dim, kernel_size=kernel_size)
        check_heads(features, num_heads, "num_heads")
        check_flag(use_spe=use_spe, use_rope=use_rope)
        check_positive(rope_freq_base=rope_freq_base)
        check_choice((*get_args(Implementation), None), implementation=implementation)
        need(
            qk_dim % 32 == qk_dim % (2 * num_heads) == 0,
            f"qk_dim must be a multiple of 32 and of 2 num_heads={2 * num_heads}, got {qk_dim}",
        )
        self.features, self.value_groups = features, num_heads
        self.qk_dim, self.kernel_size = qk_dim, kernel_size
        self.use_rope, self.rope_freq_base = use_rope, rope_freq_base
        self.implementation, self.dtype = implementation, dtype
        types: dict[str, Any] = dict(param_dtype=param_dtype, rngs=rngs)

        def encoder(kernel: int | tuple[int, int], blocks: int = 1, dilation: int = 1) -> Encoder:
            options: dict[str, Any] = dict(blocks=blocks, dilation=dilation, **types)
            options |= dict(block_kernel=kernel, use_bias=True, skip=False)
            return Encoder(3, qk_dim // 4, kernel, **options)

        self.encoders = nnx.List(
            [encoder(1, blocks=2), encoder((1, 3)), encoder((3, 1)), encoder(2, dilation=2)]
            if use_spe
            else [Conv(3, qk_dim, 1, use_bias=False, kernel_init=PYTORCH_UNIFORM, **types)]
        )

    def __call__(
        self,
        features: Float[Array, "b h w c"],
        image: Float[Array, "b Hi Wi rgb"],
        output_size: tuple[Size, Size] | None = None,
        *,
        cameras: Cameras | None = None,
        values: Float[Array, "b h w d"] | None = None,
    ) -> Float[Array, "b H W d"]:
        """Features `(B, h, w, C)`, or `values`, at the size asked for, or else the image's.

        Args:
          features: at low resolution.
          image: of any size.
          output_size: (H, W).
          cameras: poses from camera to world, `(B, 4, 4)`, and (fx, fy, cx, cy), `(B, 4)`, in
            pixels of an image whose size is twice the largest centre (cx, cy) of the batch, in
            whole pixels. If not given, cameras look along the axis, fx and fy are the image's width
            and height, and (cx, cy) is its middle.
          values: what is reassembled instead of the features.

        Raises:
          ValueError: arrays that do not fit together, or an `output_size` that is none.
        """
        check_features_of_heads(features, self.features, self.value_groups)
        check_image(features, image)
        if cameras is not None:
            _check_cameras(features, cameras)
            cameras = cameras if cameras[0].shape[0] else None  # of no image
        size = size_of_output(image, output_size)
        dtype = compute_dtype(self.dtype, features, image, values)
        v = reassembled(features.astype(dtype), values, groups=self.value_groups)
        encoded = encode_in_turn(self.encoders, image.astype(dtype))
        q = self._at(encoded, size, cameras)
        k = self._at(encoded, (features.shape[1], features.shape[2]), cameras)
        return attend(
            q,
            k,
            v,
            heads=self.value_groups,
            kernel_size=self.kernel_size,
            implementation=self.implementation,
        )

    def _at(
        self, encoded: list[Array], size: tuple[Size, Size], cameras: Cameras | None
    ) -> Float[Array, "b H W d"]:
        """The encoded image at this size, turned."""
        pooled = [ops.adaptive_avg_pool(e, size) for e in encoded]
        frequencies = self._frequencies()
        if not frequencies.any():
            return jnp.concatenate(pooled, axis=-1)
        rotation, y, x = _rays(size, cameras, at_least_float32(pooled[0].dtype))
        # A map's gradient is its images' own: of all of them together, devices would wait for it.
        y = jnp.broadcast_to(y, (pooled[0].shape[0], y.shape[1]))[:, :, None, None]
        shared = x[:, None, :, None], rotation, jnp.asarray(frequencies, x.dtype)
        return ops.map_rows(_turned, *pooled, y, shared=shared, values=self.qk_dim)

    def _frequencies(self) -> Float[np.ndarray, "3 half"]:
        """What the directions are multiplied by, to be the angles of half a head's channels."""
        half = self.qk_dim // self.value_groups // 2
        n = half // 6 if self.use_rope else 0
        each = 2 * np.pi / 8 * self.rope_freq_base ** np.arange(n)
        frequencies = np.zeros((3, half))
        for i in range(3):
            frequencies[i, 3 + i : 6 * n : 6] = each
        return frequencies


def _check_cameras(features: Array, cameras: Cameras) -> None:
    batches = features.shape[0], 0  # no image: the shape of the result is asked for, with one
    need(
        len(cameras) == 2
        and cameras[0].shape in [(b, 4, 4) for b in batches]
        and cameras[1].shape in [(b, 4) for b in batches],
        "cameras must be poses (batch, 4, 4) and intrinsics (batch, 4) of the features' batch "
        f"{features.shape[0]}, got {[a.shape for a in cameras]}",
    )


def _rays(
    size: tuple[Size, Size], cameras: Cameras | None, dtype: DTypeLike
) -> tuple[Float[Array, "b 3 3"], Float[Array, "b h"], Float[Array, "b w"]]:
    """P, and of every row and column y and x of v."""
    # In shares of the image, of which fx and fy are one and the middle is a half.
    y, x = (_centres(n, dtype)[None] for n in size)
    if cameras is None:
        return jnp.eye(3, dtype=dtype)[None], y - 0.5, x - 0.5
    poses, intrinsics = (a.astype(dtype) for a in cameras)
    focal, centre = intrinsics[:, :2], intrinsics[:, 2:]
    whole = jax.lax.stop_gradient(jnp.floor(2 * centre.max(axis=0, keepdims=True)))
    x = (x * whole[:, :1] - centre[:, :1]) / focal[:, :1]
    y = (y * whole[:, 1:] - centre[:, 1:]) / focal[:, 1:]
    return poses[:, :3, :3], y, x


def _centres(n: Size, dtype: DTypeLike) -> Float[Array, " n"]:
    """Of the pixels of an axis, in 0 .. 1."""
    twice = 2 * jnp.arange(n, dtype=jnp.int32) + 1
    return twice.astype(dtype) / (2 * to_int32(n)).astype(dtype)


def _turned(*arrays: Any) -> Float[Array, "b h w d"]:
    """R of some maps together: of these, y, and (x, P, frequencies)."""
    *maps, y, (x, rotation, frequencies) = arrays
    directions = [
        rotation[:, i, :1, None, None] * x
        + rotation[:, i, 1:2, None, None] * y
        + rotation[:, i, 2:, None, None]
        for i in range(3)
    ]
    length = jnp.sqrt(sum(jnp.square(d) for d in directions))
    angles = sum(
        -d / length * f[None, None, None] for d, f in zip(directions, frequencies, strict=True)
    )
    heads = maps[0].shape[3] * len(maps) // (2 * angles.shape[3])
    z = jnp.concatenate(maps, axis=-1)
    z = z.reshape(*z.shape[:3], heads, -1)
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, :, None]
    return ops.rotate(z, angles).reshape(*z.shape[:3], -1)
