"""Ops in blocks of rows equal their reference, however the rows are cut."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resfu_jax.ops import _rows as row_blocks
from resfu_jax.ops import (
    deformable_attention,
    deformable_sample,
    fns_attention,
    local_attention,
    local_reassembly,
    local_similarity,
    norm_linear,
)
from resfu_jax.ops._cpu import cells
from resfu_jax.ops._rows import Rows, block_rows, map_row_blocks
from resfu_jax.ops.pcdc import PCDCParameters, pcdc


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(params=[12, 500], ids=["one-row", "some-rows"])
def values(request, monkeypatch):
    jax.clear_caches()  # of programs with other blocks
    monkeypatch.setattr(row_blocks, "BLOCK_VALUES", request.param)
    yield request.param
    jax.clear_caches()


def with_gradients(f, *arrays, **options):
    @jax.jit
    def run(*arrays):
        y, vjp = jax.vjp(functools.partial(f, **options), *arrays)
        return y, vjp(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    return run(*arrays)


def check(f, *arrays):
    """Values and gradients of both implementations."""
    blocks, reference = (
        with_gradients(f, *arrays, implementation=name) for name in ("cpu", "reference")
    )
    chex.assert_trees_all_close(blocks, reference, rtol=2e-4, atol=2e-4)


def pcdc_parameters(width, hidden, groups):
    shapes = [
        *[(3, 3, width // groups, hidden), (hidden,), (width,), (width,)],
        *[(hidden // groups, hidden), (hidden,), (hidden,), (hidden,), (hidden, 9), (9,)],
    ]
    return PCDCParameters(*(normal(i, *s) for i, s in enumerate(shapes)))


def pcdc_of_two(k, q, parameters, implementation):
    return pcdc(
        k, q, parameters, dilation=2, groups=2, norm_groups=4, implementation=implementation
    )


@pytest.mark.parametrize("size", [(6, 10), (12, 10), (9, 7)])
def test_pcdc(size, values):
    """The full map, the key of a whole ratio, and a key that is resized."""
    k, q = normal(20, 2, 6, 5, 4), normal(21, 2, *size, 4)
    check(pcdc_of_two, k, q, pcdc_parameters(4, 8, 2))


@pytest.mark.parametrize("size", [(6, 10), (12, 10)])
def test_pcdc_in_bfloat16(size, values, monkeypatch):
    """Blocks of any size as one block; what that is worth, the common suite tests."""
    arrays = normal(20, 2, 6, 5, 4), normal(21, 2, *size, 4), pcdc_parameters(4, 8, 2)

    def run():
        f = functools.partial(pcdc_of_two, implementation="cpu")
        ones = jnp.ones((2, *size, 9), jnp.bfloat16)
        gradients = jax.jit(lambda *arrays: jax.vjp(f, *arrays)[1](ones))(
            *jax.tree.map(lambda a: a.astype(jnp.bfloat16), arrays)
        )
        return jax.tree.map(lambda a: a.astype(jnp.float32), gradients)

    in_blocks = run()
    monkeypatch.setattr(row_blocks, "BLOCK_VALUES", 10**9)
    for a, b in zip(*map(jax.tree.leaves, (in_blocks, run())), strict=True):
        assert jnp.linalg.norm(a - b) <= 0.03 * jnp.linalg.norm(b)


POINTS = 4 * jax.random.uniform(jax.random.key(4), (2, 6, 5, 2, 3, 2)) - 0.5
QKV = [normal(0, 2, 6, 5, 8), normal(1, 2, 3, 4, 8), normal(2, 2, 3, 4, 4)]


def test_deformable_attention(values):
    def f(q, k, v, points, bias, implementation):
        return deformable_attention(
            q, k, v, points, heads=2, bias=bias, implementation=implementation
        )

    check(f, *QKV, POINTS, normal(3, 2, 3, 4))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_heads_of_deformable_attention(heads):
    """One head of two groups, a head of each, two heads of each: as the formula stands."""
    bias = normal(3, heads, 3, 8 // heads)

    def formula(q, k, v, points, bias):
        def by_head(samples):
            """Points before all channels, then heads."""
            b, hh, ww, groups, p, d = samples.shape
            return jnp.moveaxis(samples, 3, 4).reshape(b, hh, ww, p, heads, groups * d // heads)

        keys, values = (by_head(deformable_sample(a, points)) for a in (k, v))
        keys = keys + jnp.moveaxis(bias, 0, 1)[None, None, None]
        scores = jnp.einsum("bhwnd,bhwpnd->bhwpn", q.reshape(2, 6, 5, heads, -1), keys)
        out = jnp.einsum("bhwpn,bhwpnc->bhwnc", jax.nn.softmax(scores, axis=3), values)
        return out.reshape(2, 6, 5, -1)

    ours = with_gradients(
        lambda *args: deformable_attention(*args[:4], heads=heads, bias=args[4]),
        *QKV,
        POINTS,
        bias,
    )
    expected = with_gradients(formula, *QKV, POINTS, bias)
    chex.assert_trees_all_close(ours, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("padding_mode", ["zeros", "border"])
def test_deformable_sample(padding_mode, values):
    points = 6 * jax.random.uniform(jax.random.key(4), (2, 8, 5, 2, 1, 2)) - 1
    f = functools.partial(deformable_sample, padding_mode=padding_mode)
    check(f, normal(0, 2, 4, 3, 6), points)


@pytest.mark.parametrize("size", [(8, 6), (7, 9)])  # whole and broken ratios
@pytest.mark.parametrize("groups", [1, 2])
def test_local_attention(size, groups, values):
    scores = normal(0, 2, *size, groups * 9)
    scale, v = normal(1, 2, *size, groups), normal(2, 2, 4, 3, 4)

    def written_out(scores, scale, v):
        weights = jax.nn.softmax(scores.reshape(2, *size, groups, 9)) * scale[..., None]
        weights = weights.reshape(2, *size, groups * 9)
        return local_reassembly(weights, v, groups=groups, implementation="reference")

    def attention(scores, scale, v, **options):
        return local_attention(scores, v, scale=scale, groups=groups, **options)

    expected = with_gradients(written_out, scores, scale, v)
    for options in (dict(), dict(implementation="xla"), dict(implementation="reference")):
        result = with_gradients(attention, scores, scale, v, **options)
        chex.assert_trees_all_close(result, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="scale must be a factor"):
        local_attention(scores, v, scale=jnp.concatenate([scale, scale], 3), groups=groups)


SECOND_ORDER = {
    "local_attention": (local_attention, [(1, 4, 6, 9), (1, 2, 3, 2)], {}),
    "local_similarity": (local_similarity, [(1, 4, 6, 2), (1, 2, 3, 2)], dict(kernel_size=3)),
    "fns_attention": (fns_attention, [(1, 4, 6, 9), (1, 2, 3, 2)], {}),
    "norm_linear": (norm_linear, [(1, 4, 3, 4), (4,), (4,), (4, 2)], dict(norm="layer")),
    "deformable_sample": (deformable_sample, [(1, 2, 3, 2), (1, 4, 6, 1, 1, 2)], {}),
}


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_second_derivatives(name, values):
    """Of blocks, whose first ones are no more than a function that JAX differentiates."""
    f, shapes, options = SECOND_ORDER[name]
    arrays = [0.3 * normal(40 + i, *shape) for i, shape in enumerate(shapes)]
    directions = [normal(50 + i, *shape) for i, shape in enumerate(shapes)]

    def curvature(implementation):
        def along(*arrays):
            loss = lambda *a: jnp.sin(f(*a, implementation=implementation, **options)).sum()  # noqa: E731
            gradients = jax.grad(loss, argnums=range(len(arrays)))(*arrays)
            return sum(jnp.vdot(g, d) for g, d in zip(gradients, directions, strict=True))

        return jax.jit(jax.grad(along, argnums=range(len(arrays))))(*arrays)

    chex.assert_trees_all_close(curvature("cpu"), curvature("reference"), rtol=2e-4, atol=2e-4)


def test_block_rows(monkeypatch):
    monkeypatch.setattr(row_blocks, "BLOCK_VALUES", 100)
    assert block_rows(12, 20) == 4  # the largest divisor of 12 within 5
    assert block_rows(12, 1000) == 1
    assert block_rows(13, 20) == 1
    assert block_rows(4, 1) == 4


def test_overlapping_rows():
    """A moving sum over three rows, times a number that all blocks share."""

    def f(scale, x):
        return (scale * (x[:, :-2] + x[:, 1:-1] + x[:, 2:]),)

    def in_blocks(scale, x):
        (y,) = map_row_blocks(f, 3, (None, Rows(1, 2, 4)), (Rows(1, 2, 2),), scale, x)
        return (y * jnp.arange(6.0)[None, :, None]).sum()

    def written_out(scale, x):
        return (f(scale, x)[0] * jnp.arange(6.0)[None, :, None]).sum()

    check_gradients(in_blocks, written_out, jnp.float32(1.5), normal(0, 2, 8, 3))


@pytest.mark.parametrize("whole_forward", [False, True])
def test_sums_over_blocks(whole_forward):
    """Rows over the root of the sum of all squares; what is shared may be a tree with a gap."""
    rows = Rows(1, 2, 2)

    def f(params, x):
        y = jnp.sin(params["scale"] * x)
        return y, jnp.square(y).sum()

    def normalised(run):
        def loss(scale, x):
            y, square = run(dict(scale=scale, bias=None), x)
            return (y / jnp.sqrt(square) * jnp.arange(8.0)[None, :, None]).sum()

        return loss

    def in_blocks(params, x):
        specs = (None, rows), (rows, None)
        return map_row_blocks(f, 4, *specs, params, x, whole_forward=whole_forward)

    check_gradients(normalised(in_blocks), normalised(f), jnp.float32(1.5), normal(0, 2, 8, 5))


def check_gradients(f, expected, *arguments):
    np.testing.assert_allclose(f(*arguments), expected(*arguments), rtol=1e-5)
    gradients = (jax.jit(jax.grad(g, argnums=(0, 1)))(*arguments) for g in (f, expected))
    chex.assert_trees_all_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA's CPU compiler")
def test_bfloat16_blocks_do_not_widen_the_map():
    """Else each block costs as much as the whole map."""
    block = Rows(1, 2, 2)

    def f(x):
        return map_row_blocks(lambda a: (a * a,), 8, (block,), (block,), x)[0]

    x = normal(0, 1, 16, 5, 3).astype(jnp.bfloat16)
    compiled = jax.jit(f).lower(x).compile()
    updated = re.findall(r"(\w+)\[\S+ dynamic-update-slice", compiled.as_text())
    assert set(updated) == {"bf16" if jax.__version_info__ >= (0, 11, 2) else "u16"}
    np.testing.assert_array_equal(compiled(x), x * x)


@pytest.mark.optimized
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA's CPU compiler")
def test_gradients_of_blocks_do_not_copy_the_map():
    """Each block's gradient takes the block's place, after it was read; else each copies all."""

    def f(x, k):
        own = Rows(1, 4, 4)
        return map_row_blocks(lambda x, k: (x @ k,), 8, (own, None), (own,), x, k)[0]

    x, k = normal(0, 1, 32, 64, 16), normal(1, 16, 16)
    copied = re.findall(
        r"copy[\w.]* = f32\[1,32,64,16\]", _loops(jax.grad(_square(f), (0, 1)), x, k)
    )
    assert copied == []


def _square(f):
    return lambda *args: jnp.square(f(*args)).sum()


def _loops(f, *args) -> str:
    """The text of the bodies of all loops of f, as compiled."""
    text = jax.jit(f).lower(*args).compile().as_text()
    bodies = re.findall(r"body=%([\w.]+)", text)
    assert bodies
    parts = [re.search(rf"^%{re.escape(b)} .*?^}}", text, re.M | re.S) for b in bodies]
    return "\n".join(part.group() for part in parts)


# Cells (h, w), ratio and window, and the patches that they are multiplied in.
@pytest.mark.parametrize(
    ("size", "ratio", "n", "patch"),
    [
        ((8, 8), (2, 2), 5, (4, 4)),
        ((6, 8), (2, 2), 5, (2, 4)),
        ((4, 6), (4, 2), 5, (4, 2)),
        ((4, 4), (4, 4), 5, (1, 4)),
        ((4, 4), (3, 2), 3, (2, 2)),
        ((4, 5), (1, 3), 3, (2, 1)),
        ((5, 7), (2, 2), 5, (1, 1)),
        ((4, 4), (2, 2), 1, (1, 1)),
    ],
)
def test_patches_of_cells(size, ratio, n, patch):
    """`correlate` and `scatter` are the derivatives of `reassemble` as its formula stands."""
    (h, w), groups = size, 2
    out_size = h * ratio[0], w * ratio[1]
    assert cells._patch(h, w, n, ratio) == patch
    y = normal(0, 2, *out_size, 6)
    x = normal(1, 2, h + n - 1, w + n - 1, 6)
    weights = normal(2, 2, *out_size, groups, n * n)

    def form(weights, x, y):
        rows, cols = (jnp.arange(m) // r for m, r in zip(out_size, ratio, strict=True))
        shifts = [(t, s) for t in range(n) for s in range(n)]
        windows = jnp.stack([x[:, rows + t][:, :, cols + s] for t, s in shifts], axis=-1)
        windows, y = (a.reshape(*a.shape[:3], groups, 3, *a.shape[4:]) for a in (windows, y))
        return jnp.einsum("bhwgt,bhwgdt,bhwgd->", weights, windows, y)

    @jax.jit
    def ours(weights, x, y):
        d_weights, d_x = cells.correlate(y, x, n, groups), cells.scatter(weights, y, x.shape)
        return d_weights, d_x, cells.reassemble(weights, x)

    expected = jax.jit(jax.grad(form, (0, 1, 2)))(weights, x, y)
    chex.assert_trees_all_close(ours(weights, x, y), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_samples_of_many_blocks(dtype):
    points = (4 * jax.random.uniform(jax.random.key(4), (2, 16, 5, 2, 1, 2)) - 0.5).astype(dtype)
    f = functools.partial(with_gradients, deformable_sample, normal(0, 2, 4, 3, 600), points)
    chex.assert_trees_all_close(
        f(implementation="cpu"), f(implementation="reference"), rtol=1e-4, atol=1e-3
    )
