"""Surface normals of depth maps, against planes whose normals are known."""

import numpy as np
import pytest

from resfu_jax.normals import normal_errors, normals_from_depth, normals_picture

CAMERA = (60.0, 50.0, 9.5, 7.0)


def plane(normal, distance, size=(15, 20)):
    """Depths of the plane n . P = -distance, as the camera sees it."""
    fx, fy, cx, cy = CAMERA
    v, u = np.indices(size)
    rays = np.stack([(u - cx) / fx, (v - cy) / fy, np.ones(size)], axis=-1)
    return (-distance / (rays @ normal)).astype(np.float32)


@pytest.mark.parametrize("normal", [(0, 0, -1), (0.3, -0.2, -0.9), (0, -0.8, -0.6)])
def test_of_a_plane_they_are_exact(normal):
    normal = np.array(normal) / np.linalg.norm(normal)
    depth = plane(normal, 2.0)
    found = normals_from_depth(depth, CAMERA)
    assert (depth > 0).all() and found.dtype == np.float32
    np.testing.assert_allclose(found, np.broadcast_to(normal, found.shape), atol=2e-4)


def test_unknown_depths_have_none_and_count_nowhere():
    depth = plane(np.array([0.0, 0.0, -1.0]), 3.0)
    depth[4, 5], depth[9, 9] = 0, np.inf
    found = normals_from_depth(depth, CAMERA)
    unknown = np.isnan(found).any(axis=-1)
    assert unknown[4, 5] and unknown[9, 9] and unknown[4, 4] and unknown.sum() == 10
    errors = normal_errors(found, np.broadcast_to(np.float32([0, 0, -1]), found.shape))
    assert errors["mean"] < 1e-3 and errors["below_11.25"] == 1
    assert normals_picture(found)[0, 0].tolist() == [128, 128, 255]
    assert normals_picture(found)[4, 5].tolist() == [128, 128, 128]


def test_errors_are_angles():
    angles = np.radians([[0.0, 10, 20], [25, 40, 90]])
    tilted = np.stack([np.sin(angles), np.zeros((2, 3)), -np.cos(angles)], axis=-1)
    straight = np.broadcast_to(np.array([0.0, 0, -1]), tilted.shape)
    errors = normal_errors(tilted, straight)
    assert errors["mean"] == pytest.approx(185 / 6) and errors["median"] == pytest.approx(22.5)
    shares = [errors[f"below_{limit}"] for limit in ("11.25", "22.5", "30")]
    assert shares == pytest.approx([2 / 6, 3 / 6, 4 / 6])
    assert normal_errors(tilted, straight, angles < 0.1)["mean"] == pytest.approx(0, abs=1e-6)
    assert np.isnan(normal_errors(tilted, straight, np.zeros((2, 3), bool))["mean"])


def test_wrong_arguments(as_users_call):
    depth = np.ones((4, 5), np.float32)
    for camera in ((1, 2, 3), (0, 1, 2, 3), (1, 1, np.nan, 0)):
        with pytest.raises(ValueError, match="intrinsics must be f_x, f_y, c_x, c_y"):
            normals_from_depth(depth, camera)
    with pytest.raises(ValueError, match="depth must be"):
        normals_from_depth(depth[0], CAMERA)
    with pytest.raises(ValueError, match="prediction and truth must both be"):
        normal_errors(np.ones((4, 5, 3)), np.ones((4, 4, 3)))
