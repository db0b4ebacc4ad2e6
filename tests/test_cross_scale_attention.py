import functools

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from resfu_jax.ops import cross_scale_attention, neighborhood_attention, resize
from resfu_jax.ops._xla import cross_scale

FORMS = ["reference", "xla"]
# (h, w), (H, W), kernel_size: odd and even windows, one that fills the map; several tiles of
# columns; ratios that are whole, that are not, and both.
WHOLE = [
    ((5, 7), (10, 14), 3),
    ((5, 7), (20, 21), (5, 4)),
    ((6, 6), (18, 6), 6),
    ((3, 50), (3, 200), (1, 3)),
]
OTHERS = [
    ((5, 6), (13, 19), 3),
    ((6, 8), (14, 19), 6),
    ((3, 4), (8, 11), 4),
    ((4, 30), (4, 277), (3, 2)),
]
CASES = WHOLE + OTHERS


def arrays(size, out, heads=2, d=4, dv=3, batch=2, dtype=jnp.float32):
    """Queries, keys, values and a cotangent of the result."""
    shapes = [(*out, heads, d), (*size, heads, d), (*size, heads, dv), (*out, heads, dv)]
    keys = jax.random.split(jax.random.key(0), 4)
    return [
        jax.random.normal(key, (batch, *shape), dtype)
        for key, shape in zip(keys, shapes, strict=True)
    ]


def attention(implementation=None, **options):
    # Jitted: op by op the many small compilations take longer.
    return jax.jit(
        functools.partial(cross_scale_attention, implementation=implementation, **options)
    )


def repeated_attention(q, k, v, *, kernel_size):
    """What the published modules do."""

    def repeat(x):
        flat = x.reshape(*x.shape[:3], -1)
        return resize(flat, q.shape[1:3], method="nearest-exact").reshape(
            *q.shape[:3], *x.shape[3:]
        )

    dilation = tuple(max(1, n // m) for n, m in zip(q.shape[1:3], k.shape[1:3], strict=True))
    return neighborhood_attention(
        q, repeat(k), repeat(v), kernel_size=kernel_size, dilation=dilation
    )


def value_and_gradients(f):
    """Of q, k, v and the cotangent: the output and the gradients to q, k and v."""

    def both(q, k, v, cotangent):
        y, vjp = jax.vjp(f, q, k, v)
        return y, *vjp(cotangent)

    return jax.jit(both)


@pytest.fixture
def few_at_a_time(monkeypatch):
    """Strips in turn, some of them together, the last ones by themselves."""
    monkeypatch.setattr(cross_scale, "_SCORES", 3000)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("size, out, kernel", [*CASES, ((8, 8), (6, 16), 3)])
def test_equals_attention_to_repeated_keys_and_values(size, out, kernel):
    inputs = arrays(size, out)
    actual = value_and_gradients(attention("reference", kernel_size=kernel))(*inputs)
    repeated = functools.partial(repeated_attention, kernel_size=kernel)
    for a, b in zip(actual, value_and_gradients(repeated)(*inputs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size, out, kernel", CASES)
def test_forms_agree(size, out, kernel):
    inputs = arrays(size, out)
    results = [
        value_and_gradients(attention(form, kernel_size=kernel))(*inputs)
        for form in ("xla", "reference", None)
    ]
    for actual, wanted, chosen in zip(*results, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(chosen, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size, out, kernel", [CASES[1], CASES[4]])
def test_strips_in_turn(size, out, kernel, few_at_a_time):
    inputs = arrays(size, out)
    f = attention("xla", kernel_size=kernel)
    assert "stablehlo.while" in f.lower(*inputs[:3]).as_text()
    wanted = value_and_gradients(attention("reference", kernel_size=kernel))(*inputs)
    for a, b in zip(value_and_gradients(f)(*inputs), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", FORMS)
def test_attends_to_the_window_alone(implementation):
    """Equal scores, one-hot values: the result lists the members."""
    (h, w), (height, width), kernel = (5, 4), (10, 12), (3, 2)
    v = jnp.eye(h * w).reshape(1, h, w, 1, h * w)
    q, k = jnp.zeros((1, height, width, 1, 1)), jnp.zeros((1, h, w, 1, 1))
    y = attention(implementation, kernel_size=kernel)(q, k, v)
    members = []
    for n, size, taps in zip((h, w), (height, width), kernel, strict=True):
        table = np.zeros((size, n))
        for i in range(size):
            start = max(0, min(i * n // size - taps // 2, n - taps))
            table[i, start : start + taps] = 1 / taps
        members.append(table)
    np.testing.assert_allclose(
        y.reshape(height, width, h, w), np.einsum("ia,jb->ijab", *members), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("implementation", FORMS)
def test_a_pixel_that_two_members_show_counts_twice(implementation):
    # 3 of 5 pixels, none skipped: pixels 0 to 4 show 0 0 1 2 2.
    v = jnp.eye(3).reshape(1, 1, 3, 1, 3)
    q, k = jnp.zeros((1, 1, 5, 1, 1)), jnp.zeros((1, 1, 3, 1, 1))
    y = attention(implementation, kernel_size=(1, 3))(q, k, v)
    wanted = np.array([[2, 1, 0], [2, 1, 0], [1, 1, 1], [0, 1, 2], [0, 1, 2]]) / 3
    np.testing.assert_allclose(y[0, 0, :, 0], wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("x64", [False, True], ids=["float32", "x64"])
def test_equal_sizes_are_neighborhood_attention(x64):
    with jax.enable_x64(x64):
        g = goldens.load("na2d_k3_d1", x64=x64)
        inputs = [jnp.asarray(g.arrays[f"in/{n}"]) for n in ("q", "k", "v", "cotangent")]
        for form in FORMS:
            y, *gradients = value_and_gradients(attention(form, kernel_size=3))(*inputs)
            assert y.dtype == inputs[2].dtype
            goldens.assert_close(y, g.arrays["out/y"], g.tol_out, "y")
            for n, d in zip("qkv", gradients, strict=True):
                goldens.assert_close(d, g.arrays[f"grad/in/{n}"], g.tol_grad, f"d_{n}")


@pytest.mark.parametrize("implementation", FORMS)
def test_heads_are_independent(implementation):
    q, k, v, _ = arrays((4, 5), (8, 10), heads=3)
    f = attention(implementation, kernel_size=3)
    together = f(q, k, v)
    for i in range(3):
        alone = f(*(x[:, :, :, i : i + 1] for x in (q, k, v)))
        np.testing.assert_allclose(together[:, :, :, i : i + 1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.bfloat16, 2e-2), (jnp.float16, 3e-3)])
@pytest.mark.parametrize("implementation", FORMS)
def test_half_precision_is_near_float32(implementation, dtype, tolerance):
    # Scores of up to several hundred: their softmax in bfloat16 would be off by far more.
    q, *others = arrays((5, 6), (10, 18), d=8, dtype=dtype)
    inputs = 8 * q, *others
    actual = value_and_gradients(attention(implementation, kernel_size=3, scale=1.0))(*inputs)
    wide = [x.astype(jnp.float32) for x in inputs]
    wanted = value_and_gradients(attention("reference", kernel_size=3, scale=1.0))(*wide)
    for a, b in zip(actual, wanted, strict=True):
        assert a.dtype == dtype
        goldens.assert_close(a.astype(jnp.float32), b, tolerance, str(dtype))


def test_values_of_another_dtype():
    q, k, v, _ = arrays((4, 5), (8, 10))
    f = attention(kernel_size=3)
    y = f(q.astype(jnp.bfloat16), k.astype(jnp.bfloat16), v)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, f(q, k, v), atol=0.05)


@pytest.mark.parametrize("implementation", [*FORMS, None])
def test_eager_and_vmap(implementation):
    q, k, v, _ = arrays((4, 5), (8, 11))
    f = attention(implementation, kernel_size=3)
    wanted = f(q, k, v)
    np.testing.assert_allclose(f.__wrapped__(q, k, v), wanted, rtol=1e-5, atol=1e-6)
    pairs = [jnp.stack([x, 2 * x]) for x in (q, k, v)]
    together = jax.vmap(f)(*pairs)
    for i in range(2):
        alone = f(*(x[i] for x in pairs))
        np.testing.assert_allclose(together[i], alone, rtol=1e-5, atol=1e-6)


def test_checkpoint_and_second_derivative():
    q, k, v, _ = arrays((3, 3), (6, 3), heads=1, d=2, dv=2, batch=1)

    def hessian(f):
        return jax.jit(jax.jacrev(jax.grad(lambda k: jnp.sum(f(q, k, v) ** 3))))(k)

    wanted = hessian(attention("reference", kernel_size=2))
    actual = hessian(jax.checkpoint(attention(kernel_size=2)))
    np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)


def test_no_image():
    q, k, v, _ = arrays((4, 5), (8, 11), batch=0)
    y = cross_scale_attention(q, k, v, kernel_size=3)
    assert y.shape == (0, 8, 11, 2, 3) and y.dtype == v.dtype


def test_sharded_over_the_batch():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    inputs = arrays((4, 3), (8, 6), heads=1, d=2, dv=2, batch=8)
    f = value_and_gradients(attention(kernel_size=3))
    compiled = f.lower(*(jax.device_put(x, sharding) for x in inputs)).compile()
    text = compiled.as_text()
    assert not any(op in text for op in ("all-gather", "all-reduce", "collective-permute"))


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_export_with_symbolic_batch_and_sizes(implementation):
    constraints = ["h >= 5", "w >= 4", "y >= 2*h", "x >= w"]
    b, h, w, y, x = export.symbolic_shape("b, h, w, y, x", constraints=constraints)
    shapes = [(b, y, x, 1, 3), (b, h, w, 1, 3), (b, h, w, 1, 2), (b, y, x, 1, 2)]
    f = value_and_gradients(attention(implementation, kernel_size=(5, 4)))
    exported = export.export(f)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    reloaded = export.deserialize(exported.serialize(vjp_order=0))
    for size, out in [((5, 4), (10, 4)), ((6, 7), (19, 15))]:
        inputs = arrays(size, out, heads=1, d=3, dv=2)
        for actual, wanted in zip(reloaded.call(*inputs), f(*inputs), strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=2e-6)


def test_export_at_a_whole_ratio():
    b, h, w = export.symbolic_shape("b, h, w", constraints=["h >= 3", "w >= 3"])
    shapes = [(b, 2 * h, 3 * w, 1, 3), (b, h, w, 1, 3), (b, h, w, 1, 2)]
    f = attention("xla", kernel_size=3)
    exported = export.export(f)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    assert "stablehlo.gather" not in exported.mlir_module()
    q, k, v, _ = arrays((5, 4), (10, 12), heads=1, d=3, dv=2)
    np.testing.assert_allclose(exported.call(q, k, v), f(q, k, v), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("implementation", FORMS)
def test_symbolic_sizes_may_be_smaller_than_the_window(implementation):
    """It then is the largest that fits."""
    b, h, w = export.symbolic_shape("b, h, w")
    shapes = [(b, 2 * h, 3 * w, 1, 3), (b, h, w, 1, 3), (b, h, w, 1, 2)]
    f = attention(implementation, kernel_size=(4, 5))
    exported = export.export(f)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    for size, fits in (((3, 2), (3, 2)), ((1, 7), (1, 5)), ((6, 4), (4, 4))):
        q, k, v, _ = arrays(size, (2 * size[0], 3 * size[1]), heads=1, d=3, dv=2)
        wanted = attention(implementation, kernel_size=fits)(q, k, v)
        np.testing.assert_allclose(exported.call(q, k, v), wanted, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    "change, options, message",
    [
        (dict(q=(2, 8, 14, 8)), {}, "q must be .batch, H, W, heads, d"),
        (dict(k=(2, 4, 7, 1, 4)), {}, "q must be .batch, H, W, heads, d"),
        (dict(k=(1, 4, 7, 2, 4)), {}, "q must be .batch, H, W, heads, d"),
        (dict(v=(2, 7, 4, 2, 4)), {}, "v must be k's shape"),
        (dict(), dict(kernel_size=5), "at most 4 for a height of 4 at low and 8 at high"),
        (dict(q=(2, 9, 11, 2, 4)), dict(kernel_size=(4, 12)), "at most 11 for a width of 7"),
        (dict(q=(2, 3, 14, 2, 4)), dict(kernel_size=4), "at most 3 for a height of 4 at low and 3"),
        (dict(), dict(kernel_size=0), "kernel_size must be a positive int"),
        (dict(), dict(kernel_size=(3, 3, 3)), "kernel_size must be a positive int"),
        (dict(), dict(kernel_size=3.0), "kernel_size must be a positive int"),
        (dict(), dict(implementation="cpu"), "implementation must be None or one of"),
        (
            dict(q=(2, 3, 14, 2, 4)),
            dict(implementation="xla"),
            "'xla' does not apply: it needs as many rows of q as of k, got 3 and 4; use None",
        ),
    ],
)
def test_wrong_input(change, options, message, as_users_call):
    shapes = dict(q=(2, 8, 14, 2, 4), k=(2, 4, 7, 2, 4), v=(2, 4, 7, 2, 4)) | change
    options = dict(kernel_size=3) | options
    with pytest.raises(ValueError, match=message):
        cross_scale_attention(*(jnp.zeros(shapes[n]) for n in "qkv"), **options)


def test_keys_of_another_dtype(as_users_call):
    q = jnp.zeros((1, 3, 3, 1, 2))
    with pytest.raises(ValueError, match="k must have q's dtype float32, got bfloat16"):
        cross_scale_attention(q, q.astype(jnp.bfloat16), q, kernel_size=3)
