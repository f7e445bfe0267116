"""Mean average precision of retrieving profiles of the same group, equal to copairs' on the same pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from cellfast.metadata import columns as names
from cellfast.profiles.neighbours import prepare, tie_tolerance
from cellfast.profiles.table import ProfileTable


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


def average_precision(
    metadata: pd.DataFrame,
    features: np.ndarray,
    pos_sameby: Sequence[str],
    pos_diffby: Sequence[str] = (),
    neg_sameby: Sequence[str] = (),
    neg_diffby: Sequence[str] = (),
    metric: str = "cosine",
) -> AveragePrecision:
    """Rank, for every profile, its positives among its negatives by similarity, and average the precision at each positive.

    Equivalent to ``copairs.map.average_precision`` with the same column lists: a pair is positive when it agrees in every
    ``pos_sameby`` and differs in every ``pos_diffby`` column, negative likewise by ``neg_sameby`` and ``neg_diffby``. Unlike
    there, equal similarities count by their expectation over random orders, so that positives win no tie.

    Source: McSherry & Najork 2008 (average precision with ties).

    Args:
        metadata: [n, …]; features: float [n, D].

    Raises:
        CellfastError: features that are not finite or have no direction.
    """
    x, offset = prepare(features, metric)
    n = len(x)
    norm, offset_used = np.sqrt(np.einsum("ij,ij->i", x, x)), bool(offset.any())
    codes = {c: pd.factorize(metadata[c])[0] for c in {*pos_sameby, *pos_diffby, *neg_sameby, *neg_diffby}}
    values = np.full(n, np.nan)
    num_positive, num_total, tied = np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(n, bool)
    step = max(1, (1 << 22) // max(n, 1))
    for start in range(0, n, step):
        rows = np.arange(start, min(n, start + step))

        def pairs(same: Sequence[str], differ: Sequence[str], rows: np.ndarray = rows) -> np.ndarray:
            mask = np.ones((len(rows), n), bool)
            for column in same:
                mask &= codes[column][rows][:, None] == codes[column][None, :]
            for column in differ:
                mask &= codes[column][rows][:, None] != codes[column][None, :]
            mask[np.arange(len(rows)), rows] = False
            return mask

        positive, negative = pairs(pos_sameby, pos_diffby), pairs(neg_sameby, neg_diffby)
        similarity = x[rows] @ x.T - offset
        for i, row in enumerate(rows):
            good, bad = similarity[i, positive[i]], similarity[i, negative[i]]
            num_positive[row], num_total[row] = len(good), len(good) + len(bad)
            if len(good) == 0:
                continue
            # Only the positives' ranks matter: each is 1 + the positives before it + the negatives strictly nearer.
            good, bad = np.sort(good)[::-1], np.sort(bad)
            tolerance = tie_tolerance(norm[row], good, x.shape[1], offset_used)
            above = len(bad) - np.searchsorted(bad, good + tolerance, side="right")
            as_near = len(bad) - above - np.searchsorted(bad, good - tolerance, side="left")
            order = np.arange(1, len(good) + 1)
            precision = order / (order + above)
            if as_near.any():
                tied[row] = True
                _expect_ties(precision, good, bad, tolerance)
            values[row] = float(precision.mean())
    return AveragePrecision(values, num_positive, num_total, tied)


def _expect_ties(precision: np.ndarray, good: np.ndarray, bad: np.ndarray, tolerance: np.ndarray) -> None:
    """Put the expectation over random orders in place of the precision at positives that are as near as some negative.

    Args:
        precision: float64 [p], at each positive; changed.
        good: float64 [p], similarity of the positives, falling; bad: float64 [m], of the negatives, rising.
        tolerance: float64 [p], by which equal similarities can differ.
    """
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


def grouped_precision(metadata: pd.DataFrame, precision: AveragePrecision, groupby: Sequence[str]) -> pd.DataFrame:
    """Mean average precision per group: columns ``groupby``, ``mean_average_precision``, ``num_profiles``; queries without a
    positive are left out.
    """
    frame = metadata[list(groupby)].reset_index(drop=True).assign(mean_average_precision=precision.values)
    frame = frame[np.isfinite(precision.values)]
    return (
        frame.groupby(list(groupby), dropna=False)["mean_average_precision"]
        .agg(mean_average_precision="mean", num_profiles="size")
        .reset_index()
    )


def moa_precision(profiles: ProfileTable, metric: str = "cosine") -> dict[str, Any] | None:
    """Precision per MoA: treatments of the same MoA and another compound, among treatments of other MoAs (and compounds).

    Equivalent to copairs with pos_sameby MoA, pos_diffby compound, neg_diffby MoA and compound.
    """
    metadata = profiles.metadata
    ap = average_precision(metadata, profiles.features, [names.MOA], [names.COMPOUND], [], [names.MOA, names.COMPOUND], metric)
    return _summary(metadata, ap, [names.MOA], lambda row: str(row[0]))


def replicate_precision(wells: ProfileTable, metric: str = "cosine") -> dict[str, Any] | None:
    """Precision per treatment: wells of the same treatment, among wells of other compounds.

    Equivalent to copairs with pos_sameby compound and concentration, neg_diffby compound.
    """
    metadata = wells.metadata
    key = [c for c in (names.COMPOUND, names.CONCENTRATION) if c in metadata]
    # copairs refuses missing values in these columns; an unknown concentration is a value of its own here.
    filled = metadata.assign(**{c: metadata[c].fillna(-1.0) for c in key if c == names.CONCENTRATION})
    ap = average_precision(filled, wells.features, key, [], [], [names.COMPOUND], metric)
    return _summary(filled, ap, key, lambda row: " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in row))


def _summary(metadata: pd.DataFrame, precision: AveragePrecision, key: list[str], label: Any) -> dict[str, Any] | None:
    if not np.isfinite(precision.values).any():
        return None
    grouped = grouped_precision(metadata, precision, key)
    return {
        "mean": float(grouped["mean_average_precision"].mean()),
        "num_groups": len(grouped),
        "num_queries": int(np.isfinite(precision.values).sum()),
        "num_queries_with_ties": int(precision.tied.sum()),
        "num_queries_without_positive": int((~np.isfinite(precision.values)).sum()),
        "per_group": {label(list(row[: len(key)])): float(row[len(key)]) for row in grouped.itertuples(index=False, name=None)},
    }
