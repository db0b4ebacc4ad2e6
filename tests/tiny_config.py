"""The smallest run of train.py that has all its parts: 8 steps on images of 32 pixels."""

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
        steps=8,
        batch_size=8,
        log_every=1,
        model=ModelConfig(
            backbone=BackboneConfig(
                options=dict(
                    widths=(8, 8, 16, 16), depths=(1, 1, 1, 1), heads=(1, 1, 2, 2), drop_path=0.1
                )
            ),
            head=HeadConfig(upsampler="bilinear", width=8, dropout=0.1),
        ),
        data=DataConfig(name="shapes", resize_scale=0.25, crop_size=(32, 32)),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2, clip_norm=1.0),
        eval=EvalConfig(every=4, batch_size=40, pictures=2),
        checkpoint=CheckpointConfig(every=3),
    )
