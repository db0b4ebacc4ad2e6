"""The initial weights are those of the published modules."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from resfu_jax import create_upsampler


def normal(std):
    """All central moments that tell a normal from a uniform or a truncated one."""

    def check(w):
        assert abs(w.mean()) < 4 * std / w.size**0.5
        assert abs(w.std() / std - 1) < 4 / (2 * w.size) ** 0.5
        assert abs((w**4).mean() / w.var() ** 2 - 3) < 4 * (96 / w.size) ** 0.5

    return check


def uniform(bound):
    def check(w):
        assert 0.9 * bound < np.abs(w).max() <= bound
        assert abs(w.mean()) < 4 * bound / (3 * w.size) ** 0.5
        assert abs(w.std() * 3**0.5 / bound - 1) < 4 / w.size**0.5

    return check


def xavier(fan_in, fan_out):
    return uniform(math.sqrt(6 / (fan_in + fan_out)))


def zero(w):
    assert not w.any()


C, CG = 64, 96  # features, guide
CASES = {
    "carafe": {"compress": xavier(C, 64), "encode": normal(0.001)},
    "sapa": {"q": normal(0.02), "k": normal(0.02)},
    "sapa_g": {"q": normal(0.02), "qx": normal(0.02), "gate": normal(0.02), "k": normal(0.02)},
    "sapa_deform": {"q": normal(0.02), "k": normal(0.02), "offset": normal(0.02)},
    "fade": {
        "compress_guide": xavier(C, 64),
        "compress": xavier(C, 64),
        "encode": xavier(9 * 64, 9 * 25),
        "gate": xavier(C, 1),
    },
    "fade_lite": {
        "compress_guide": xavier(C, 25),
        "compress": xavier(C, 25),
        "encode": xavier(9, 9 * 25),  # depthwise, as PyTorch counts its fans
        "gate": xavier(C, 1),
    },
    "semishift": {"compress_guide": xavier(CG, 64), "encode": xavier(9 * 64, 9 * 25)},
    "dysample": {"offset": normal(0.001)},
    "dysample_s_plus": {"offset": normal(0.001), "scope": zero},
    "lda_aqu": {
        "q": xavier(C, 16),
        "k": xavier(C, 16),
        "offset": xavier(9, 9 * 8),
        "offset.conv": zero,
        "table": normal(0.02),
    },
}


@pytest.mark.parametrize("name", CASES)
def test_weights(name):
    guide = C if name.startswith("fade") else CG
    up = create_upsampler(name, features=C, guide_features=guide, scale=2, rngs=nnx.Rngs(7))
    params = {
        ".".join(map(str, path)): np.asarray(p[...])
        for path, p in nnx.to_flat_state(nnx.state(up, nnx.Param))
    }
    checked = set()
    for layer, check in CASES[name].items():
        key = layer if layer in params else f"{layer}.kernel"
        check(params[key].ravel().astype(np.float64))
        checked.add(key)
    for path, value in params.items():
        if path.endswith("bias"):
            zero(value)
        elif path.endswith("scale"):
            assert (value == 1).all()
        else:
            assert path in checked or name == "semishift", path


@pytest.mark.parametrize("name", ["dysample", "dysample_plus", "dysample_s_plus"])
def test_dysample_starts_nearly_bilinear(name):
    x = jax.random.normal(jax.random.key(0), (1, 6, 7, C))
    y = create_upsampler(name, features=C, scale=2)(x)
    wanted = create_upsampler("bilinear", features=C, scale=2)(x)
    assert 0 < np.abs(y - wanted).max() < 0.03


def test_seeds_differ_and_repeat():
    def weights(seed):
        up = create_upsampler("fade", features=8, guide_features=8, rngs=nnx.Rngs(seed))
        return np.asarray(up.encode.kernel[...])

    np.testing.assert_array_equal(weights(1), weights(1))
    assert not np.array_equal(weights(1), weights(2))
