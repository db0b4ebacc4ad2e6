"""CamVid with a deep, narrow ViT, a linear head and any upsampler, from `configs/mirl_camvid.py`.

    python train.py --config configs/camvid_vit_deep.py:resfu --workdir runs/deep_resfu \\
        --config.init_from=runs/mirl_camvid --config.init_skip='("head",)'

Without `init_from` and `init_skip` the ViT starts from random weights.

Result: docs/mirl.md.
"""

from configs import camvid_vit_frozen, mirl_camvid
from resfu_jax.training import Config, HeadConfig, OptimizerConfig


def get_config(upsampler: str = "resfu") -> Config:
    config = camvid_vit_frozen.get_config()
    config.steps, config.batch_size, config.log_every = 200, 4, 20
    config.model = mirl_camvid.get_config().model
    config.model.head = HeadConfig(name="linear", upsampler=upsampler, norm=True)
    config.data.crop_size, config.data.flip = (96, 128), True
    config.data.resize_scale = 0.5
    config.optimizer = OptimizerConfig(
        learning_rate=1e-3,
        head_learning_rate_multiple=4.0,
        weight_decay=0.05,
        warmup_steps=20,
        clip_norm=1.0,
    )
    config.eval.every = config.checkpoint.every = config.steps
    return config
