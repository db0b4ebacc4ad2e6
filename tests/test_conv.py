import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resfu_jax.ops._cpu import conv as _cpu_conv
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


@pytest.fixture
def short_blocks(monkeypatch):
    """Blocks of a row, whatever the kernel's size: several of them."""
    jax.clear_caches()  # of programs with other blocks
    monkeypatch.setattr(_cpu_conv, "block_rows", lambda *args, **options: 1)
    yield
    jax.clear_caches()


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


@pytest.mark.parametrize("implementation", [None, "reference", "cpu"])
@pytest.mark.parametrize(
    "size, kernel, options, outputs",
    # Of the last, the windows are small next to the outputs.
    [(*case, 5) for case in CASES] + [(WIDE, (1, 2), dict(padding=1, dilation=2), 72)],
)
def test_equals_definition(implementation, size, kernel, options, outputs, short_blocks):
    x, k = inputs(size, kernel, outputs=outputs)
    out = jax.jit(functools.partial(conv, implementation=implementation, **options))(x, k)
    np.testing.assert_allclose(out, by_definition(x, k, **options), atol=2e-5)


def assert_gradients_equal_those_of_xla(x, k, options):
    def gradients(implementation):
        def loss(x, k):
            out = conv(x, k, implementation=implementation, **options)
            return jnp.vdot(out, jax.random.normal(jax.random.key(1), out.shape))

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(x, k)

    for ours, expected in zip(gradients("cpu"), gradients("reference"), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("size, kernel, options", CASES)
@pytest.mark.parametrize("rows", ["one", "all"])
def test_gradients_equal_those_of_xla(size, kernel, options, rows, request):
    if rows == "one":
        request.getfixturevalue("short_blocks")
    assert_gradients_equal_those_of_xla(*inputs(size, kernel), options)


@pytest.mark.parametrize("form", ["tap by tap", "rows"])
@pytest.mark.parametrize(
    "size, kernel, options",
    [
        (WIDE, (3, 3), dict(padding=1)),
        (WIDE, (1, 2), dict(padding=1)),
        (IMAGE, (3, 3), dict(padding=1)),
        (WIDE, (3, 2), dict(padding=((1, 0), (2, 3)), dilation=(2, 1))),
        (IMAGE, (3, 3), dict(padding=1, stride=2)),
    ],
)
def test_gradients_of_many_outputs(size, kernel, options, form, monkeypatch, short_blocks):
    """They take the gradient to x from windows, too: tap by tap, where the outputs' is small."""
    x, k = inputs(size, kernel, outputs=72)
    gradient = conv(x, k, **options).size
    # Just enough for the outputs' gradient: the channels of `WIDE` are in several parts.
    values = gradient if form == "tap by tap" else gradient - 1
    monkeypatch.setattr(_cpu_conv, "BLOCK_VALUES", values)
    assert_gradients_equal_those_of_xla(x, k / 8, options)  # of sums of 648, as of those of 45


@pytest.mark.parametrize("channels, outputs, stride", [(16, 1, 1), (16, 1, 2), (2, 5, 1)])
def test_second_derivative(channels, outputs, stride, short_blocks):
    x, k = inputs((1, 3, 3, channels), (2, 2), outputs=outputs)

    def hessian(implementation):
        def loss(x, k):
            return jnp.sum(conv(x, k, stride=stride, implementation=implementation) ** 3)

        return jax.jacrev(jax.grad(loss, argnums=(0, 1)), argnums=(0, 1))(x, k)

    both = map(jax.tree.leaves, map(hessian, ("cpu", "reference")))
    for ours, expected in zip(*both, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("stride", [1, 2])
def test_vmap_over_images_and_kernels(stride, short_blocks):
    x, k = inputs(WIDE, (3, 3))
    x, k = jnp.stack([x, 2 * x]), jnp.stack([k, k + 1])
    together = jax.vmap(functools.partial(conv, stride=stride, implementation="cpu"))(x, k)
    for i in range(2):
        np.testing.assert_allclose(together[i], by_definition(x[i], k[i], stride), atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_bfloat16_sums_kernel_gradients_in_float32(stride, short_blocks):
    # 64 blocks of 64 terms of 1: added up in bfloat16, the sum would stop at 256.
    x = jnp.ones((1, 64 * stride, 64 * stride, 16), jnp.bfloat16)
    k = jnp.zeros((1, 1, 16, 1), jnp.bfloat16)
    run = functools.partial(conv, stride=stride, implementation="cpu")
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
        (jnp.zeros((3, 3, 3, 1)), {"stride": 0}, "stride must be one or two positive"),
        (jnp.zeros((3, 3, 3, 1)), {"dilation": (1, 0)}, "dilation must be one or two positive"),
        (jnp.zeros((3, 3, 3, 1)), {"padding": -1}, "padding must not be negative"),
        (jnp.zeros((7, 3, 3, 1)), {}, "kernel must not be larger than the padded x"),
    ],
)
def test_wrong_input(kernel, options, message, as_users_call):
    with pytest.raises(ValueError, match=message):
        conv(jnp.zeros((1, 5, 5, 3)), kernel, **options)
