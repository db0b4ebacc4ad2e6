"""MIRL of ViT-S-54 on ImageNet-1k, as its authors pre-train it for 300 epochs.

    resfu prepare image_folder/imagenet --images ILSVRC2012/train
    python train.py --config configs/mirl_s54_imagenet.py --workdir runs/mirl_s54

Huang, Fu and Bors, NeurIPS 2023 (arXiv 2309.14136), and the settings of their code
(russellllaputa/MIRL): six segments of nine blocks, decoders of one block of 384 channels, crops of
20 to 100 % of the image's area at 224 x 224, mirrored or not, batch 4096, AdamW (0.9, 0.95) with
decay 0.05, rate 1.5e-4 x 4096 / 256 = 2.4e-3 after 40 epochs of warm-up, then a cosine to 0. An
epoch is 1,281,167 / 4096 images, 312.8 steps. `--config.optimizer.accumulate=8` processes the batch
in parts, `--config.model.remat=True` keeps less of each block.

Result: not run here; `make dry-run` runs two steps. Published: 84.4 % top-1 on ImageNet-1k after
fine-tuning, 84.8 % from 800 epochs of pre-training.
"""

from resfu_jax.training import (
    BackboneConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    MIRLConfig,
    ModelConfig,
    OptimizerConfig,
)

IMAGES, BATCH, EPOCHS, WARMUP_EPOCHS = 1_281_167, 4096, 300, 40


def get_config() -> Config:
    return Config(
        task="mirl",
        steps=round(EPOCHS * IMAGES / BATCH),
        batch_size=BATCH,
        log_every=100,
        model=ModelConfig(
            backbone=BackboneConfig(name="vit", variant="s54"),
            dtype="bfloat16",
        ),
        data=DataConfig(
            name="image_folder/imagenet",
            crop_size=(224, 224),
            scale_range=(1.0, 1.0),
            area_range=(0.2, 1.0),
            photometric=False,
            num_workers=32,
        ),
        mirl=MIRLConfig(segments=6, decoder_width=384, decoder_depth=1, decoder_heads=12),
        optimizer=OptimizerConfig(
            learning_rate=1.5e-4 * BATCH / 256,
            head_learning_rate_multiple=1.0,
            weight_decay=0.05,
            beta2=0.95,
            warmup_steps=round(WARMUP_EPOCHS * IMAGES / BATCH),
            warmup_start=0.0,
            decay="cosine",
        ),
        eval=EvalConfig(every=round(10 * IMAGES / BATCH), batch_size=512),
        checkpoint=CheckpointConfig(every=1000),
    )
