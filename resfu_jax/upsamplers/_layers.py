"""What the upsamplers share: layers applied in the compute dtype, and checks of their inputs."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resfu_jax import ops
from resfu_jax._checks import check_whole, need
from resfu_jax.ops._dtypes import at_least_float32, promote
from resfu_jax.ops._interp import Size
from resfu_jax.ops._row_blocks import (
    Rows,
    add,
    add_to_sums,
    block_rows,
    cut,
    loop,
    map_row_blocks,
    zero_sums,
)
from resfu_jax.ops.group_norm import group_norm

EPS = 1e-5  # of every norm of the published modules
XAVIER_UNIFORM = nnx.initializers.xavier_uniform()


def conv(
    in_features: int,
    features: int,
    kernel_size: int,
    *,
    dilation: int = 1,
    use_bias: bool = True,
    kernel_init=XAVIER_UNIFORM,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A convolution with zero padding that keeps the size; apply it with `apply_conv`."""
    return nnx.Conv(
        in_features,
        features,
        (kernel_size, kernel_size),
        padding=dilation * (kernel_size - 1) // 2,
        kernel_dilation=dilation,
        use_bias=use_bias,
        kernel_init=kernel_init,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def apply_conv(x: Float[Array, "b h w c"], layer: nnx.Conv) -> Float[Array, "b h w d"]:
    """`layer(x)` in the dtype of x."""
    kernel = layer.kernel[...].astype(x.dtype)
    y = ops.conv(x, kernel, padding=layer.padding, dilation=layer.kernel_dilation)
    return y if layer.bias is None else y + layer.bias[...].astype(x.dtype)[None, None, None]


def apply_linear(x: Float[Array, "b h w c"], layer: nnx.Linear) -> Float[Array, "b h w d"]:
    """`layer(x)` in the dtype of x."""
    x = x @ layer.kernel[...].astype(x.dtype)
    return x if layer.bias is None else x + layer.bias[...].astype(x.dtype)[None, None, None]


def project(
    x: Float[Array, "b h w c"], layer: nnx.Linear
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w d"]]:
    """x, for its further use, and `layer(x)`.

    Of both gradients to x, the second is added to the first in place, block by block: JAX would add
    two maps and write a third.
    """
    x, y = _fork(x, layer.kernel[...].astype(x.dtype))
    return x, y if layer.bias is None else y + layer.bias[...].astype(x.dtype)[None, None, None]


@jax.custom_vjp
def _fork(x: Array, kernel: Array) -> tuple[Array, Array]:
    return x, x @ kernel


def _fork_bwd(saved, g):
    x, kernel = saved
    b, h, w, c = x.shape
    rows = block_rows(h, b * w * c)
    block, added = Rows(1, rows, rows), Rows(1, rows, rows, offsets=(0,))

    def body(i, state):
        d_x, d_kernel = state
        x_rows, d_y = cut((x, g[1]), i, (block, block))
        d_x = add(d_x, (d_y @ kernel.T,), i, added)
        return d_x, add_to_sums(d_kernel, jnp.einsum("bhwc,bhwd->cd", x_rows, d_y))

    d_x = g[0].astype(at_least_float32(x.dtype))
    d_x, d_kernel = loop(h // rows, body, (d_x, zero_sums(kernel)))
    return d_x.astype(x.dtype), d_kernel.astype(kernel.dtype)


_fork.defvjp(lambda x, kernel: (_fork(x, kernel), (x, kernel)), _fork_bwd)


def apply_norm(
    x: Float[Array, "b h w c"], norm: nnx.GroupNorm | nnx.LayerNorm | None
) -> Float[Array, "b h w c"]:
    """`norm(x)` in the dtype of x, statistics in float32 or better; x itself without a norm."""
    if norm is None:
        return x
    if isinstance(norm, nnx.GroupNorm):
        return group_norm(x, norm.scale[...], norm.bias[...], groups=norm.num_groups, eps=EPS)
    return _layer_norm(x, norm.scale[...], norm.bias[...])


def apply_linear_of_norm(
    x: Float[Array, "b h w c"], norm: nnx.GroupNorm | nnx.LayerNorm | None, layer: nnx.Linear
) -> Float[Array, "b h w d"]:
    """`layer(norm(x))`; with a LayerNorm in blocks of rows, and nothing else of x's size."""
    if not isinstance(norm, nnx.LayerNorm):
        return apply_linear(apply_norm(x, norm), layer)
    wide = at_least_float32(x.dtype)
    scale, norm_bias, kernel = (p[...].astype(wide) for p in (norm.scale, norm.bias, layer.kernel))
    # The norm's scale and bias as part of the layer's.
    bias = norm_bias @ kernel
    if layer.bias is not None:
        bias = bias + layer.bias[...].astype(wide)

    def f(params, blocks):
        kernel, bias = (p.astype(x.dtype) for p in params)
        y = _normalised(*blocks).astype(x.dtype) @ kernel
        return (y + bias[None, None, None],)

    b, h, w, c = x.shape
    # Several blocks even where one fits the cache: the memory is that of a block.
    rows = block_rows(h, b * w * c, h // 4 if isinstance(h, int) else None)
    block = Rows(1, rows, rows)
    params = scale[:, None] * kernel, bias
    (out,) = map_row_blocks(f, h // rows, (block,), (block,), params, (x,))
    return out


def _layer_norm(x: Array, scale: Array, bias: Array) -> Array:
    y = _normalised(x)
    scale, bias = (v.astype(y.dtype)[None, None, None] for v in (scale, bias))
    return (y * scale + bias).astype(x.dtype)


@jax.custom_vjp
def _normalised(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """With mean 0 and variance 1 over the channels, in float32 or better."""
    return _normalised_and_factor(x)[0]


def _normalised_and_factor(x: Array) -> tuple[Array, Array]:
    x = x.astype(at_least_float32(x.dtype))
    centred = x - x.mean(axis=-1, keepdims=True)
    factor = jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + EPS)
    return centred * factor, factor


def _normalised_bwd(x, g):
    y, factor = _normalised_and_factor(x)
    c = x.shape[-1]
    # Means as products with a vector: several times as fast on a CPU as XLA's sums of products.
    mean = jnp.full((c, 1), 1 / c, y.dtype)
    g_mean, gy_mean = (jnp.matmul(a, mean, precision=jax.lax.Precision.HIGHEST) for a in (g, g * y))
    return (((g - g_mean - y * gy_mean) * factor).astype(x.dtype),)


_normalised.defvjp(lambda x: (_normalised(x), x), _normalised_bwd)


def compute_dtype(dtype: DTypeLike | None, *inputs: Array | None) -> DTypeLike:
    """The chosen compute dtype, or the promoted one of the inputs that are given."""
    return promote(*(a.dtype for a in inputs if a is not None)) if dtype is None else dtype


def need_guide(name: str, guide_features: int | None) -> int:
    """The number of the guide's channels; a `ValueError` if there is none or it is not a number."""
    if guide_features is None:
        raise ValueError(f"guide_features is needed: {name} is guided; give the guide's channels")
    check_whole(guide_features=guide_features)
    return guide_features


def check_features(features: Array, channels: int) -> None:
    """The features are `(batch, height, width, channels)`."""
    need(
        features.ndim == 4 and features.shape[3] == channels,
        f"features must be (batch, height, width, {channels}), got shape {features.shape}",
    )


def check_guide(features: Array, guide: Array, channels: int) -> None:
    """The guide fits the features and is at least as large."""
    need(
        guide.ndim == 4 and guide.shape[3] == channels,
        f"guide must be (batch, height, width, {channels}), got shape {guide.shape}",
    )
    need(
        features.shape[0] == guide.shape[0],
        f"guide must have the features' batch size {features.shape[0]}, got {guide.shape[0]}",
    )
    for n, m in zip(features.shape[1:3], guide.shape[1:3], strict=True):
        if isinstance(n, int) and isinstance(m, int):
            need(
                1 <= n <= m,
                "guide must be at least as large as the features along both axes, "
                f"got guide {guide.shape[1:3]} and features {features.shape[1:3]}",
            )


def reassembled(
    features: Array, values: Array | None, *, groups: int = 1
) -> Float[Array, "b h w d"]:
    """What is reassembled: the features, or other values at their pixels.

    Values are in the features' dtype, to which `compute_dtype` has promoted both. Their channels
    must divide into the groups.
    """
    if values is None:
        return features
    need(
        values.ndim == 4 and values.shape[:3] == features.shape[:3],
        f"values must be {(*features.shape[:3], 'channels')}, a vector for every pixel of the "
        f"features, got shape {values.shape}",
    )
    need(
        values.shape[3] % groups == 0,
        f"values must have a multiple of {groups} channels (the groups), got {values.shape[3]}",
    )
    return values.astype(features.dtype)


def check_output_size(
    name: str, features: Array, output_size: tuple[Size, Size] | None, scale: int
) -> None:
    """For upsamplers that only know their whole scale: no other size is asked for."""
    fixed = tuple(scale * n for n in features.shape[1:3])
    need(
        output_size is None or tuple(output_size) == fixed,
        f"{name} of scale {scale} turns {features.shape[1:3]} into {fixed} only, got "
        f"output_size={None if output_size is None else tuple(output_size)}; resize its result, "
        "or choose another upsampler",
    )
