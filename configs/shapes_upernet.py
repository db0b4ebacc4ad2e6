"""`shapes_resfu` with a UPerNet head, three upsamplers of ratio 2 in its top-down path.

    python train.py --config configs/shapes_upernet.py:carafe --workdir runs/shapes_upernet_carafe

Any upsampler, named after the colon; without a name: FADE. `--config.model.head.pool_sizes="()"`
leaves the pyramid pooling out: a plain FPN.

Result (FADE, last step, seed 0): mIoU 0.589, boundary IoU 0.482, 922,742 parameters; nine minutes
on two busy CPU cores.
"""

from configs import shapes_direct
from resfu_jax.training import Config


def get_config(upsampler: str = "fade") -> Config:
    config = shapes_direct.get_config(upsampler)
    config.model.head.name = "upernet"
    config.model.head.pool_sizes = (1, 2)  # of the 4 x 4 pixels that a crop of 128 has left
    return config
