import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resfu_jax.ops import softmax


@pytest.mark.parametrize("taps", [1, 9, 25, 100])
@pytest.mark.parametrize("scale", [1, 1e4])
@pytest.mark.parametrize("implementation", ["reference", "cpu", None])
def test_values_and_gradient(taps, scale, implementation):
    x, g = scale * jax.random.normal(jax.random.key(0), (2, 2, 3, 4, taps))
    ours, d_ours = jax.vjp(lambda x: softmax(x, implementation=implementation), x)
    expected, d_expected = jax.vjp(jax.nn.softmax, x)
    np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=1e-30)
    np.testing.assert_allclose(d_ours(g)[0], d_expected(g)[0], rtol=1e-4, atol=2e-6 * scale)


@pytest.mark.parametrize("implementation", ["reference", "cpu", None])
def test_in_float32_or_better(implementation):
    y = softmax(jnp.zeros((2, 9), jnp.bfloat16), implementation=implementation)
    assert y.dtype == jnp.float32
