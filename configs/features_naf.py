"""NAF learned without labels, as its authors trained it: on DINOv3 ViT-B/16, for any backbone.

    python -m resfu_jax.data prepare image_folder/photos --images DIR
    python train.py --config configs/features_naf.py --workdir runs/features_naf

Settings of valeoai/NAF: photos of 512 pixels (ImageNet there), features of the photo at half its
size explain those of the photo; squared error, AdamW 2e-4 without schedule, batch 4, 25,000 steps,
bfloat16 ("under 2 hours and 8 GB on an A100"). Mirrored images are ours.

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
        steps=25_000,
        batch_size=4,
        log_every=100,
        model=ModelConfig(
            backbone=BackboneConfig(
                name="vit",
                variant="dinov3_base",
                pretrained="facebook/dinov3-vitb16-pretrain-lvd1689m",
                frozen=True,
            ),
            head=HeadConfig(upsampler="naf"),
            dtype="bfloat16",
        ),
        data=DataConfig(
            name="image_folder/photos",
            resize_to=(512, 10000),
            crop_size=(512, 512),
            scale_range=(1.0, 1.0),
            photometric=False,
            num_workers=8,
        ),
        objective=ObjectiveConfig(name="naf"),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=2e-4,
            final_learning_rate=2e-4,
            head_learning_rate_multiple=1.0,
            weight_decay=1e-5,
            warmup_steps=0,
        ),
        eval=EvalConfig(every=5000, batch_size=4),
        checkpoint=CheckpointConfig(every=1000),
    )
