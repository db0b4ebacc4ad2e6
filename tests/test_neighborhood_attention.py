import functools

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from resfu_jax.ops.neighborhood_attention import neighborhood_attention, window_members

NAMES = goldens.names("na2d")
FORMS = ["reference", "xla"]

# (batch, height, width, heads, d, dv), kernel_size, dilation: one and several tiles, whole and
# ragged; uneven residue classes; windows that reach over more than one neighbouring tile.
CASES = [
    ((1, 5, 7, 1, 3, 3), 3, 1),
    ((2, 17, 9, 2, 4, 2), 5, 1),
    ((1, 9, 19, 1, 2, 5), (4, 2), 1),
    ((1, 11, 10, 2, 2, 2), (1, 9), 1),
    ((1, 21, 13, 1, 2, 2), (13, 3), (1, 4)),
    ((1, 13, 20, 1, 3, 1), (2, 3), (5, 2)),
    ((2, 1, 1, 1, 2, 2), 1, 1),
]


def arrays(size=(2, 9, 11, 2, 4, 3), dtype=jnp.float32):
    *shape, d, dv = size
    keys = jax.random.split(jax.random.key(0), 4)
    return [
        jax.random.normal(key, (*shape, c), dtype)
        for key, c in zip(keys, (d, d, dv, dv), strict=True)
    ]


def attention(implementation=None, **options):
    # Jitted: op by op the many small compilations take longer.
    return jax.jit(
        functools.partial(neighborhood_attention, implementation=implementation, **options)
    )


def value_and_gradients(f):
    """Of q, k, v and the cotangent: the output and the gradients to q, k and v."""

    def both(q, k, v, cotangent):
        y, vjp = jax.vjp(f, q, k, v)
        return y, *vjp(cotangent)

    return jax.jit(both)


@pytest.mark.parametrize("x64", [False, True], ids=["float32", "x64"])
@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_golden(name, implementation, x64):
    with jax.enable_x64(x64):
        g = goldens.load(name, x64=x64)
        q, k, v, cotangent = (
            jnp.asarray(g.arrays[f"in/{n}"]) for n in ("q", "k", "v", "cotangent")
        )
        kernel, dilation = (tuple(g.args[n]) for n in ("kernel_size", "dilation"))
        f = attention(implementation, kernel_size=kernel, dilation=dilation)
        y, *gradients = value_and_gradients(f)(q, k, v, cotangent)
        assert y.dtype == v.dtype
        goldens.assert_close(y, g.arrays["out/y"], g.tol_out, "y")
        for n, d in zip("qkv", gradients, strict=True):
            goldens.assert_close(d, g.arrays[f"grad/in/{n}"], g.tol_grad, f"d_{n}")


@pytest.mark.parametrize("name", NAMES)
def test_window_members_of_goldens(name):
    g = goldens.load(name)
    for axis, kernel, dilation in zip("hw", g.args["kernel_size"], g.args["dilation"], strict=True):
        wanted = g.arrays[f"const/index_{axis}"]
        np.testing.assert_array_equal(window_members(len(wanted), kernel, dilation), wanted)


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("size, kernel, dilation", [((9, 6), (4, 3), 1), ((8, 7), (3, 2), (2, 3))])
def test_attends_to_the_window_alone(implementation, size, kernel, dilation):
    # Equal scores, one-hot values: the output lists the members, each with weight 1 / (Kr Kc).
    h, w = size
    q = jnp.zeros((1, h, w, 1, 1))
    v = jnp.eye(h * w).reshape(1, h, w, 1, h * w)
    y = attention(implementation, kernel_size=kernel, dilation=dilation)(q, q, v)
    steps = (dilation, dilation) if isinstance(dilation, int) else dilation
    members = []
    for n, size_, step in zip(size, kernel, steps, strict=True):
        table = np.zeros((n, n))
        for i in range(n):
            residue_class = list(range(i % step, n, step))
            start = max(0, min(i // step - size_ // 2, len(residue_class) - size_))
            table[i, residue_class[start : start + size_]] = 1 / size_
        members.append(table)
    np.testing.assert_allclose(
        y.reshape(h, w, h, w), np.einsum("ia,jb->ijab", *members), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("size, kernel, dilation", CASES)
def test_forms_agree(size, kernel, dilation):
    inputs = arrays(size)
    results = [
        value_and_gradients(attention(form, kernel_size=kernel, dilation=dilation))(*inputs)
        for form in ("xla", "reference")
    ]
    for actual, wanted in zip(*results, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("implementation", FORMS)
def test_window_of_the_whole_map_is_plain_attention(implementation):
    q, k, v, _ = arrays((2, 5, 11, 2, 4, 3))
    y = attention(implementation, kernel_size=(5, 11), scale=0.7)(q, k, v)

    def flat(x):
        return x.reshape(2, 55, *x.shape[3:])

    scores = 0.7 * jnp.einsum("bihd,bjhd->bhij", flat(q), flat(k))
    wanted = jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(scores), flat(v))
    np.testing.assert_allclose(flat(y), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", FORMS)
def test_constants_stay_constant(implementation):
    q, k, v, _ = arrays((1, 10, 7, 2, 3, 3))
    v = jnp.broadcast_to(v[:, :1, :1], v.shape)
    y = attention(implementation, kernel_size=3, dilation=2)(100 * q, k, v)
    np.testing.assert_allclose(y, v, rtol=1e-5)


def test_heads_are_independent():
    q, k, v, _ = arrays((1, 9, 4, 2, 3, 2))
    f = attention(kernel_size=3)
    together = f(q, k, v)
    for i in range(2):
        alone = f(*(x[:, :, :, i : i + 1] for x in (q, k, v)))
        np.testing.assert_allclose(together[:, :, :, i : i + 1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", FORMS)
def test_jit_and_vmap(implementation):
    q, k, v, _ = arrays((2, 9, 4, 1, 3, 2))
    f = attention(implementation, kernel_size=(3, 4), dilation=(2, 1))
    wanted = f(q, k, v)
    np.testing.assert_allclose(f.__wrapped__(q, k, v), wanted, rtol=1e-5, atol=1e-6)  # eager
    pairs = [jnp.stack([x, 2 * x]) for x in (q, k, v)]
    together = jax.vmap(f)(*pairs)
    for i in range(2):
        alone = f(*(x[i] for x in pairs))
        np.testing.assert_allclose(together[i], alone, rtol=1e-5, atol=1e-6)


def test_second_derivative_and_checkpoint():
    q, k, v, _ = arrays((1, 9, 3, 1, 2, 2))

    def hessian(f):
        return jax.jit(jax.jacrev(jax.grad(lambda v: jnp.sum(f(q, v, v) ** 3))))(k)

    wanted = hessian(attention("reference", kernel_size=3))
    actual = hessian(jax.checkpoint(attention("xla", kernel_size=3)))
    np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.bfloat16, 2e-2), (jnp.float16, 3e-3)])
@pytest.mark.parametrize("implementation", FORMS)
def test_half_precision_is_near_float32(implementation, dtype, tolerance):
    # Scores of up to several hundred: their softmax in bfloat16 would be off by far more.
    q, k, v, cotangent = (x.astype(dtype) for x in arrays((1, 17, 9, 1, 8, 4)))
    q = 8 * q
    f = attention(implementation, kernel_size=5, scale=1.0)
    actual = value_and_gradients(f)(q, k, v, cotangent)
    wide = [x.astype(jnp.float32) for x in (q, k, v, cotangent)]
    wanted = value_and_gradients(attention("reference", kernel_size=5, scale=1.0))(*wide)
    for a, b in zip(actual, wanted, strict=True):
        assert a.dtype == dtype
        goldens.assert_close(a.astype(jnp.float32), b, tolerance, str(dtype))


def test_values_of_another_dtype():
    q, k, v, _ = arrays()
    f = attention(kernel_size=3)
    y = f(q.astype(jnp.bfloat16), k.astype(jnp.bfloat16), v)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, f(q, k, v), atol=0.05)


def test_tiles_keep_no_windows_and_no_probabilities():
    inputs = arrays((1, 32, 32, 1, 8, 8))

    def temporaries(form):
        f = value_and_gradients(attention(form, kernel_size=7))
        return f.lower(*inputs).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("xla") < temporaries("reference") / 8


def test_sharded_over_the_batch():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    inputs = arrays((8, 9, 4, 1, 2, 2))
    f = value_and_gradients(attention(kernel_size=(5, 3)))
    sharded = [jax.device_put(x, sharding) for x in inputs]
    compiled = f.lower(*sharded).compile()
    text = compiled.as_text()
    assert not any(op in text for op in ("all-gather", "all-reduce", "collective-permute"))
    for actual, wanted in zip(compiled(*sharded), f(*inputs), strict=True):
        assert len(actual.sharding.device_set) == 8
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "implementation, sizes", [("reference", [(2, 18, 5)]), (None, [(1, 5, 4), (2, 18, 11)])]
)
def test_export_with_symbolic_batch_and_sizes(implementation, sizes):
    b, h, w = export.symbolic_shape("b, h, w", constraints=["h >= 5", "w >= 4"])
    f = value_and_gradients(attention(implementation, kernel_size=(5, 2), dilation=(1, 2)))
    structs = [jax.ShapeDtypeStruct((b, h, w, 1, c), jnp.float32) for c in (3, 3, 2, 2)]
    reloaded = export.deserialize(export.export(f)(*structs).serialize())
    for size in sizes:
        inputs = arrays((*size, 1, 3, 2))
        for actual, wanted in zip(reloaded.call(*inputs), f(*inputs), strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    "change, options, message",
    [
        (dict(q=(2, 6, 7, 4)), {}, "q and k must be"),
        (dict(k=(2, 6, 7, 1, 4)), {}, "q and k must be"),
        (dict(v=(2, 7, 6, 2, 4)), {}, "v the same up to the last axis"),
        (dict(), dict(kernel_size=7), "the height of q, got 7 [*] 1 = 7 > 6"),
        (dict(), dict(dilation=(1, 3)), "the width of q, got 3 [*] 3 = 9 > 7"),
        (dict(), dict(kernel_size=0), "kernel_size must be a positive int"),
        (dict(), dict(kernel_size=(3, 3, 3)), "kernel_size must be a positive int"),
        (dict(), dict(kernel_size=3.0), "kernel_size must be a positive int"),
        (dict(), dict(dilation=(1, -1)), "dilation must be a positive int"),
        (dict(), dict(implementation="tile"), "implementation must be None or one of"),
    ],
)
def test_wrong_input(change, options, message, as_users_call):
    shapes = dict.fromkeys("qkv", (2, 6, 7, 2, 4)) | change
    options = dict(kernel_size=3) | options
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(*(jnp.zeros(shapes[n]) for n in "qkv"), **options)


def test_keys_of_another_dtype(as_users_call):
    q = jnp.zeros((1, 3, 3, 1, 2))
    with pytest.raises(ValueError, match="k must have q's dtype float32, got bfloat16"):
        neighborhood_attention(q, q.astype(jnp.bfloat16), q, kernel_size=3)
