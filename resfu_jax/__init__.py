"""Feature upsampling in JAX: the published operators, proven equal to the official modules."""

from resfu_jax import ops
from resfu_jax.convert import from_torch
from resfu_jax.upsamplers import create_upsampler, list_upsamplers

__version__ = "0.1.0"
__all__ = ["create_upsampler", "from_torch", "list_upsamplers", "ops"]
