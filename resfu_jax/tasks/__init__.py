"""What `train.py` trains: one class a task, which the loop of `train.py` is told of."""

from resfu_jax._checks import need
from resfu_jax._extras import extra

with extra("train"):
    from resfu_jax.tasks.depth import Depth, depth_model
    from resfu_jax.tasks.features import Features
    from resfu_jax.tasks.matting import Matting, matting_model
    from resfu_jax.tasks.mirl import MIRL
    from resfu_jax.tasks.segmentation import Segmentation, evaluate_batch
    from resfu_jax.tasks.task import Pictures, Task
    from resfu_jax.training.config import TASK_KINDS, Config

__all__ = [
    "MIRL",
    "Depth",
    "Features",
    "Matting",
    "Pictures",
    "Segmentation",
    "Task",
    "create_task",
    "depth_model",
    "evaluate_batch",
    "matting_model",
    "register_task",
]

_TASKS: dict[str, type[Task]] = {
    "segmentation": Segmentation,
    "depth": Depth,
    "features": Features,
    "matting": Matting,
    "mirl": MIRL,
}


def register_task(name: str, cls: type[Task]) -> None:
    """Makes a task known to `train.py`, under the name that `config.task` has then.

    Of a subclass of a task of this library, configs are checked as those of that task are, and what
    loads its runs loads them. A config file that needs it imports the module that calls this.

    Raises:
      ValueError: the name is taken by another class, or the class is no `Task`.
    """
    need(isinstance(cls, type) and issubclass(cls, Task), f"cls must be a Task, got {cls!r}")
    need(
        _TASKS.setdefault(name, cls) is cls,
        f"name must be new, and {name!r} is {_TASKS[name].__name__}",
    )
    like = (kind for kind, task in _TASKS.items() if kind != name and issubclass(cls, task))
    TASK_KINDS.setdefault(name, next(like, name))


def create_task(config: Config) -> Task:
    """The task of a config, which `training.validate` has checked."""
    return _TASKS[config.task](config)
