"""Upsamplers of a frozen ViT-Ti/16, learned from CamVid's photos without their labels.

    resfu prepare camvid
    python train.py --config configs/camvid_features.py:resfu --workdir runs/camvid_features_resfu
    resfu probe camvid --run runs/camvid_features_resfu --class-balance 0.5 --seeds 0 1 2

The backbone is timm's `vit_tiny_patch16_224.augreg_in21k_ft_in1k`, from Hugging Face (`pip
install -e ".[hub]"`) or, with `--config.model.backbone.pretrained=FILE`, from a file. Whatever is
learned sees the same 400 crops in the same order, about one pass over the 367 photos: NAF, JAFAR
and AnyUp with their own objectives, AnyUp from released weights with
`--config.model.head.pretrained=released`; upsamplers of one scale, to a quarter of the patch, with
features of shifted photos.

Result: docs/probing.md. A run takes 6 to 11 minutes on one CPU core; JAFAR and AnyUp up to 30.
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


def get_config(upsampler: str = "naf") -> Config:
    own = upsampler in ("naf", "jafar", "anyup")
    objective = ObjectiveConfig(upsampler) if own else ObjectiveConfig("stitch", {"scale": 4})
    return Config(
        task="features",
        steps=200,
        batch_size=2,
        log_every=20,
        model=ModelConfig(
            backbone=BackboneConfig(
                name="vit",
                variant="tiny",
                pretrained="timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
                frozen=True,
            ),
            head=HeadConfig(upsampler=upsampler, scale=4),
            mean=(127.5, 127.5, 127.5),
            std=(127.5, 127.5, 127.5),
        ),
        data=DataConfig(
            name="camvid", crop_size=(256, 320), scale_range=(1.0, 1.0), photometric=False
        ),
        objective=objective,
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            head_learning_rate_multiple=1.0,
            weight_decay=1e-5,
            warmup_steps=20,
            clip_norm=1.0,
        ),
        eval=EvalConfig(every=200, batch_size=2),
        checkpoint=CheckpointConfig(every=100),
    )
