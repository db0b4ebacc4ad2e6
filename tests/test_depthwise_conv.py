import functools
import itertools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from resfu_jax.ops.depthwise_conv import depthwise_conv


def _inputs(size=(2, 7, 5, 3), kernel=(3, 3), dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 2)
    return (
        jax.random.normal(keys[0], size, dtype),
        jax.random.normal(keys[1], (*kernel, size[3]), dtype),
    )


def _by_definition(x, kernel):
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    (_, h, w, _), (kh, kw, _) = x.shape, kernel.shape
    out = np.zeros_like(x)
    for i, j, u, v in itertools.product(range(h), range(w), range(kh), range(kw)):
        y, z = i + u - kh // 2, j + v - kw // 2
        if 0 <= y < h and 0 <= z < w:
            out[:, i, j] += kernel[u, v] * x[:, y, z]
    return out


@pytest.mark.parametrize("implementation", [None, "reference", "cpu"])
@pytest.mark.parametrize(
    "size, kernel", [((2, 7, 5, 3), (3, 3)), ((1, 4, 6, 2), (5, 1)), ((2, 1, 1, 4), (3, 5))]
)
def test_equals_definition(implementation, size, kernel):
    x, k = _inputs(size, kernel)
    np.testing.assert_allclose(
        depthwise_conv(x, k, implementation=implementation), _by_definition(x, k), atol=1e-5
    )


@pytest.mark.parametrize("size, kernel", [((2, 7, 5, 3), (3, 3)), ((1, 4, 6, 2), (5, 1))])
def test_gradients_of_shifts_equal_those_of_the_convolution(size, kernel):
    x, k = _inputs(size, kernel)
    seed = jax.random.normal(jax.random.key(1), size)

    def gradients(implementation):
        def loss(x, k):
            return jnp.vdot(depthwise_conv(x, k, implementation=implementation), seed)

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(x, k)

    for ours, expected in zip(gradients("cpu"), gradients("reference"), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_second_derivative():
    x, k = _inputs((1, 3, 3, 1))

    def hessian(implementation):
        def loss(k):
            return jnp.sum(depthwise_conv(x, k, implementation=implementation) ** 3)

        return jax.jacrev(jax.grad(loss))(k)

    np.testing.assert_allclose(hessian("cpu"), hessian("reference"), rtol=1e-4, atol=1e-4)


def test_vmap_over_images_and_kernels():
    x, k = _inputs()
    x, k = jnp.stack([x, 2 * x]), jnp.stack([k, k + 1])
    shifts = functools.partial(depthwise_conv, implementation="cpu")
    together = jax.vmap(shifts)(x, k)
    for i in range(2):
        np.testing.assert_allclose(together[i], _by_definition(x[i], k[i]), atol=1e-5)


def test_bfloat16_sums_kernel_gradients_in_float32():
    # 64 x 64 terms of 1: added up in bfloat16, the sum would stop at 256.
    x = jnp.ones((1, 64, 64, 1), jnp.bfloat16)
    k = jnp.zeros((3, 3, 1), jnp.bfloat16)
    gradient = jax.grad(
        lambda k: jnp.sum(depthwise_conv(x, k, implementation="cpu").astype(jnp.float32))
    )(k)
    assert gradient.dtype == jnp.bfloat16
    assert gradient[1, 1, 0] == 64 * 64


def test_exports_with_symbolic_sizes():
    b, h, w = jax.export.symbolic_shape("b, h, w")
    exported = jax.export.export(jax.jit(functools.partial(depthwise_conv, implementation="cpu")))(
        jax.ShapeDtypeStruct((b, h, w, 3), jnp.float32),
        jax.ShapeDtypeStruct((3, 3, 3), jnp.float32),
    )
    x, k = _inputs()
    np.testing.assert_allclose(exported.call(x, k), _by_definition(x, k), atol=1e-5)


@pytest.mark.parametrize(
    "kernel, options, message",
    [
        (jnp.zeros((3, 3, 4)), {}, "same channels"),
        (jnp.zeros((2, 3, 3)), {}, "odd sides"),
        (jnp.zeros((3, 3, 3), jnp.bfloat16), {}, "cast it"),
        (
            jnp.zeros((3, 3, 3)),
            {"implementation": "shift"},
            "implementation must be None",
        ),
    ],
)
def test_wrong_input(kernel, options, message, monkeypatch):
    # Users run without the shape checks that the tests turn on.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        depthwise_conv(jnp.zeros((1, 5, 5, 3)), kernel, **options)
