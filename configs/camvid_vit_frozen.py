"""A linear head on a frozen ViT-Ti/16, on CamVid, with any upsampler after the features.

    python -m resfu_jax.data prepare camvid
    python train.py --config configs/camvid_vit_frozen.py:resfu --workdir runs/camvid_vit_resfu

The backbone is timm's `vit_tiny_patch16_224.augreg_in21k_ft_in1k`, from Hugging Face (`pip
install -e ".[hub]"`) or, with `--config.model.backbone.pretrained=FILE`, from a file. Its 23 x 30
tokens of an image go through GroupNorm, the upsampler to stride 4 and a 1x1 classifier; guided
upsamplers see the stem of ReSFU's Segmenter experiments. No augmentation, so the features are
computed once per image.

Result: docs/results.md.
"""

from resfu_jax.training import (
    BackboneConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    HeadConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
)


def get_config(upsampler: str = "resfu") -> Config:
    # FADE's gate mixes guide and features: it needs as many channels.
    width = 192 if upsampler.startswith("fade") else None
    return Config(
        steps=500,
        batch_size=4,
        log_every=50,
        model=ModelConfig(
            backbone=BackboneConfig(
                name="vit",
                variant="tiny",
                pretrained="timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
                frozen=True,
                cache_features=True,
            ),
            head=HeadConfig(name="linear", upsampler=upsampler, norm=True, width=width),
            mean=(127.5, 127.5, 127.5),
            std=(127.5, 127.5, 127.5),
        ),
        # 480x360 images, padded to a multiple of the patch.
        data=DataConfig(
            name="camvid",
            crop_size=(368, 480),
            scale_range=(1.0, 1.0),
            flip=False,
            photometric=False,
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, head_learning_rate_multiple=1.0, warmup_steps=50, clip_norm=1.0
        ),
        loss=LossConfig(class_balance=0.5),
        eval=EvalConfig(every=500, batch_size=4),
        checkpoint=CheckpointConfig(every=250),
    )
