"""Feature upsampling in JAX: the published operators, proven equal to the official modules."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resfu_jax import ops
    from resfu_jax.convert import from_torch, load_upsampler
    from resfu_jax.depth import DepthPipeline
    from resfu_jax.features import FeaturePipeline
    from resfu_jax.matting import MattingPipeline
    from resfu_jax.predictor import Predictor
    from resfu_jax.upsamplers import create_upsampler, list_upsamplers

__version__ = "0.1.0"
__all__ = [
    "DepthPipeline",
    "FeaturePipeline",
    "MattingPipeline",
    "Predictor",
    "create_upsampler",
    "from_torch",
    "list_upsamplers",
    "load_upsampler",
    "ops",
]

# Imported when they are first used: `resfu --help` does not wait for JAX, and `resfu_jax.ops` and
# `resfu_jax.serving` come without Flax.
_HOMES = {
    "DepthPipeline": "resfu_jax.depth",
    "FeaturePipeline": "resfu_jax.features",
    "MattingPipeline": "resfu_jax.matting",
    "Predictor": "resfu_jax.predictor",
    "create_upsampler": "resfu_jax.upsamplers",
    "from_torch": "resfu_jax.convert",
    "list_upsamplers": "resfu_jax.upsamplers",
    "load_upsampler": "resfu_jax.convert",
}
_MODULES = ("convert", "ops", "upsamplers")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"resfu_jax.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'resfu_jax' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
