"""What NAF and RaysUp share: attention to raw features of any width, in heads."""

from jaxtyping import Array, Float

from resfu_jax import ops
from resfu_jax._checks import check_whole, need
from resfu_jax.ops import Implementation
from resfu_jax.upsamplers._inputs import check_features


def check_heads(features: int | None, heads: int, name: str) -> None:
    """The features' channels, if they are fixed, divide into the heads, an argument of that name."""
    check_whole(**{name: heads})
    if features is not None:
        check_whole(features=features)
        need(
            features % heads == 0, f"features must be a multiple of {name}={heads}, got {features}"
        )


def check_features_of_heads(features: Array, channels: int | None, heads: int) -> None:
    """They are `(batch, height, width, channels)`; None: any multiple of the heads."""
    if channels is not None:
        return check_features(features, channels)
    need(
        features.ndim == 4 and features.shape[3] % heads == 0,
        "features must be (batch, height, width, channels), the channels a multiple of the "
        f"{heads} heads, got shape {features.shape}",
    )


def attend(
    q: Float[Array, "b H W d"],
    k: Float[Array, "b h w d"],
    v: Float[Array, "b h w dv"],
    *,
    heads: int,
    kernel_size: int,
    implementation: Implementation | None,
) -> Float[Array, "b H W dv"]:
    """`ops.cross_scale_attention` of heads that are blocks of successive channels.

    Along an axis that the window does not fit into, it is the largest one that does.
    """
    kernel = tuple(
        min(kernel_size, size // max(1, size // n))
        if isinstance(n, int) and isinstance(size, int)
        else kernel_size
        for n, size in zip(k.shape[1:3], q.shape[1:3], strict=True)
    )
    q, k, v = (x.reshape(*x.shape[:3], heads, x.shape[3] // heads) for x in (q, k, v))
    out = ops.cross_scale_attention(q, k, v, kernel_size=kernel, implementation=implementation)
    return out.reshape(*out.shape[:3], -1)
