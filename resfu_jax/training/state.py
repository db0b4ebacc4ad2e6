"""The state of a run: everything that a checkpoint holds, as a pytree of arrays."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from resfu_jax.training.config import Config, ConfigError

State = dict[str, Any]
Create = Callable[[nnx.Rngs], Any]  # a model with a filter `trainable`


def split_model(model: Any) -> tuple[nnx.GraphDef, State]:
    """The model without its arrays, and these.

    `params` are those that learn, `rest` the others: batch statistics, dropout, a frozen backbone.
    """
    graphdef, *states = nnx.split(model, model.trainable, ...)
    params, rest = (nnx.as_pure(state) for state in states)
    return graphdef, {"params": params, "rest": rest}


def merge_model(graphdef: nnx.GraphDef, params: Any, rest: Any) -> Any:
    """The model with these arrays; to run it changes none of them."""
    return nnx.merge(graphdef, params, rest, copy=True)


def create_state(
    config: Config,
    create_model: Create,
    optimizer: optax.GradientTransformation,
    weights: Any = None,
) -> tuple[nnx.GraphDef, State]:
    """The model without its arrays, and the state that a run starts from.

    Args:
      config: an experiment.
      create_model: of its task.
      optimizer: of `create_optimizer`.
      weights: of `initial_weights`.
    """
    model = create_model(nnx.Rngs(config.seed))
    if weights is not None:
        nnx.update(model, weights)
    graphdef, arrays = split_model(model)
    state = {
        "step": jnp.zeros((), jnp.int32),
        **arrays,
        "optimizer": optimizer.init(arrays["params"]),
    }
    if config.optimizer.ema_decay is not None:
        state["ema"] = jax.tree.map(jnp.copy, arrays["params"])
    return graphdef, state


def abstract_state(
    config: Config,
    create_model: Create,
    optimizer: optax.GradientTransformation,
    try_out: Callable[[Any], Any],
) -> tuple[nnx.GraphDef, State]:
    """`create_state` in shapes and types only, of a model that can be used.

    Args:
      config: an experiment.
      create_model: of its task.
      optimizer: of `create_optimizer`.
      try_out: does with the model what a step does.

    Raises:
      ValueError: options of the model that do not fit together, or not the size of crops.
    """
    graphdef, state = jax.eval_shape(lambda: create_state(config, create_model, optimizer))
    jax.eval_shape(
        lambda params, rest: try_out(merge_model(graphdef, params, rest)),
        state["params"],
        state["rest"],
    )
    return graphdef, state


@contextlib.contextmanager
def blaming(field: str) -> Iterator[None]:
    """What turns out not to fit is a mistake in this field of the config.

    Raises:
      ConfigError: instead of a `ValueError` or `FileNotFoundError`.
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"{field}: {error}") from error
