import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from resfu_jax.training import SegmentationCounts, count
from resfu_jax.training.metrics import boundary

K = 4
NAMES = ("a", "b", "c", "d")


def numpy_erode(mask, times):
    """Repeated 3x3 erosion of a mask with one pixel of zeros around it, as the paper does it."""
    mask = np.pad(mask, 1)
    for _ in range(times):
        padded = np.pad(mask, 1)
        h, w = mask.shape
        mask = np.min([padded[i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=0)
    return mask[1:-1, 1:-1]


def numpy_boundary(mask, ratio):
    h, w = mask.shape
    d = max(1, round(ratio * np.sqrt(h * h + w * w)))
    return mask & ~numpy_erode(mask, d)


def numpy_counts(predictions, labels, ratio, sizes):
    confusion = np.zeros((K, K), int)
    intersection, union = np.zeros(K, int), np.zeros(K, int)
    for p, y, (h, w) in zip(predictions, labels, sizes, strict=True):
        p, y = p[:h, :w], y[:h, :w]
        valid = y != 255
        np.add.at(confusion, (y[valid], p[valid]), 1)
        for k in range(K):
            true = numpy_boundary((y == k) & valid, ratio)
            predicted = numpy_boundary((p == k) & valid, ratio)
            intersection[k] += (true & predicted).sum()
            union[k] += (true | predicted).sum()
    return confusion, intersection, union


def blobs(seed, sizes, h=40, w=48):
    """Label maps with regions thicker than a boundary, some ignored; predictions are shifted."""
    rng = np.random.default_rng(seed)
    labels = np.kron(rng.integers(0, K, (len(sizes), h // 8, w // 8)), np.ones((8, 8), int))
    predictions = np.roll(labels, (1, 2), axis=(1, 2))
    labels[:, 10:13, 20:31] = 255
    for y, (height, width) in zip(labels, sizes, strict=True):
        y[height:] = 255
        y[:, width:] = 255
    return predictions.astype(np.uint8), labels.astype(np.uint8)


@pytest.mark.parametrize("ratio", [0.001, 0.02, 0.05, 0.4])
def test_counts_equal_the_literal_definition(ratio):
    sizes = np.array([[40, 48], [33, 48], [17, 25]])
    predictions, labels = blobs(0, sizes)
    counts = jax.jit(lambda *a: count(*a[:2], num_classes=K, dilation_ratio=ratio, sizes=a[2]))(
        predictions, labels, sizes
    )
    expected = numpy_counts(predictions, labels, ratio, sizes)
    for got, want in zip(jax.tree.leaves(counts), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_without_sizes_the_whole_array_is_the_image():
    sizes = np.array([[40, 48]] * 2)
    predictions, labels = blobs(1, sizes)
    a = count(jnp.asarray(predictions), jnp.asarray(labels), num_classes=K)
    b = count(*map(jnp.asarray, (predictions, labels)), num_classes=K, sizes=jnp.asarray(sizes))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_boundary_of_a_square_is_a_frame_and_the_image_edge_counts():
    mask = np.zeros((1, 9, 9), bool)
    mask[0, 2:7, 2:7] = True
    frame = mask.copy()
    frame[0, 3:6, 3:6] = False
    one = jnp.array([1])
    np.testing.assert_array_equal(boundary(jnp.asarray(mask), one), frame)
    full = np.asarray(boundary(jnp.ones((1, 5, 5), bool), one))[0]
    assert full.sum() == 16 and not full[1:-1, 1:-1].any()


def test_perfect_prediction_is_1_and_absent_classes_do_not_count():
    labels = jnp.asarray(np.kron([[0, 1], [1, 0]], np.ones((8, 8), int))[None])
    metrics = SegmentationCounts.zeros(K).merge(count(labels, labels, num_classes=K)).compute(NAMES)
    assert metrics["miou"] == metrics["boundary_iou"] == metrics["pixel_accuracy"] == 1
    assert set(metrics) == {
        "miou",
        "boundary_iou",
        "pixel_accuracy",
        *(f"{kind}/{name}" for kind in ("iou", "boundary_iou") for name in "ab"),
    }


def test_a_class_that_is_only_predicted_counts_as_zero():
    labels = jnp.zeros((1, 16, 16), int)
    predictions = labels.at[0, 4:8, 4:8].set(2)
    metrics = SegmentationCounts.zeros(K).merge(count(predictions, labels, num_classes=K))
    metrics = metrics.compute(NAMES)
    assert metrics["iou/c"] == 0
    np.testing.assert_allclose(metrics["miou"], (240 / 256) / 2)
    np.testing.assert_allclose(metrics["pixel_accuracy"], 240 / 256)


def test_merging_images_equals_counting_them_together_and_does_not_overflow():
    sizes = np.array([[40, 48]] * 3)
    predictions, labels = blobs(2, sizes)
    one_by_one = SegmentationCounts.zeros(K)
    for p, y in zip(predictions, labels, strict=True):
        batch = count(jnp.asarray(p[None]), jnp.asarray(y[None]), num_classes=K)
        one_by_one = one_by_one.merge(batch)
    together = count(jnp.asarray(predictions), jnp.asarray(labels), num_classes=K)
    jax.tree.map(np.testing.assert_array_equal, one_by_one, together)

    huge = jax.tree.map(lambda x: np.full_like(x, 2**31 - 1), together)
    twice = SegmentationCounts.zeros(K).merge(huge).merge(huge)
    assert twice.confusion.dtype == np.int64
    assert twice.confusion[0, 0] == 2**32 - 2


def test_nothing_labelled_is_zero_not_nan():
    labels = jnp.full((1, 8, 8), 255)
    counts = count(jnp.zeros_like(labels), labels, num_classes=K)
    assert SegmentationCounts.zeros(K).merge(counts).compute(NAMES) == {
        "miou": 0.0,
        "boundary_iou": 0.0,
        "pixel_accuracy": 0.0,
    }


def test_sharded_batch_gives_the_same_counts():
    sizes = np.array([[40, 48]] * 8)
    predictions, labels = blobs(3, sizes)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    put = lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))  # noqa: E731
    sharded = jax.jit(lambda p, y: count(p, y, num_classes=K))(put(predictions), put(labels))
    whole = count(jnp.asarray(predictions), jnp.asarray(labels), num_classes=K)
    jax.tree.map(np.testing.assert_array_equal, sharded, whole)
