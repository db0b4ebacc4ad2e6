"""What the fitted layers of all seeds say of maps of features, and how right they are."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from resfu_jax._checks import need
from resfu_jax.ops.resize import resize
from resfu_jax.probing.fitting import Linear
from resfu_jax.probing.images import Pipeline
from resfu_jax.probing.targets import Target
from resfu_jax.upsamplers import list_upsamplers, takes_values, upsampler_entry


def _scores(linear: Linear, x: Float[Array, "b h w c"]) -> Float[Array, "s b h w k"]:
    """Those of every seed. (One product: an `einsum` is several times slower on a CPU.)"""
    kernels = jnp.moveaxis(linear["kernel"], 0, 1)  # (C, s, K)
    seeds, outputs = kernels.shape[1:]
    y = x.astype(jnp.float32).reshape(-1, x.shape[3]) @ kernels.reshape(x.shape[3], -1)
    y = y + linear["bias"].reshape(1, -1)
    return jnp.moveaxis(y.reshape(*x.shape[:3], seeds, outputs), 3, 0)


@functools.partial(jax.jit, static_argnums=0)
def read_off(
    target: Target, linear: Linear, x: Float[Array, "b h w c"]
) -> Float[Array, "s b h w r"]:
    """What every seed's layer reads off features."""
    return target.read(_scores(linear, x))


@functools.partial(jax.jit, static_argnums=(0, 3))
def answers(
    target: Target, linear: Linear, low: Float[Array, "b h w c"], groups: int
) -> Float[Array, "b h w d"]:
    """The answers of all seeds, once for each group of channels that has weights of its own."""
    a = jnp.moveaxis(target.answer(_scores(linear, low)), 0, 3)
    return jnp.tile(a.reshape(*a.shape[:3], -1), groups)


@functools.partial(jax.jit, static_argnums=(1, 2))
def by_seed(a: Float[Array, "b h w d"], seeds: int, groups: int) -> Float[Array, "s b h w a"]:
    """Of answers that were upsampled the mean over groups, seeds first."""
    a = a.astype(jnp.float32).reshape(*a.shape[:3], groups, seeds, -1).mean(axis=3)
    return jnp.moveaxis(a, 3, 0)


@functools.partial(jax.jit, static_argnums=0)
def count(target: Target, maps: Float[Array, "s b h w r"], labels: Num[Array, "b H W"]) -> Any:
    """Counts of every seed, of maps that are resized to the labels."""

    def of_seed(maps):
        return target.count(resize(maps, labels.shape[1:3], method="bilinear"), labels)

    return jax.lax.map(of_seed, maps)


def value_groups(pipeline: Pipeline) -> int:
    """Groups of channels with weights of their own.

    Probabilities get the mean of all groups' weights.

    Raises:
      ValueError: the upsampler has no weights that could be given to others than the features.
    """
    known = (name for name in list_upsamplers() if takes_values(upsampler_entry(name).cls))
    need(
        pipeline.value_groups > 0,
        f"protocols cannot be 'probabilities' for {pipeline.name!r}: its output is more than a sum "
        "of features with weights, which probabilities could be given; members that have them: "
        f"{', '.join(known)}",
    )
    return pipeline.value_groups


def statistics(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of all metrics that every run has."""
    names = [n for n in runs[0] if n not in ("seed", "loss") and all(n in run for run in runs)]
    values = {name: [run[name] for run in runs] for name in names}
    result = {"mean": {name: float(np.mean(v)) for name, v in values.items()}}
    if len(runs) > 1:
        result["std"] = {name: float(np.std(v, ddof=1)) for name, v in values.items()}
    return result
