"""`shapes_resfu` with the head of SAPA's and FADE's experiments: six upsamplers, x2 by x2.

    python train.py --config configs/shapes_stagewise.py:sapa --workdir runs/shapes_stagewise_sapa

Any upsampler, named after the colon; without a name: FADE.

Result: not measured yet.
"""

from configs import shapes_direct
from resfu_jax.training import Config


def get_config(upsampler: str = "fade") -> Config:
    config = shapes_direct.get_config(upsampler)
    config.model.head.wiring = "stagewise"
    config.model.head.project = "linear"
    return config
