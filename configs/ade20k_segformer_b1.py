"""SegFormer-B1 on ADE20K with any upsampler in its head: the experiment of most upsampler papers.

    python -m resfu_jax.data prepare ade20k
    python train.py --config configs/ade20k_segformer_b1.py:resfu --workdir runs/ade20k_b1_resfu

The upsampler is named after the colon; without a name: ReSFU. The encoder starts from the ImageNet
weights `nvidia/mit-b1` of Hugging Face (`--config.model.backbone.pretrained=FILE` for a file).

Published mIoU / boundary IoU on the validation images, one scale, no mirroring:

    bilinear      41.68 / 27.80 (README of poppinace/fade), 42.11 / 28.16 (of tiny-smart/sapa)
    carafe        42.82 / 29.84 (both)
    fade          44.41 / 32.65 (poppinace/fade: best checkpoint; the last has 44.25),
                  43.06 / 31.68 (tiny-smart/sapa)
    sapa          43.20 / 30.96 (tiny-smart/sapa: SAPA-B)
    sapa_deform   44.68 / 31.74 (tiny-smart/sapa: SAPA-D)
    dysample, lda_aqu, resfu: not known to us; ReSFU's repository states none

Authors say that results vary by 0.5 mIoU from run to run. The width of the boundary in their
boundary IoU is not published, and docs/training.md tells what else differs from their protocol.

The optimisation is that of SegFormer (NVlabs/SegFormer, MMSegmentation), which all of them use. The
wiring is that of the source: ReSFU takes every map to 1/4 at once with the projected finest map as
guide, after 1x1 convolution, BatchNorm and ReLU (zmhhmz/ReSFU); bilinear is the plain SegFormer
head; all others have six upsamplers of ratio 2 (SAPA's and FADE's fork of NVlabs' code; DySample
and LDA-AQU as SAPA, for want of a released configuration).

ReSFU's scores compare neighbours 2 pixels apart at all three ratios: the released configuration
leaves out the ratio, and the module's default is 2. The authors' demonstration has the ratios 2, 4
and 8: `--config.model.head.upsampler_options="{'lr_mult': 500.0}"`.

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

# What dry runs try.
UPSAMPLERS = "resfu bilinear carafe fade sapa sapa_deform dysample lda_aqu".split()


def get_config(upsampler: str = "resfu") -> Config:
    head = HeadConfig(upsampler=upsampler, width=256, dropout=0.1)
    if upsampler.startswith("resfu"):
        head.wiring, head.project = "direct", "conv_bn_relu"
        head.upsampler_options = {"dilation": 2, "lr_mult": 500.0}
    else:
        head.wiring = "direct" if upsampler == "bilinear" else "stagewise"
        head.project = "linear"
    return Config(
        steps=160_000,
        batch_size=16,
        log_every=50,
        model=ModelConfig(
            backbone=BackboneConfig(variant="b1", pretrained="nvidia/mit-b1"), head=head
        ),
        data=DataConfig(
            name="ade20k",
            resize_to=(512, 2048),
            crop_size=(512, 512),
            max_class_share=0.75,
            num_workers=8,
        ),
        optimizer=OptimizerConfig(
            learning_rate=6e-5,
            head_learning_rate_multiple=10.0,
            weight_decay=0.01,
            warmup_steps=1500,
            warmup_start=1e-6,
            power=1.0,
        ),
        eval=EvalConfig(every=16_000, group_sizes=True),
        checkpoint=CheckpointConfig(every=2000),
    )
