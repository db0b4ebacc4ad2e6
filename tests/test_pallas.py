"""Kernels for TPUs: interpreted on a CPU, and where they are lowered."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import tpu as pltpu

from resfu_jax.ops import cross_scale_attention, fns_attention, local_attention, local_reassembly

CHANNELS = 64


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def local(size, ratio, kernel=3, batch=1, dtype=jnp.float32):
    """With groups and factors."""
    h, w = size
    out = (h * ratio, w * ratio)
    arrays = [
        normal(0, batch, *out, 2 * kernel**2, dtype=dtype),
        normal(1, batch, *out, 2, dtype=dtype),
        normal(2, batch, h, w, CHANNELS, dtype=dtype),
    ]
    return (lambda scores, scale, v, **k: local_attention(scores, v, scale=scale, groups=2, **k)), (
        arrays
    )


def fns(size, ratio, kernel=3, batch=1, dtype=jnp.float32):
    h, w = size
    arrays = [
        normal(0, batch, h * ratio, w * ratio, kernel**2, dtype=dtype),
        normal(1, batch, h, w, CHANNELS, dtype=dtype),
    ]
    return fns_attention, arrays


def cross(size, ratio, kernel=(3, 2), batch=1, dtype=jnp.float32):
    """Of an even window, too."""
    h, w = size
    arrays = [
        normal(0, batch, h * ratio, w * ratio, 2, 8, dtype=dtype),
        normal(1, batch, h, w, 2, 8, dtype=dtype),
        normal(2, batch, h, w, 2, CHANNELS // 2, dtype=dtype),
    ]
    return functools.partial(cross_scale_attention, kernel_size=kernel), arrays


OPS = [local, fns, cross]
every = pytest.mark.parametrize("op", OPS)


def interpreted(f, *arrays):
    with pltpu.force_tpu_interpret_mode():
        return jax.jit(functools.partial(f, implementation="pallas"))(*arrays)


def value_and_gradients(f):
    def g(*arrays):
        y, vjp = jax.vjp(f, *arrays)
        return y, vjp(jnp.cos(y))

    return g


# ------------------------------------------------------------------------------------------ values
# Rows of one program and of several, the last of which hangs over; one tile of columns and two.
@every
@pytest.mark.parametrize(
    ("size", "ratio"),
    [((11, 3), 2), ((3, 5), 3), ((3, 65), 4), ((3, 2), 8), ((3, 2), 16)],
)
def test_equals_the_reference(op, size, ratio):
    f, arrays = op(size, ratio)
    wanted = jax.jit(functools.partial(f, implementation="reference"))(*arrays)
    np.testing.assert_allclose(interpreted(f, *arrays), wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("op", [local, fns, functools.partial(cross, kernel=5)])
def test_wide_windows_and_gradients(op):
    f, arrays = op((5, 7), 2, kernel=5, batch=2) if op in OPS else op((5, 7), 2, batch=2)
    wanted = jax.jit(value_and_gradients(functools.partial(f, implementation="reference")))(*arrays)
    with pltpu.force_tpu_interpret_mode():
        named = functools.partial(f, implementation="pallas")
        actual = jax.jit(value_and_gradients(named))(*arrays)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-5)


@every
def test_bfloat16(op):
    f, arrays = op((3, 5), 2, dtype=jnp.bfloat16)
    actual = interpreted(f, *arrays)
    assert actual.dtype == jnp.bfloat16
    wide = [a.astype(jnp.float32) for a in arrays]
    wanted = f(*wide, implementation="reference")
    assert float(jnp.abs(actual.astype(jnp.float32) - wanted).max() / jnp.abs(wanted).max()) < 2e-2


def test_weights_as_they_are():
    weights, v = normal(0, 1, 6, 10, 9), normal(1, 1, 3, 5, CHANNELS)
    wanted = local_reassembly(weights, v, implementation="reference")
    np.testing.assert_allclose(
        interpreted(local_reassembly, weights, v), wanted, rtol=1e-4, atol=1e-5
    )


# -------------------------------------------------------------------------------- where it applies
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(attn=(1, 7, 10, 9)), r"it needs whole ratios, got \(3, 5\) to \(7, 10\)"),
        (dict(x=(1, 3, 5, 32)), "of less than 64 channels more than half would be padding"),
        (dict(dtype="float16"), "it needs float32 or bfloat16, got float16"),
        (dict(x=(1, 3, 5, 2**15)), "a program would need .* MiB of VMEM, of 40"),
    ],
)
def test_what_it_does_not_apply_to(change, message, as_users_call):
    shapes = dict(attn=(1, 6, 10, 9), x=(1, 3, 5, 64), dtype="float32") | change
    dtype = shapes.pop("dtype")
    arrays = [jnp.zeros(shape, dtype) for shape in shapes.values()]
    with pytest.raises(ValueError, match=f"'pallas' does not apply: {message}; use None"):
        fns_attention(*arrays, implementation="pallas")
    assert "tpu_custom_call" not in lowered(fns_attention, ["tpu"], *arrays)


@pytest.mark.parametrize("known", ["b", "h", None])
def test_symbolic_sizes(known):
    b, h = export.symbolic_shape("b, h")
    b, h = 2 if known == "b" else b, 3 if known == "h" else h
    shapes = [(b, 2 * h, 10, 9), (b, h, 5, 64)]
    arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    assert "tpu_custom_call" not in lowered(fns_attention, ["tpu"], *arrays)
    with pytest.raises(ValueError, match="its sizes must be known"):
        lowered(functools.partial(fns_attention, implementation="pallas"), ["tpu"], *arrays)


@every
def test_by_name_on_a_cpu(op):
    f, arrays = op((3, 4), 2)
    with pytest.raises(ValueError, match="Only interpret mode is supported on CPU"):
        f(*arrays, implementation="pallas")


# ----------------------------------------------------------------------------- where it is lowered
def lowered(f, platforms, *arrays):
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
    return export.export(jax.jit(f), platforms=platforms)(*shapes).mlir_module()


WAYS = {
    "jit": lambda f: f,
    "vmap": lambda f: (
        lambda *a: jax.vmap(f, in_axes=(0, *[None] * (len(a) - 1)))(a[0][None], *a[1:])
    ),
    "checkpoint": jax.checkpoint,
    "gradients": value_and_gradients,
}


@pytest.mark.parametrize("way", WAYS)
@every
def test_on_a_tpu_alone(op, way):
    f, arrays = op((3, 4), 2)
    f = WAYS[way](f)
    assert "tpu_custom_call" in lowered(f, ["tpu"], *arrays)
    for platform in ("cpu", "cuda"):
        assert "tpu_custom_call" not in lowered(f, [platform], *arrays)


@every
def test_one_file_holds_every_platform(op):
    f, arrays = op((3, 4), 2)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
    exported = export.export(jax.jit(f), platforms=["cpu", "cuda", "tpu"])(*shapes)
    assert exported.mlir_module().count("tpu_custom_call") == 1
    again = export.deserialize(exported.serialize(vjp_order=1))
    np.testing.assert_allclose(again.call(*arrays), f(*arrays), rtol=1e-4, atol=1e-5)


def test_vmap_is_one_batch():
    f, (attn, x) = fns((3, 4), 2, batch=2)
    attn = jnp.stack([attn, 2 * attn])
    together = jax.vmap(f, in_axes=(0, None))(attn, x)
    for a, b in zip(together, attn, strict=True):
        np.testing.assert_allclose(a, f(b, x), rtol=1e-4, atol=1e-5)


def test_pallas_is_imported_when_it_is_needed():
    code = """
import sys
import jax, jax.numpy as jnp
from resfu_jax.ops import fns_attention
f = jax.jit(fns_attention)
f(jnp.zeros((1, 6, 8, 9)), jnp.zeros((1, 3, 4, 64)))
assert not [m for m in sys.modules if m.startswith("jax.experimental.pallas")]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
