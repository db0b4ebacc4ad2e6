"""Maps over rows, and rotary positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resfu_jax import ops
from resfu_jax.ops import _rows


@pytest.mark.parametrize("block_values", [40, 10**6])
def test_map_rows_equals_the_function(block_values, monkeypatch):
    monkeypatch.setattr(_rows, "BLOCK_VALUES", block_values)
    keys = jax.random.split(jax.random.key(0), 3)
    x, weights, cotangent = (
        jax.random.normal(k, s)
        for k, s in zip(keys, [(2, 6, 5, 4), (4, 8), (2, 6, 5, 8)], strict=True)
    )
    row = jnp.arange(6, dtype=jnp.float32)[None, :, None, None]

    def f(x, row, weights):
        return jnp.tanh(x @ weights) * row

    def mapped(x, row, weights):
        return ops.map_rows(f, x, row, shared=weights, values=8)

    for a, b in zip(
        jax.tree.leaves(jax.vjp(mapped, x, row, weights)[1](cotangent)),
        jax.tree.leaves(jax.vjp(f, x, row, weights)[1](cotangent)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mapped(x, row, weights), f(x, row, weights), rtol=1e-6)


def test_rotation_turns_pairs_and_back():
    x, half = jax.random.normal(jax.random.key(0), (3, 8)), jnp.linspace(0, 3, 12).reshape(3, 4)
    angles = jnp.concatenate([half, half], axis=1)
    y = ops.rotate(x, angles)
    turned = jax.lax.complex(x[:, :4], x[:, 4:]) * jax.lax.complex(jnp.cos(half), jnp.sin(half))
    np.testing.assert_allclose(y[:, :4], turned.real, atol=1e-6)
    np.testing.assert_allclose(y[:, 4:], turned.imag, atol=1e-6)
    np.testing.assert_allclose(ops.rotate(y, -angles), x, atol=1e-6)
    assert ops.rotate(x.astype(jnp.float16), 1000 * angles).dtype == jnp.float16
    with pytest.raises(ValueError, match="x must have an even number of channels"):
        ops.rotate(x[:, :3], angles[:, :3])
