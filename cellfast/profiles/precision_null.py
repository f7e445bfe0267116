"""What average precision is by chance: its expectation, draws of its null distribution, p-values, and their correction."""

from __future__ import annotations

import numpy as np

#: Random ranks copairs would draw are drawn as it does where there are at most as many; beyond that faster draws of the same.
_AS_COPAIRS = 50_000_000


def expected_average_precision(num_positive: np.ndarray, num_total: np.ndarray) -> np.ndarray:
    """Expectation of average precision over random orders, float64: ((M − 1)/(L − 1) · (L − H_L) + H_L) / L for M positives of L.

    Equivalent to ``copairs.map.normalization.expected_ap``. Source: Bestgen 2015.
    """
    from scipy.special import digamma

    m, total = np.asarray(num_positive, np.float64), np.asarray(num_total, np.float64)
    harmonic = digamma(total + 1) + np.euler_gamma
    with np.errstate(invalid="ignore", divide="ignore"):
        value = ((m - 1) / (total - 1) * (total - harmonic) + harmonic) / total
    return np.where(m == total, 1.0, value)


def normalized_precision(values: np.ndarray, num_positive: np.ndarray, num_total: np.ndarray) -> np.ndarray:
    """(AP − expectation) / (1 − expectation): 0 by chance, 1 at best. Equivalent to ``copairs.map.normalization.normalize_ap``."""
    chance = expected_average_precision(num_positive, num_total)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(1 - chance < 1e-10, 0.0, (values - chance) / (1 - chance))


def null_precisions(configurations: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Average precision of random ranks, float32 [configurations, size]: for each (positives, total), rows sorted as given.

    Where the pools are small the draws are those of copairs 0.5 for the same seed; where they are large they are drawn without writing
    whole permutations down.
    """
    from cellfast.profiles.ranking_kernels import draw_precisions

    seeds = np.random.default_rng(seed).integers(8096, size=len(configurations))
    result = np.empty((len(configurations), size), np.float32)
    as_copairs = int(configurations[:, 1].sum()) * size <= _AS_COPAIRS
    for i, (positives, total) in enumerate(configurations.tolist()):
        if as_copairs:
            rng = np.random.default_rng(seeds[i])
            ranks = np.tile(np.arange(total, dtype=np.uint16 if total < 2**16 else np.uint32), (size, 1))
            rng.permuted(ranks, axis=1, out=ranks)
            ranks = np.sort(ranks[:, :positives], axis=1)
            precision = np.arange(1, positives + 1, dtype=np.float32) / (ranks + 1)
            result[i] = precision.sum(axis=1) / positives
        else:
            draw_precisions(positives, total, np.array([seeds[i]], np.uint64), result[i])
    return result


def precision_p_values(
    values: np.ndarray, num_positive: np.ndarray, num_total: np.ndarray, group: np.ndarray, size: int, seed: int
) -> np.ndarray:
    """p-value of each group's mean average precision, float64 [groups]: the share of null means that are greater; NaN without a query.

    Equivalent to ``copairs.map.mean_average_precision``: queries of one pool size share their draws. It takes the ranks of a group's
    queries as random; what it does not know of is that wells of a plate resemble each other.

    Args:
        values: float64 [q] of the queries, finite; num_positive, num_total, group: int64 [q].
    """
    configurations, place = np.unique(np.stack([num_positive, num_total], axis=1), axis=0, return_inverse=True)
    null = null_precisions(configurations, size, seed)
    place = place.reshape(-1)
    result = np.full(int(group.max(initial=-1)) + 1, np.nan)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(result) + 1))
    ranked: dict[tuple[int, ...], np.ndarray] = {}
    for g in np.flatnonzero(np.diff(starts)):
        rows = order[starts[g] : starts[g + 1]]
        key = tuple(place[rows].tolist())
        if key not in ranked:
            ranked[key] = np.sort(null[list(key)].mean(axis=0))
        greater = size - np.searchsorted(ranked[key], np.float32(values[rows].mean()), side="right")
        result[g] = (1 + greater) / (1 + size)
    return result


def false_discovery_rates(p_values: np.ndarray) -> np.ndarray:
    """Benjamini-Hochberg adjusted p-values, float64 of the same shape; NaN stays and is not counted as a test.

    Equivalent to ``statsmodels.stats.multitest.multipletests(method="fdr_bh")``. Source: Benjamini & Hochberg 1995.
    """
    result = np.full(p_values.shape, np.nan)
    have = np.flatnonzero(np.isfinite(p_values))
    order = have[np.argsort(p_values[have], kind="stable")]
    scaled = p_values[order] * len(order) / np.arange(1, len(order) + 1)
    result[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return result
