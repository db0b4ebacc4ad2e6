"""Pooling, pixel shuffle, unfold and grid sampling: parity with PyTorch, and laws."""

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

from resfu_jax.ops.grid_sample import grid_sample
from resfu_jax.ops.pixel_shuffle import pixel_shuffle, pixel_unshuffle
from resfu_jax.ops.pool import adaptive_avg_pool
from resfu_jax.ops.resize import resize
from resfu_jax.ops.unfold import unfold


def check(g, f, convert=goldens.nhwc):
    """Values and gradient of `f` at the golden's input; `convert` brings its outputs to ours."""
    x = jnp.asarray(goldens.nhwc(g.arrays["in/x"]))
    cotangent = jnp.asarray(convert(g.arrays["in/cotangent"]))
    y, dx = jax.jit(lambda x: (f(x), *jax.vjp(f, x)[1](cotangent)))(x)
    assert y.dtype == x.dtype
    goldens.assert_close(y, convert(g.arrays["out/y"]), g.tol_out, g.name)
    goldens.assert_close(dx, goldens.nhwc(g.arrays["grad/in/x"]), g.tol_grad, g.name)


@pytest.mark.parametrize("name", goldens.names("func_adaptive_avg_pool"))
def test_adaptive_avg_pool_parity(name, x64):
    g = goldens.load(name, x64=x64)
    check(g, lambda x: adaptive_avg_pool(x, tuple(g.args["output_size"])))


@pytest.mark.parametrize("name", goldens.names("classic_pixel_shuffle"))
def test_pixel_shuffle_parity(name, x64):
    g = goldens.load(name, x64=x64)
    check(g, lambda x: pixel_shuffle(x, g.args["upscale_factor"]))


@pytest.mark.parametrize("name", goldens.names("func_pixel_unshuffle"))
def test_pixel_unshuffle_parity(name, x64):
    g = goldens.load(name, x64=x64)
    check(g, lambda x: pixel_unshuffle(x, g.args["downscale_factor"]))


@pytest.mark.parametrize("name", goldens.names("func_unfold"))
def test_unfold_parity(name, x64):
    g = goldens.load(name, x64=x64)
    k = g.args["kernel_size"]
    b, c, h, w = g.arrays["in/x"].shape

    def convert(y):  # (B, C K^2, h w) -> (B, h, w, K^2, C)
        return y.reshape(b, c, k * k, h, w).transpose(0, 3, 4, 2, 1)

    options = dict(dilation=g.args["dilation"], padding=g.args["padding"])
    check(g, lambda x: unfold(x, k, **options), convert)


@pytest.mark.parametrize("name", goldens.names("func_grid_sample"))
def test_grid_sample_parity(name, x64):
    g = goldens.load(name, x64=x64)
    options = dict(padding_mode=g.args["padding_mode"], align_corners=g.args["align_corners"])
    grid = jnp.asarray(g.arrays["in/grid"])
    check(g, lambda x: grid_sample(x, grid, **options))

    x = jnp.asarray(goldens.nhwc(g.arrays["in/x"]))
    cotangent = jnp.asarray(goldens.nhwc(g.arrays["in/cotangent"]))
    (d_grid,) = jax.vjp(lambda grid: grid_sample(x, grid, **options), grid)[1](cotangent)
    goldens.assert_close(d_grid, g.arrays["grad/in/grid"], g.tol_grad, name)


@settings(deadline=None, max_examples=8)
@given(sizes=st.tuples(*[st.integers(1, 12)] * 4))
def test_pool_averages_its_cells(sizes):
    h, w, height, width = sizes
    x = np.random.default_rng(0).normal(size=(1, h, w, 2)).astype(np.float32)
    y = jax.jit(adaptive_avg_pool, static_argnums=1)(jnp.asarray(x), (height, width))
    for i in range(height):
        for j in range(width):
            cell = x[
                :,
                i * h // height : -(-(i + 1) * h // height),
                j * w // width : -(-(j + 1) * w // width),
            ]
            np.testing.assert_allclose(y[:, i, j], cell.mean((1, 2)), atol=1e-6)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_unshuffle_inverts_shuffle(factor):
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 2 * factor**2))
    y = pixel_shuffle(x, factor)
    assert y.shape == (2, 3 * factor, 5 * factor, 2)
    np.testing.assert_array_equal(pixel_unshuffle(y, factor), x)


@pytest.mark.parametrize("pad_mode", ["constant", "edge", "reflect"])
@pytest.mark.parametrize(
    ("kernel_size", "dilation", "padding"), [(1, 1, 0), (2, 1, 0), (3, 2, 2), (5, 1, 3)]
)
def test_unfold_lists_the_neighbours(kernel_size, dilation, padding, pad_mode):
    x = np.random.default_rng(0).normal(size=(2, 6, 7, 3)).astype(np.float32)
    y = unfold(jnp.asarray(x), kernel_size, dilation=dilation, padding=padding, pad_mode=pad_mode)
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode=pad_mode)
    windows = np.lib.stride_tricks.sliding_window_view(
        padded, [(kernel_size - 1) * dilation + 1] * 2, axis=(1, 2)
    )[..., ::dilation, ::dilation]  # (B, h', w', C, K, K)
    wanted = windows.reshape(*windows.shape[:4], kernel_size**2).swapaxes(3, 4)
    np.testing.assert_array_equal(y, wanted)


def pixel_grid(height, width):
    """Positions of the pixels of a height x width map, without align_corners."""
    rows, columns = ((jnp.arange(n, dtype=jnp.float32) + 0.5) / n * 2 - 1 for n in (height, width))
    return jnp.stack(jnp.broadcast_arrays(columns[None, :], rows[:, None]), axis=-1)[None]


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (10, 12), (9, 4)])
def test_grid_of_a_resized_map_is_resize(size):
    x = jax.random.normal(jax.random.key(0), (1, 5, 6, 3))

    @jax.jit
    def both(x):
        return grid_sample(x, pixel_grid(*size), padding_mode="border"), resize(x, size)

    np.testing.assert_allclose(*both(x), atol=3e-6)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
def test_single_pixel_and_far_positions(padding_mode, align_corners):
    options = dict(padding_mode=padding_mode, align_corners=align_corners)
    far = jnp.asarray([[-3e9, 0.0], [0.0, 5e8], [7.3, -9.1], [-1.4, 1.2]])[None, None]
    x = jnp.ones((1, 4, 5, 2))
    y = grid_sample(x, far, **options)
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y[0, 0, :3], 0 if padding_mode == "zeros" else 1, atol=1e-6)
    one = grid_sample(x[:, :1, :1], jnp.zeros((1, 1, 1, 2)), **options)
    np.testing.assert_allclose(one, 1)


def test_clamped_coordinates_have_no_gradient():
    x = jax.random.normal(jax.random.key(0), (1, 4, 5, 2))
    grid = jnp.asarray([[1.5, 0.1], [0.1, -1.5]])[None, None]
    loss = lambda g: jnp.sum(grid_sample(x, g, padding_mode="border"))  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(grid)
    assert gradient[0, 0, 0, 0] == 0 == gradient[0, 0, 1, 1]
    assert gradient[0, 0, 0, 1] != 0 != gradient[0, 0, 1, 0]


OPS = {
    "adaptive_avg_pool": lambda x: adaptive_avg_pool(x, (3, 8)),
    "pixel_shuffle": lambda x: pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: pixel_unshuffle(x, 2),
    "unfold": lambda x: unfold(x, 3, padding=1, pad_mode="reflect"),
    "grid_sample": lambda x: grid_sample(
        x, jnp.broadcast_to(1.2 * pixel_grid(3, 7), (x.shape[0], 3, 7, 2))
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_transformations(name):
    """jit, vmap, both directions of differentiation, checkpoint, bfloat16."""
    f = OPS[name]
    x = jax.random.normal(jax.random.key(0), (2, 4, 6, 8))
    y = f(x)
    np.testing.assert_allclose(jax.jit(f)(x), y, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(f)(jnp.stack([x, 2 * x]))[1], 2 * y, atol=4e-6)
    # All are linear in x: forward and reverse mode must agree with the function itself.
    np.testing.assert_allclose(jax.jvp(f, (x,), (x,))[1], y, atol=2e-6)
    gradient = jax.grad(lambda x: jnp.sum(jnp.square(jax.checkpoint(f)(x))))(x)
    np.testing.assert_allclose(jnp.vdot(gradient, x), 2 * jnp.vdot(y, y), rtol=1e-5)
    half = f(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), y, atol=0.03)


@pytest.mark.parametrize("name", OPS)
def test_symbolic_export(name):
    f = OPS[name]
    x = jax.random.normal(jax.random.key(0), (2, 4, 6, 8))
    b, h, w = export.symbolic_shape("b, 2*h, 2*w", constraints=["h >= 2", "w >= 2"])
    exported = export.export(jax.jit(f))(jax.ShapeDtypeStruct((b, h, w, 8), jnp.float32))
    np.testing.assert_allclose(exported.call(x), f(x), atol=1e-6)


@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
def test_grid_sample_symbolic_grid(padding_mode):
    b, h, w, m, n = export.symbolic_shape("b, h, w, m, n")
    x = jax.random.normal(jax.random.key(0), (2, 4, 5, 3))
    grid = 1.3 * jax.random.normal(jax.random.key(1), (2, 6, 7, 2))
    f = jax.jit(lambda x, grid: grid_sample(x, grid, padding_mode=padding_mode))
    exported = export.export(f)(
        jax.ShapeDtypeStruct((b, h, w, 3), jnp.float32),
        jax.ShapeDtypeStruct((b, m, n, 2), jnp.float32),
    )
    np.testing.assert_allclose(exported.call(x, grid), f(x, grid), atol=1e-6)


def test_grid_sample_batch_sharding_needs_no_communication():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x, grid = (
        jax.device_put(jax.random.normal(jax.random.key(i), s), sharding)
        for i, s in enumerate([(8, 4, 5, 2), (8, 6, 7, 2)])
    )

    def loss(x, grid):
        return jnp.sum(jnp.square(grid_sample(x, grid)))

    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, grid).compile().as_text()
    assert "all-gather" not in program and "all-reduce" not in program


X = jnp.zeros((1, 4, 6, 8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: adaptive_avg_pool(X, (0, 2)), "output_size"),
        (lambda: pixel_shuffle(X, 3), "channels"),
        (lambda: pixel_shuffle(X, 0), "factor"),
        (lambda: pixel_unshuffle(X, 3), "divisible"),
        (lambda: unfold(X, 0), "kernel_size"),
        (lambda: unfold(X, 5), "does not fit into height"),
        (lambda: unfold(X, 3, padding=4, pad_mode="reflect"), "padding < height"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
