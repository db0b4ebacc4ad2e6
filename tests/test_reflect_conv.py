"""Convolutions with reflected borders: in blocks of rows as in one piece."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from resfu_jax.ops import _rows, reflect_conv

# Kernel, dilation, rows of the map: odd, even, along one axis, as far as the map allows.
CASES = [((1, 1), 1, 6), ((3, 3), 1, 6), ((1, 3), 1, 6), ((2, 2), 2, 6), ((3, 5), 1, 2)]


def arrays(kernel=(3, 3), rows=6, dtype=jnp.float32):
    shapes = [(2, rows, 5, 8), (*kernel, 8, 6), (6,), (8,), (8,)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]


def convolve(implementation, dilation=1, norm=True):
    def f(x, kernel, bias, scale, norm_bias):
        options = dict(scale=scale, norm_bias=norm_bias, groups=2) if norm else {}
        options |= dict(dilation=dilation, implementation=implementation)
        return reflect_conv(x, kernel, bias, **options)

    return f


@pytest.fixture
def several_blocks(monkeypatch):
    monkeypatch.setattr(_rows, "BLOCK_VALUES", 160)  # of two rows
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("kernel", "dilation", "rows"), CASES)
def test_blocks_equal_the_whole(kernel, dilation, rows, norm, several_blocks):
    inputs = arrays(kernel, rows)

    def both(implementation):
        f = convolve(implementation, dilation, norm)
        y, vjp = jax.vjp(f, *inputs)
        return y, vjp(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    wanted, actual = (jax.jit(functools.partial(both, n))() for n in ("reference", "cpu"))
    assert actual[0].shape == (2, rows, 5, 6)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5 * np.abs(b).max())


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA's CPU compiler")
def test_gradient_of_the_kernel_is_made_of_products(several_blocks):
    """XLA would make a convolution whose window is the block, for which it has no fast code."""
    f = jax.grad(lambda *a: jnp.square(convolve("cpu")(*a)).sum(), (0, 1))
    text = jax.jit(f).lower(*arrays()).compile().as_text()
    assert set(re.findall(r"window=\{size=(\d+x\d+)", text)) == {"3x3"}


def test_reference_is_what_it_says():
    x, kernel, bias, scale, norm_bias = (np.asarray(a, np.float64) for a in arrays())
    groups = x.reshape(2, 6, 5, 2, 4)
    mean, var = (f(axis=(1, 2, 4), keepdims=True) for f in (groups.mean, groups.var))
    y = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(x.shape) * scale + norm_bias
    y = np.pad(y / (1 + np.exp(-y)), ((0, 0), (1, 1), (1, 1), (0, 0)), "reflect")
    taps = [y[:, u : u + 6, v : v + 5] @ kernel[u, v] for u in range(3) for v in range(3)]
    for implementation in ("reference", "cpu", None):
        actual = convolve(implementation)(*arrays())
        np.testing.assert_allclose(actual, sum(taps) + bias, rtol=1e-4, atol=1e-4)


def test_bfloat16_and_symbolic_sizes():
    wanted = convolve("reference")(*arrays())
    y = convolve(None)(*arrays(dtype=jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), wanted, atol=0.05 * np.abs(wanted).max())
    x, *others = arrays()
    b, h, w = export.symbolic_shape("b, h, w", constraints=["h >= 2", "w >= 2"])
    exported = export.export(jax.jit(lambda x: convolve("cpu")(x, *others)))(
        jax.ShapeDtypeStruct((b, h, w, 8), jnp.float32)
    )
    np.testing.assert_allclose(exported.call(x), wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (dict(kernel=(3, 3, 7, 6)), {}, "kernel must be .kh, kw, channels, outputs."),
        (dict(kernel=(2, 3, 8, 6)), {}, "kernel must span an odd number of pixels"),
        (dict(kernel=(3, 5, 8, 6)), dict(dilation=3), "x must have more than 6 pixels"),
        ({}, dict(scale=jnp.ones(8)), "norm_bias must be given with scale"),
        ({}, dict(implementation="xla"), "implementation must be None or one of reference, cpu"),
    ],
)
def test_wrong_arguments(change, options, message, as_users_call):
    shapes = dict(x=(2, 6, 5, 8), kernel=(3, 3, 8, 6)) | change
    with pytest.raises(ValueError, match=message):
        reflect_conv(*(jnp.zeros(shapes[n]) for n in ("x", "kernel")), **options)
