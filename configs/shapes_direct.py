"""`shapes_resfu` with any upsampler, named after a colon; nothing else differs.

    python train.py --config configs/shapes_direct.py:dysample --workdir runs/shapes_dysample

Every map goes to the grid of the finest in one step, at ratios 2, 4 and 8. Without a name: ReSFU.

Result: for ReSFU and bilinear that of `shapes_resfu` and `shapes_bilinear`; the others compare on
equal terms in docs/toy.md.
"""

from configs import shapes_resfu
from resfu_jax.training import Config


def get_config(upsampler: str = "resfu") -> Config:
    config = shapes_resfu.get_config()
    config.model.head.upsampler = upsampler
    return config
