"""Depth of the embedded `shapes/depth` dataset: MiT (small) and a decoder with any upsampler.

    python train.py --config configs/shapes_depth.py:resfu --workdir runs/shapes_depth_resfu

Shapes lie on each other in fog, so that depth can be seen (contrast fades with it) and jumps at
every outline. Losses are those of the depth probes, without their warm-up.

Result (mean of seeds 0, 1, 2, standard deviation): AbsRel 0.0944 ± 0.0019, RMSE 0.702 ± 0.002 with
ReSFU, 0.0976 ± 0.0056 and 0.706 ± 0.007 with bilinear; others in docs/depth.md. One to three
minutes of training on two CPU cores.
"""

from configs import shapes_resfu
from resfu_jax.training import Config, DataConfig, DepthConfig, HeadConfig


def get_config(upsampler: str = "resfu") -> Config:
    config = shapes_resfu.get_config()
    config.task = "depth"
    config.model.head = HeadConfig(name="depth_decoder", upsampler=upsampler, width=64)
    config.data = DataConfig(
        name="shapes/depth", crop_size=(128, 128), scale_range=(1.0, 1.0), photometric=False
    )
    config.steps = config.eval.every = 300
    config.depth = DepthConfig(min_depth=0.1, warmup_steps=0)
    return config
