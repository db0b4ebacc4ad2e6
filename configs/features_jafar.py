"""JAFAR learned without labels, as its authors trained it: on DINOv2 ViT-S/14.

    python -m resfu_jax.data prepare image_folder/photos --images DIR
    python train.py --config configs/features_jafar.py --workdir runs/features_jafar

Settings of PaulCouairon/JAFAR: photos of 448 pixels (ImageNet there), reduced to a quarter to a
half; cosine and squared error, and consistency under blur and noise; AdamW 2e-4 without schedule,
batch 4, 100,000 steps, bfloat16. Mirrored images are ours.

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
        steps=100_000,
        batch_size=4,
        log_every=100,
        model=ModelConfig(
            backbone=BackboneConfig(
                name="vit",
                variant="dinov2_small",
                pretrained="facebook/dinov2-small",
                frozen=True,
            ),
            head=HeadConfig(upsampler="jafar"),
            dtype="bfloat16",
        ),
        data=DataConfig(
            name="image_folder/photos",
            resize_to=(448, 10000),
            crop_size=(448, 448),
            scale_range=(1.0, 1.0),
            photometric=False,
            num_workers=8,
        ),
        objective=ObjectiveConfig(name="jafar"),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=2e-4,
            final_learning_rate=2e-4,
            head_learning_rate_multiple=1.0,
            weight_decay=1e-5,
            warmup_steps=0,
        ),
        eval=EvalConfig(every=10000, batch_size=4),
        checkpoint=CheckpointConfig(every=1000),
    )
