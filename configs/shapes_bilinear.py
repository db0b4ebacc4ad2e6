"""The twin of `shapes_resfu` with bilinear upsampling; nothing else differs.

    python train.py --config configs/shapes_bilinear.py --workdir runs/shapes_bilinear

Result: not measured yet.
"""

from configs import shapes_resfu
from resfu_jax.training import Config


def get_config() -> Config:
    config = shapes_resfu.get_config()
    config.model.head.upsampler = "bilinear"
    return config
