"""The parts that `train.py` composes: config, loss, metrics, optimiser, checkpoints, reporting."""

from resfu_jax.training.checkpoint import CheckpointError, Checkpoints
from resfu_jax.training.config import (
    BackboneConfig,
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    EvalConfig,
    HeadConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    check_overrides,
    check_same_run,
    create_inference,
    model_arguments,
    size_multiple,
    validate,
    write_config,
)
from resfu_jax.training.feature_cache import FeatureCache
from resfu_jax.training.losses import class_weights, cross_entropy, pixel_weights
from resfu_jax.training.metrics import SegmentationCounts, count
from resfu_jax.training.optimizer import (
    accumulate_gradients,
    create_optimizer,
    create_schedule,
    update_ema,
)
from resfu_jax.training.pretrained import pretrained_backbone
from resfu_jax.training.reporting import Reporter, print_table, read_metrics
from resfu_jax.training.signals import StopSignals

__all__ = [
    "BackboneConfig",
    "CheckpointConfig",
    "CheckpointError",
    "Checkpoints",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "FeatureCache",
    "HeadConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Reporter",
    "SegmentationCounts",
    "StopSignals",
    "accumulate_gradients",
    "check_overrides",
    "check_same_run",
    "class_weights",
    "count",
    "create_inference",
    "create_optimizer",
    "create_schedule",
    "cross_entropy",
    "model_arguments",
    "pixel_weights",
    "pretrained_backbone",
    "print_table",
    "read_metrics",
    "size_multiple",
    "update_ema",
    "validate",
    "write_config",
]
