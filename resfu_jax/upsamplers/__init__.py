"""Upsamplers: one file, one paper. Chosen by name through `create_upsampler`."""

from resfu_jax.upsamplers import classic as classic
from resfu_jax.upsamplers._registry import (
    create_upsampler,
    list_upsamplers,
    register,
    upsampler_entry,
)
from resfu_jax.upsamplers.resfu import ReSFU

__all__ = ["ReSFU", "create_upsampler", "list_upsamplers", "register", "upsampler_entry"]
