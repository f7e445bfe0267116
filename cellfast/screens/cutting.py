"""Cuts square crops out of a field around centroids.

The convention, here and everywhere: the crop of side S around the centroid (y, x) holds the pixels
``rint(y) − S//2 + (0 … S−1)``, likewise for x; the pixel nearest the centroid lands at index S//2. Centroids are 0-based pixel
centres (CellProfiler's and scikit-image's convention); halves round to even.
"""

from __future__ import annotations

import numpy as np

from cellfast.compiled import njit
from cellfast.errors import CellfastError

BORDERS = ("pad", "reflect", "drop")


def crop_origins(center_y: np.ndarray, center_x: np.ndarray, crop_size: int) -> np.ndarray:
    """First row and column of each crop, int64 [n, 2]: ``rint(center) − crop_size // 2``; negative where it reaches over the
    edge."""
    centers = np.stack([np.asarray(center_y, dtype=np.float64), np.asarray(center_x, dtype=np.float64)], axis=1)
    return np.rint(centers).astype(np.int64) - crop_size // 2


def inside(origins: np.ndarray, crop_size: int, height: int, width: int) -> np.ndarray:
    """bool [n]: True for crops that lie in the field wholly."""
    last = origins + crop_size
    return (origins >= 0).all(axis=1) & (last[:, 0] <= height) & (last[:, 1] <= width)


@njit()
def _cut(
    plane: np.ndarray, origins: np.ndarray, out: np.ndarray, channel: int, reflect: bool
) -> None:  # pragma: no cover - compiled
    height, width = plane.shape
    size = out.shape[2]
    for i in range(origins.shape[0]):
        y0, x0 = origins[i, 0], origins[i, 1]
        if y0 >= 0 and x0 >= 0 and y0 + size <= height and x0 + size <= width:
            for y in range(size):
                out[i, channel, y, :] = plane[y0 + y, x0 : x0 + size]
            continue
        for y in range(size):
            yy = y0 + y
            if reflect:
                # Like np.pad's "reflect": the edge pixel is not repeated; again and again where the field is smaller than the
                # crop.
                period = 2 * (height - 1) if height > 1 else 1
                yy = abs(yy) % period
                yy = min(yy, period - yy) if height > 1 else 0
            for x in range(size):
                xx = x0 + x
                if reflect:
                    period = 2 * (width - 1) if width > 1 else 1
                    xx = abs(xx) % period
                    xx = min(xx, period - xx) if width > 1 else 0
                    out[i, channel, y, x] = plane[yy, xx]
                elif 0 <= yy < height and 0 <= xx < width:
                    out[i, channel, y, x] = plane[yy, xx]
                else:
                    out[i, channel, y, x] = 0


def cut_crops(planes: list[np.ndarray], origins: np.ndarray, crop_size: int, *, border: str = "pad") -> np.ndarray:
    """Cut crops [n, C, S, S] out of C planes [H, W] of one dtype.

    Equivalent to ``np.pad(plane, S, mode="constant" | "reflect")[y + S : y + 2·S, x + S : x + 2·S]`` per crop and channel.

    Args:
        planes: one [H, W] array per channel, same shape and dtype.
        origins: int64 [n, 2] from `crop_origins`.
        crop_size: S, px.
        border: ``pad`` fills with 0 outside the field, ``reflect`` mirrors it; ``drop`` expects origins that are `inside`.

    Raises:
        CellfastError: an unknown ``border``, or with ``drop`` an origin that is not inside.
    """
    if border not in BORDERS:
        raise CellfastError(f"border must be one of {', '.join(BORDERS)}, got {border!r}")
    height, width = planes[0].shape
    if border == "drop" and not inside(origins, crop_size, height, width).all():
        raise CellfastError("with border 'drop' every crop must lie inside the field; drop those that do not first")
    out = np.empty((len(origins), len(planes), crop_size, crop_size), dtype=planes[0].dtype)
    for channel, plane in enumerate(planes):
        _cut(np.ascontiguousarray(plane), origins, out, channel, border == "reflect")
    return out
