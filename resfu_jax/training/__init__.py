"""The parts of `train.py`: config, devices, loss, metrics, optimiser, checkpoints, reporting."""

from resfu_jax._extras import extra
from resfu_jax._files import write_whole
from resfu_jax._output import readers_may_leave

with extra("train"):
    from resfu_jax.training.checkpoint import CheckpointError, Checkpoints
    from resfu_jax.training.config import (
        BackboneConfig,
        CheckpointConfig,
        Config,
        ConfigError,
        DataConfig,
        DepthConfig,
        EvalConfig,
        HeadConfig,
        LossConfig,
        MattingConfig,
        MIRLConfig,
        ModelConfig,
        ObjectiveConfig,
        OptimizerConfig,
        ParallelConfig,
        ProfileConfig,
        check_overrides,
        create_inference,
        create_preprocess,
        define_config,
        load_config,
        model_arguments,
        parse_flags,
        size_multiple,
        task_kind,
    )
    from resfu_jax.training.devices import (
        Layout,
        Profile,
        agreed_stop,
        check_together,
        initialize_distributed,
        is_main_process,
        local_rows,
        one_after_another,
        peak_flops,
        peak_memory,
    )
    from resfu_jax.training.dry_run import dry_run
    from resfu_jax.training.feature_cache import FeatureCache, feature_lookup
    from resfu_jax.training.flops import count_flops, count_step_flops
    from resfu_jax.training.input import (
        blank_batch,
        eval_batches,
        open_sources,
        prepare_embedded,
        train_batches,
    )
    from resfu_jax.training.losses import class_weights, cross_entropy, pixel_weights
    from resfu_jax.training.matting_losses import matting_losses
    from resfu_jax.training.matting_metrics import MattingCounts, count_mattes, matting_errors
    from resfu_jax.training.metrics import SegmentationCounts, count
    from resfu_jax.training.optimizer import (
        accumulate_gradients,
        create_optimizer,
        create_schedule,
        update_ema,
    )
    from resfu_jax.training.pretrained import initial_weights, pretrained_backbone
    from resfu_jax.training.reporting import (
        MetricsWindow,
        NonFiniteError,
        Reporter,
        print_table,
        read_metrics,
    )
    from resfu_jax.training.signals import Stopped, StopSignals
    from resfu_jax.training.state import (
        State,
        abstract_state,
        blaming,
        create_state,
        merge_model,
        split_model,
    )
    from resfu_jax.training.timing import Stopwatch, evaluation_steps
    from resfu_jax.training.validation import validate
    from resfu_jax.training.workdir import (
        check_same_run,
        find_run,
        find_workdir,
        read_config,
        write_config,
    )

__all__ = [
    "BackboneConfig",
    "CheckpointConfig",
    "CheckpointError",
    "Checkpoints",
    "Config",
    "ConfigError",
    "DataConfig",
    "DepthConfig",
    "EvalConfig",
    "FeatureCache",
    "HeadConfig",
    "Layout",
    "LossConfig",
    "MIRLConfig",
    "MattingConfig",
    "MattingCounts",
    "MetricsWindow",
    "ModelConfig",
    "NonFiniteError",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Profile",
    "ProfileConfig",
    "Reporter",
    "SegmentationCounts",
    "State",
    "StopSignals",
    "Stopped",
    "Stopwatch",
    "abstract_state",
    "accumulate_gradients",
    "agreed_stop",
    "blank_batch",
    "blaming",
    "check_overrides",
    "check_same_run",
    "check_together",
    "class_weights",
    "count",
    "count_flops",
    "count_mattes",
    "count_step_flops",
    "feature_lookup",
    "create_inference",
    "create_optimizer",
    "create_preprocess",
    "create_schedule",
    "create_state",
    "cross_entropy",
    "define_config",
    "dry_run",
    "eval_batches",
    "evaluation_steps",
    "find_run",
    "find_workdir",
    "initial_weights",
    "initialize_distributed",
    "is_main_process",
    "load_config",
    "local_rows",
    "matting_errors",
    "matting_losses",
    "merge_model",
    "model_arguments",
    "one_after_another",
    "open_sources",
    "parse_flags",
    "peak_flops",
    "peak_memory",
    "pixel_weights",
    "prepare_embedded",
    "pretrained_backbone",
    "print_table",
    "read_config",
    "read_metrics",
    "readers_may_leave",
    "size_multiple",
    "task_kind",
    "split_model",
    "train_batches",
    "update_ema",
    "validate",
    "write_config",
    "write_whole",
]
