"""LoftUp's first stage, learned from masks, on DINOv2 ViT-S/14.

    python -m resfu_jax.data prepare image_folder/photos --images DIR --labels MASKS
    python train.py --config configs/features_loftup.py --workdir runs/features_loftup

Settings of the paper (Huang et al., ICCV 2025): photos of 224 pixels with masks (a million of
SA-1B, whose masks are SAM's), AdamW 1e-3, batch 8, one epoch. The masks of a photo are the numbers
of its label map, at most 255; a weight decay is not told, it is that of PyTorch. The second stage
(a teacher on crops) is not here. Mirrored images are ours.

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
        steps=125_000,
        batch_size=8,
        log_every=100,
        model=ModelConfig(
            backbone=BackboneConfig(
                name="vit",
                variant="dinov2_small",
                pretrained="facebook/dinov2-small",
                frozen=True,
            ),
            head=HeadConfig(upsampler="loftup"),
        ),
        data=DataConfig(
            name="image_folder/photos",
            resize_to=(224, 10000),
            crop_size=(224, 224),
            scale_range=(1.0, 1.0),
            photometric=False,
            num_workers=8,
        ),
        objective=ObjectiveConfig(name="loftup"),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=1e-3,
            final_learning_rate=1e-3,
            head_learning_rate_multiple=1.0,
            weight_decay=0.01,
            warmup_steps=0,
        ),
        eval=EvalConfig(every=10000, batch_size=8),
        checkpoint=CheckpointConfig(every=1000),
    )
