"""A workdir as train.py leaves it, without its training: random weights, in a second."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import tiny_config
from flax import nnx

from resfu_jax import data, training
from resfu_jax.model import create_model


class Position:
    """Stands in for the data iterator, whose position is saved, too."""

    def get_state(self):
        return {}


def tiny_config_of(upsampler="bilinear", resize_scale=1.0, **evaluation) -> training.Config:
    config = tiny_config.get_config()
    config.model.head.upsampler = upsampler
    config.data.resize_scale = resize_scale
    config.eval = dataclasses.replace(config.eval, **evaluation)
    return config


def make_run(workdir: pathlib.Path, config: training.Config, steps: dict[int, float | None]):
    """Writes config.json and a checkpoint for each step, evaluated with that mIoU.

    The parameters of step n are those of seed n; there are averages if the config has a decay, of
    seed n + 100.
    """
    info = data.dataset_info(config.data.name)
    workdir.mkdir(parents=True)
    training.write_config(workdir, config)
    optimizer = training.create_optimizer(config.optimizer, config.steps)

    @jax.jit
    def init(seed):
        arguments = training.model_arguments(config.model)
        model = create_model(
            **arguments, num_classes=info.num_classes, rngs=nnx.Rngs(jax.random.key(seed))
        )
        # Random statistics and biases, too: logits are about 0 without.
        params, rest = (nnx.as_pure(s) for s in nnx.split(model, model.trainable, ...)[1:])
        params = jax.tree.map(
            lambda x: x + 0.3 * jax.random.normal(jax.random.key(seed), x.shape), params
        )
        return {
            "step": jnp.int32(seed),
            "params": params,
            "rest": rest,
            "optimizer": optimizer.init(params),
        }

    checkpoints = training.Checkpoints(workdir / "checkpoints", keep=len(steps))
    for step, miou in steps.items():
        state = init(step)
        if config.optimizer.ema_decay is not None:
            state["ema"] = init(step + 100)["params"]
        checkpoints.save(step, state, Position(), None if miou is None else {"miou": miou})
    checkpoints.close()
