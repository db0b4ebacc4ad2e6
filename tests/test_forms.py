"""Which form of an op runs: the one that is asked for, or the best of the platform."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from resfu_jax import create_upsampler
from resfu_jax.ops import conv, fns_attention, local_attention, local_similarity, resize
from resfu_jax.ops._forms import Form, Forms


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


ATTN, X = normal(0, 2, 8, 6, 9), normal(1, 2, 4, 3, 5)


# ------------------------------------------------------------------------------- asked for by name
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fns_attention(ATTN[:, :7], X, implementation="cpu"),
            r"'cpu' does not apply: it needs whole ratios, got \(4, 3\) to \(7, 6\); use None",
        ),
        (
            lambda: resize(X, (8, 7), method="nearest", implementation="xla"),
            "'xla' does not apply: nearest needs whole ratios",
        ),
        (
            lambda: local_similarity(X, X, kernel_size=3, implementation="pallas"),
            "of reference, xla, cpu for local_similarity, got 'pallas' .no such form",
        ),
        (
            lambda: conv(X, normal(2, 3, 3, 5, 2), implementation="cuda"),
            "must be None or one of reference, cpu for conv, got 'cuda' .unknown",
        ),
        (
            lambda: create_upsampler("carafe", features=8, implementation="cuda"),
            "implementation must be",
        ),
    ],
)
def test_a_form_that_does_not_apply_says_why(call, message, as_users_call):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("size", [(8, 6), (7, 5)])
def test_none_never_fails(size):
    """Also at ratios at which the CPU's form does not apply."""
    attn = normal(0, 2, *size, 9)
    expected = fns_attention(attn, X, implementation="reference")
    np.testing.assert_allclose(fns_attention(attn, X), expected, atol=1e-5)


# ------------------------------------------------------------- None: when the program is lowered
def toy(calls):
    """An op whose forms say of themselves which they are, by a constant."""

    def form(name, number):
        def f(x, *, scale):
            calls.append(name)
            return x * (number * scale)

        return f

    return Forms("toy", form("reference", 7.0), xla=form("xla", 11.0), cpu=Form(form("cpu", 13.0)))


WAYS = {
    "jit": lambda f: f,
    "vmap": lambda f: lambda x: jax.vmap(f)(x[None])[0],
    "checkpoint": jax.checkpoint,
    "grad": lambda f: jax.grad(lambda x: f(x).sum()),
    "grad of checkpoint": lambda f: jax.grad(lambda x: jax.checkpoint(f)(x).sum()),
}


@pytest.mark.parametrize("way", WAYS)
def test_each_platform_has_its_own_form(way):
    op = toy([])
    f = jax.jit(WAYS[way](lambda x: op(None, x, scale=1.0)))
    x = jax.ShapeDtypeStruct(export.symbolic_shape("b, n"), jnp.float32)
    for platform, number in (("cpu", "1.300000e+01"), ("tpu", "1.100000e+01")):
        program = export.export(f, platforms=[platform])(x).mlir_module()
        assert set(re.findall(r"1\.[13]00000e\+01|7\.000000e\+00", program)) == {number}


def test_one_file_holds_every_platform(monkeypatch):
    op = toy([])
    f = jax.jit(lambda x: op(None, x, scale=1.0))
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    exported = export.export(f, platforms=["cpu", "cuda", "tpu"])(shape)
    program = exported.mlir_module()
    assert "1.300000e+01" in program and "1.100000e+01" in program
    again = export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(jnp.ones(3)), 13 * np.ones(3))
    # What this machine has does not matter.
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    np.testing.assert_array_equal(op(None, jnp.ones(3), scale=2.0), 26 * np.ones(3))


def test_other_platforms_forms_are_not_traced():
    """But for its shape: a call that compiles for a CPU has the result of the last one's."""
    calls = []
    op = toy(calls)
    jax.jit(jax.grad(lambda x: op(None, x, scale=1.0).sum()))(jnp.ones(3))
    assert calls.count("cpu") >= 1 and calls.count("xla") <= 2 and "reference" not in calls


def test_forms_inside_of_shard_map():
    """Weights that all devices have get the gradients of all of them."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    x, w = jnp.arange(16.0).reshape(8, 2), jnp.ones((1, 2))
    op = Forms("toy", lambda x, w: x * w, cpu=lambda x, w: x * w)

    def value_and_gradients(x, w):
        y, vjp = jax.vjp(lambda x, w: op(None, x, w), x, w)
        return y, *vjp(y)

    specs = P("d"), P()
    sharded = jax.shard_map(
        value_and_gradients, mesh=mesh, in_specs=specs, out_specs=(P("d"), *specs)
    )
    for a, b in zip(jax.jit(sharded)(x, w), value_and_gradients(x, w), strict=True):
        np.testing.assert_allclose(a, b)


def test_calls_outside_of_jit_compile_once():
    calls = []
    op = toy(calls)
    for _ in range(3):
        op(None, jnp.ones(3), scale=1.0)
    assert calls.count("cpu") == 1
    op(None, jnp.ones(4), scale=1.0)
    assert calls.count("cpu") == 2


INDEXED = "stablehlo.(?:dynamic_)?(gather|scatter)"  # and not in names of functions


def program(f, platform, *arrays):
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
    return export.export(jax.jit(f), platforms=[platform])(*shapes).mlir_module()


def value_and_gradients(f):
    def g(*arrays):
        y, vjp = jax.vjp(f, *arrays)
        return y, vjp(y)

    return g


@pytest.mark.parametrize("op", [fns_attention, local_attention])
def test_windows_are_products_on_accelerators(op):
    f = value_and_gradients(op)
    for platform in ("tpu", "cuda"):
        text = program(f, platform, ATTN, X)
        assert "dot_general" in text
        assert not re.findall(f"stablehlo.while|{INDEXED}", text)
    cpu = program(f, "cpu", ATTN, X)
    assert cpu != program(f, "tpu", ATTN, X)
    named = value_and_gradients(functools.partial(op, implementation="cpu"))
    assert cpu.count("dot_general") == program(named, "cpu", ATTN, X).count("dot_general")


def test_dysample_neither_gathers_nor_scatters_on_a_tpu():
    up = create_upsampler("dysample", features=16, scale=2)
    graphdef, params = nnx.split(up)
    f = value_and_gradients(lambda x: nnx.merge(graphdef, params)(x))
    x = normal(0, 1, 4, 5, 16)
    assert not re.findall(INDEXED, program(f, "tpu", x))
    for platform in ("cpu", "cuda"):
        text = program(f, platform, x)
        assert {"gather", "scatter"} <= set(re.findall(INDEXED, text))
