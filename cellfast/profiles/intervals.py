"""How sure a score is: intervals over mechanisms of action, which a further screen would draw anew."""

from __future__ import annotations

import math

import numpy as np

FEWEST = 3  # clusters of a second clustering that can say anything


def ratio_interval(
    right: np.ndarray,
    total: np.ndarray,
    cluster: np.ndarray,
    level: float = 0.95,
    most: float | None = None,
    also: np.ndarray | None = None,
) -> list[float] | None:
    """Interval of Σ right / Σ total, a share between 0 and 1, over clusters of dependent profiles; None where nothing is counted.

    Wilson's interval with the effective number n = p(1 − p) / s², s² the delete-one-cluster jackknife's variance, and Student's t with
    one degree of freedom less than clusters; to s² is added half of what one more cluster, half right, would. n is at most the number
    counted and at least the number of clusters (of equal weight), so the interval has a width where all are right or all are wrong.

    Args:
        right: float [n], how right each profile is (0 … 1); total: float [n], 1 where it is counted, 0 where not.
        cluster: int [n]; profiles of different clusters are taken to be independent.
        most: the largest effective number; None: the number counted, as of what is either right or wrong.
        also: int [n], a second clustering: profiles are taken to be independent where they differ in both. Not used where it has fewer
            than ``FEWEST`` clusters.

    Source: Wilson 1927; Korn & Graubard 1998 (effective number); Dean & Pagano 2015 (Wilson's form and t for clustered samples);
    Cameron, Gelbach & Miller 2011 (two clusterings); Satterthwaite 1946 (their degrees of freedom).
    """
    counted = total > 0
    right, total, cluster = right[counted], total[counted], cluster[counted]
    if len(total) == 0:
        return None
    clusterings = [np.unique(cluster, return_inverse=True)[1]]
    if also is not None and len(np.unique(also[counted])) >= FEWEST:
        clusterings.append(np.unique(also[counted], return_inverse=True)[1])
    num = int(clusterings[0].max()) + 1
    if num == 1:
        # One cluster says nothing about others.
        return [0.0, 1.0]
    p = min(max(right.sum() / total.sum(), 0.0), 1.0)
    variances = [_left_out_variance(right, total, one) for one in clusterings]
    variance, freedom = max(variances), num - 1.0
    if len(clusterings) == 2:
        both = np.unique(np.stack(clusterings), axis=1, return_inverse=True)[1].reshape(-1)
        variance = max(variance, sum(variances) - _left_out_variance(right, total, both))
        parts = sum(v**2 / one.max() for v, one in zip(variances, clusterings))
        freedom = sum(variances) ** 2 / parts if parts > 0 else freedom
    # Few clusters with an error, or none, say little of how errors cluster.
    variance += 0.5 * ((p - 0.5) / (num + 1)) ** 2
    weights = np.bincount(clusterings[0], weights=total)
    fewest = weights.sum() ** 2 / (weights**2).sum()
    number = min(p * (1 - p) / variance, total.sum() if most is None else most) if variance > 0 else 0.0
    number, t = max(number, fewest), _student(level, freedom)
    centre = (p + t**2 / (2 * number)) / (1 + t**2 / number)
    half = t / (1 + t**2 / number) * math.sqrt(p * (1 - p) / number + t**2 / (4 * number**2))
    return [max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))]


def _left_out_variance(right: np.ndarray, total: np.ndarray, cluster: np.ndarray) -> float:
    right, total = np.bincount(cluster, weights=right), np.bincount(cluster, weights=total)
    return _jackknife_variance((right.sum() - right) / (total.sum() - total))


def mean_interval(values: np.ndarray, cluster: np.ndarray, level: float = 0.95) -> list[float] | None:
    """Interval of the mean of values between 0 and 1 (an average precision per group), as ``ratio_interval``; they vary less than what is
    either right or wrong, so the effective number has no upper bound.
    """
    return ratio_interval(values, np.ones(len(values)), cluster, level, np.inf)


Share = tuple[np.ndarray, np.ndarray]


def paired_interval(a: Share, b: Share, cluster: np.ndarray, level: float = 0.95) -> list[float] | None:
    """Interval of the difference b − a of two shares of the same profiles, each (right [n], total [n]); None where one counts nothing.

    The jackknife over clusters with Student's t, as if one more profile were right in a alone and one in b alone: two scores that
    agree everywhere are not said to be equal for certain.

    Source: Bonett & Price 2012 (the two added profiles).
    """
    found = _shares(a, b, cluster)
    if found is None:
        return None
    difference, left, number = found
    if len(left[0]) < 2:
        return [-1.0, 1.0]
    half = _student(level, len(left[0]) - 1) * math.sqrt(_jackknife_variance(left[1] - left[0]) + 2 / (number + 2) ** 2)
    return [max(-1.0, difference - half), min(1.0, difference + half)]


def difference_interval(a: Share, b: Share, cluster: np.ndarray, level: float = 0.95) -> list[float] | None:
    """Interval of the difference b − a of two shares that may count different profiles, from the intervals of both and the correlation
    of their jackknife values.

    Source: Zou & Donner 2008 (method of variance estimates recovery).
    """
    found = _shares(a, b, cluster)
    of_a, of_b = ratio_interval(*a, cluster, level), ratio_interval(*b, cluster, level)
    if found is None or of_a is None or of_b is None:
        return None
    difference, left, _ = found
    p_a, p_b = ((right * (total > 0)).sum() / total.sum() for right, total in (a, b))
    spread = [float(one.std()) if len(one) else 0.0 for one in left]
    rho = float(np.corrcoef(left)[0, 1]) if min(spread) > 1e-12 else 0.0

    def half(one: float, other: float) -> float:
        return math.sqrt(max(one**2 + other**2 - 2 * rho * one * other, 0.0))

    return [
        max(-1.0, difference - half(p_b - of_b[0], of_a[1] - p_a)),
        min(1.0, difference + half(of_b[1] - p_b, p_a - of_a[0])),
    ]


def _shares(a: Share, b: Share, cluster: np.ndarray) -> tuple[float, list[np.ndarray], float] | None:
    """b − a, both shares with each cluster left out in turn, and the number counted."""
    num = int(cluster.max(initial=-1)) + 1
    (right_a, total_a), (right_b, total_b) = (
        tuple(np.bincount(cluster, weights=v * (total > 0), minlength=num) for v in (right, total)) for right, total in (a, b)
    )
    if total_a.sum() == 0 or total_b.sum() == 0:
        return None
    used = (total_a > 0) | (total_b > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        left = [((r.sum() - r) / (t.sum() - t))[used] for r, t in ((right_a, total_a), (right_b, total_b))]
    finite = np.isfinite(left[0]) & np.isfinite(left[1])
    difference = float(right_b.sum() / total_b.sum() - right_a.sum() / total_a.sum())
    return difference, [one[finite] for one in left], float(max(total_a.sum(), total_b.sum()))


def _jackknife_variance(left: np.ndarray) -> float:
    """Variance of a statistic from its values with one cluster left out each."""
    if len(left) < 2:
        return 0.0
    return float((len(left) - 1) / len(left) * ((left - left.mean()) ** 2).sum())


def _student(level: float, freedom: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.5 + level / 2))
