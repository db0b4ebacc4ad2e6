"""Monocular depth as published: BTS on NYU Depth V2, and the linear probe of JAFAR and AnyUp.

    python -m resfu_jax.data prepare nyu_depth_v2 --manual-dir DIR
    python train.py --config configs/depth.py:bts --workdir runs/depth_bts

    python -m resfu_jax.data prepare depth_folder/photos --images DIR --depth DIR --scale 0.001
    python train.py --config configs/depth.py:jafar --workdir runs/depth_jafar

bts     ResNet-50, a decoder with `sapa`; crops of 416x544, 50 epochs of 24,231 images in batches
        of 4, AdamW 1e-4 to 1e-5 (power 0.9), decay 0.01, the silog loss; Eigen's crop, 10 m
jafar   DINOv2 ViT-S/14 at 448 and JAFAR's released weights, both frozen; upsampled features and
        class token to 256 bins; batches of 2, 5 epochs of COCO (118,287 images), AdamW 5e-3; sig
        loss and half the gradient loss

Settings of cleinc/bts and of PaulCouairon/JAFAR's evaluation (and its issue 5). Published: BTS-R50
with SAPA-B, delta1 .871, AbsRel .116, RMSE .410 (nearest .865, .119, .419; SAPA's README); JAFAR,
no table of depth; AnyUp's paper has, for NYU at 224 pixels, JAFAR RMSE .4906 and delta1 .8052.

What differs. BTS: no local planar guidance, pyramid pooling or rotation, and decay of the decoder,
too; the training images of the official file are 795, FastDepth's archive has 47,584.
JAFAR: the labels are of Depth Anything V2 Small, here from a folder; whole images are evaluated,
there their middle; the rate decays linearly, there a cosine goes up and down.

Result: none was run here to its end; `make dry-run` runs two steps of each.
"""

from resfu_jax.training import (
    BackboneConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DepthConfig,
    EvalConfig,
    HeadConfig,
    ModelConfig,
    OptimizerConfig,
)

UPSAMPLERS = ("bts", "jafar")  # recipes, which dry runs go through


def get_config(recipe: str = "bts") -> Config:
    if recipe not in UPSAMPLERS:
        raise ValueError(f"there are recipes {', '.join(UPSAMPLERS)}, not {recipe!r}")
    return bts() if recipe == "bts" else jafar()


def bts() -> Config:
    steps = 50 * 24_231 // 4
    return Config(
        task="depth",
        steps=steps,
        batch_size=4,
        log_every=100,
        model=ModelConfig(
            backbone=BackboneConfig(
                name="resnet", variant="50", pretrained="timm/resnet50.tv_in1k"
            ),
            head=HeadConfig(name="depth_decoder", upsampler="sapa", width=128),
        ),
        data=DataConfig(
            name="nyu_depth_v2", crop_size=(416, 544), scale_range=(1.0, 1.0), num_workers=8
        ),
        depth=DepthConfig(sig=0.0, silog=1.0, gradient=0.0, warmup_steps=0, crop="eigen"),
        optimizer=OptimizerConfig(
            learning_rate=1e-4,
            final_learning_rate=1e-5,
            power=0.9,
            head_learning_rate_multiple=1.0,
            weight_decay=0.01,
            warmup_steps=0,
        ),
        eval=EvalConfig(every=5000, batch_size=8),
        checkpoint=CheckpointConfig(every=1000),
    )


def jafar() -> Config:
    steps = 5 * 118_287 // 2
    return Config(
        task="depth",
        steps=steps,
        batch_size=2,
        log_every=100,
        model=ModelConfig(
            backbone=BackboneConfig(
                name="vit",
                variant="dinov2_small",
                pretrained="facebook/dinov2-small",
                frozen=True,
            ),
            head=HeadConfig(
                name="bins",
                upsampler="jafar",
                pretrained="jafar_dinov2_vits14",
                scale=14,
                bins=256,
                class_token=True,
            ),
        ),
        data=DataConfig(
            name="depth_folder/photos",
            resize_to=(448, 10_000),
            crop_size=(448, 448),
            scale_range=(1.0, 1.0),
            photometric=False,
            num_workers=8,
        ),
        optimizer=OptimizerConfig(
            learning_rate=5e-3,
            head_learning_rate_multiple=1.0,
            upsampler_learning_rate_multiple=0.0,
            weight_decay=1e-5,
            warmup_steps=0,
        ),
        eval=EvalConfig(every=20_000, batch_size=2),
        checkpoint=CheckpointConfig(every=2000),
    )
