"""Pure functions of NHWC arrays: no parameters, no Flax.

What all have in common (`checks.takes_maps`): arrays are of real numbers, unless a function only
moves them; float16 maps with bfloat16 ones are made float32; an empty batch gives an empty result.
"""

from resfu_jax.ops._forms import Implementation
from resfu_jax.ops.adaptive_filter import adaptive_filter
from resfu_jax.ops.conv import conv
from resfu_jax.ops.cross_attention import cross_attention
from resfu_jax.ops.cross_scale_attention import cross_scale_attention
from resfu_jax.ops.deformable_attention import deformable_attention
from resfu_jax.ops.deformable_sample import deformable_sample
from resfu_jax.ops.depthwise_conv import depthwise_conv
from resfu_jax.ops.filters import box_filter, gaussian_blur, guided_filter
from resfu_jax.ops.fns_attention import fns_attention
from resfu_jax.ops.gaussian_splat import gaussian_splat
from resfu_jax.ops.grid_sample import grid_sample
from resfu_jax.ops.group_norm import group_norm
from resfu_jax.ops.grouped_conv import grouped_conv, grouped_linear
from resfu_jax.ops.joint_bilateral import joint_bilateral
from resfu_jax.ops.layer_norm import layer_norm
from resfu_jax.ops.local_window import (
    local_attention,
    local_reassembly,
    local_similarity,
)
from resfu_jax.ops.neighborhood_attention import neighborhood_attention
from resfu_jax.ops.norm_linear import norm_linear
from resfu_jax.ops.pad import pad
from resfu_jax.ops.pixel_shuffle import pixel_shuffle, pixel_unshuffle
from resfu_jax.ops.pool import adaptive_avg_pool
from resfu_jax.ops.reflect_conv import reflect_conv
from resfu_jax.ops.resize import resize
from resfu_jax.ops.rotary import rotate
from resfu_jax.ops.rows import map_rows
from resfu_jax.ops.unfold import unfold

__all__ = [
    "Implementation",
    "adaptive_avg_pool",
    "adaptive_filter",
    "box_filter",
    "conv",
    "cross_attention",
    "cross_scale_attention",
    "deformable_attention",
    "deformable_sample",
    "depthwise_conv",
    "fns_attention",
    "gaussian_blur",
    "gaussian_splat",
    "grid_sample",
    "group_norm",
    "grouped_conv",
    "grouped_linear",
    "guided_filter",
    "joint_bilateral",
    "layer_norm",
    "local_attention",
    "local_reassembly",
    "local_similarity",
    "map_rows",
    "neighborhood_attention",
    "norm_linear",
    "pad",
    "pixel_shuffle",
    "pixel_unshuffle",
    "reflect_conv",
    "resize",
    "rotate",
    "unfold",
]
