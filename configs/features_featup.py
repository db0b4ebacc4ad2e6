"""FeatUp's stack of joint bilateral upsamplers, learned without labels on DINOv2 ViT-S/14.

    python -m resfu_jax.data prepare image_folder/photos --images DIR
    python train.py --config configs/features_featup.py --workdir runs/features_featup

Settings of mhamilton723/FeatUp: photos of 224 pixels (COCO-Stuff there), five jittered views of
each, NAdam 1e-3, batch 4, 2000 steps. There, gradients of the first ten steps are clipped to a norm
of 1e-4; here, the rate grows over them. Mirrored images are ours.

Result: not run here; `make dry-run` runs two steps.
"""

from resfu_jax.training import (
    BackboneConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    HeadConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
)


def get_config() -> Config:
    return Config(
        task="features",
        steps=2_000,
        batch_size=4,
        log_every=100,
        model=ModelConfig(
            backbone=BackboneConfig(
                name="vit",
                variant="dinov2_small",
                pretrained="facebook/dinov2-small",
                frozen=True,
            ),
            head=HeadConfig(upsampler="featup", scale=16),
        ),
        data=DataConfig(
            name="image_folder/photos",
            resize_to=(224, 10000),
            crop_size=(224, 224),
            scale_range=(1.0, 1.0),
            photometric=False,
            num_workers=8,
        ),
        objective=ObjectiveConfig(name="featup"),
        optimizer=OptimizerConfig(
            name="nadam",
            learning_rate=1e-3,
            final_learning_rate=1e-3,
            head_learning_rate_multiple=1.0,
            weight_decay=0.0,
            warmup_steps=10,
        ),
        eval=EvalConfig(every=500, batch_size=4),
        checkpoint=CheckpointConfig(every=1000),
    )
