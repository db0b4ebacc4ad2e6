"""Upsamplers learned without labels for a frozen backbone, as their authors trained them.

    python -m resfu_jax.data prepare image_folder/photos --images DIR
    python train.py --config configs/features.py:naf --workdir runs/features_naf

naf     DINOv3 ViT-B/16  512, ImageNet  4, 25,000    AdamW 2e-4, decay 1e-5, bfloat16
jafar   DINOv2 ViT-S/14  448, ImageNet  4, 100,000   the same
anyup   DINOv2 ViT-S/14  448, ImageNet  4, 100,000   the same
featup  DINOv2 ViT-S/14  224, COCO      4, 2,000     NAdam 1e-3
loftup  DINOv2 ViT-S/14  224, SA-1B     8, 125,000   AdamW 1e-3, stage 1 of the paper

(backbone; pixels and photos; batch and steps) are settings of valeoai/NAF, PaulCouairon/JAFAR,
wimmerth/anyup for one backbone, mhamilton723/FeatUp, and LoftUp's paper (Huang et al., ICCV 2025).
Their authors tell under 2 hours of an A100 for NAF, and 5 of an H100 for AnyUp. Rates are constant;
mirrored images are ours. In FeatUp's code gradients of the first ten steps are clipped to a norm of
1e-4; here, the rate grows over them. LoftUp needs masks, `prepare ... --labels MASKS`: the numbers
of a photo's label map, at most 255 (SAM's there); its weight decay is not told and is PyTorch's.
AnyUp goes on from its released weights with `--config.model.head.pretrained=released`, or a file.

Result: none was run here to its end; `make dry-run` runs two steps of each.
"""

import dataclasses

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


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What differs."""

    size: int
    steps: int
    batch_size: int = 4
    backbone: str = "dinov2_small"
    pretrained: str = "facebook/dinov2-small"
    optimizer: str = "adamw"
    learning_rate: float = 2e-4
    weight_decay: float = 1e-5
    warmup_steps: int = 0
    scale: int = 2
    dtype: str = "bfloat16"


RECIPES = {
    "naf": Recipe(
        size=512,
        steps=25_000,
        backbone="dinov3_base",
        pretrained="facebook/dinov3-vitb16-pretrain-lvd1689m",
    ),
    "jafar": Recipe(size=448, steps=100_000),
    "anyup": Recipe(size=448, steps=100_000),
    "featup": Recipe(
        size=224,
        steps=2_000,
        optimizer="nadam",
        learning_rate=1e-3,
        weight_decay=0.0,
        warmup_steps=10,
        scale=16,
        dtype="float32",
    ),
    "loftup": Recipe(
        size=224,
        steps=125_000,
        batch_size=8,
        learning_rate=1e-3,
        weight_decay=0.01,
        dtype="float32",
    ),
}
UPSAMPLERS = tuple(RECIPES)


def get_config(upsampler: str = "naf") -> Config:
    if upsampler not in RECIPES:
        raise ValueError(f"there are recipes of {', '.join(RECIPES)}, not of {upsampler!r}")
    recipe = RECIPES[upsampler]
    return Config(
        task="features",
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        log_every=100,
        model=ModelConfig(
            backbone=BackboneConfig(
                name="vit", variant=recipe.backbone, pretrained=recipe.pretrained, frozen=True
            ),
            head=HeadConfig(upsampler=upsampler, scale=recipe.scale),
            dtype=recipe.dtype,
        ),
        data=DataConfig(
            name="image_folder/photos",
            resize_to=(recipe.size, 10_000),
            crop_size=(recipe.size, recipe.size),
            scale_range=(1.0, 1.0),
            photometric=False,
            num_workers=8,
        ),
        objective=ObjectiveConfig(name=upsampler),
        optimizer=OptimizerConfig(
            name=recipe.optimizer,
            learning_rate=recipe.learning_rate,
            final_learning_rate=recipe.learning_rate,
            head_learning_rate_multiple=1.0,
            weight_decay=recipe.weight_decay,
            warmup_steps=recipe.warmup_steps,
        ),
        eval=EvalConfig(every=recipe.steps // 10, batch_size=recipe.batch_size),
        checkpoint=CheckpointConfig(every=1000),
    )
