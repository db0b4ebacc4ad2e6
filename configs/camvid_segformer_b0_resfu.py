"""SegFormer-B0 with a ReSFU head on CamVid at half resolution, from scratch.

    python -m resfu_jax.data prepare camvid
    python train.py --config configs/camvid_segformer_b0_resfu.py --workdir runs/camvid_resfu

Result (last step, seed 0): mIoU 0.330, boundary IoU 0.227, against 0.338 and 0.213 of the twin
`camvid_segformer_b0_bilinear`. 22 minutes on two busy CPU cores. 600 steps of 4 images are 6.5
epochs, far from converged: the rare classes are not predicted yet. With more time raise
`--config.steps`.
"""

from resfu_jax.training import (
    BackboneConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    HeadConfig,
    ModelConfig,
    OptimizerConfig,
)


def get_config() -> Config:
    return Config(
        steps=600,
        batch_size=4,
        log_every=20,
        model=ModelConfig(
            backbone=BackboneConfig(variant="b0", options={"drop_path": 0.0}),
            head=HeadConfig(upsampler="resfu", width=128, dropout=0.0),
        ),
        # 480x360 images become 240x180; their crops are padded to a multiple of the stride.
        data=DataConfig(name="camvid", resize_scale=0.5, crop_size=(192, 256)),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            head_learning_rate_multiple=1.0,
            warmup_steps=60,
            clip_norm=1.0,
        ),
        eval=EvalConfig(every=150, batch_size=8, pad_to=(192, 256)),
        checkpoint=CheckpointConfig(every=50),
    )
