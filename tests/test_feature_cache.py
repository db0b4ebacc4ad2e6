"""Features kept on disk are those that the model computes, and never those of another model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from resfu_jax.model import create_model
from resfu_jax.training import FeatureCache

pytestmark = pytest.mark.usefixtures("programs_are_kept")

SMALL = dict(widths=(8, 8, 16, 16), depths=(1, 1, 1, 1), heads=(1, 1, 2, 2), drop_path=0.5)


def model(seed=0, frozen=True, dtype=None):
    head = dict(name="fpn", upsampler="bilinear", width=8)
    return create_model(
        backbone=SMALL, head=head, num_classes=3, frozen=frozen, dtype=dtype, rngs=nnx.Rngs(seed)
    )


def images(n, size=32):
    return np.random.default_rng(n).integers(0, 256, (n, size, size, 3), np.uint8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_the_model(tmp_path, dtype):
    m = model(dtype=jnp.dtype(dtype))
    cache = FeatureCache(tmp_path, m, batch_size=2)
    x = images(3)
    expected = jax.jit(lambda m, x: m.features(x))(m, jnp.asarray(x))
    for _ in range(2):  # computed, and read back
        for a, b in zip(cache(x), expected, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(
                a.astype(np.float32),
                b.astype(np.float32),
                atol=0.05 if b.dtype == jnp.bfloat16 else 1e-5,
            )
    first, second = cache(x), cache(x[::-1])
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b[::-1])


def test_every_image_is_computed_once(tmp_path, monkeypatch):
    x = images(3)
    expected = FeatureCache(tmp_path, model(), batch_size=2)(x)
    cache = FeatureCache(tmp_path, model(), batch_size=2)  # another run
    monkeypatch.setattr(cache, "_features", _Lowers(cache._features))
    for a, b in zip(cache(x[[2, 0, 0]]), expected, strict=True):
        np.testing.assert_array_equal(a, b[[2, 0, 0]])
    with pytest.raises(AssertionError, match="computed"):
        cache(images(1))


class _Lowers:
    """Refuses to compute."""

    def __init__(self, function):
        self.lower = function.lower

    def __call__(self, *_):
        raise AssertionError("computed")


def test_other_weights_or_sizes_have_features_of_their_own(tmp_path):
    x = images(1)
    a = FeatureCache(tmp_path, model(0))(x)[0]
    b = FeatureCache(tmp_path, model(1))(x)[0]
    assert np.abs(a - b).max() > 1e-3
    assert FeatureCache(tmp_path, model(0))(images(1, 64))[0].shape[1:3] == (16, 16)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_models_arrays_may_be_donated(tmp_path):
    m = model()
    cache = FeatureCache(tmp_path, m)
    for leaf in jax.tree.leaves(nnx.state(m, nnx.Param)):
        leaf.delete()
    assert np.isfinite(cache(images(1))[0]).all()


def test_a_backbone_that_learns_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model.frozen must be True"):
        FeatureCache(tmp_path, model(frozen=False))


def _cut(content):
    return content[: len(content) // 2]


def _flip(at):
    def flip(content):
        i = int(at * (len(content) - 1))
        return content[:i] + bytes([content[i] ^ 4]) + content[i + 1 :]

    return flip


DAMAGE = [lambda _: b"", _cut, lambda x: b"\0" * len(x), *map(_flip, np.linspace(0, 1, 24))]


def test_a_damaged_file_is_computed_again(tmp_path):
    x = images(1)
    cache = FeatureCache(tmp_path, model(), batch_size=1)
    expected = cache(x)
    (path,) = tmp_path.rglob("*.npz")
    content = path.read_bytes()
    for i, damage in enumerate(DAMAGE):
        path.write_bytes(damage(content))
        for _ in range(2):  # computed, and read back
            for a, b in zip(cache(x), expected, strict=True):
                np.testing.assert_array_equal(a, b, err_msg=str(i))
    assert list(tmp_path.rglob("*.npz")) == [path]


def test_home_and_addresses(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    FeatureCache("~/features", model())(images(1))
    assert len(list((tmp_path / "features").rglob("*.npz"))) == 1
    with pytest.raises(ValueError, match="directory is gs://bucket/x; .* this machine"):
        FeatureCache("gs://bucket/x", model())
