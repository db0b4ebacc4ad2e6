import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resfu_jax.ops.conv import conv

WIDE, IMAGE = (2, 9, 8, 16), (2, 9, 8, 3)
CASES = [
    (WIDE, (3, 3), dict(padding=1)),
    (IMAGE, (3, 3), dict(padding=1)),
    (WIDE, (3, 3), dict(stride=2)),
    (WIDE, (3, 5), dict(stride=(2, 3), padding=((1, 0), (2, 3)))),
    (IMAGE, (7, 7), dict(stride=4, padding=3)),
    (WIDE, (3, 3), dict(dilation=2, padding=2)),
    (WIDE, (2, 3), dict(stride=2, dilation=(3, 1))),
    ((1, 1, 1, 4), (1, 1), {}),
]


def inputs(size, kernel, dtype=jnp.float32, outputs=5):
    keys = jax.random.split(jax.random.key(0), 2)
    return (
        jax.random.normal(keys[0], size, dtype),
        jax.random.normal(keys[1], (*kernel, size[3], outputs), dtype),
    )


def by_definition(x, kernel, stride=1, padding=0, dilation=1):
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    (s, t), (d, e) = np.broadcast_to(stride, 2), np.broadcast_to(dilation, 2)
    x = np.pad(x, ((0, 0), *np.broadcast_to(padding, (2, 2)), (0, 0)))
    kh, kw = kernel.shape[:2]
    h, w = (x.shape[1] - d * (kh - 1) - 1) // s + 1, (x.shape[2] - e * (kw - 1) - 1) // t + 1
    out = np.zeros((len(x), h, w, kernel.shape[3]))
    for i in range(h):
        for j in range(w):
            window = x[:, s * i :: d, t * j :: e][:, :kh, :kw]
            out[:, i, j] = np.einsum("buvc,uvco->bo", window, kernel)
    return out


@pytest.mark.parametrize("size, kernel, options", CASES)
def test_equals_definition(size, kernel, options):
    x, k = inputs(size, kernel)
    out = jax.jit(functools.partial(conv, **options))(x, k)
    np.testing.assert_allclose(out, by_definition(x, k, **options), atol=2e-5)


def test_one_pixel_is_a_product_of_matrices():
    x, k = inputs(WIDE, (1, 1))
    g = jax.random.normal(jax.random.key(1), (*x.shape[:3], 5))

    def run(implementation):
        y, vjp = jax.vjp(functools.partial(conv, implementation=implementation), x, k)
        return y, *vjp(g)

    for ours, expected in zip(run("cpu"), run("reference"), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", [None, "cpu"])
def test_bfloat16_sums_kernel_gradients_in_float32(implementation):
    # 4096 terms of 1: added up in bfloat16, the sum would stop at 256.
    x = jnp.ones((1, 64, 64, 16), jnp.bfloat16)
    k = jnp.zeros((1, 1, 16, 1), jnp.bfloat16)
    run = functools.partial(conv, implementation=implementation)
    gradient = jax.grad(lambda k: jnp.sum(run(x, k).astype(jnp.float32)))(k)
    assert gradient.dtype == jnp.bfloat16
    assert (gradient == 64 * 64).all()


def test_exports_with_symbolic_sizes():
    b, h, w = jax.export.symbolic_shape("b, h, w")
    exported = jax.export.export(jax.jit(functools.partial(conv, padding=1)))(
        jax.ShapeDtypeStruct((b, h, w, 3), jnp.float32),
        jax.ShapeDtypeStruct((3, 3, 3, 5), jnp.float32),
    )
    x, k = inputs(IMAGE, (3, 3))
    np.testing.assert_allclose(exported.call(x, k), by_definition(x, k, padding=1), atol=1e-5)


@pytest.mark.parametrize(
    "kernel, options, message",
    [
        (jnp.zeros((3, 3, 4, 1)), {}, "same channels"),
        (jnp.zeros((3, 3, 3)), {}, "same channels"),
        (jnp.zeros((3, 3, 3, 1), jnp.bfloat16), {}, "cast it"),
        (
            jnp.zeros((3, 3, 3, 1)),
            {"implementation": "block"},
            "implementation must be None",
        ),
        (jnp.zeros((3, 3, 3, 1)), {"implementation": "cpu"}, "needs a 1 x 1 kernel"),
        (jnp.zeros((1, 1, 3, 1)), {"implementation": "cpu", "stride": 2}, "stride 1"),
        (jnp.zeros((3, 3, 3, 1)), {"stride": 0}, "stride must be one or two positive"),
        (jnp.zeros((3, 3, 3, 1)), {"dilation": (1, 0)}, "dilation must be one or two positive"),
        (jnp.zeros((3, 3, 3, 1)), {"padding": -1}, "padding must not be negative"),
        (jnp.zeros((7, 3, 3, 1)), {}, "kernel must not be larger than the padded x"),
    ],
)
def test_wrong_input(kernel, options, message, as_users_call):
    with pytest.raises(ValueError, match=message):
        conv(jnp.zeros((1, 5, 5, 3)), kernel, **options)
