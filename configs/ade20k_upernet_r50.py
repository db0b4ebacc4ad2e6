"""UPerNet-R50 on ADE20K with any upsampler in its top-down path.

    python -m resfu_jax.data prepare ade20k
    python train.py --config configs/ade20k_upernet_r50.py:carafe --workdir runs/ade20k_upernet

The upsampler is named after the colon; without a name: bilinear, the plain UPerNet. The backbone
has the deep stem (MMSegmentation's R50-V1c) and starts from timm's ImageNet weights
`resnet50c.gluon_in1k` (`--config.model.backbone.pretrained=FILE` for a file).

Published mIoU / boundary IoU on the validation images (README of tiny-smart/sapa):

    bilinear      41.09 / 28.04
    carafe        41.49 / 28.29
    fade          41.83 / 27.92
    sapa          41.47 / 28.27 (SAPA-B)
    sapa_deform   42.60 / 28.97 (SAPA-D)

That source gives 80 000 steps of 16 images. The rest is MMSegmentation's `upernet_r50` with
`schedule_80k`: width 512, SGD of learning rate 0.01 and weight decay 5e-4, no warm-up, polynomial
decay of power 0.9 to 1e-4. MMSegmentation adds 0.4 times the loss of an FCN head on the third map,
and decays norms and biases too; neither is done here.

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

UPSAMPLERS = "bilinear sapa_deform".split()  # what dry runs try


def get_config(upsampler: str = "bilinear") -> Config:
    return Config(
        steps=80_000,
        batch_size=16,
        log_every=50,
        model=ModelConfig(
            backbone=BackboneConfig(
                name="resnet",
                variant="50",
                options={"stem": "deep"},
                pretrained="timm/resnet50c.gluon_in1k",
            ),
            head=HeadConfig(name="upernet", upsampler=upsampler, width=512, dropout=0.1),
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
            learning_rate=0.01,
            final_learning_rate=1e-4,
            head_learning_rate_multiple=1.0,
            weight_decay=5e-4,
            beta1=0.9,
            warmup_steps=0,
            power=0.9,
        ),
        eval=EvalConfig(every=8000, group_sizes=True),
        checkpoint=CheckpointConfig(every=2000),
    )
