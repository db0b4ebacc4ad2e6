"""Surface normals of depth maps, and how far two maps of normals are apart.

With a pinhole camera of focal lengths f and principal point c, the pixel in column u and row v of
depth z shows the point

    P(u, v) = z ((u - c_x) / f_x, (v - c_y) / f_y, 1)

x to the right, y down, z away from the camera. The normal is that of the plane through the
differences of P between the pixel's neighbours, down and across, and faces the camera:

    n = (P(u, v + 1) - P(u, v - 1)) x (P(u + 1, v) - P(u - 1, v)),    normalised

Of a plane it is exact, at any distance and angle. At borders the pixel takes its neighbour's place.
The errors are those of Fouhey et al., "Data-Driven 3D Primitives for Single Image Understanding",
ICCV 2013: the angle's mean and median, and the share of pixels below 11.25, 22.5 and 30 degrees.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8

from resfu_jax._checks import is_number, need

Normals = Float[np.ndarray, "h w 3"]


def normals_from_depth(depth: Float[np.ndarray, "h w"], intrinsics: Sequence[float]) -> Normals:
    """The normal of the surface at each pixel, float32; NaN where a depth is not known.

    Args:
      depth: along the camera's axis; 0, negative or not finite where it is not known. At least two
        rows and columns.
      intrinsics: f_x, f_y, c_x, c_y in pixels of this map; the first pixel's centre is at 0, 0.

    Raises:
      ValueError: another shape, or intrinsics that are not four numbers, f positive.
    """
    need(
        depth.ndim == 2 and min(depth.shape) >= 2,
        f"depth must be (height, width), both at least 2, got {depth.shape}",
    )
    fx, fy, cx, cy = check_intrinsics(intrinsics)
    z = np.where(np.isfinite(depth) & (depth > 0), depth, np.nan).astype(np.float64)
    v, u = np.indices(z.shape, dtype=np.float64)
    points = np.stack([z * (u - cx) / fx, z * (v - cy) / fy, z], axis=-1)
    down, across = (np.gradient(points, axis=axis) for axis in (0, 1))
    normals = np.cross(down, across)
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    normals = normals / np.where(length > 0, length, np.nan)
    return np.where(np.isnan(z)[..., None], np.nan, normals).astype(np.float32)


def check_intrinsics(intrinsics: Sequence[float]) -> tuple[float, ...]:
    """The same four numbers, or a `ValueError`; as for `normals_from_depth`."""
    values = tuple(intrinsics)
    need(
        len(values) == 4 and all(map(is_number, values)) and min(values[:2]) > 0,
        f"intrinsics must be f_x, f_y, c_x, c_y, the first two positive, got {values}",
    )
    return values


def normal_errors(
    prediction: Normals, truth: Normals, valid: Bool[np.ndarray, "h w"] | None = None
) -> dict[str, float]:
    """The angle between normals in degrees: its `mean`, `median`, and shares below three limits.

    Args:
      prediction: unit vectors.
      truth: as well.
      valid: pixels that count, of those where both are known; None: all of these.

    Returns:
      `mean`, `median`, `below_11.25`, `below_22.5`, `below_30`; not a number if no pixel counts.

    Raises:
      ValueError: shapes that differ.
    """
    need(
        prediction.shape == truth.shape and prediction.ndim == 3 and prediction.shape[2] == 3,
        "prediction and truth must both be (height, width, 3), got shapes "
        f"{prediction.shape} and {truth.shape}",
    )
    p, t = prediction.astype(np.float64), truth.astype(np.float64)
    # Not by the arc cosine, which is rough near 0.
    angle = 2 * np.arctan2(np.linalg.norm(p - t, axis=-1), np.linalg.norm(p + t, axis=-1))
    known = np.isfinite(angle)
    degrees = np.degrees(angle[known if valid is None else known & valid])
    names = ("mean", "median", "below_11.25", "below_22.5", "below_30")
    if not degrees.size:
        return dict.fromkeys(names, float("nan"))
    shares = [float((degrees < limit).mean()) for limit in (11.25, 22.5, 30)]
    return dict(
        zip(names, [float(degrees.mean()), float(np.median(degrees)), *shares], strict=True)
    )


def normals_picture(normals: Normals) -> UInt8[np.ndarray, "h w 3"]:
    """Normals in colours: x, -y and -z from -1 to 1 are red, green and blue; grey: not known."""
    colours = 127.5 * (1 + normals * np.array([1, -1, -1], np.float32))
    known = np.isfinite(normals).all(axis=-1, keepdims=True)
    return np.where(known, np.rint(np.where(known, colours, 0)), 128).astype(np.uint8)
