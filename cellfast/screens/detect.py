"""A plain nucleus detector, for screens that come without locations."""

from __future__ import annotations

import numpy as np

from cellfast.errors import CellfastError, option

DEFAULT_DIAMETER_PX = 30.0
# The foreground must be brighter than the background by so many standard deviations of the background, else the field is empty.
CONTRAST_GUARD = 4.0


def detect_nuclei(
    plane: np.ndarray, *, diameter_px: float = DEFAULT_DIAMETER_PX
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Find nuclei in a DNA plane: smooth, Otsu's threshold on the background-subtracted plane, split touching ones by a distance
    watershed.

    Args:
        plane: [H, W] uint8 or uint16, bright nuclei on a dark background.
        diameter_px: typical diameter of a nucleus; smoothing, background scale and the size limits (1/8 to 6 times its area)
            follow from it.

    Returns:
        (y, x, dropped): centroids float32 [n] in order of rows, and how many objects were dropped by reason (``too small``, ``too
        large``). A field whose foreground does not stand out from its background's noise has no nuclei.

    Source: Otsu 1979; the distance-transform watershed of CellProfiler's IdentifyPrimaryObjects in its plainest form.
    """
    from scipy import ndimage
    from skimage.feature import peak_local_max
    from skimage.filters import threshold_otsu
    from skimage.segmentation import watershed

    if not 3 <= diameter_px <= 500:
        raise CellfastError(f"{option('diameter_px')} must lie in 3..500 px, got {diameter_px:g}")
    none = np.zeros(0, np.float32)
    smooth = ndimage.gaussian_filter(plane.astype(np.float32), diameter_px / 15)
    # The background varies slowly; a low percentile over a coarse grid follows it without following the nuclei.
    step = max(1, int(diameter_px // 4))
    coarse = smooth[::step, ::step]
    window = max(3, round(4 * diameter_px / step))
    low = ndimage.gaussian_filter(ndimage.percentile_filter(coarse, 20, size=window, mode="reflect"), window / 4)
    factors = (plane.shape[0] / low.shape[0], plane.shape[1] / low.shape[1])
    background = ndimage.zoom(low, factors, order=1, mode="nearest", grid_mode=True)[: plane.shape[0], : plane.shape[1]]
    flat = smooth - background
    threshold = threshold_otsu(flat)
    # A few very bright (mitotic) nuclei pull Otsu's threshold above the dim ones: its second round looks below it only.
    below = flat[flat <= threshold]
    lower = threshold_otsu(below) if below.size and below.min() < below.max() else threshold
    centre = np.median(flat)
    noise = 1.4826 * np.median(np.abs(flat - centre)) + 1e-6
    if (flat > lower).mean() < 0.45 and lower > centre + CONTRAST_GUARD * noise:
        threshold = min(threshold, max(lower, 0.35 * threshold))
    mask = flat > threshold
    if not mask.any() or mask.all() or flat[mask].mean() < centre + CONTRAST_GUARD * noise:
        return none, none, {}
    mask = ndimage.binary_fill_holes(ndimage.binary_opening(mask, iterations=max(1, round(diameter_px / 15))))
    distance = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask), diameter_px / 15)
    peaks = peak_local_max(
        distance, min_distance=max(1, round(0.35 * diameter_px)), labels=ndimage.label(mask)[0], exclude_border=False
    )
    markers = np.zeros(plane.shape, np.int32)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    labels = watershed(-distance, markers, mask=mask)
    y, x, area = centroids_of_labels(labels)[1:]
    typical = np.pi / 4 * diameter_px**2
    small, large = area < typical / 8, area > typical * 6
    dropped = {name: int(flag.sum()) for name, flag in (("too small", small), ("too large", large)) if flag.any()}
    keep = np.flatnonzero(~small & ~large)
    keep = keep[np.lexsort((x[keep], y[keep]))]
    return y[keep], x[keep], dropped


def centroids_of_labels(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(label, y, x, area) of every label but 0, ascending: means of pixel coordinates in one pass; any number of labels, with
    gaps."""
    rows, columns = np.nonzero(labels)
    found, inverse = np.unique(labels[rows, columns], return_inverse=True)
    area = np.bincount(inverse, minlength=len(found))
    y = np.bincount(inverse, weights=rows, minlength=len(found)) / np.maximum(area, 1)
    x = np.bincount(inverse, weights=columns, minlength=len(found)) / np.maximum(area, 1)
    return found.astype(np.int64), y.astype(np.float32), x.astype(np.float32), area
