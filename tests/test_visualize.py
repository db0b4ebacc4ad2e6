import numpy as np
import pytest
from PIL import Image

from resfu_jax.visualize import (
    PCA,
    Window,
    colorize,
    compare_predictions,
    save_grid,
    save_png,
    side_by_side,
)

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


def test_equal_features_get_equal_colours():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(9, 8, 5)) * [1, 1, 9, 4, 2] + 3
    pca = PCA.fit(features)
    np.testing.assert_array_equal(pca(features[:4, :3]), pca(features)[:4, :3])
    # The first colour follows the channel that varies most.
    red = pca(features)[..., 0].ravel().astype(float)
    assert abs(np.corrcoef(red, features[..., 2].ravel())[0, 1]) > 0.95


def test_a_border_unlike_the_rest_does_not_rule_the_colours():
    features = np.random.default_rng(0).normal(size=(16, 12, 6))
    framed = np.pad(features, ((1, 1), (1, 1), (0, 0)), constant_values=1000.0)
    picture = PCA.fit(framed)(framed)[1:-1, 1:-1]
    assert picture.reshape(-1, 3).std(axis=0).min() > 40


@pytest.mark.parametrize("shape", [(1, 1, 5), (4, 4, 2)])
def test_maps_with_fewer_than_three_directions(shape):
    features = np.random.default_rng(0).normal(size=shape)
    assert PCA.fit(features)(features).shape == (*shape[:2], 3)


def test_a_grid_has_its_panels_in_their_places(tmp_path):
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    panels = [("", np.full((6, 4, 3), c, np.uint8)) for c in colours]
    path = tmp_path / "new" / "grid.png"
    save_grid(path, panels, columns=2, width=1, space=0.1, dpi=100)
    with Image.open(path) as file:
        grid = np.asarray(file.convert("RGB"))
    assert grid.shape == (310, 210, 3)
    for (y, x), colour in zip([(75, 50), (75, 160), (235, 50)], colours, strict=True):
        assert tuple(grid[y, x]) == colour
    assert (
        (grid[155] == 255).all() and (grid[:, 105] == 255).all() and (grid[235, 160] == 255).all()
    )


def test_a_row_with_titles_is_higher(tmp_path):
    panels = [("title", np.zeros((5, 5, 3), np.uint8)), ("", np.zeros((5, 5, 3), np.uint8))]
    save_grid(tmp_path / "grid.png", panels, columns=1, width=1, space=0, dpi=100)
    with Image.open(tmp_path / "grid.png") as file:
        grid = np.asarray(file.convert("L"))
    assert grid.shape == (222, 100)
    assert (grid[:20] < 128).any() and (grid[:20] == 255).any() and (grid[25:] == 0).all()


def test_predictions_of_models_are_put_side_by_side(tmp_path):
    image = np.full((10, 14, 3), 120, np.uint8)
    files = {"one": [], "other": []}
    for i in range(2):
        label = np.full((10, 14), i)
        for value, (name, paths) in enumerate(files.items(), 1):
            paths.append(tmp_path / f"{name}{i}.png")
            save_png(paths[-1], side_by_side(image, label, np.full((10, 14), value), PALETTE))
    compare_predictions(tmp_path / "all.png", files, width=1.4, space=0.1, dpi=100)
    with Image.open(tmp_path / "all.png") as file:
        picture = np.asarray(file.convert("RGB"))
    assert picture.shape == (2 * 100 + 10 + 22, 4 * 140 + 30, 3)
    middle = [[tuple(picture[y, x]) for x in (70, 220, 370, 520)] for y in (72, 182)]
    image = (120, 120, 120)
    assert middle == [
        [image, PALETTE[0], PALETTE[1], PALETTE[2]],
        [image, PALETTE[1], PALETTE[1], PALETTE[2]],
    ]


def test_weights_are_drawn_where_they_are():
    weights = np.zeros((20, 30))
    weights[7, 11], weights[8, 11] = 0.8, -0.4
    image = np.full((160, 240, 3), 100, np.uint8)
    window = Window.around((60, 100), (160, 240), (20, 30), rows=10)
    assert window.rows == (2, 12) and window.columns == (5, 20)  # cells of 8 pixels
    picture = window.show(image, weights, zoom=4)
    assert picture.shape == (10 * 32, 15 * 32, 3)
    at = lambda row, column: picture[(row - 2) * 32 + 4, (column - 5) * 32 + 4].tolist()  # noqa: E731
    assert at(7, 11) == [255, 170, 30]
    assert at(6, 11) == [45, 45, 45]
    assert at(8, 11) == [round((0.45 * 100 + c) / 2) for c in (60, 130, 255)]
    assert picture[(60 - 16) * 4 + 2, (100 - 40) * 4 + 2].tolist() == [255, 255, 255]  # the cross


@pytest.mark.parametrize("pixel", [(0, 0), (159, 239), (0, 239)])
def test_windows_stay_inside(pixel):
    window = Window.around(pixel, (160, 240), (20, 30), rows=6)
    image = np.random.default_rng(0).integers(0, 256, (160, 240, 3), np.uint8)
    assert window.show(image, zoom=2).shape == (96, 144, 3)
    framed = window.frame(image)
    assert framed.shape == image.shape and (framed != image).any()
    whole = Window.around(pixel, (160, 240), (20, 30), rows=99)
    assert whole.rows == (0, 20) and whole.columns == (0, 30)
