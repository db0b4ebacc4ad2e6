"""FreqFusion against the official module, and what is its own."""

import functools

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from resfu_jax import create_upsampler, from_torch

NAMES = goldens.names("freqfusion")
OFFICIAL = "Linwei-Chen/FreqFusion:FreqFusion"


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(graphdef, params, x, y, cotangents):
    def fuse(params, x, y):
        return nnx.merge(graphdef, params).fuse(x, y)

    out, vjp = jax.vjp(fuse, params, x, y)
    return out, nnx.merge(graphdef, params).attention(x, y), vjp(cotangents)


# In float32 by the form that is chosen; in float64, where no mistake passes for rounding, by all.
@pytest.mark.parametrize(
    ("name", "implementation", "x64"),
    [(name, None, x64) for name in NAMES for x64 in (False, True)]
    + [(name, form, True) for name in NAMES for form in ("reference", "xla", "cpu")],
    indirect=["x64"],
)
def test_module(name, implementation, x64):
    g = goldens.load(name, x64=x64)
    up = from_torch(OFFICIAL, g.group("param"), **g.args)
    y, x, cotangent = (
        jnp.asarray(goldens.nhwc(g.arrays[f"in/{n}"])) for n in ("hr_feat", "lr_feat", "cotangent")
    )
    up.implementation = implementation
    buffers = {k: g.arrays[k] for k in g.meta["buffers"]}
    buffers = {k.removeprefix("param/"): v for k, v in buffers.items()}
    wanted = nnx.state(from_torch(OFFICIAL, g.group("grad/param") | buffers, **g.args), nnx.Param)
    cg = y.shape[3]
    cotangents = cotangent[..., cg:], cotangent[..., :cg]
    (low, high), mask, (d_params, dx, dy) = value_and_gradients(*nnx.split(up), x, y, cotangents)
    out = jnp.concatenate([high, low], axis=-1)
    goldens.assert_close(out, goldens.nhwc(g.arrays["out/y"]), g.tol_out, "y")
    goldens.assert_close(mask, goldens.nhwc(g.arrays["stage/mask_lr"]), g.tol_out, "mask_lr")
    goldens.assert_close(dx, goldens.nhwc(g.arrays["grad/in/lr_feat"]), g.tol_grad, "d_x")
    goldens.assert_close(dy, goldens.nhwc(g.arrays["grad/in/hr_feat"]), g.tol_grad, "d_y")
    leaves = jax.tree_util.tree_leaves_with_path(d_params)
    for (path, a), b in zip(leaves, jax.tree.leaves(wanted), strict=True):
        goldens.assert_close(a, b, g.tol_grad, jax.tree_util.keystr(path))
        assert np.any(b)


def test_every_golden_is_compared():
    assert len(NAMES) == 8


# ------------------------------------------------------------------------------------- its own
def build(scale=2, **options):
    return create_upsampler(
        "freqfusion",
        features=8,
        guide_features=6,
        scale=scale,
        **dict(compressed_channels=8) | options,
    )


def inputs(size, out_size, batch=1):
    x = jax.random.normal(jax.random.key(0), (batch, *size, 8))
    return x, jax.random.normal(jax.random.key(1), (batch, *out_size, 6))


@pytest.mark.parametrize(
    ("size", "out_size", "options"),
    [
        ((3, 4), (7, 5), {}),
        ((1, 1), (4, 4), dict(scale=4, feature_resample=True)),
        ((2, 3), (6, 9), dict(scale=3, feature_resample=True, direction_feat="sim")),
        ((3, 4), (7, 5), dict(semi_conv=False, upsample_mode="bicubic", use_high_pass=False)),
    ],
)
def test_more_sizes_than_the_official_module_has(size, out_size, options):
    up, (x, y) = build(**options), inputs(size, out_size)
    low, high = jax.jit(up.fuse)(x, y)
    assert low.shape == (1, *out_size, 8) and high.shape == y.shape
    assert np.isfinite(low).all() and np.isfinite(high).all()
    np.testing.assert_allclose(jax.jit(up)(x, y), low, rtol=1e-5, atol=1e-6)


def test_an_offset_of_zero_is_the_own_pixel():
    up = build(scale=3, feature_resample=True)
    for name in ("offset_x", "offset_y"):
        layer = getattr(up.offsets, name)
        layer.kernel[...] = jnp.zeros_like(layer.kernel[...])
    plain = build(scale=3)
    for name in ("compress", "compress_guide", "low", "high"):
        setattr(plain, name, getattr(up, name))
    x, y = inputs((3, 4), (9, 12))
    np.testing.assert_allclose(up(x, y), plain(x, y), rtol=1e-5, atol=1e-6)


def test_maps_of_zeros_have_gradients():
    """Their channels have no direction to compare."""
    up = build(feature_resample=True, feature_resample_norm=False)
    x, y = (jnp.zeros_like(a) for a in inputs((2, 2), (4, 4)))
    gradients = jax.jit(jax.grad(lambda x, y: up(x, y).sum(), argnums=(0, 1)))(x, y)
    assert all(np.isfinite(g).all() for g in gradients)


def test_options_change_what_it_says():
    said = dict(value_groups=2, needs_whole_scale=True)
    up = build(feature_resample=True, feature_resample_group=2)
    assert {name: getattr(up, name) for name in said} == said
    assert not build(semi_conv=False, upsample_mode="bicubic").weights_are_convex
    up = build(comp_feat_upsample=False)
    assert up.without_gradient == (("high", "kernel"), ("high", "bias"))
    assert build().without_gradient == ()


def test_initial_weights():
    """Xavier uniform, also of the offsets, and normal for the kernels; biases are zero."""
    up = create_upsampler(
        "freqfusion", features=64, guide_features=32, scale=2, feature_resample=True
    )
    for layer, fans in [
        (up.compress, 64 + 64),
        (up.compress_guide, 32 + 64),
        (up.offsets.offset_x, 9 * (72 + 32)),
        (up.offsets.scope_x, 9 * (72 + 32)),
        (up.offsets.offset_y, 9 * (72 + 8)),
    ]:
        bound, w = (6 / fans) ** 0.5, layer.kernel[...]
        assert 0.9 * bound < np.abs(w).max() <= bound
        assert abs(w.std() * 3**0.5 / bound - 1) < 4 / w.size**0.5
        assert not np.any(layer.bias[...])
    for layer in (up.low, up.high):
        w = layer.kernel[...]
        assert abs(w.std() / 0.001 - 1) < 4 / (2 * w.size) ** 0.5
        assert not np.any(layer.bias[...])


@pytest.mark.parametrize(("resample", "count"), [(True, 104_690), (False, 52_514)])
def test_parameter_counts_as_published(resample, count):
    options = dict(features=256, guide_features=256, scale=2, feature_resample=resample)
    up = nnx.eval_shape(lambda: create_upsampler("freqfusion", **options))
    assert sum(p.size for p in jax.tree.leaves(nnx.state(up, nnx.Param))) == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(use_high_pass=False), "comp_feat_upsample=True needs use_high_pass=True"),
        (dict(semi_conv=False, feature_resample=True), "feature_resample=True needs semi_conv"),
        (dict(feature_resample=True, feature_resample_group=3), "feature_resample_group must"),
        (dict(feature_resample=True, compressed_channels=12), "a multiple of 8, got 12"),
        (dict(lowpass_kernel=4), "lowpass_kernel must be odd"),
        (dict(upsample_mode="area"), "upsample_mode must be one of"),
        (dict(direction_feat="all"), "direction_feat must be one of"),
        (dict(hamming_window=1), "hamming_window must be True or False"),
        (dict(implementation="cuda"), "implementation must be one of"),
    ],
)
def test_wrong_options_are_named(options, message, as_users_call):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_wrong_inputs_are_named(as_users_call):
    up, (x, y) = build(feature_resample=True), inputs((3, 4), (7, 8))
    for call in (up, up.fuse):
        with pytest.raises(ValueError, match="scale 2 with feature_resample needs a guide"):
            call(x, y)
        with pytest.raises(ValueError, match="features must be"):
            call(x[..., :3], y)
        with pytest.raises(ValueError, match="guide must be at least as large"):
            call(x, y[:, :2])


def test_from_torch_tells_what_is_wrong():
    g = goldens.load("freqfusion_resample_norm")
    state = g.group("param")
    with pytest.raises(ValueError, match="up_group must be 1"):
        from_torch(OFFICIAL, state, **g.args, up_group=2)
    with pytest.raises(ValueError, match="'hamming_lowpass' has shape"):
        from_torch(OFFICIAL, state, **g.args, hamming_window=False)
    with pytest.raises(ValueError, match="unexpected 'dysampler"):
        from_torch(OFFICIAL, state, **g.args | dict(feature_resample=False))
    wrong = state | {"dysampler.init_pos": np.zeros((1, 32, 1, 1), np.float32)}
    with pytest.raises(ValueError, match="'dysampler.init_pos' is not that of scale 2"):
        from_torch("FreqFusion", wrong, **g.args)
