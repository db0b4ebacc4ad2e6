import io

import numpy as np
import pytest
from PIL import Image

from resfu_jax.data import dataset_info, load, open_source, prepare, shapes


def _draw(seed, **options):
    return shapes.draw_example(np.random.default_rng(seed), **options)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The real builder with a handful of examples, as dataset `tiny`."""
    config = shapes.ShapesConfig(name="tiny", size=48, train_examples=5, validation_examples=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(load._DATASETS, "tiny", (shapes.INFO, shapes.Shapes, config))
        folder = tmp_path_factory.mktemp("data")
        prepare("tiny", folder)
        yield folder


def test_same_generator_same_pixels():
    for one, two in zip(_draw((1, 2)), _draw((1, 2)), strict=True):
        np.testing.assert_array_equal(one, two)
    assert not np.array_equal(_draw((1, 2))[0], _draw((1, 3))[0])


def test_every_class_is_common_and_labels_are_classes():
    present = np.zeros(len(shapes.CLASS_NAMES))
    for seed in range(60):
        image, label = _draw(seed)
        assert image.shape == (128, 128, 3) and image.dtype == label.dtype == np.uint8
        assert label.max() < len(shapes.CLASS_NAMES)
        present += np.bincount(label.ravel(), minlength=len(shapes.CLASS_NAMES)) > 0
    assert present[0] == 60
    assert present.min() >= 15


def test_number_of_shapes_is_bounded():
    for seed in range(10):
        label = _draw(seed, max_shapes=1)[1]
        assert len(np.unique(label)) == 2  # background and one shape


def test_every_shape_stands_out_from_what_is_under_it():
    for seed in range(20):
        image, label = _draw(seed, max_shapes=1)
        inside, outside = image[label > 0].mean(0), image[label == 0].mean(0)
        assert np.linalg.norm(inside - outside) > 45


def test_single_pixels_do_not_tell_the_class():
    """About half of a shape's pixels have the hue of its class; the others have any."""
    shares = []
    for seed in range(100):
        image, label = _draw(seed, max_shapes=1, size=64)
        hue = np.asarray(Image.fromarray(image).convert("HSV"))[..., 0][label > 0] / 256
        typical = (label.max() - 1) / 7
        away = np.abs((hue - typical + 0.5) % 1 - 0.5)
        shares.append(np.mean(away < 1 / 14))
    assert 0.4 < np.mean(shares) < 0.7, np.mean(shares)


def test_ignored_outlines_surround_shapes_and_hide_none():
    for seed in range(5):
        plain = _draw(seed, max_shapes=1)[1]
        outlined = _draw(seed, max_shapes=1, ignore_outlines=True)[1]
        np.testing.assert_array_equal(outlined[plain > 0], plain[plain > 0])
        assert set(np.unique(outlined[plain == 0])) == {0, 255}
        next_to_shape = np.zeros_like(plain, bool)
        rows, columns = np.nonzero(plain)
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                next_to_shape[np.clip(rows + dy, 0, 127), np.clip(columns + dx, 0, 127)] = True
        np.testing.assert_array_equal(outlined == 255, next_to_shape & (plain == 0))


@pytest.mark.parametrize("name", sorted(load._DATASETS))
def test_infos(name):
    info = dataset_info(name)
    assert info.name == name
    assert len(info.palette) == info.num_classes == len(set(info.palette))
    assert len(set(info.class_names)) == info.num_classes
    assert info.ignore_label == 255
    assert info.embedded == ("shapes" in name)


def test_builder_stores_what_is_drawn(tiny):
    for split, seed, count in (("train", 0, 5), ("validation", 1, 3)):
        source = open_source("tiny", split, tiny)
        examples = {example["id"]: example for example in source}
        assert sorted(examples) == [f"{split}_{i:05d}".encode() for i in range(count)]
        for index in range(count):
            example = examples[f"{split}_{index:05d}".encode()]
            image, label = _draw((shapes._SEED, seed, index), size=48)
            np.testing.assert_array_equal(_decode(example["image"]), image)
            np.testing.assert_array_equal(_decode(example["label"]), label)


def test_building_twice_gives_the_same_bytes(tiny, tmp_path):
    prepare("tiny", tmp_path)
    assert list(open_source("tiny", "train", tmp_path)) == list(open_source("tiny", "train", tiny))


def test_a_slice_of_a_split(tiny):
    assert len(open_source("tiny", "train[:2]", tiny)) == 2


def _decode(data):
    return np.asarray(Image.open(io.BytesIO(data)))
