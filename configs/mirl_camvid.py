"""A deep, narrow ViT (24 blocks of 64 channels) learned from CamVid's photos alone.

    resfu prepare camvid
    python train.py --config configs/mirl_camvid.py:mirl --workdir runs/mirl_camvid
    python train.py --config configs/mirl_camvid.py:mae --workdir runs/mae_camvid

`mirl` has six segments of four blocks; `mae` is the same encoder with one decoder behind its last
block. Labels are not looked at. `configs/camvid_vit_deep.py` starts from either.

Result: docs/mirl.md.
"""

from configs import mirl_tiny
from resfu_jax.training import Config, DataConfig

UPSAMPLERS = ("mirl", "mae")


def get_config(method: str = "mirl") -> Config:
    if method not in UPSAMPLERS:
        raise ValueError(f"there are configs of {' and '.join(UPSAMPLERS)}, not of {method!r}")
    config = mirl_tiny.get_config()
    config.steps, config.batch_size = 300, 32
    config.model.backbone.options = dict(depth=24, width=64, heads=4)
    config.data = DataConfig(
        name="camvid",
        crop_size=(96, 96),
        scale_range=(1.0, 1.0),
        area_range=(0.1, 0.6),
        photometric=False,
    )
    config.mirl.segments = 6 if method == "mirl" else 1
    config.optimizer.warmup_steps = 30
    config.eval.every = config.checkpoint.every = 100
    return config
