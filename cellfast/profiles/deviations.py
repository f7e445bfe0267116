"""How far wells are from the controls of their plates: Mahalanobis distance, induction, cell count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cellfast.profiles.whitening import ledoit_wolf_shrinkage

_ROWS = 4096


@dataclass
class Deviations:
    """Wells as differences from the controls of their plate (stratum), or of the screen where it has none.

    Attributes:
        centre: float64 [strata + 1, D], mean of the controls; the last row of all.
        place: int64 [n], the row of ``centre`` for each well.
        axes: float64 [D, r], directions in which the controls vary; variances: float64 [r], along them, and ``elsewhere`` (Ledoit-Wolf).
        bounds: float64 [D], the controls' 99th percentile of the absolute difference.
        magnitude: float64 [n], Mahalanobis distance of each well.
        count_ratio: float64 [n], cells over the mean of the controls' on the plate; None without counts.
    """

    centre: np.ndarray
    place: np.ndarray
    axes: np.ndarray
    variances: np.ndarray
    elsewhere: float
    bounds: np.ndarray
    magnitude: np.ndarray
    count_ratio: np.ndarray | None

    def of_groups(self, features: np.ndarray, members: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Of each treatment: ``mahalanobis`` of its mean, ``induction`` (share of features whose median difference is beyond the
        controls' 99th percentile; 0.01 or less by chance), ``count_ratio``.
        """
        mean = np.empty((len(members), features.shape[1]))
        induction = np.empty(len(members))
        for i, rows in enumerate(members):
            difference = features[rows] - self.centre[self.place[rows]]
            mean[i] = difference.mean(axis=0)
            induction[i] = (np.abs(np.median(difference, axis=0)) > self.bounds).mean()
        result = {"mahalanobis": _lengths(mean, self.axes, self.variances, self.elsewhere), "induction": induction}
        if self.count_ratio is not None:
            result["count_ratio"] = np.array([self.count_ratio[rows].mean() for rows in members])
        return result


def deviations(features: np.ndarray, controls: np.ndarray, stratum: np.ndarray, counts: np.ndarray | None) -> Deviations:
    """Fit on the controls of each stratum.

    Args:
        features: float [n, D]; controls: rows; stratum: int [n]; counts: float [n] or None.
    """
    units = np.unique(stratum[controls])
    of_control = np.searchsorted(units, stratum[controls])
    sizes = np.bincount(of_control, minlength=len(units))
    order = np.argsort(of_control, kind="stable")
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    values = features[controls].astype(np.float64)
    centre = np.add.reduceat(values[order], starts, axis=0) / sizes[:, None]
    difference = values - centre[of_control]
    centre = np.concatenate([centre, values.mean(axis=0)[None]])
    place = np.minimum(np.searchsorted(units, stratum), len(units) - 1)
    place = np.where(units[place] == stratum, place, len(units))
    # Few controls span few directions: nothing is D × D then.
    if len(difference) < difference.shape[1]:
        _, singular, axes = np.linalg.svd(difference, full_matrices=False)
        variances, axes = singular**2 / len(difference), axes.T
    else:
        variances, axes = np.linalg.eigh(difference.T @ difference / len(difference))
    share, mean = ledoit_wolf_shrinkage(difference), float(np.maximum(variances, 0.0).sum()) / difference.shape[1]
    elsewhere = max(share * mean, 1e-12 * mean, np.finfo(np.float64).tiny)
    variances = (1 - share) * np.maximum(variances, 0.0) + elsewhere
    magnitude = np.concatenate(
        [
            _lengths(features[a : a + _ROWS] - centre[place[a : a + _ROWS]], axes, variances, elsewhere)
            for a in range(0, len(features), _ROWS)
        ]
    )
    ratio = None
    if counts is not None:
        mean = np.append(np.bincount(of_control, weights=counts[controls]) / sizes, counts[controls].mean())
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = counts / mean[place]
    bounds = np.percentile(np.abs(difference), 99, axis=0)
    return Deviations(centre, place, axes, variances, elsewhere, bounds, magnitude, ratio)


def _lengths(difference: np.ndarray, axes: np.ndarray, variances: np.ndarray, elsewhere: float) -> np.ndarray:
    """√(dᵀ Σ⁻¹ d) of each row."""
    along = (difference @ axes) ** 2
    rest = np.maximum((difference**2).sum(axis=1) - along.sum(axis=1), 0.0)
    if axes.shape[0] == axes.shape[1]:
        rest[:] = 0.0
    return np.sqrt((along / variances).sum(axis=1) + rest / elsewhere)
