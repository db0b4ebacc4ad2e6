"""`ops.cross_attention`: its forms agree, whatever each pixel sees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resfu_jax.ops import _rows, cross_attention, cross_scale_attention
from resfu_jax.ops.cross_attention import repeated_windows
from resfu_jax.training.flops import count_flops


def arrays(out, size, channels=8, dv=5, batch=2, dtype=jnp.float32):
    shapes = (*out, channels), (*size, channels), (*size, dv), (*out, dv)
    keys = jax.random.split(jax.random.key(0), 4)
    draws = (jax.random.normal(k, (batch, *s)) for k, s in zip(keys, shapes, strict=True))
    return [a.astype(dtype) for a in draws]


def ranges(n_out, n, reach):
    """Every pixel sees what is less than this far from it."""
    at = (np.arange(n_out) + 0.5) / n_out * n - 0.5
    return np.abs(at[:, None] - np.arange(n)) <= reach


def value_and_gradients(implementation, inputs, **options):
    @jax.jit
    def run(q, k, v, cotangent):
        attend = functools.partial(cross_attention, implementation=implementation, **options)
        y, vjp = jax.vjp(attend, q, k, v)
        return y, *vjp(cotangent)

    return run(*inputs)


ANY = np.random.default_rng(0).integers(0, 3, (12, 6)) + np.eye(12, 6, dtype=int)[:, ::-1]
ANY[6:, 2] += 1
WINDOWS = {
    "all": ((24, 20), (6, 5), {}),
    "rows": ((24, 20), (6, 5), dict(rows=ranges(24, 6, 1.2))),
    "columns in tiles": ((3, 96), (3, 24), dict(columns=ranges(96, 24, 2.5))),
    "both, not whole": ((17, 64), (7, 6), dict(rows=ranges(17, 7, 2), columns=ranges(64, 6, 1))),
    "counts": ((12, 20), (6, 5), dict(rows=ANY)),
    "fewer queries than keys": ((2, 3), (6, 5), dict(rows=ranges(2, 6, 2))),
    "traced": ((24, 20), (6, 5), dict(rows=jnp.asarray(ranges(24, 6, 1.2)))),
}


@pytest.mark.parametrize("block_values", [300, 10**6])
@pytest.mark.parametrize("case", WINDOWS)
def test_forms_agree(case, block_values, monkeypatch):
    monkeypatch.setattr(_rows, "BLOCK_VALUES", block_values)
    out, size, windows = WINDOWS[case]
    with jax.enable_x64(True):
        inputs = arrays(out, size, dtype=jnp.float64)
        actual = value_and_gradients("xla", inputs, heads=2, **windows)
        wanted = value_and_gradients("reference", inputs, heads=2, **windows)
    for a, b in zip(actual, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("out, size, kernel", [((10, 14), (5, 7), 3), ((13, 19), (5, 6), 4)])
def test_repeated_windows_are_those_of_attention_across_scales(out, size, kernel):
    """Whose heads have outputs of their own, averaged here."""
    q, k, v, _ = arrays(out, size)

    @jax.jit
    def across(q, k, v):
        q, k = (a.reshape(*a.shape[:3], 2, -1) for a in (q, k))
        v = jnp.stack([v, v], axis=3)
        return cross_scale_attention(q, k, v, kernel_size=kernel).mean(axis=3)

    rows, columns = (repeated_windows(n, m, kernel) for n, m in zip(size, out, strict=True))
    assert rows.shape == (out[0], size[0]) and (rows.sum(axis=1) == kernel).all()
    y = jax.jit(functools.partial(cross_attention, heads=2, rows=rows, columns=columns))(q, k, v)
    np.testing.assert_allclose(y, across(q, k, v), rtol=1e-4, atol=1e-5)


def test_what_is_never_seen_costs_little():
    """A fifth of the map along both axes, of which a block's and a tile's pixels see more."""

    def operations(**windows):
        shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        q, k = shape((1, 256, 256, 32)), shape((1, 32, 32, 32))
        return count_flops(functools.partial(cross_attention, heads=2, **windows), q, k, k)

    table = ranges(256, 32, 3.2)
    assert operations(rows=table, columns=table) < 0.15 * operations()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_types(dtype):
    inputs = arrays((12, 10), (6, 5), dtype=dtype)
    for a, b in zip(
        value_and_gradients(None, inputs, heads=2),
        value_and_gradients(None, [a.astype(jnp.float32) for a in inputs], heads=2),
        strict=True,
    ):
        assert a.dtype == dtype
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * np.abs(b).max())


def test_errors(as_users_call):
    q, k, v, _ = arrays((4, 6), (2, 3))
    for changed, message in (
        (dict(q=q[0]), "q must be"),
        (dict(k=k[..., :4]), "q must be"),
        (dict(v=v[:, :1]), "v must be k's shape"),
        (dict(k=k.astype(jnp.bfloat16)), "k must have q's dtype"),
        (dict(heads=3), "heads must divide the 8 channels"),
        (dict(rows=np.ones((4, 3))), r"rows must be \(4, 2\), got shape \(4, 3\)"),
        (dict(columns=np.zeros((6, 3))), "columns must not be negative, nor 0"),
        (dict(implementation="cpu"), "implementation must be None or one of reference, xla"),
    ):
        with pytest.raises(ValueError, match=message):
            cross_attention(**dict(q=q, k=k, v=v, heads=2) | changed)
