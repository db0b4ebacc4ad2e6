"""`camvid_vit_frozen` at its best: x8 at once, augmentation, twice the steps, views averaged.

    python train.py --config configs/camvid_vit_augmented.py:resfu --workdir runs/camvid_vit_best

Crops of 240x320 pixels, at 0.75 to 2 times the size, mirrored and in other colours, have 15 x 20
tokens, near the 14 x 14 that the backbone was trained with; guide and logits are at stride 2. The
test averages windows of the size of the crops, at 1 and 1.5 times the size, mirrored too. Any
upsampler after the colon.

Result: docs/results.md.
"""

from configs import camvid_vit_frozen
from resfu_jax.training import Config


def get_config(upsampler: str = "resfu") -> Config:
    config = camvid_vit_frozen.get_config(upsampler)
    config.steps = 1000
    config.model.backbone.cache_features = False
    config.model.head.scale, config.model.head.guide_stride = 8, 2
    data = config.data
    data.crop_size, data.scale_range, data.flip, data.photometric = (
        (240, 320),
        (0.75, 2.0),
        True,
        True,
    )
    config.optimizer.warmup_steps = 100
    config.eval.every = 1000
    config.eval.mode, config.eval.crop, config.eval.stride = "slide", (240, 320), (160, 240)
    config.eval.scales, config.eval.flip = (1.0, 1.5), True
    return config
