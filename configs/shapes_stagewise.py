"""`shapes_resfu` with the head of SAPA's and FADE's experiments: six upsamplers, x2 by x2.

    python train.py --config configs/shapes_stagewise.py:sapa --workdir runs/shapes_stagewise_sapa

Any upsampler, named after the colon; without a name: FADE.

Result (FADE, last step, seed 0): mIoU 0.538, boundary IoU 0.428, 592,772 parameters; six minutes on
two busy CPU cores. That is below the direct wiring with its BatchNorm after every projection
(`shapes_resfu`): SegFormer's linear projections learn more slowly, and 600 steps are few.
"""

from configs import shapes_direct
from resfu_jax.training import Config


def get_config(upsampler: str = "fade") -> Config:
    config = shapes_direct.get_config(upsampler)
    config.model.head.wiring = "stagewise"
    config.model.head.project = "linear"
    return config
