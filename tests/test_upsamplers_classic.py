"""The classic upsamplers: parity with PyTorch, shapes, dtypes, initial weights, errors."""

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from resfu_jax.convert.classic import conv_pixel_shuffle, conv_transpose
from resfu_jax.ops.resize import resize
from resfu_jax.upsamplers._registry import create_upsampler
from resfu_jax.upsamplers.classic import Deconvolution, PixelShuffle

INTERPOLATIONS = ["nearest", "bilinear", "bicubic"]
LEARNED = ["deconv", "pixel_shuffle"]


@pytest.mark.parametrize("name", goldens.names("classic_conv"))
def test_parity(name, x64):
    """The converted module: values and all gradients."""
    g = goldens.load(name, x64=x64)
    prefix, convert, layout = (
        ("0.", conv_pixel_shuffle, "OIHW") if "shuffle" in name else ("", conv_transpose, "IOHW")
    )
    up = convert(g.group("param"), **g.args)
    x = jnp.asarray(goldens.nhwc(g.arrays["in/x"]))
    graphdef, params = nnx.split(up)

    y, vjp = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x), params, x)
    d_params, dx = vjp(jnp.asarray(goldens.nhwc(g.arrays["in/cotangent"])))
    d_kernel = np.transpose(
        d_params["kernel"].get_value(), {"OIHW": (3, 2, 0, 1), "IOHW": (2, 3, 0, 1)}[layout]
    )
    assert y.dtype == x.dtype
    goldens.assert_close(y, goldens.nhwc(g.arrays["out/y"]), g.tol_out, name)
    goldens.assert_close(dx, goldens.nhwc(g.arrays["grad/in/x"]), g.tol_grad, name)
    goldens.assert_close(d_kernel, g.arrays[f"grad/param/{prefix}weight"], g.tol_grad, name)
    goldens.assert_close(
        d_params["bias"].get_value(), g.arrays[f"grad/param/{prefix}bias"], g.tol_grad, name
    )


@pytest.mark.parametrize(
    ("name", "convert"),
    [
        ("classic_conv_transpose_k2s2", conv_transpose),
        ("classic_conv_pixel_shuffle_s2", conv_pixel_shuffle),
    ],
)
def test_conversion_names_what_is_wrong(name, convert):
    g = goldens.load(name)
    state = g.group("param")
    weight, bias = state
    broken = {weight: state[weight][1:], "extra": state[bias]}
    with pytest.raises(ValueError) as error:
        convert(broken, **g.args)
    for word in (weight, bias, "extra", "shape"):
        assert word in str(error.value)


def test_conversion_refuses_other_geometries():
    state = {"weight": np.zeros((2, 3, 4, 4), np.float32), "bias": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match="must equal scale"):
        conv_transpose(state, in_channels=2, out_channels=3, kernel_size=4, stride=2)
    with pytest.raises(ValueError, match="out_channels_conv"):
        conv_pixel_shuffle(
            {}, in_channels=4, out_channels_conv=4, kernel_size=3, padding=1, upscale_factor=2
        )


@pytest.mark.parametrize("name", INTERPOLATIONS)
def test_interpolations_take_any_size(name):
    up = create_upsampler(name, features=2, scale=2)
    x = jax.random.normal(jax.random.key(0), (1, 5, 7, 2))
    np.testing.assert_array_equal(up(x, (9, 4)), resize(x, (9, 4), method=name))
    np.testing.assert_allclose(up(jnp.full((2, 3, 4, 2), 0.7), (11, 5)), 0.7, rtol=2e-6)


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
def test_align_corners_keeps_the_corners(name):
    up = create_upsampler(name, features=2, scale=3, align_corners=True)
    x = jax.random.normal(jax.random.key(0), (1, 4, 5, 2))
    np.testing.assert_allclose(up(x)[:, ::11, ::14], x[:, ::3, ::4], atol=1e-6)


def test_deconvolution_is_its_definition():
    """k[u] x[a] goes to pixel a s + u - P."""
    x = jax.random.normal(jax.random.key(0), (1, 3, 4, 2))
    for options in (
        dict(scale=2),
        dict(scale=3, kernel_size=5, padding=1),
        dict(scale=2, kernel_size=7, padding=3, output_padding=1, out_features=3),
        dict(scale=3, kernel_size=1, padding=0, output_padding=2),
        dict(scale=4, kernel_size=4, padding=1, output_padding=2),
    ):
        up = Deconvolution(2, rngs=nnx.Rngs(0), **options)
        s, k, padding = up.scale, up.kernel.shape[0], up.padding
        full = np.zeros((1, 3 * s + k + s, 4 * s + k + s, up.kernel.shape[3]))
        for a in range(3):
            for b in range(4):
                value = np.einsum("bi,yxio->byxo", x[:, a, b], up.kernel.get_value())
                full[:, a * s : a * s + k, b * s : b * s + k] += value
        wanted = full[:, padding : padding + 3 * s, padding : padding + 4 * s]
        np.testing.assert_allclose(up(x), wanted + np.asarray(up.bias.get_value()), atol=1e-6)


@pytest.mark.parametrize(
    ("up", "fan_in"),
    [
        (Deconvolution(24, scale=4, out_features=16, rngs=nnx.Rngs(0)), 16 * 16),
        (PixelShuffle(24, scale=3, rngs=nnx.Rngs(0)), 24 * 9),
    ],
    ids=LEARNED,
)
def test_initial_weights_are_the_published_ones(up, fan_in):
    """Uniform within 1 / sqrt(fan_in): bounds, mean and variance."""
    bound = fan_in**-0.5
    kernel, bias = (np.asarray(p.get_value()) for p in (up.kernel, up.bias))
    for a in (kernel, bias):
        assert np.abs(a).max() <= bound
    assert np.abs(kernel).max() > 0.99 * bound
    assert abs(kernel.mean()) < 0.05 * bound
    assert kernel.std() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert np.abs(bias).max() > 0.7 * bound
    other = type(up)(24, scale=up.scale, rngs=nnx.Rngs(1))
    assert (np.asarray(other.kernel.get_value()).ravel()[:9] != kernel.ravel()[:9]).any()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nearest", dict(align_corners=True), "align_corners"),
        ("bilinear", dict(scale=0), "scale"),
        ("deconv", dict(scale=0), "scale"),
        ("deconv", dict(scale=2, kernel_size=3), "must equal scale"),
        ("deconv", dict(scale=2, padding=1), "must equal scale"),
        ("pixel_shuffle", dict(scale=2, kernel_size=4), "kernel_size"),
    ],
)
def test_wrong_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_upsampler(name, features=4, **options)


def test_values_of_float32_are_not_narrowed():
    features = jnp.zeros((1, 3, 5, 4), jnp.bfloat16)
    values = 1 + 1e-4 * jax.random.normal(jax.random.key(0), features.shape)
    y = create_upsampler("nearest", features=4, scale=2)(features, values=values)
    np.testing.assert_array_equal(y[:, ::2, ::2], values)


def test_bicubic_keeps_constants_but_not_the_range():
    up = create_upsampler("bicubic", features=4, scale=2)
    np.testing.assert_allclose(up(jnp.full((1, 3, 5, 4), -1.25)), -1.25, rtol=1e-5)
    step = jnp.zeros((1, 3, 6, 4)).at[:, :, 3:].set(1)
    assert up(step).max() > 1.01 and not up.weights_are_convex
