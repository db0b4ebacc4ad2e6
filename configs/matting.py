"""A2U matting with a choice of upsampler in its four decoder slots.

    python train.py --config configs/matting.py:fade --workdir runs/matting_fade
    python train.py --config configs/matting.py:soft_shapes --workdir runs/soft_shapes

fade, sapa   Composition-1K, for which its authors have to be asked: crops of 512, batch 16, Adam,
             30 epochs of 6000 steps, rates 1e-4 of encoder and upsamplers and 1e-2 of the rest, a
             tenth after epochs 20 and 26; settings of dongdong93/a2u_matting and poppinace/fade.
             Published (SAD, MSE, Grad, Conn): FADE 31.10, 0.0073, 14.52, 28.11 (Lu et al., ECCV
             2022); SAPA-B 31.19, 0.0079, 15.48, 28.30 (Lu et al., NeurIPS 2022); bilinear 37.31,
             0.0103, 21.38, 35.39.
soft_shapes  FADE in a small network on the embedded dataset, for minutes on two CPU cores.

Other upsamplers: `--config.model.head.upsampler=carafe`. Weights to start from are a ResNet-34 of
ImageNet; the released code has its own. It asks for frozen BatchNorm, and then undoes that: so here
it learns; `--config.model.backbone.options="{'freeze_norm': True}"` freezes the encoder's.

Result: fade and sapa were not run here to their end; `make dry-run` runs two steps of each.
soft_shapes (seeds 0, 1, 2): SAD 1.31, 0.83 and 0.94 with FADE; 0.823 ± 0.072 with ReSFU and 0.868 ±
0.048 with bilinear (mean, standard deviation); others in docs/matting.md.
"""

from resfu_jax.training import (
    BackboneConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    HeadConfig,
    MattingConfig,
    ModelConfig,
    OptimizerConfig,
)

UPSAMPLERS = ("fade", "sapa", "soft_shapes")
EPOCH = 6000


def get_config(name: str = "fade") -> Config:
    if name not in UPSAMPLERS:
        raise ValueError(f"there are recipes called {', '.join(UPSAMPLERS)}, not {name!r}")
    return soft_shapes() if name == "soft_shapes" else composition_1k(name)


def composition_1k(upsampler: str) -> Config:
    return Config(
        task="matting",
        steps=30 * EPOCH,
        batch_size=16,
        seed=6,
        log_every=100,
        model=ModelConfig(
            backbone=BackboneConfig(
                name="resnet", variant="34", pretrained="timm/resnet34.tv_in1k"
            ),
            head=HeadConfig(upsampler=upsampler),
        ),
        data=DataConfig(
            name="composition_1k", crop_size=(512, 512), scale_range=(0.8, 1.25), num_workers=8
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-4,
            head_learning_rate_multiple=100.0,
            upsampler_learning_rate_multiple=0.01,
            weight_decay=0.0,
            warmup_steps=0,
            milestones=(20 * EPOCH, 26 * EPOCH),
        ),
        eval=EvalConfig(every=EPOCH, batch_size=1, group_sizes=True),
        checkpoint=CheckpointConfig(every=1000),
    )


def soft_shapes() -> Config:
    return Config(
        task="matting",
        steps=200,
        batch_size=8,
        log_every=20,
        model=ModelConfig(
            backbone=BackboneConfig(
                name="resnet",
                variant="18",
                options=dict(widths=(16, 32, 64, 64), depths=(1, 1, 1, 1), stem_width=8),
            ),
            head=HeadConfig(upsampler="fade", dropout=0.1),
        ),
        data=DataConfig(name="soft_shapes", crop_size=(128, 128), scale_range=(0.8, 1.25)),
        matting=MattingConfig(trimap_width=(3, 15)),
        optimizer=OptimizerConfig(
            learning_rate=2e-3,
            head_learning_rate_multiple=1.0,
            weight_decay=0.0,
            warmup_steps=30,
            clip_norm=1.0,
        ),
        eval=EvalConfig(every=200, batch_size=16),
        checkpoint=CheckpointConfig(every=100),
    )
