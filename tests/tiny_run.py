"""Workdirs of train.py: one without its training, random weights, in a second; what is in them."""

import dataclasses
import pathlib

import grain
import jax
import jax.numpy as jnp
import numpy as np
import tiny_config
from flax import nnx

from resfu_jax import data, training
from resfu_jax.model import create_model


def tiny_config_of(resize_scale=1.0, **evaluation) -> training.Config:
    config = tiny_config.get_config()
    config.data.resize_scale = resize_scale
    config.eval = dataclasses.replace(config.eval, **evaluation)
    return config


def make_run(workdir: pathlib.Path, config: training.Config, steps: dict[int, float | None]):
    """Writes config.json and a checkpoint for each step, evaluated with that mIoU.

    Step n has random numbers of seed n, and averages if the config has a decay.
    """
    info = data.dataset_info(config.data.name, config.data.dir)
    workdir.mkdir(parents=True)
    training.write_config(workdir, config)
    optimizer = training.create_optimizer(config.optimizer, config.steps)

    def init():
        arguments = training.model_arguments(config.model)
        model = create_model(**arguments, num_classes=info.num_classes, rngs=nnx.Rngs(0))
        params, rest = (nnx.as_pure(s) for s in nnx.split(model, model.trainable, ...)[1:])
        state = {"step": jnp.int32(0), "params": params, "rest": rest}
        state["optimizer"] = optimizer.init(params)
        return state | ({} if config.optimizer.ema_decay is None else {"ema": params})

    abstract = jax.eval_shape(init)  # to run the initialisers would take long to compile
    checkpoints = training.Checkpoints(workdir / "checkpoints", keep=len(steps))
    position = iter(grain.MapDataset.range(1).to_iter_dataset())
    for step, miou in steps.items():
        rng = np.random.default_rng(step)

        def random(path, x, rng=rng):
            if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
                return jax.random.key(0)
            values = rng.normal(size=x.shape)
            return jnp.asarray(abs(values) if path[0].key == "rest" else values, x.dtype)

        state = jax.tree.map_with_path(random, abstract)  # in rest are variances
        checkpoints.save(step, state, position, miou)
    checkpoints.close()


def losses(lines: list[dict]) -> dict[int, float]:
    """The loss of every step in metrics.jsonl."""
    return {line["step"]: line["loss"] for line in lines if "loss" in line}
