"""A member of another package, unlike any here: what it can do, only its attributes say."""

import jax
import jax.numpy as jnp
from flax import nnx

from resfu_jax import ops
from resfu_jax.upsamplers import (
    check_features,
    check_floating,
    check_guide,
    check_whole,
    compute_dtype,
    need_guide,
    reassembled,
    register,
)


@register("toy")
class GatedNearest(nnx.Module):
    """Nearest neighbours of one exact scale; a gate mixes the guide in."""

    guide = "features"
    needs_whole_scale = True
    same_width = True
    mixes = True
    without_gradient = (("unused",),)

    def __init__(
        self, features, guide_features, *, scale=2, dtype=None, param_dtype=jnp.float32, rngs
    ):
        check_floating(dtype=dtype, param_dtype=param_dtype)
        self.width = need_guide("toy", guide_features)
        check_whole(features=features, scale=scale)
        self.features, self.scale, self.dtype = features, scale, dtype
        self.gate = nnx.Param(rngs.params.normal((features,), param_dtype))
        self.unused = nnx.Param(jnp.zeros((3,), param_dtype))

    def __call__(self, features, guide, *, values=None):
        check_features(features, self.features)
        check_guide(features, guide, self.width)
        size = tuple(self.scale * n for n in features.shape[1:3])
        if guide.shape[1:3] != size:
            raise ValueError(f"toy of scale {self.scale} needs a guide of {size}")
        dtype = compute_dtype(self.dtype, features, guide, values)
        x, y = features.astype(dtype), guide.astype(dtype)
        v = reassembled(x, values)
        if v.shape[3] != self.width:
            raise ValueError(f"values must have {self.width} channels, got {v.shape[3]}")
        gate = jax.nn.sigmoid(x @ self.gate[...].astype(dtype)[:, None])
        gate, v = (ops.resize(a, size, method="nearest") for a in (gate, v))
        return gate * y + (1 - gate) * v
