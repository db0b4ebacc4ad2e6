"""ReSFU and its ops: what must hold for any input."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from resfu_jax.ops.conv import conv
from resfu_jax.ops.filters import box_filter, gaussian_blur, guided_filter
from resfu_jax.ops.fns_attention import fns_attention
from resfu_jax.ops.grouped_conv import block_diagonal, grouped_conv, grouped_linear
from resfu_jax.ops.norm_linear import norm_linear
from resfu_jax.ops.pcdc import PCDCParameters, pcdc
from resfu_jax.upsamplers import create_upsampler
from resfu_jax.upsamplers.resfu import ReSFU, neighbours_inside

# Every example compiles; the seeds are fixed so that a run repeats.
few = settings(max_examples=6, deadline=None, derandomize=True, database=None)


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def attention(seed, *size, kernel_size=3):
    return jax.nn.softmax(normal(seed, *size, kernel_size**2), axis=-1)


@functools.cache
def resfu(scale=2, **options):
    options = dict(groups=2, gn_dim=2, embedding_dim=8) | options
    return ReSFU(4, 3, scale=scale, rngs=nnx.Rngs(0), **options)


@functools.cache
def compiled(scale=2, **options):
    return jax.jit(resfu(scale, **options).__call__)


# --- fns_attention ---


@few
@given(
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    ratio=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    k=st.sampled_from([1, 3]),
)
@example(size=(3, 2), ratio=(4, 6), k=3)  # half cells
@example(size=(2, 3), ratio=(4, 2), k=3)  # not along both axes
@example(size=(1, 1), ratio=(8, 8), k=5)
def test_fns_attention_forms_agree(size, ratio, k):
    out_size = [n * r for n, r in zip(size, ratio, strict=True)]
    attn, x = attention(0, 2, *out_size, kernel_size=k), normal(1, 2, *size, 3)
    cotangent = normal(2, 2, *out_size, 3)

    @functools.partial(jax.jit, static_argnums=0)
    def f(implementation, attn, x):
        y, vjp = jax.vjp(lambda a, x: fns_attention(a, x, implementation=implementation), attn, x)
        return y, vjp(cotangent)

    reference = f("reference", attn, x)
    for form in ("xla", "cpu"):
        chex.assert_trees_all_close(f(form, attn, x), reference, rtol=1e-5, atol=1e-5)


@few
@given(h=st.integers(1, 5), w=st.integers(1, 5), hh=st.integers(1, 13), ww=st.integers(1, 13))
def test_fns_attention_samples_where_the_formula_says(h, w, hh, ww):
    """Any pair of sizes: a ramp is sampled at its positions."""
    sample = jax.jit(fns_attention)
    for axis, n, m in ((0, h, hh), (1, w, ww)):
        ramp = jnp.arange(n, dtype=jnp.float32)
        x = jnp.broadcast_to(ramp[:, None] if axis == 0 else ramp[None], (h, w))[None, ..., None]
        for tap in range(9):
            attn = jax.nn.one_hot(jnp.full((1, hh, ww), tap), 9)
            y = np.asarray(sample(attn, x)[0, ..., 0])
            step = (tap // 3 if axis == 0 else tap % 3) - 1
            positions = np.clip((np.arange(m) + 0.5) * n / m - 0.5 + step, 0, n - 1)
            wanted = positions[:, None] if axis == 0 else positions[None]
            np.testing.assert_allclose(y, np.broadcast_to(wanted, y.shape), atol=1e-5)


@few
@given(ratio=st.integers(1, 4), implementation=st.sampled_from(["reference", "xla", "cpu"]))
def test_fns_attention_is_convex_and_shifts(ratio, implementation):
    h, w = 7, 6
    f = jax.jit(functools.partial(fns_attention, implementation=implementation))
    attn, x = attention(0, 1, h * ratio, w * ratio), normal(1, 1, h, w, 2)
    y = f(attn, x)
    assert y.max() <= x.max() + 1e-5
    assert y.min() >= x.min() - 1e-5
    np.testing.assert_allclose(f(attn, jnp.full_like(x, 3.5)), 3.5, rtol=1e-6)
    # Moving both inputs by a whole cell moves the interior.
    moved = f(jnp.roll(attn, ratio, axis=1), jnp.roll(x, 1, axis=1))
    inner = slice(3 * ratio, (h - 2) * ratio)
    np.testing.assert_allclose(moved[:, inner], jnp.roll(y, ratio, axis=1)[:, inner], atol=1e-6)


def test_fns_attention_rejects(as_users_call):
    x = normal(0, 1, 4, 4, 2)
    with pytest.raises(ValueError, match="odd K"):
        fns_attention(normal(0, 1, 8, 8, 4), x)
    with pytest.raises(ValueError, match="same batch size"):
        fns_attention(normal(0, 2, 8, 8, 9), x)
    with pytest.raises(ValueError, match="whole ratios"):
        fns_attention(normal(0, 1, 9, 8, 9), x, implementation="cpu")
    with pytest.raises(ValueError, match="implementation must be"):
        fns_attention(normal(0, 1, 8, 8, 9), x, implementation="cuda")


# --- filters and grouped convolutions ---


@few
@given(h=st.integers(1, 9), w=st.integers(1, 9), radius=st.integers(0, 5))
def test_filters_keep_constants(h, w, radius):
    @jax.jit
    def filtered(x, guide):
        return (
            box_filter(x, radius),
            gaussian_blur(x, kernel_size=5, sigma=1.3),
            guided_filter(guide, x, radius=radius, eps=1e-3),
        )

    x = jnp.full((1, h, w, 2), 2.5)
    for y in filtered(x, normal(0, 1, h, w, 2)):
        np.testing.assert_allclose(y, x, rtol=1e-5)


def test_blur_in_bfloat16_keeps_constants():
    # The kernel's numbers, rounded to bfloat16, sum to 0.9980.
    x = jnp.broadcast_to(jnp.arange(1, 2, 2**-7).astype(jnp.bfloat16), (1, 5, 4, 128))
    y = gaussian_blur(x, kernel_size=3)
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(x, np.float32))


def test_box_filter_is_the_mean_of_the_window():
    x = np.asarray(normal(0, 1, 6, 5, 1))
    y = box_filter(jnp.asarray(x), 2)
    for i in range(6):
        for j in range(5):
            window = x[0, max(i - 2, 0) : i + 3, max(j - 2, 0) : j + 3]
            np.testing.assert_allclose(y[0, i, j, 0], window.mean(), rtol=1e-5)


def guided_filter_as_defined(guide, x, radius, eps):
    """Window by window, in float64."""
    guide, x = np.asarray(guide, np.float64), np.asarray(x, np.float64)
    h, w = guide.shape[1:3]
    pixels = [(i, j) for i in range(h) for j in range(w)]

    def window(x, i, j):
        return x[:, max(i - radius, 0) : i + radius + 1, max(j - radius, 0) : j + radius + 1]

    def mean(x):
        return x.mean(axis=(1, 2))

    a, b = np.zeros_like(guide), np.zeros_like(guide)
    for i, j in pixels:
        of_guide, of_x = window(guide, i, j), window(x, i, j)
        centred = of_guide - mean(of_guide)[:, None, None]
        a[:, i, j] = mean(centred * of_x) / (mean(centred**2) + eps)
        b[:, i, j] = mean(of_x) - a[:, i, j] * mean(of_guide)
    out = np.zeros_like(guide)
    for i, j in pixels:
        out[:, i, j] = mean(window(a, i, j)) * guide[:, i, j] + mean(window(b, i, j))
    return out


def flat_guide(kind, dtype=jnp.float32):
    """Little noise on a ground that is far from zero, or on two."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:22, :19]
    ground = {"flat": 1000.0 * np.ones((22, 19)), "steps": 255.0 * ((y // 9 + x // 9) % 2)}[kind]
    noise = 0.03 * rng.normal(size=(1, 22, 19, 2))
    return jnp.asarray(ground[None, ..., None] + noise, dtype)


@pytest.mark.parametrize("kind", ["flat", "steps"])
@pytest.mark.parametrize("radius", [1, 4, 8, 30])
def test_guided_filter_keeps_the_variance_of_flat_guides(kind, radius):
    guide, x = flat_guide(kind), normal(1, 1, 22, 19, 2)
    y = jax.jit(functools.partial(guided_filter, radius=radius, eps=1e-3))(guide, x)
    wanted = guided_filter_as_defined(guide, x, radius, 1e-3)
    np.testing.assert_allclose(y, wanted, atol=5e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("gf_scale", [1, 2])
def test_guided_filter_in_narrow_dtypes(dtype, gf_scale):
    """One rounding, of the result; and of the gradients."""
    guide = (4 + 0.04 * normal(0, 1, 24, 20, 3)).astype(dtype)
    x, cotangent = normal(1, 1, 24, 20, 3).astype(dtype), normal(2, 1, 24, 20, 3).astype(dtype)

    def f(guide, x, cotangent):
        filtered = functools.partial(guided_filter, radius=8, eps=1e-3, gf_scale=gf_scale)
        y, vjp = jax.vjp(filtered, guide, x)
        return y, *vjp(cotangent)

    wide = jax.jit(f)(*(a.astype(jnp.float32) for a in (guide, x, cotangent)))
    eager = guided_filter(guide, x, radius=8, eps=1e-3, gf_scale=gf_scale)
    pairs = [(eager, wide[0]), *zip(jax.jit(f)(guide, x, cotangent), wide, strict=True)]
    tolerance = float(jnp.finfo(dtype).eps)
    for a, b in pairs:
        assert a.dtype == dtype
        atol = tolerance * float(abs(b).max())
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=tolerance, atol=atol)


@pytest.mark.parametrize("gf_scale", [1, 2])
@jax.enable_x64(True)
def test_guided_filter_gradient(gf_scale):
    guide, x = (normal(i, 1, 9, 8, 2, dtype=jnp.float64) for i in range(2))
    f = jax.jit(functools.partial(guided_filter, radius=2, eps=1e-2, gf_scale=gf_scale))
    check_grads(f, (guide, x), order=1, modes=["rev"])


def test_box_filter_sums_in_float32():
    x = normal(0, 1, 30, 40, 2) + 10
    for dtype in (jnp.bfloat16, jnp.float16):
        narrow = x.astype(dtype)
        y = box_filter(narrow, 12)
        assert y.dtype == dtype
        wanted = box_filter(narrow.astype(jnp.float32), 12).astype(dtype)
        np.testing.assert_array_equal(y.astype(jnp.float32), wanted.astype(jnp.float32))


def pcdc_parameters(level, dtype):
    """Of a layer whose hidden values vary little around `level`."""
    shapes = dict(
        kernel=(0.2, 3, 3, 4, 16),
        bias=(0.1, 16),
        scale=(0.1, 8),
        norm_bias=(0.1, 8),
        mix=(0.01, 8, 16),
        mix_bias=(1e-4, 16),
        hidden_scale=(0.1, 16),
        hidden_bias=(0.1, 16),
        project=(0.3, 16, 9),
        project_bias=(0.1, 9),
    )
    rng = np.random.default_rng(0)
    values = {name: std * rng.normal(size=shape) for name, (std, *shape) in shapes.items()}
    values["mix_bias"] += level
    for name in ("scale", "hidden_scale"):
        values[name] += 1
    return PCDCParameters(**{name: jnp.asarray(a, dtype) for name, a in values.items()})


@pytest.mark.parametrize("tile", [None, 3])
@pytest.mark.parametrize("dilation", [2, 3])  # the ratio, and not
def test_pcdc_keeps_the_variance_of_hidden_maps(dilation, tile):
    k, q = normal(0, 1, 6, 5, 8), normal(1, 1, 12, 10, 8)
    options = dict(dilation=dilation, groups=2, norm_groups=4)

    def f(level, dtype, **form):
        inputs = k.astype(dtype), q.astype(dtype)
        f = jax.jit(functools.partial(pcdc, **options, **form))
        return f(*inputs, pcdc_parameters(level, dtype))

    for level, tolerance in ((1.0, 1e-4), (30.0, 2e-3), (1000.0, 5e-2)):
        with jax.enable_x64(True):
            exact = f(level, jnp.float64, implementation="reference")
        np.testing.assert_allclose(f(level, jnp.float32, tile=tile), exact, atol=tolerance)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_linear_map_of_a_norm_in_narrow_dtypes(implementation):
    """The error is that of the normalised map's rounding, wherever the map is."""
    for dtype in (jnp.bfloat16, jnp.float16):
        x = (40 + 0.5 * normal(0, 1, 20, 20, 8)).astype(dtype)
        scale, bias, kernel = (
            normal(i, *s).astype(dtype) for i, s in enumerate([[8], [8], [8, 6]], 1)
        )

        def f(*arrays, implementation=implementation):
            options = dict(norm="group", groups=4, implementation=implementation)
            return norm_linear(*arrays, **options).astype(jnp.float32)

        y = f(x, scale, bias, kernel)
        wanted = f(*(a.astype(jnp.float32) for a in (x, scale, bias, kernel)))
        np.testing.assert_allclose(
            y, wanted, atol=2 * float(jnp.finfo(dtype).eps) * float(wanted.max())
        )


def test_resfu_in_bfloat16_with_a_flat_guide():
    """Weights as large as trained ones; the guide is flat but for its steps."""
    rng = np.random.default_rng(1)

    def resfu(dtype):
        up = ReSFU(16, 16, scale=4, dtype=dtype, rngs=nnx.Rngs(0))
        random = np.random.default_rng(2)
        for variable, std in (
            (up.q.kernel, 0.25),
            (up.k.kernel, 0.25),
            (up.semantic_scores.project.kernel, 0.3),
            (up.semantic_scores.mix_kernel, 0.1),
        ):
            variable[...] = jnp.asarray(std * random.normal(size=variable.shape), jnp.float32)
        return up

    y, x = np.mgrid[:64, :64]
    steps = ((x // 16 + y // 16) % 2)[None, ..., None]
    guide = jnp.asarray(steps + 0.02 * rng.normal(size=(1, 64, 64, 16)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(1, 16, 16, 16)), jnp.float32)
    exact, narrow = (
        jax.jit(resfu(dtype).__call__)(x, guide).astype(jnp.float32)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    np.testing.assert_allclose(narrow, exact, atol=0.3)
    assert np.sqrt(np.mean(np.square(narrow - exact))) < 0.02


def test_gradients_are_finite_in_float16():
    up = ReSFU(16, 16, rngs=nnx.Rngs(0))
    x, guide, weight = (
        normal(i, 1, *size, 16, dtype=jnp.float16)
        for i, size in enumerate([(6, 7), (12, 14), (12, 14)])
    )
    for guide_ in (guide, 4 + 0.01 * guide, jnp.full_like(guide, 3)):

        def loss(up, x, guide):
            return (up(x, guide) * weight).astype(jnp.float32).mean()

        for g in jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1, 2)))(up, x, guide_)):
            assert np.isfinite(g).all()


def test_filters_reject(as_users_call):
    x = normal(0, 1, 4, 4, 2)
    with pytest.raises(ValueError, match="kernel_size"):
        gaussian_blur(x, kernel_size=2)
    with pytest.raises(ValueError, match="sigma"):
        gaussian_blur(x, sigma=0.0)
    with pytest.raises(ValueError, match="radius"):
        box_filter(x, -1)
    with pytest.raises(ValueError, match="gf_scale"):
        guided_filter(x, x, radius=2, eps=1e-3, gf_scale=5)


@pytest.mark.parametrize(("groups", "dilation"), [(1, 1), (2, 3), (4, 2)])
def test_grouped_conv(groups, dilation):
    x, kernel = normal(0, 2, 9, 11, 8), normal(1, 3, 3, 8 // groups, 12)
    # A dense kernel, zero between the groups.
    dense = jax.vmap(jax.vmap(lambda tap: block_diagonal(tap, groups)))(kernel)
    wanted = conv(x, dense, dilation=dilation)
    ours = grouped_conv(x, kernel, groups=groups, dilation=dilation)
    np.testing.assert_allclose(ours, wanted, atol=1e-4)
    point = kernel[1, 1]
    wanted = grouped_conv(x, point[None, None], groups=groups)
    np.testing.assert_allclose(grouped_linear(x, point, groups=groups), wanted, atol=1e-5)
    with pytest.raises(ValueError, match="groups=5 must divide"):
        grouped_conv(x, kernel, groups=5)


# --- the module ---


@few
@given(
    h=st.integers(2, 6),
    w=st.integers(2, 6),
    scale=st.sampled_from([2, 3, 4]),
    extra=st.integers(0, 1),
)
def test_constant_features_stay_constant_and_outputs_are_convex(h, w, scale, extra):
    """Any odd or non-square size, guides that are not a whole multiple included."""
    guide = normal(0, 1, h * scale + extra, w * scale, 3)
    x = normal(1, 1, h, w, 4)
    up = compiled(scale)
    np.testing.assert_allclose(up(jnp.full_like(x, -1.25), guide), -1.25, rtol=1e-5)
    y = up(x, guide)
    assert y.shape == (1, h * scale + extra, w * scale, 4)
    assert (y.max(axis=(1, 2)) <= x.max(axis=(1, 2)) + 1e-5).all()
    assert (y.min(axis=(1, 2)) >= x.min(axis=(1, 2)) - 1e-5).all()


@pytest.mark.parametrize(
    ("scale", "dilation"), [(2, None), (3, None), (8, None), (16, None), (3, 2), (8, 2)]
)
def test_scales_and_dilations(scale, dilation):
    """The fast forms equal the reference, where the dilation is the ratio and where not."""
    x, guide = normal(0, 1, 3, 2, 4), normal(1, 1, 3 * scale, 2 * scale, 3)
    reference = compiled(scale, dilation=dilation, implementation="reference")(x, guide)
    for form in (None, "xla"):
        y = compiled(scale, dilation=dilation, implementation=form)(x, guide)
        np.testing.assert_allclose(y, reference, atol=1e-5)


def test_shifting_by_whole_cells_shifts_the_interior():
    """Without norms of the inputs: what remains are the hidden norms, whose inputs only move."""
    up = jax.jit(resfu(2, normx=False, normy=False, radius=2, kernel_size=3).__call__)
    # A pattern on a constant ground, far from the borders: moving it changes no global statistic.
    x = jnp.zeros((1, 24, 24, 4)).at[:, 8:12, 8:12].set(normal(0, 1, 4, 4, 4))
    guide = jnp.zeros((1, 48, 48, 3)).at[:, 16:24, 16:24].set(normal(1, 1, 8, 8, 3))
    y = up(x, guide)
    moved = up(jnp.roll(x, (3, 2), axis=(1, 2)), jnp.roll(guide, (6, 4), axis=(1, 2)))
    np.testing.assert_allclose(moved, jnp.roll(y, (6, 4), axis=(1, 2)), atol=2e-5)
    assert np.abs(y).max() > 0.1


@jax.enable_x64(True)  # the factor, not how float32 rounds what cancels
def test_lr_mult_scales_the_branches_only():
    x, guide = normal(0, 1, 4, 5, 4, dtype=jnp.float64), normal(1, 1, 8, 10, 3, dtype=jnp.float64)

    def gradients(lr_mult):
        loss = jax.jit(jax.grad(lambda up: jnp.square(up(x, guide)).sum()))
        grads = loss(resfu(lr_mult=lr_mult, param_dtype=jnp.float64))
        return dict(nnx.to_flat_state(nnx.state(grads, nnx.Param)))

    one, many = gradients(1.0), gradients(500.0)
    assert len(one) == 28
    for path, g in one.items():
        factor = 500.0 if path[0] in ("semantic_scores", "detail_scores") else 1.0
        np.testing.assert_allclose(many[path][...], factor * g[...], rtol=1e-4, atol=1e-6)


def test_initialisation_is_the_official_one():
    up = ReSFU(384, 256, kernel_size=3, rngs=nnx.Rngs(3))
    for weight in (
        up.q.kernel,
        up.k.kernel,
        up.semantic_scores.mix_kernel,
        up.detail_scores.project.kernel,
    ):
        w = np.asarray(weight[...]).ravel()
        assert abs(w.mean()) < 4 * 0.02 / w.size**0.5
        assert abs(w.std() / 0.02 - 1) < 4 / (2 * w.size) ** 0.5
        # A normal, not truncated: its fourth moment is three times its squared variance.
        assert abs((w**4).mean() / w.var() ** 2 - 3) < 4 * (96 / w.size) ** 0.5
    for branch in (up.semantic_scores, up.detail_scores):
        w = np.asarray(branch.kernel[...]).ravel()
        assert abs(w.std() / (2 / (128 * 9)) ** 0.5 - 1) < 4 / (2 * w.size) ** 0.5
        for zero in (branch.bias, branch.mix_bias, branch.project.bias, branch.norm.bias):
            assert not np.any(zero[...])
        assert np.all(branch.hidden_norm.scale[...] == 1)
    assert not np.array_equal(up.semantic_scores.kernel[...], up.detail_scores.kernel[...])


def test_mask_covers_neighbours_outside():
    inside = np.asarray(neighbours_inside((5, 4), 3, 2)).reshape(5, 4, 3, 3)
    assert inside[2, 1].tolist() == [[False, True, True]] * 3
    assert inside[0, 2].tolist() == [[False] * 3, [True, True, False], [True, True, False]]
    assert inside[:, :, 1, 1].all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kernel_size=4), "kernel_size must be odd"),
        (dict(embedding_dim=10), "groups must divide"),
        (dict(gn_dim=3), "gn_dim must divide"),
        (dict(y_conv=False), "guide_features must equal embedding_dim"),
        (dict(scale=0), "scale must be a positive whole number"),
        (dict(implementation="cuda"), "implementation must be"),
        (dict(guide_features=48), "guide_features must be below 32 or a multiple of 32"),
        (dict(guide_features=None), "guide_features is needed"),
        (dict(radios=4), "unknown option of upsampler 'resfu': 'radios'; did you mean 'radius'"),
    ],
)
def test_constructor_rejects(options, message, as_users_call):
    with pytest.raises(ValueError, match=message):
        create_upsampler("resfu", **(dict(features=8, guide_features=8) | options))


def test_call_rejects(as_users_call):
    up = resfu()
    with pytest.raises(ValueError, match=r"features must be \(batch, height, width, 4\)"):
        up(normal(0, 1, 4, 4, 5), normal(1, 1, 8, 8, 3))
    with pytest.raises(ValueError, match="guide must have the features' batch size"):
        up(normal(0, 2, 4, 4, 4), normal(1, 1, 8, 8, 3))
    with pytest.raises(ValueError, match="guide must be at least as large"):
        up(normal(0, 1, 4, 4, 4), normal(1, 1, 3, 8, 3))
    with pytest.raises(ValueError, match="unknown upsampler 'resfoo'; did you mean 'resfu'"):
        create_upsampler("resfoo", features=4)
