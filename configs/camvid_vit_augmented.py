"""`camvid_vit_frozen` at its best: twice the size, augmentation, twice the steps.

    python train.py --config configs/camvid_vit_augmented.py:resfu --workdir runs/camvid_vit_best

The images are enlarged, 1.5 to 2.5 times in training and 2 times in the test, so that a token
covers 8 x 8 pixels of them and guide and logits are at stride 2. Training sees crops of the size
that `camvid_vit_frozen` has, mirrored or not; the test goes over windows of the same size, mirrored
too. Any upsampler after the colon.

Result: ReSFU 0.637 mIoU, bilinear 0.574; docs/results.md.
"""

from configs import camvid_vit_frozen
from resfu_jax.training import Config


def get_config(upsampler: str = "resfu") -> Config:
    config = camvid_vit_frozen.get_config(upsampler)
    config.steps = 1000
    config.model.backbone.cache_features = False
    config.data.scale_range, config.data.flip = (1.5, 2.5), True
    config.optimizer.warmup_steps = 100
    config.eval.every = 1000
    config.eval.mode, config.eval.crop = "slide", config.data.crop_size
    config.eval.stride = (184, 240)
    config.eval.scales, config.eval.flip = (2.0,), True
    return config
