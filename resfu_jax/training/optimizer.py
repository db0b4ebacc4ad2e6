"""AdamW as semantic segmentation uses it: warm-up, polynomial decay, a faster head."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from resfu_jax.training.config import OptimizerConfig


def create_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of the backbone: linear warm-up, then lr · (1 − progress)^power down to 0.

    A run that is not longer than the warm-up ends within it.
    """
    warmup = optax.linear_schedule(
        config.learning_rate * config.warmup_start, config.learning_rate, config.warmup_steps
    )
    decay = optax.polynomial_schedule(
        config.learning_rate, 0.0, config.power, max(steps - config.warmup_steps, 1)
    )
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def decay_mask(params: Any) -> Any:
    """True for parameters that weight decay applies to: not norms, biases, or other vectors."""

    def decays(path: tuple, param: jax.Array) -> bool:
        names = [str(getattr(key, "key", getattr(key, "name", key))).lower() for key in path]
        return param.ndim > 1 and not any("norm" in name or "bias" in name for name in names)

    return jax.tree_util.tree_map_with_path(decays, params)


def head_mask(params: Any) -> Any:
    """True for the parameters under the model's `head`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[0], "key", getattr(path[0], "name", None)) == "head", params
    )


def create_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW whose updates, decay included, are scaled by the head's learning rate multiple.

    Args:
        config: the optimiser's part of an experiment.
        steps: total number of steps, the length of the schedule.
    """
    clip = (
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm)
    )
    return optax.chain(
        clip,
        optax.adamw(
            create_schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
        optax.masked(optax.scale(config.head_learning_rate_multiple), head_mask),
    )


def update_ema(ema: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """Exponential moving average of the parameters, `decay` growing in over the first steps.

    With t the number of steps done, the decay is min(decay, (1 + t) / (10 + t)), so that the random
    initial values are forgotten soon.
    """
    t = step.astype(jnp.float32)
    rate = jnp.minimum(decay, (1.0 + t) / (10.0 + t))
    return jax.tree.map(lambda e, p: rate * e + (1.0 - rate) * p, ema, params)


def accumulate_gradients(
    grad_fn: Callable, params: Any, rest: Any, batch: Any, *, parts: int
) -> tuple[jax.Array, Any, Any]:
    """Sums loss and gradients over parts of a batch, one after the other, to save memory.

    Args:
        grad_fn: (params, rest, part) -> ((loss, new rest), gradients), with losses that add up to
            the batch's.
        params: what the gradients are of.
        rest: other state, passed on from part to part.
        batch: pytree of arrays with the batch axis first.
        parts: how many parts; each takes every `parts`-th example, so that on a mesh no example
            changes its device.

    Returns:
        The loss, the new rest and the gradients of the whole batch.
    """

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    def body(carry: tuple, part: Any) -> tuple[tuple, None]:
        loss, rest, grads = carry
        (part_loss, rest), part_grads = grad_fn(params, rest, part)
        return (loss + part_loss, rest, jax.tree.map(jnp.add, grads, part_grads)), None

    start = (jnp.zeros(()), rest, jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(body, start, jax.tree.map(split, batch))[0]
