import dataclasses
import io
import json
import logging
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from resfu_jax.data import (
    DataError,
    DatasetInfo,
    DatasetNotPrepared,
    Source,
    dataset_info,
    eval_batches,
    list_datasets,
    open_source,
    skip_corrupt,
    train_batches,
    transforms,
)
from resfu_jax.preprocess import Preprocess

INFO = DatasetInfo("toy", tuple("abcdef"), ((0, 0, 0),) * 6)
BANDS = DatasetInfo("bands", tuple(map(str, range(64))), ((0, 0, 0),) * 64)


def _png(array, **options):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(array)).save(buffer, "PNG", **options)
    return buffer.getvalue()


def _toy(count=7, size=(20, 28), broken=()):
    """A source of random pictures; those in `broken` are not decodable."""
    rng = np.random.default_rng(0)
    records = []
    for index in range(count):
        image = _png(rng.integers(0, 256, (*size, 3), np.uint8))
        records.append(
            {
                "image": image[:50] if index in broken else image,
                "label": _png(rng.integers(0, 6, size, np.uint8)),
                "id": f"toy_{index}".encode(),
            }
        )
    return Source("toy", "train", records)


def _train(source=None, **options):
    options = {"batch_size": 3, "crop_size": (16, 16), "seed": 0} | options
    return train_batches(_toy() if source is None else source, INFO, **options)


def _take(iterator, count):
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


def _assert_equal(first, second):
    for one, two in zip(first, second, strict=True):
        assert one.keys() == two.keys() >= {"image", "label", "id"}
        for key in one:
            np.testing.assert_array_equal(one[key], two[key])


# ---------------------------------------------------------------------------------- training


def test_shapes_and_types_of_a_batch():
    (batch,) = _take(_train(crop_size=(16, 40)), 1)
    assert batch["image"].shape == (3, 16, 40, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (3, 16, 40) and batch["label"].dtype == np.uint8
    assert batch["id"].shape == (3,) and batch["id"].dtype.kind == "S"


def test_seed_decides_everything():
    first = _take(_train(seed=3), 4)
    _assert_equal(first, _take(_train(seed=3), 4))
    assert not np.array_equal(first[0]["image"], _take(_train(seed=4), 1)[0]["image"])


def test_every_epoch_is_a_new_permutation_and_batches_cross_epochs():
    ids = np.concatenate([batch["id"] for batch in _take(_train(), 14)])
    epochs = ids.reshape(6, 7)
    assert all(len(set(epoch)) == 7 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 3


def test_an_example_is_augmented_anew_in_every_epoch():
    batches = _take(_train(_toy(count=1), batch_size=1), 5)
    assert len({batch["image"].tobytes() for batch in batches}) == 5


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_state_restores_the_exact_position(steps):
    iterator = _train()
    for _ in range(steps):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))  # as a checkpoint would keep it
    expected = _take(iterator, 5)
    resumed = _train()
    resumed.set_state(state)
    _assert_equal(expected, _take(resumed, 5))


def test_batches_of_another_size_go_on_with_the_next_example():
    iterator, (*_, last) = _train(), _take(_train(batch_size=1), 6 + 8)
    next(iterator), next(iterator)
    resumed = _train(batch_size=4)
    resumed.set_state(iterator.get_state())
    iterator.close()
    (*_, second) = _take(resumed, 2)
    _assert_equal([{key: value[-1:] for key, value in second.items()}], [last])
    assert resumed.get_state() == {"examples": 14}


@pytest.mark.parametrize(
    "state",
    [{"next_index": 3}, {"iterators_in_use_states": [{"next_index": 2}, {"next_index": 1}]}],
)
def test_positions_of_older_versions(state):
    resumed = _train()
    resumed.set_state(state)
    _assert_equal(_take(_train(), 5)[3:], _take(resumed, 2))


@pytest.mark.slow
def test_worker_processes_change_nothing():
    expected = _take(_train(), 6)
    iterator = _train(num_workers=2)
    first = [next(iterator) for _ in range(3)]
    state = iterator.get_state()
    _assert_equal(expected, first + _take(iterator, 3))
    resumed = _train()
    resumed.set_state(state)
    _assert_equal(expected[3:], _take(resumed, 3))


def test_shards_are_the_whole_batch_one_after_the_other():
    whole = _take(_train(batch_size=4), 5)
    parts = [_take(_train(batch_size=2, shard=(index, 2)), 5) for index in range(2)]
    for step, batch in enumerate(whole):
        for key in batch:
            together = np.concatenate([part[step][key] for part in parts])
            np.testing.assert_array_equal(batch[key], together)


# ------------------------------------------------------------------------------ augmentation


def _bands(height=64, width=240):
    """Red counts columns, green counts rows; the label changes every fourth column."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    image = np.stack([x, y, 0 * x], -1).astype(np.uint8)
    return Source(
        "bands",
        "train",
        [{"image": _png(image), "label": _png(x.astype(np.uint8) // 4), "id": b"x"}],
    ), image


@pytest.mark.parametrize("resize_scale", [1.0, 0.5])
@pytest.mark.parametrize("scale_range", [(1.0, 1.0), (0.5, 2.0), (1.7, 2.0), (0.5, 0.6)])
def test_labels_stay_aligned_with_the_image(scale_range, resize_scale):
    source, _ = _bands()
    iterator = train_batches(
        source,
        BANDS,
        batch_size=40,
        crop_size=(48, 80),
        scale_range=scale_range,
        preprocess=Preprocess(scale=resize_scale, mean=(1, 2.5, 3.5)),
        photometric=False,
        seed=1,
    )
    (batch,) = _take(iterator, 1)
    offsets, flips = [], 0
    for image, label in zip(batch["image"].astype(float), batch["label"], strict=True):
        valid = label != 255
        inside = valid.copy()
        for axis in (0, 1):  # antialiasing bends the ramp within a few pixels of the border
            for shift in (-4, 4):
                inside &= np.roll(valid, shift, axis)
        inside[:4] = inside[-4:] = False
        inside[:, :4] = inside[:, -4:] = False
        if not inside.any():
            continue
        # Red is the source column - 0.5 (pixel centres), so red + 0.5 lies in the label's band.
        offset = image[..., 0] + 0.5 - (4.0 * label + 2)
        assert np.abs(offset[inside]).max() <= 2.0 + 1.6  # half a band + a step at scale 1/4
        offsets.append(offset[inside].mean())
        flips += image[6, 12, 0] < image[6, 4, 0]
        assert np.all(image[~valid] == (1, 2, 4))
    # A shift by one source pixel would be 1. At exactly half size every nearest position is a tie
    # between two columns, which shifts labels by half a source pixel.
    assert np.abs(np.mean(offsets)) < (0.15 if resize_scale == 1 else 0.6)
    assert 5 < flips < 35


@pytest.mark.parametrize("scale", [0.3, 0.77, 1.0, 1.9])
@pytest.mark.parametrize("size", [(41, 57), (33, 24)])
def test_cropping_while_resampling_equals_cropping_afterwards(scale, size):
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize(size[::-1])
    label = Image.fromarray(rng.integers(0, 6, size, np.uint8))
    whole, whole_label = transforms.resample(smooth, label, scale)
    assert whole.size == whole_label.size == transforms.scaled_size(smooth.size, scale)
    window = (2, 1, whole.width - 1, whole.height - 3)
    part, part_label = transforms.resample(smooth, label, scale, window)
    x, y = (
        (np.arange(low, high) + 0.5) * before / after
        for low, high, before, after in zip(
            window[:2], window[2:], label.size, whole.size, strict=True
        )
    )
    tie = [np.abs(positions - np.rint(positions)) < 1e-3 for positions in (x, y)]
    tie = tie[0][None, :] | tie[1][:, None]  # halfway between two pixels either is nearest
    same = np.asarray(part_label) == np.asarray(whole_label.crop(window))
    assert np.all(same | tie)
    np.testing.assert_allclose(
        np.asarray(part).astype(int), np.asarray(whole.crop(window)).astype(int), atol=1
    )


def test_resized_crops_have_the_areas_and_aspects_asked_for():
    size, rng = (60, 40), np.random.default_rng(0)
    boxes = [transforms.resized_crop(size, (0.2, 1.0), (3 / 4, 4 / 3), rng) for _ in range(2000)]
    left, top, right, bottom = np.array(boxes, float).T
    assert left.min() == top.min() == 0 and right.max() == 60 and bottom.max() == 40
    share, aspect = (right - left) * (bottom - top) / 2400, (right - left) / (bottom - top)
    assert 0.19 < share.min() < 0.22 and 0.85 < share.max() <= 0.9  # 53 x 40 is the largest
    assert 0.72 < aspect.min() < 0.78 and 1.28 < aspect.max() < 1.38
    # What never fits is the largest window in the middle that has the aspect.
    assert transforms.resized_crop((100, 10), (1.0, 1.0), (0.5, 2.0), rng) == (40, 0, 60, 10)
    assert transforms.resized_crop((10, 100), (1.0, 1.0), (0.5, 2.0), rng) == (0, 40, 10, 60)
    assert transforms.resized_crop((8, 8), (1.0, 1.0), (1.0, 1.0), rng) == (0, 0, 8, 8)


def test_resized_crops_keep_labels_aligned_and_come_again():
    source, _ = _bands()
    options = dict(
        batch_size=20, crop_size=(48, 48), area_range=(0.2, 1.0), photometric=False, seed=1
    )
    (batch,) = _take(train_batches(source, BANDS, **options), 1)
    _assert_equal([batch], _take(train_batches(source, BANDS, **options), 1))
    assert (batch["label"] < 64).all()  # nothing is padded
    offset = batch["image"][..., 0] + 0.5 - (4.0 * batch["label"] + 2)
    assert np.abs(offset[:, 6:-6, 6:-6]).max() <= 2.0 + 2.5  # half a band, and a pixel of the crop
    starts = batch["image"][:, 24, 10, 0].astype(int) - batch["image"][:, 24, 38, 0]
    assert 3 < (starts > 0).sum() < 17  # mirrored or not


def test_small_images_are_padded_and_never_cropped_below_the_crop_size():
    (batch,) = _take(_train(crop_size=(32, 48), scale_range=(1.0, 1.0), photometric=False), 1)
    assert np.all(batch["label"][:, :20, :28] < 6)
    assert np.all(batch["label"][:, 20:] == 255) and np.all(batch["label"][:, :, 28:] == 255)
    assert np.all(batch["image"][:, 20:] == (124, 116, 104))


def test_without_any_augmentation_the_picture_is_unchanged():
    source = _toy()
    options = {"crop_size": (20, 28), "scale_range": (1.0, 1.0), "flip": False}
    (batch,) = _take(_train(source, photometric=False, **options), 1)
    for row, name in enumerate(batch["id"]):
        example = source[int(name.decode().removeprefix("toy_"))]
        for key in ("image", "label"):
            np.testing.assert_array_equal(
                batch[key][row], np.asarray(Image.open(io.BytesIO(example[key])))
            )


def test_crops_reach_every_corner():
    source, _ = _bands(height=24, width=24)
    iterator = train_batches(
        source,
        BANDS,
        batch_size=200,
        crop_size=(20, 20),
        seed=0,
        scale_range=(1.0, 1.0),
        flip=False,
        photometric=False,
    )
    (batch,) = _take(iterator, 1)
    corners = {tuple(pixel[:2]) for pixel in batch["image"][:, 0, 0].tolist()}
    assert corners == {(x, y) for x in range(5) for y in range(5)}


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((20, 28), (30, 42)),  # the short side rules
        ((28, 20), (42, 30)),
        ((10, 40), (15, 60)),  # both
        ((8, 64), (8, 60)),  # the long side rules: 7.5, 60
        ((60, 60), (30, 30)),
    ],
)
def test_resizing_to_a_short_side(size, resized):
    source = _toy(1, size=size)
    options = {"batch_size": 1, "preprocess": Preprocess(resize_to=(30, 60))}
    (batch,) = eval_batches(source, INFO, pad_to=1, **options)
    assert batch["image"].shape[1:3] == resized and batch["size"].tolist() == [list(resized)]
    half = Preprocess(resize_to=(30, 60), scale=0.5)
    (half,) = eval_batches(source, INFO, pad_to=(64, 64), batch_size=1, preprocess=half)
    assert np.abs(2 * half["size"][0] - resized).max() <= 1
    options |= {"flip": False, "photometric": False, "crop_size": resized}
    (same,) = _take(_train(source, scale_range=(1.0, 1.0), **options), 1)
    for key in ("image", "label"):
        np.testing.assert_array_equal(same[key], batch[key])
    # The random scale multiplies both bounds.
    (crops,) = _take(_train(source, scale_range=(0.5, 0.5), **options), 1)
    inside = crops["label"][0] != 255
    drawn = inside.any(1).sum(), inside.any(0).sum()
    assert np.abs(2 * np.array(drawn) - resized).max() <= 1


@pytest.mark.parametrize("orientation", [True, False])
def test_images_are_turned_or_not_in_training_and_evaluation(orientation):
    image = np.arange(8 * 12 * 3, dtype=np.uint16).astype(np.uint8).reshape(8, 12, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    expected = np.rot90(image, -1) if orientation else image
    files = {"image": _png(image, exif=exif), "label": _png(np.zeros(expected.shape[:2], np.uint8))}
    source = Source("toy", "train", [files | {"id": b"phone"}])
    preprocess = Preprocess(orientation=orientation)
    (batch,) = eval_batches(source, INFO, batch_size=1, preprocess=preprocess, pad_to=1)
    np.testing.assert_array_equal(batch["image"], expected[None])
    options = dict(batch_size=1, crop_size=expected.shape[:2], scale_range=(1.0, 1.0))
    plain = dict(flip=False, photometric=False, preprocess=preprocess)
    (crops,) = _take(_train(source, **options, **plain), 1)
    np.testing.assert_array_equal(crops["image"], expected[None])


def _corner(height=40, width=40):
    """Class 0, but for class 1 in a corner of a quarter of each side; one pixel is ignored."""
    label = np.zeros((height, width), np.uint8)
    label[: height // 4, : width // 4] = 1
    label[-1, -1] = 255
    image = np.zeros((height, width, 3), np.uint8)
    return Source("toy", "train", [{"image": _png(image), "label": _png(label), "id": b"x"}])


def test_crops_of_one_class_are_drawn_anew():
    options = {"batch_size": 200, "crop_size": (12, 12), "scale_range": (1.0, 1.0)}

    def largest_shares(source, share):
        (batch,) = _take(_train(source, max_class_share=share, **options), 1)
        labels = batch["label"].reshape(200, -1)
        return np.array([np.bincount(row[row != 255]).max() / (row != 255).sum() for row in labels])

    first, mixed = (largest_shares(_corner(), share) for share in (1.0, 0.75))
    # 32 of 29 x 29 places have less than 3/4 of one class: 4 %, or 35 % in 11 tries.
    assert np.mean(first < 0.75) < 0.1
    assert 0.22 < np.mean(mixed < 0.75) < 0.48
    blank = _corner()
    blank.records[0]["label"] = _png(np.full((40, 40), 2, np.uint8))
    assert np.all(largest_shares(blank, 0.75) == 1)  # it gives up


def test_a_class_share_ignores_what_is_ignored():
    augment = transforms.Augment(
        (4, 4), Preprocess(), (1.0, 1.0), 0.75, False, False, np.uint8(255)
    )
    label = np.full((4, 4), 255, np.uint8)
    for first, second, mixed in ((3, 1, False), (2, 1, True), (4, 0, False), (0, 0, False)):
        label[0], label[1] = [0] * first + [255] * (4 - first), [1] * second + [255] * (4 - second)
        assert augment._is_mixed(Image.fromarray(label)) == mixed


def test_photometric_jitter_is_bounded_and_random():
    grey = Image.new("RGB", (4, 4), (120, 120, 120))
    results, rng = [], np.random.default_rng(0)
    for _ in range(1000):
        pixels = np.asarray(transforms.photometric_jitter(grey, rng))
        assert pixels.shape == (4, 4, 3)
        assert np.ptp(pixels) == 0  # grey has no hue or saturation to change
        results.append(int(pixels[0, 0, 0]))
    unchanged = np.mean(np.array(results) == 120)
    assert 0.2 < unchanged < 0.32  # brightness and contrast both off: 1/4
    assert min(results) >= (120 - 32) * 0.5 - 1 and max(results) <= (120 + 32) * 1.5 + 1
    assert len(set(results)) > 60


def test_photometric_jitter_turns_hue_and_saturation():
    red = Image.new("RGB", (2, 2), (200, 60, 60))
    pixels = np.array(
        [
            np.asarray(transforms.photometric_jitter(red, np.random.default_rng(seed)))[0, 0]
            for seed in range(200)
        ]
    ).astype(int)
    hue_side = np.sign(pixels[:, 1] - pixels[:, 2])  # towards yellow or towards magenta
    assert {-1, 0, 1} == set(hue_side.tolist())
    assert np.all(pixels[:, 0] >= pixels[:, 1:].max(1))  # +-36 degrees: red stays strongest


# -------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
def test_evaluation_drops_nothing_and_pads_whole_rows(batch_size):
    source = _toy()
    batches = eval_batches(source, INFO, batch_size=batch_size, pad_to=(24, 32))
    rows = [row for batch in batches for row in zip(*batch.values(), strict=True)]
    assert len(batches) == -(-7 // batch_size) and len(rows) == len(batches) * batch_size
    for index, (image, label, name, size) in enumerate(rows):
        assert image.shape == (24, 32, 3) and label.shape == (24, 32) and size.dtype == np.int32
        if index >= len(source):
            assert name == b"" and np.all(label == 255) and tuple(size) == (0, 0)
            continue
        assert tuple(size) == (20, 28)
        assert name == source[index]["id"]
        expected = np.asarray(Image.open(io.BytesIO(source[index]["image"])))
        np.testing.assert_array_equal(image[:20, :28], expected)
        assert np.all(label[:20, :28] < 6)
        assert np.all(label[20:] == 255) and np.all(label[:, 28:] == 255)
    _assert_equal(list(batches), list(batches))  # can be iterated again


def test_pad_to_a_multiple_fits_the_largest_image():
    small, large = _toy(2, size=(20, 50)), _toy(2, size=(40, 10))
    source = dataclasses.replace(small, records=small.records + large.records)
    (batch,) = eval_batches(source, INFO, batch_size=4, pad_to=16)
    assert batch["image"].shape == (4, 48, 64, 3)
    assert batch["size"].tolist() == 2 * [[20, 50]] + 2 * [[40, 10]]
    half = Preprocess(scale=0.5, mean=(127.5,) * 3, multiple=16)
    (batch,) = eval_batches(source, INFO, batch_size=4, preprocess=half)
    assert batch["image"].shape == (4, 32, 32, 3)
    assert batch["size"].tolist() == 2 * [[10, 25]] + 2 * [[20, 5]]
    assert (batch["image"][0, 10:] == 128).all() and (batch["image"][:, :, 25:] == 128).all()


@pytest.mark.parametrize("count", [1, 2])
def test_images_of_like_sizes_are_evaluated_together(count):
    small, large, tall = (_toy(n, size=s) for n, s in ((3, (20, 50)), (2, (17, 33)), (2, (40, 10))))
    records = [r for part in (small, tall, large) for r in part.records]
    records = [r | {"id": b"%d" % i} for i, r in enumerate(records)]
    parts = [
        list(
            eval_batches(
                dataclasses.replace(small, records=records),
                INFO,
                batch_size=2,
                pad_to=16,
                group_sizes=True,
                shard=(index, count),
            )
        )
        for index in range(count)
    ]
    shapes = [[batch["image"].shape[1:3] for batch in part] for part in parts]
    assert all(these == shapes[0] for these in shapes)  # alike in all processes
    assert set(shapes[0]) == {(32, 64), (48, 16), (32, 48)}
    rows = [row for part in parts for batch in part for row in zip(*batch.values(), strict=True)]
    seen = sorted(name for _, _, name, _ in rows if name)
    assert seen == [b"%d" % i for i in range(7)]
    for image, label, name, (height, width) in rows:
        assert not name or max(image.shape[0] - height, image.shape[1] - width) < 16
        assert np.all(label[height:] == 255) and np.all(label[:, width:] == 255)


def test_evaluation_at_half_resolution():
    source, image = _bands()
    half = Preprocess(scale=0.5)
    (batch,) = eval_batches(source, BANDS, batch_size=1, pad_to=(32, 120), preprocess=half)
    inner = batch["image"][0, 4:-4, 4:-4, 0].astype(float) + 0.5
    assert np.abs(inner - 4.0 * batch["label"][0, 4:-4, 4:-4] - 2).max() <= 2.5
    assert image.shape == (64, 240, 3)


def test_shards_of_an_evaluation_have_equally_many_batches():
    batches = [eval_batches(_toy(5), INFO, batch_size=2, pad_to=4, shard=(i, 2)) for i in range(2)]
    assert [len(list(part)) for part in batches] == [2, 2]
    ids = [name for part in batches for batch in part for name in batch["id"]]
    assert sorted(ids) == [b""] * 3 + [f"toy_{i}".encode() for i in range(5)]


def test_an_image_larger_than_pad_to_is_an_error():
    with pytest.raises(DataError, match=r"(?s)'toy_0' is 20x28 .*does not fit pad_to=\(24, 24\)"):
        list(eval_batches(_toy(), INFO, batch_size=2, pad_to=(24, 24)))


# ------------------------------------------------------------------------------------ errors


def _broken_record(**changes):
    source = _toy(count=1)
    return dataclasses.replace(source, records=[source.records[0] | changes])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"label": _png(np.full((20, 28), 6, np.uint8))}, r"holds the values \[6\]; toy has .* 5"),
        ({"label": _png(np.zeros((20, 27), np.uint8))}, r"differ in size: 28x20 against 27x20"),
        (
            {"label": _png(np.zeros((20, 28, 3), np.uint8))},
            r"PIL mode 'RGB'; class indices need one",
        ),
        (
            {"image": b"no picture"},
            r"the image of toy.*: cannot be read as an image: it is none of BMP",
        ),
        (
            {"label": _png(np.zeros((20, 28), np.uint8))[:40]},
            r"the label map of toy.*: cannot be read as an image",
        ),
    ],
)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_unusable_examples_are_named(mode, changes, message):
    source = _broken_record(**changes)
    with pytest.raises(DataError, match=message) as caught:
        if mode == "train":
            next(_train(source))
        else:
            list(eval_batches(source, INFO, batch_size=1, pad_to=4))
    assert "split 'train', example 'toy_0'" in str(caught.value)


@pytest.mark.slow
def test_an_unusable_example_is_named_by_a_worker_process_too():
    iterator = _train(_broken_record(image=b"no picture"), num_workers=1)
    with pytest.raises(Exception, match="the image of toy, split 'train'.*cannot be read"):
        next(iterator)
    iterator.close()


def test_corrupt_examples_are_skipped_and_counted_only_on_request(caplog):
    source = _toy(broken=(1, 4))
    with pytest.raises(DataError, match="the image of toy.*cannot be read as an image"):
        _take(_train(source), 3)
    with caplog.at_level(logging.WARNING):
        checked = skip_corrupt(source, INFO)
    assert checked.skipped == ("toy_1", "toy_4") and len(checked) == 5
    assert "skipping 2 corrupt of 7 examples: toy_1, toy_4" in caplog.text
    assert skip_corrupt(checked, INFO) is checked
    for batches in (
        _take(_train(source, on_corrupt="skip"), 5),
        eval_batches(source, INFO, batch_size=5, pad_to=4, on_corrupt="skip"),
    ):
        ids = {name for batch in batches for name in batch["id"]}
        assert ids == {b"toy_0", b"toy_2", b"toy_3", b"toy_5", b"toy_6"}


def test_wrong_labels_are_never_skipped():
    source = _broken_record(label=_png(np.full((20, 28), 6, np.uint8)))
    with pytest.raises(DataError, match="holds the values"):
        next(_train(source, on_corrupt="skip"))


def test_nothing_left_to_decode():
    with pytest.raises(DataError, match="No example of toy, split 'train', can be decoded"):
        skip_corrupt(_toy(2, broken=(0, 1)), INFO)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size must be a whole number, at least 1, got 0"),
        ({"crop_size": (0, 4)}, r"crop_size must be positive \(height, width\), got \(0, 4\)"),
        ({"scale_range": (2.0, 0.5)}, r"0 < low <= high, got \(2.0, 0.5\)"),
        ({"max_class_share": 0.0}, "max_class_share must be above 0, at most 1"),
        ({"area_range": (0.5, 2.0)}, r"area_range must be 0 < low <= high <= 1, or None, got"),
        ({"aspect_range": (2.0, 1.0)}, r"aspect_range must be 0 < low <= high, got"),
        ({"num_workers": -1}, "num_workers must be a whole number from 0, got -1"),
        ({"shard": (2, 2)}, r"0 <= index < count, got \(2, 2\)"),
    ],
)
def test_arguments_of_training_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        _train(**options)


@pytest.mark.parametrize("pad_to", [0, (0, 4)])
def test_arguments_of_evaluation_are_checked(pad_to):
    with pytest.raises(ValueError, match="pad_to must be positive"):
        eval_batches(_toy(), INFO, batch_size=1, pad_to=pad_to)


def test_grouping_needs_a_number_to_round_to():
    with pytest.raises(ValueError, match=r"group_sizes needs one number pad_to .* got \(24, 32\)"):
        eval_batches(_toy(), INFO, batch_size=1, pad_to=(24, 32), group_sizes=True)


def test_an_empty_source():
    with pytest.raises(ValueError, match="toy, split 'train', holds no examples"):
        _train(Source("toy", "train", []))


def test_a_dataset_that_is_not_prepared_tells_the_command(tmp_path, monkeypatch):
    with pytest.raises(DatasetNotPrepared) as caught:
        open_source("camvid/clean", "train", tmp_path)
    command = f"python -m resfu_jax.data prepare camvid/clean --data-dir {tmp_path}"
    assert str(caught.value).splitlines()[-1].strip() == command
    monkeypatch.setenv("RESFU_DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"(?s){tmp_path}.*prepare shapes$"):
        open_source("shapes", "train")


def test_what_an_interrupted_build_leaves_is_not_taken_for_a_dataset(tmp_path):
    left = tmp_path / "shapes" / "default"
    for name in ("incomplete.ABCDEF_1.0.1", "1.0.1"):
        (left / name).mkdir(parents=True)
        (left / name / "shapes-train.array_record-00000-of-00001").write_bytes(b"half")
    with pytest.raises(DatasetNotPrepared):
        open_source("shapes", "train", tmp_path)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"no dataset 'shape'\. Did you mean 'shapes'"):
        dataset_info("shape")
    with pytest.raises(ValueError, match=r"no dataset 'zzzz'\. Available: ade20k, camvid"):
        open_source("zzzz", "train")
    with pytest.raises(ValueError, match="shapes has no split 'test'"):
        open_source("shapes", "test")
    with pytest.raises(ValueError, match="no dataset 'image_folder'. Your own images are image_fo"):
        dataset_info("image_folder")


def test_names(tmp_path):
    assert list_datasets(tmp_path) == [
        "ade20k",
        "camvid",
        "camvid/clean",
        "cityscapes",
        "coco_stuff",
        "coco_stuff/27",
        "composition_1k",
        "nyu_depth_v2",
        "nyu_depth_v2/filled",
        "oxford_pet",
        "shapes",
        "shapes/depth",
        "shapes/outline_ignored",
        "soft_shapes",
        "voc",
        "voc/train_aug",
    ]


@pytest.mark.slow
def test_tensorflow_is_not_imported_from_building_to_batches(tmp_path):
    script = f"""
import sys
from resfu_jax.data import dataset_info, load, open_source, prepare, shapes, train_batches
config = shapes.ShapesConfig(name="tiny", size=32, train_examples=4, validation_examples=1)
load._DATASETS["tiny"] = (shapes.INFO, shapes.Shapes, config)
prepare("tiny", {str(tmp_path)!r})
source = open_source("tiny", "train", {str(tmp_path)!r})
next(train_batches(source, dataset_info("tiny"), batch_size=2, crop_size=(16, 16), seed=0))
assert not [name for name in sys.modules if name.partition(".")[0] in ("tensorflow", "torch")]
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.endswith("fine\n"), done.stderr
