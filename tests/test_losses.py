import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from resfu_jax import data
from resfu_jax.training import LossConfig, class_weights, cross_entropy, pixel_weights

K = 5


def numpy_loss(logits, labels, smoothing=0.0, weights=None):
    """Pixel by pixel, in float64: each class's share of the target has that class's weight."""
    weights = np.ones(K) if weights is None else np.asarray(weights)
    total = norm = 0.0
    for z, y in zip(logits.reshape(-1, K).astype(np.float64), labels.ravel(), strict=True):
        if y == 255:
            continue
        log_p = z - np.log(np.exp(z).sum())
        target = np.full(K, smoothing / K)
        target[y] += 1 - smoothing
        total -= (weights * target * log_p).sum()
        norm += weights[y]
    return total / norm


def example(seed=0, ignored=0.3):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, 6, 7, K)).astype(np.float32) * 3
    labels = rng.integers(0, K, (2, 6, 7)).astype(np.uint8)
    labels[rng.random(labels.shape) < ignored] = 255
    return logits, labels


@pytest.mark.parametrize("weights", [None, (0.5, 1.0, 2.0, 0.0, 3.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_the_definition(smoothing, weights):
    logits, labels = example()
    loss = jax.jit(
        lambda z, y: cross_entropy(z, y, label_smoothing=smoothing, class_weights=weights)
    )(logits, labels)
    np.testing.assert_allclose(loss, numpy_loss(logits, labels, smoothing, weights), rtol=1e-5)


def test_smoothing_with_class_weights_is_pytorchs():
    """Two pixels with p = (3/4, 1/4) and (1/2, 1/2), an ignored one; by hand, and as torch says.

    With w = (1, 3), s = 0.4 and K = 2, the loss of label y is -0.6 w_y ln p_y - 0.2 Σ_k w_k ln p_k,
    its gradient to z_j is 0.6 w_y (p_j - [j = y]) + 0.2 (4 p_j - w_j), both over Σ w_y = 1 + 3.
    """
    logits = jnp.log(jnp.array([[[[3.0, 1.0], [1.0, 1.0], [5.0, 1.0]]]]))
    labels = jnp.array([[[0, 1, 255]]])

    def loss(z, y, normalizer=None):
        return cross_entropy(
            z, y, label_smoothing=0.4, class_weights=(1.0, 3.0), normalizer=normalizer
        )

    value, grad = jax.value_and_grad(loss)(logits, labels)
    np.testing.assert_allclose(value, 0.716026, rtol=1e-5)
    wanted = [[[[0.0625, -0.0625], [0.275, -0.275], [0.0, 0.0]]]]
    np.testing.assert_allclose(grad, wanted, rtol=1e-5)
    # Accumulated as in train.py: every part over the weight of the whole batch.
    normalizer = pixel_weights(labels, class_weights=(1.0, 3.0)).sum()
    assert normalizer == 4.0
    values, grads = zip(
        *(
            jax.value_and_grad(loss)(logits[:, :, i : i + 1], labels[:, :, i : i + 1], normalizer)
            for i in range(3)
        ),
        strict=True,
    )
    np.testing.assert_allclose(sum(values), 0.716026, rtol=1e-5)
    np.testing.assert_allclose(jnp.concatenate(grads, axis=2), wanted, rtol=1e-5)


def test_labels_without_weight_give_zero():
    """PyTorch divides by zero."""
    logits, labels = example()
    loss, grad = jax.value_and_grad(
        lambda z: cross_entropy(
            z,
            jnp.zeros(labels.shape, jnp.int32),
            label_smoothing=0.1,
            class_weights=(0.0, 1.0, 1.0, 1.0, 1.0),
        )
    )(jnp.asarray(logits))
    assert loss == 0
    assert np.all(np.asarray(grad) == 0)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}])
def test_ignored_pixels_have_no_gradient(options):
    logits, labels = example()
    grad = jax.grad(lambda z: cross_entropy(z, jnp.asarray(labels), **options))(jnp.asarray(logits))
    assert np.all(np.asarray(grad)[labels == 255] == 0)
    assert np.all(np.any(np.asarray(grad)[labels != 255] != 0, axis=-1))


def test_all_ignored_is_zero_and_has_zero_gradient():
    logits, labels = example(ignored=2.0)
    loss, grad = jax.value_and_grad(lambda z: cross_entropy(z, jnp.asarray(labels)))(
        jnp.asarray(logits)
    )
    assert loss == 0
    assert np.all(np.asarray(grad) == 0)


def test_bfloat16_logits_are_summed_in_float32():
    logits, labels = example()
    loss = cross_entropy(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(labels))
    rounded = np.asarray(jnp.asarray(logits, jnp.bfloat16), np.float32)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, numpy_loss(rounded, labels), rtol=1e-5)


def test_parts_of_a_batch_add_up():
    logits, labels = example()
    normalizer = pixel_weights(jnp.asarray(labels)).sum()
    parts = sum(
        cross_entropy(jnp.asarray(z), jnp.asarray(y), normalizer=normalizer)
        for z, y in zip(logits, labels, strict=True)
    )
    np.testing.assert_allclose(parts, numpy_loss(logits, labels), rtol=1e-5)


def test_wrong_shape_is_named():
    logits, labels = example()
    with pytest.raises(ValueError, match=r"labels have shape \(2, 3, 7\).*need \(2, 6, 7\)"):
        cross_entropy(jnp.asarray(logits), jnp.asarray(labels[:, :3]))


def source_of(*labels):
    def png(label):
        buffer = io.BytesIO()
        Image.fromarray(np.array(label, np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    return data.Source("x", "train", [{"label": png(label)} for label in labels])


INFO = data.DatasetInfo("x", ("a", "b", "c", "d"), ((0, 0, 0),) * 4)


def test_label_counts_leave_out_the_ignore_label():
    source = source_of([[0, 0, 1], [255, 2, 0]], [[2], [2]])
    np.testing.assert_array_equal(data.label_counts(source, INFO), [3, 1, 3, 0])


@pytest.mark.parametrize(
    ("exponent", "expected"), [(1.0, [2.0, 1.0, 0.5, 1.0]), (0.5, [2**0.5, 1.0, 0.5**0.5, 1.0])]
)
def test_balanced_weights(exponent, expected):
    """The classes that occur 2, 4 and 8 times have the median 4; one does not occur."""
    np.testing.assert_allclose(data.balanced_weights(np.array([2, 4, 8, 0]), exponent), expected)


def test_class_weights_of_a_config():
    source = source_of([[0, 1, 1, 2, 2, 2, 2]])
    weights = lambda **options: class_weights(LossConfig(**options), source, INFO)  # noqa: E731
    assert weights() is None
    assert weights(class_weights=(1.0, 2.0, 3.0, 4.0)) == (1.0, 2.0, 3.0, 4.0)
    np.testing.assert_allclose(weights(class_balance=1.0), (2.0, 1.0, 0.5, 1.0))
    both = weights(class_balance=1.0, class_weights=(1.0, 2.0, 3.0, 4.0))
    np.testing.assert_allclose(both, (2.0, 2.0, 1.5, 4.0))
