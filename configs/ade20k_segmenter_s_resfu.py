"""Segmenter-S with a linear decoder and ReSFU on ADE20K.

    python -m resfu_jax.data prepare ade20k
    python train.py --config configs/ade20k_segmenter_s_resfu.py --workdir runs/ade20k_segmenter

ViT-S/16 from ImageNet-21k weights fine-tuned at 384 pixels, timm's
`vit_small_patch16_384.augreg_in21k_ft_in1k` (`--config.model.backbone.pretrained=FILE` for a file).
Its features go from 1/16 to 1/4 in one ReSFU, guided by a stem that sees the image.

Settings of zmhhmz/ReSFU, `segmenter_vit-s_fcn_8xb1-160k_ade20k-512x512_resfu`. The gradients of
ReSFU's score branches are multiplied by 500, which under SGD is a learning rate of 0.5 for them.
Evaluation in windows of 512 at a stride of 480.

Published mIoU: not known to us; the repository states none.

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
    OptimizerConfig,
)


def get_config() -> Config:
    return Config(
        steps=160_000,
        batch_size=8,
        log_every=50,
        model=ModelConfig(
            backbone=BackboneConfig(
                name="vit",
                variant="small",
                options={"image_size": 384, "drop_path": 0.1},
                pretrained="timm/vit_small_patch16_384.augreg_in21k_ft_in1k",
            ),
            head=HeadConfig(
                name="linear",
                upsampler="resfu",
                upsampler_options={"lr_mult": 500.0},
                scale=4,
                guide_stride=4,
                width=32,
                dropout=0.0,
            ),
            mean=(127.5, 127.5, 127.5),
            std=(127.5, 127.5, 127.5),
        ),
        data=DataConfig(
            name="ade20k",
            resize_to=(512, 2048),
            crop_size=(512, 512),
            max_class_share=0.75,
            num_workers=8,
        ),
        optimizer=OptimizerConfig(
            name="sgd",
            learning_rate=1e-3,
            final_learning_rate=1e-4,
            head_learning_rate_multiple=1.0,
            weight_decay=0.0,
            beta1=0.9,
            warmup_steps=0,
            power=0.9,
        ),
        eval=EvalConfig(
            every=16_000, mode="slide", crop=(512, 512), stride=(480, 480), group_sizes=True
        ),
        checkpoint=CheckpointConfig(every=2000),
    )
