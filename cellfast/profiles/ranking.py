"""Ranks of positives among negatives by similarity, block by block: the engine of average precision."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cellfast.profiles.aggregate import num_threads
from cellfast.profiles.neighbours import prepare, tie_tolerance

#: What a pair is, in the arrays that say which profiles are ranked.
NEITHER, POSITIVE, NEGATIVE = 0, 1, 2

_ENTRIES = 1 << 22  # of a block of pairs, for each thread


@dataclass
class AveragePrecision:
    """Average precision of each query.

    Attributes:
        values: float64 [n], NaN for a query without a positive.
        num_positive: int64 [n], profiles to be found.
        num_total: int64 [n], profiles ranked.
        tied: bool [n], some positive is as near as some negative.
    """

    values: np.ndarray
    num_positive: np.ndarray
    num_total: np.ndarray
    tied: np.ndarray


def rank_positives(
    features: np.ndarray, kinds: Callable[[np.ndarray], np.ndarray], queries: np.ndarray, metric: str = "cosine"
) -> AveragePrecision:
    """Average precision of the positives of each query among its negatives; equal similarities count by expectation.

    Products are made in float32; what float32 cannot tell apart is compared in float64, so the ranks are float64's. Memory is that of
    the profiles and a block of pairs.

    Args:
        features: float [n, D].
        kinds: rows [q] → uint8 [q, n], what every profile is to these queries; a query is nothing to itself. Called from
            several threads.
        queries: int64, the rows that are ranked for; neighbouring ones should have similar candidates.

    Raises:
        CellfastError: features that are not finite or have no direction.
    """
    from threadpoolctl import threadpool_limits

    from cellfast.profiles.ranking_kernels import rank_rows

    x, offset = prepare(features, metric)
    n = len(x)
    norm = np.sqrt(np.einsum("ij,ij->i", x, x))
    x32, euclidean = x.astype(np.float32), bool(offset.any())
    # Rounding of a float32 product of D terms, and of the offset's subtraction.
    slack = 1.2e-7 * (8 + np.sqrt(x.shape[1])) * np.stack([norm, offset if euclidean else np.zeros(n)])
    values = np.full(n, np.nan)
    num_positive, num_total = np.zeros(n, np.int64), np.zeros(n, np.int64)
    tied = np.zeros(n, bool)
    step = max(1, _ENTRIES // max(n, 1))

    def work(start: int) -> None:
        rows = queries[start : start + step]
        kind = kinds(rows)
        columns = np.flatnonzero(kind.any(axis=0))
        if 2 * len(columns) > n:
            columns = np.arange(n)
        else:
            kind = np.ascontiguousarray(kind[:, columns])
        part = x32 if len(columns) == n else x32[columns]
        similarity = x32[rows] @ part.T
        rank_rows(similarity, kind, rows, columns, x, offset, norm, slack, euclidean, values, num_positive, num_total, tied)
        for i in np.flatnonzero(tied[rows]):
            exact = x[columns] @ x[rows[i]] - offset[columns]
            values[rows[i]] = expected_precision(
                exact[kind[i] == POSITIVE], exact[kind[i] == NEGATIVE], norm[rows[i]], x.shape[1], euclidean
            )

    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(num_threads()) as pool:
        list(pool.map(work, range(0, len(queries), step)))
    return AveragePrecision(values, num_positive, num_total, tied)


def expected_precision(good: np.ndarray, bad: np.ndarray, norm: float, num_features: int, offset_used: bool) -> float:
    """Average precision over random orders of equally near profiles.

    Args:
        good: float64 [p], similarity of the positives; bad: float64 [m], of the negatives.

    Source: McSherry & Najork 2008.
    """
    good, bad = np.sort(good)[::-1], np.sort(bad)
    tolerance = tie_tolerance(np.array(norm), good, num_features, offset_used)
    above = len(bad) - np.searchsorted(bad, good + tolerance, side="right")
    order = np.arange(1, len(good) + 1)
    precision = order / (order + above)
    edges = np.flatnonzero(-np.diff(good) > tolerance[:-1]) + 1
    for first, last in zip([0, *edges], [*edges, len(good)]):
        r = last - first
        nearer = len(bad) - np.searchsorted(bad, good[first] + tolerance[first], side="right")
        negatives = len(bad) - nearer - np.searchsorted(bad, good[last - 1] - tolerance[last - 1], side="left")
        if negatives == 0:
            continue
        n = r + negatives
        # A positive at place i of the n tied ones has on average (i − 1)(r − 1)/(n − 1) of the other r − 1 before it.
        place = np.arange(n)
        before = first + place * ((r - 1) / (n - 1))
        precision[first:last] = ((before + 1) / (first + nearer + place + 1)).mean()
    return float(precision.mean())
