import numpy as np
import pytest
from PIL import Image

from resfu_jax.visualize import colorize, save_png, side_by_side

PALETTE = ((0, 0, 0), (200, 30, 30), (30, 200, 30))


def test_each_class_has_its_colour():
    labels = np.array([[0, 1], [2, 1]])
    np.testing.assert_array_equal(
        colorize(labels, PALETTE),
        [[PALETTE[0], PALETTE[1]], [PALETTE[2], PALETTE[1]]],
    )


def test_ignored_pixels_are_hatched_in_colours_of_no_class():
    labels = np.full((12, 12), 255, np.uint8)
    labels[:2] = 1
    picture = colorize(labels, PALETTE)
    assert np.all(picture[:2] == PALETTE[1])
    colors = {tuple(c) for c in picture[2:].reshape(-1, 3).tolist()}
    assert colors == {(255, 255, 255), (64, 64, 64)}
    assert colors.isdisjoint(PALETTE)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_side_by_side_and_back_from_a_file(tmp_path, dtype):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (10, 14, 3), np.uint8)
    label, prediction = rng.integers(0, 3, (2, 10, 14)).astype(dtype)
    picture = side_by_side(image, label, prediction, PALETTE, gap=4)
    path = tmp_path / "new" / "step3.png"
    save_png(path, picture)
    with Image.open(path) as file:
        read = np.asarray(file)
    assert read.shape == (10, 3 * 14 + 2 * 4, 3)
    np.testing.assert_array_equal(read[:, :14], image)
    np.testing.assert_array_equal(read[:, 18:32], colorize(label, PALETTE))
    np.testing.assert_array_equal(read[:, 36:], colorize(prediction, PALETTE))
    assert np.all(read[:, 14:18] == 255) and np.all(read[:, 32:36] == 255)
