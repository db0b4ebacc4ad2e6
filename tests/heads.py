"""What the tests of heads share."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resfu_jax.heads._layers import BatchNorm
from resfu_jax.ops.resize import resize

WIDTHS = (4, 6, 8, 10)


def pyramid(h=16, w=24, batch=2):
    """Maps as MiT makes them of an image whose quarter is h x w: halved rounding up."""
    maps, keys = [], jax.random.split(jax.random.key(0), 4)
    for key, features in zip(keys, WIDTHS, strict=True):
        maps.append(jax.random.normal(key, (batch, h, w, features)))
        h, w = -(-h // 2), -(-w // 2)
    return maps


class Guided(nnx.Module):
    """A quick upsampler with a guide and a weight of its own, for any size."""

    guide = "features"

    def __init__(self, features, guide_features, *, scale, dtype, param_dtype, rngs):
        self.mix = nnx.Param(rngs.params.normal((guide_features, features), param_dtype))

    def __call__(self, x, guide):
        return resize(x, guide.shape[1:3]) + jnp.tanh(guide @ self.mix[...].astype(guide.dtype))


def assert_runs_or_says_why_not(build):
    """Builds and runs a head, abstractly: at sizes that double, and at others if it can."""
    module = nnx.eval_shape(build)
    run = lambda module, maps, images: module(maps, images)  # noqa: E731

    def shape(h, w):
        return jax.eval_shape(run, module, pyramid(h, w, 1), jnp.ones((1, 4 * h, 4 * w, 3))).shape

    assert shape(8, 16) == (1, 8, 16, 3)
    try:
        assert shape(9, 11) == (1, 9, 11, 3)
    except ValueError as error:  # of an upsampler that knows whole ratios only
        assert re.search(r"of scale 2 (turns|needs)", str(error)), error


def evaluating(model):
    return nnx.view(model, deterministic=True, use_running_average=True, raise_if_not_found=False)


@jax.jit
def run(model, features):
    return model(features)


def randomize_norms(module):
    """Statistics, scales and biases that a test cannot mistake for the identity."""
    rng = np.random.default_rng(0)
    for _, layer in nnx.iter_graph(module):
        if isinstance(layer, BatchNorm):
            for variable in (layer.mean, layer.var, layer.scale, layer.bias):
                variable.set_value(jnp.asarray(rng.uniform(0.5, 1.5, variable.shape), jnp.float32))
    return module


def conv_bn_relu(x, layer):
    """The layer in evaluation, written out; needs rank promotion."""
    kernel = layer.conv.kernel[...]
    if kernel.ndim == 2:
        x = x @ kernel
    else:
        _, h, w, _ = x.shape
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = sum(x[:, i : i + h, j : j + w] @ kernel[i, j] for i in range(3) for j in range(3))
    norm = layer.norm
    x = (x - norm.mean[...]) / jnp.sqrt(norm.var[...] + 1e-5)
    return jnp.maximum(x * norm.scale[...] + norm.bias[...], 0)


def gradients_and_update(module, maps):
    """Gradients to all parameters, and the state after a training step's forward pass."""
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def loss(params):
        model = nnx.merge(graphdef, params, rest, copy=True)
        logits = model(maps)
        seed = jnp.sin(jnp.arange(logits.size)).reshape(logits.shape)
        return jnp.vdot(logits, seed), nnx.state(model, nnx.Not(nnx.Param))

    return jax.jit(jax.grad(loss, has_aux=True))(params)
