"""The part of a probe that learns: a 1x1 convolution on the features of frozen networks."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num

from resfu_jax._checks import check_whole, need
from resfu_jax._extras import extra
from resfu_jax.probing.settings import ProbeSettings
from resfu_jax.probing.targets import Target

with extra("train"):
    import optax

Linear = dict[str, Array]  # kernel (C, K) and bias (K,)


def fit_linear(
    rows: Callable[[np.ndarray], tuple[Num[Any, "b n c"], Num[Any, "b n"]]],
    images: int,
    target: Target,
    settings: ProbeSettings,
    *,
    seed: int,
    advance: Callable[[int], Any] = lambda steps: None,
) -> tuple[Linear, list[float]]:
    """A 1x1 convolution fitted by AdamW under a cosine over all steps.

    It starts as PyTorch's `Conv2d(C, K, 1)`, uniform within 1 / sqrt(C). The loss of a step is that
    of the pixels that count, of all of its images.

    Args:
      rows: features and labels of pixels of some views, by their numbers. Image i has the views 2 i
        and 2 i + 1 (mirrored), or i alone without `settings.flip`.
      images: number of images.
      target: what is told of a pixel, by K outputs.
      settings: of these count `epochs`, `batch_size`, `learning_rate`, `weight_decay`, `flip`.
      seed: of the initial values, the order of images and the choice of views.
      advance: is called with the number of steps that were made.

    Returns:
      Kernel `(C, K)` and bias `(K,)`; and the mean loss of every epoch.

    Raises:
      ValueError: the loss is not finite.
    """
    check_whole(images=images)
    steps = settings.epochs * -(-images // settings.batch_size)
    optimizer, step = _stepper(settings.learning_rate, settings.weight_decay, steps, target)
    rng = np.random.default_rng(seed)
    linear: Any = None
    state: Any = None
    epochs = []
    for _ in range(settings.epochs):
        losses = []
        order = rng.permutation(images)
        views = 2 * order + rng.integers(0, 2, images) if settings.flip else order
        for first in range(0, images, settings.batch_size):
            x, y = rows(views[first : first + settings.batch_size])
            if linear is None:
                linear = _initial(seed, x.shape[-1], target.channels)
                state = optimizer.init(linear)
            linear, state, loss = step(linear, state, x, y)
            losses.append(loss)
            advance(1)
        epochs.append(float(np.mean(jax.device_get(losses))))
        need(
            math.isfinite(epochs[-1]),
            f"the loss is {epochs[-1]} in epoch {len(epochs)}: lower learning_rate (it is "
            f"{settings.learning_rate:g}), or look for features that are not finite",
        )
    return linear, epochs


def _initial(seed: int, channels: int, outputs: int) -> Linear:
    """As PyTorch begins; the seed alone decides, not how many images there are."""
    rng, bound = np.random.default_rng([seed, 1]), channels**-0.5
    shapes = {"kernel": (channels, outputs), "bias": (outputs,)}
    draws = {name: rng.uniform(-bound, bound, shape) for name, shape in shapes.items()}
    return {name: jnp.asarray(values, jnp.float32) for name, values in draws.items()}


@functools.lru_cache(maxsize=1)  # all seeds share a program
def _stepper(
    learning_rate: float,
    weight_decay: float,
    steps: int,
    target: Target,
) -> tuple[optax.GradientTransformation, Callable[..., Any]]:
    """The optimiser, and a step of it."""
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    optimizer = optax.adamw(schedule, b1=0.9, b2=0.999, weight_decay=weight_decay)

    def loss_fn(linear, x, y):
        scores = x.astype(jnp.float32) @ linear["kernel"] + linear["bias"][None, None]
        return target.loss(scores, y)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(linear, state, x, y):
        loss, gradient = jax.value_and_grad(loss_fn)(linear, x, y)
        updates, state = optimizer.update(gradient, state, linear)
        return optax.apply_updates(linear, updates), state, loss

    return optimizer, step
