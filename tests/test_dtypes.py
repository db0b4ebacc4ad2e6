import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resfu_jax.ops._cpu.cast import cast

SPECIAL = [0.0, -0.0, 1e-40, -3e-39, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan, -np.nan]
TIES = [1 + (2 * i + 1) * 2.0**-8 for i in range(-4, 4)]  # between two neighbours


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_rounds_as_astype(dtype):
    noise = np.random.default_rng(0).normal(size=4096) * 10.0 ** np.linspace(-38, 38, 4096)
    a = jnp.asarray(np.concatenate([SPECIAL, TIES, noise]), jnp.float32)
    y, expected = jax.jit(lambda a: cast(a, dtype))(a), a.astype(dtype)
    assert y.dtype == dtype
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(expected, np.float32))
    np.testing.assert_array_equal(np.signbit(y[:8]), np.signbit(expected[:8]))


def test_is_differentiated_as_astype():
    a = jnp.asarray([0.3, -7.1], jnp.float32)
    y, vjp = jax.vjp(lambda a: cast(a, jnp.bfloat16), a)
    np.testing.assert_array_equal(vjp(y)[0], y.astype(jnp.float32))
    _, tangent = jax.jvp(lambda a: cast(a, jnp.bfloat16), (a,), (a,))
    np.testing.assert_array_equal(tangent, y)
