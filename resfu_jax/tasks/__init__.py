"""What `train.py` trains: one class a task, which the loop of `train.py` is told of."""

from resfu_jax._extras import extra

with extra("train"):
    from resfu_jax.tasks.depth import Depth
    from resfu_jax.tasks.features import Features
    from resfu_jax.tasks.matting import Matting, matting_model
    from resfu_jax.tasks.segmentation import Segmentation, evaluate_batch
    from resfu_jax.tasks.task import Pictures, Task
    from resfu_jax.training.config import Config

__all__ = [
    "Depth",
    "Features",
    "Matting",
    "Pictures",
    "Segmentation",
    "Task",
    "create_task",
    "evaluate_batch",
    "matting_model",
]

_TASKS: dict[str, type[Task]] = {
    "segmentation": Segmentation,
    "depth": Depth,
    "features": Features,
    "matting": Matting,
}


def create_task(config: Config) -> Task:
    """The task of a config, which `training.validate` has checked."""
    return _TASKS[config.task](config)
