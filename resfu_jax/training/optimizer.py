"""The optimisers: warm-up, polynomial or cosine decay, a rate for every part."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from resfu_jax._checks import check_whole, need
from resfu_jax.training.config import OptimizerConfig

_UNDECAYED = ("norm", "bias", "position", "token", "register")  # parts of names


def create_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of the backbone: linear warm-up, then decay to the final rate.

    With steps counted from 0 to T - 1, W steps of warm-up, lr the peak and s = `warmup_start`:

        step < W:   lr · (s + (1 - s) · step / W)
        step >= W:  (lr - final) · (1 - (step - W) / (T - 1 - W))^power + final

    so the peak is the rate of step W, and `final` that of the last step, T - 1, as MMEngine's
    `PolyLR` reaches its `eta_min`. With cosine decay, (1 + cos(pi (step - W) / (T - 1 - W))) / 2
    stands in the place of the power (Loshchilov and Hutter, ICLR 2017, without restarts). A run of
    W + 1 steps or fewer ends before the decay begins.

    With `milestones` M instead: lr · 0.1^(number of m in M with step >= m).
    """
    warmup = optax.linear_schedule(
        config.learning_rate * config.warmup_start, config.learning_rate, config.warmup_steps
    )
    decay: optax.Schedule
    if config.milestones:
        tenths = {m - config.warmup_steps: 0.1 for m in config.milestones}
        decay = optax.piecewise_constant_schedule(config.learning_rate, tenths)
        return optax.join_schedules([warmup, decay], [config.warmup_steps])
    length = max(steps - 1 - config.warmup_steps, 1)
    if config.decay == "cosine":
        floor = config.final_learning_rate / config.learning_rate
        decay = optax.cosine_decay_schedule(config.learning_rate, length, alpha=floor)
    else:
        decay = optax.polynomial_schedule(
            config.learning_rate, config.final_learning_rate, config.power, length
        )
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def decay_mask(params: Any) -> Any:
    """True for parameters that weight decay applies to.

    Not to norms, biases and other vectors, nor to positions, class token and registers of a ViT,
    which timm's `no_weight_decay` exempts (`pos_embed`, `cls_token`, `reg_token`). The axis that
    counts the blocks of a `ViT` with `scan` makes no vector a matrix.
    """

    def decays(path: tuple, param: jax.Array) -> bool:
        keys = _keys(path)
        names = [name.lower() for name in map(str, keys)]
        return param.ndim - _is_stacked(keys) > 1 and not any(
            part in name for name in names for part in _UNDECAYED
        )

    return jax.tree_util.tree_map_with_path(decays, params)


def learning_rate_multiples(config: OptimizerConfig, params: Any) -> Any:
    """Learning rate of every parameter over that of the schedule, a number or, of blocks with a
    leading axis that counts them (`ViT` with `scan`), an array that multiplies the parameter.

    Under `head` it is `head_learning_rate_multiple`, times `upsampler_learning_rate_multiple`
    under `head.upsample`. Under `backbone` it is `layer_decay`^(L + 1 - n), with the L blocks of
    all stages numbered n = 1 .. L, as in BEiT (Bao et al., ICLR 2022), timm and MMSegmentation:

        0      embeddings, tokens and positions; the stem of a ResNet
        1 .. L the blocks; with block n, what a stage has before it (its embedding) or, at the end
               of a stage that others follow, after it (its norm)
        L + 1  the norm after the last block: full rate
    """
    # (stage, block) of every block, in order; a backbone of one stage has (0, block).
    blocks = sorted({block for path in _paths(params) if (block := _block(path)) is not None})
    stacked = [p.shape[0] for keys, p in _by_keys(params) if _in_stacked_backbone(keys)]
    if stacked:
        blocks = [(0, i) for i in range(stacked[0])]

    def multiple(path: tuple, param: Any) -> float | np.ndarray:
        keys = _keys(path)
        if keys[0] == "head":
            upsampler = "upsample" in keys
            return config.head_learning_rate_multiple * (
                config.upsampler_learning_rate_multiple if upsampler else 1.0
            )
        if config.layer_decay == 1.0 or not blocks:
            return 1.0
        if _in_stacked_backbone(keys):
            each = config.layer_decay ** np.arange(len(blocks), 0, -1)
            return each.reshape(-1, *[1] * (param.ndim - 1))
        return config.layer_decay ** (len(blocks) + 1 - _layer(keys, blocks))

    return jax.tree_util.tree_map_with_path(multiple, params)


def _layer(keys: tuple, blocks: list[tuple[int, int]]) -> int:
    """The number of a parameter of the backbone in the list above."""
    block = _block(keys)
    if block is not None:
        return blocks.index(block) + 1
    if keys[1] != "stages":
        return len(blocks) + 1 if keys[1] in ("norm", "head") else 0
    stage, part = keys[2:4]
    inside = [n for n, (s, _) in enumerate(blocks, 1) if s == stage]
    if part == "norm":
        return inside[-1] + (inside[-1] == len(blocks))
    return inside[0] if inside[0] > 1 else 0


def _keys(path: tuple) -> tuple:
    return tuple(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))) for k in path)


def _by_keys(params: Any) -> list[tuple[tuple, Any]]:
    return [(_keys(path), p) for path, p in jax.tree_util.tree_flatten_with_path(params)[0]]


def _paths(params: Any) -> list[tuple]:
    return [keys for keys, _ in _by_keys(params)]


def _is_stacked(keys: tuple) -> bool:
    """Whether a parameter has a leading axis that counts blocks: blocks.PART and not blocks.I."""
    after = keys[keys.index("blocks") + 1 :] if "blocks" in keys else ()
    return bool(after) and not isinstance(after[0], int)


def _in_stacked_backbone(keys: tuple) -> bool:
    return keys[:2] == ("backbone", "blocks") and _is_stacked(keys)


def _block(keys: tuple) -> tuple[int, int] | None:
    """(stage, block) that a parameter of the backbone is in.

    ViT: blocks.I, or blocks.PART, of all: None; MiT: stages.S.blocks.I; ResNet: stages.S.I.
    """
    if keys[:2] == ("backbone", "blocks"):
        return None if _is_stacked(keys) else (0, keys[2])
    if keys[:2] != ("backbone", "stages"):
        return None
    stage, *inside = keys[2:]
    number = inside[1] if inside[0] == "blocks" else inside[0]
    return (stage, number) if isinstance(number, int) else None


def create_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW or SGD, whose updates, decay included, are scaled by `learning_rate_multiples`.

    Args:
      config: the optimiser's part of an experiment.
      steps: total number of steps, the length of the schedule.
    """
    clip = (
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm)
    )
    schedule = create_schedule(config, steps)
    if config.name == "sgd":
        rule = optax.chain(
            optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
            optax.sgd(schedule, momentum=config.beta1),
        )
    else:
        adam = optax.nadamw if config.name == "nadam" else optax.adamw
        rule = adam(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        )

    def scaled(updates: Any, params: Any) -> Any:
        del params
        multiples = learning_rate_multiples(config, updates)
        return jax.tree.map(_times, updates, multiples)

    return optax.chain(clip, rule, optax.stateless(scaled))


def _times(update: jax.Array, multiple: float | np.ndarray) -> jax.Array:
    if isinstance(multiple, np.ndarray):
        return update * jnp.asarray(multiple, update.dtype)
    return update if multiple == 1.0 else update * multiple


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

    Raises:
      ValueError: the batch does not divide into so many parts.
    """
    check_whole(parts=parts)
    if parts == 1:
        (loss, rest), grads = grad_fn(params, rest, batch)
        return loss, rest, grads
    for size in {x.shape[0] for x in jax.tree.leaves(batch)}:
        need(size % parts == 0, f"parts must divide the batch of {size}, got {parts}")

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    def body(carry: tuple, part: Any) -> tuple[tuple, None]:
        loss, rest, grads = carry
        (part_loss, rest), part_grads = grad_fn(params, rest, part)
        return (loss + part_loss, rest, jax.tree.map(jnp.add, grads, part_grads)), None

    start = (jnp.zeros(()), rest, jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(body, start, jax.tree.map(split, batch))[0]
