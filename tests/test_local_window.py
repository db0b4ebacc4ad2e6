"""What lies beyond the image, and taps that are left out, in every form of `local_attention`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from resfu_jax.ops import local_attention, local_reassembly


def arrays(size=(3, 5), ratio=2, channels=64):
    h, w = size
    scores = jax.random.normal(jax.random.key(0), (1, ratio * h, ratio * w, 25))
    left_out = np.arange(25) % 3 == 1
    scores = jnp.where(jnp.asarray(left_out)[None, None, None], -jnp.inf, scores)
    return scores, jax.random.normal(jax.random.key(1), (1, h, w, channels))


def by_hand(weights, v, mode, ratio=2):
    """Pixel by pixel."""
    padded = np.pad(v[0], ((2, 2), (2, 2), (0, 0)), mode=mode)
    out = np.zeros((1, *weights.shape[1:3], v.shape[3]))
    for i, j in np.ndindex(weights.shape[1:3]):
        window = padded[i // ratio : i // ratio + 5, j // ratio : j // ratio + 5]
        out[0, i, j] = weights[0, i, j] @ window.reshape(25, -1)
    return out


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect"])
@pytest.mark.parametrize("implementation", ["reference", "xla", "cpu", "pallas"])
def test_border(mode, implementation):
    scores, v = arrays()
    weights = jax.nn.softmax(scores)
    wanted = by_hand(np.asarray(weights, np.float64), np.asarray(v, np.float64), mode)

    @jax.jit
    def run(scores, weights, v):
        options = dict(border=mode, implementation=implementation)
        y, vjp = jax.vjp(lambda *a: local_attention(*a, **options), scores, v)
        return y, local_reassembly(weights, v, **options), vjp(jnp.cos(y))

    with pltpu.force_tpu_interpret_mode():
        attended, reassembled, gradients = run(scores, weights, v)
    np.testing.assert_allclose(attended, wanted, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(reassembled, wanted, rtol=1e-4, atol=2e-5)
    for g in gradients:
        assert np.isfinite(g).all()
    # The sum of what a mean passes back is what it got, wherever that goes.
    if mode != "constant":
        np.testing.assert_allclose(gradients[1].sum(), np.cos(wanted).sum(), rtol=1e-3)


def test_a_border_that_does_not_exist_is_named(as_users_call):
    scores, v = arrays()
    with pytest.raises(ValueError, match="mode must be one of"):
        local_attention(scores, v, border="wrap", implementation="xla")
