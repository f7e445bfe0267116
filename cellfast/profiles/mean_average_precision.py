"""Mean average precision of retrieving profiles of the same group, equal to copairs' on the same pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from cellfast.metadata import columns as names
from cellfast.profiles.intervals import mean_interval
from cellfast.profiles.moas import MoaLabels, moa_labels
from cellfast.profiles.precision_null import expected_average_precision
from cellfast.profiles.ranking import NEGATIVE, POSITIVE, AveragePrecision, rank_positives
from cellfast.profiles.table import ProfileTable


def average_precision(
    metadata: pd.DataFrame,
    features: np.ndarray,
    pos_sameby: Sequence[str],
    pos_diffby: Sequence[str] = (),
    neg_sameby: Sequence[str] = (),
    neg_diffby: Sequence[str] = (),
    metric: str = "cosine",
    moas: MoaLabels | None = None,
) -> AveragePrecision:
    """Rank, for every profile, its positives among its negatives by similarity, and average the precision at each positive.

    Equivalent to ``copairs.map.average_precision`` with the same column lists: a pair is positive when it agrees in every
    ``pos_sameby`` and differs in every ``pos_diffby`` column, negative likewise by ``neg_sameby`` and ``neg_diffby``. Unlike
    there, equal similarities count by their expectation over random orders, so that positives win no tie.

    Source: McSherry & Najork 2008 (average precision with ties).

    Args:
        metadata: [n, …]; features: float [n, D].
        moas: of the MoA column, if it is compared: profiles that share one of several MoAs agree.

    Raises:
        CellfastError: features that are not finite or have no direction.
    """
    n = len(metadata)
    codes = {c: pd.factorize(metadata[c])[0].astype(np.int32) for c in {*pos_sameby, *pos_diffby, *neg_sameby, *neg_diffby}}

    def agree(column: str, rows: np.ndarray) -> np.ndarray:
        if column == names.MOA and moas is not None and not moas.single:
            return moas.match[moas.code[rows]][:, moas.code]
        return codes[column][rows][:, None] == codes[column][None, :]

    def kinds(rows: np.ndarray) -> np.ndarray:
        kind = np.zeros((len(rows), n), np.uint8)
        # A pair of both kinds is positive: it is to be found.
        for value, same, differ in ((NEGATIVE, neg_sameby, neg_diffby), (POSITIVE, pos_sameby, pos_diffby)):
            mask = np.ones((len(rows), n), bool)
            for column in same:
                mask &= agree(column, rows)
            for column in differ:
                mask &= ~agree(column, rows)
            kind[mask] = value
        kind[np.arange(len(rows)), rows] = 0
        return kind

    return rank_positives(features, kinds, np.arange(n), metric)


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

    Equivalent to copairs with pos_sameby MoA, pos_diffby compound, neg_diffby MoA and compound. Of profiles with several MoAs those that
    share one are positives, and each counts in all of its MoAs.
    """
    metadata = profiles.metadata
    moas = moa_labels(metadata[names.MOA])
    ap = average_precision(
        metadata, profiles.features, [names.MOA], [names.COMPOUND], [], [names.MOA, names.COMPOUND], metric, moas
    )
    rows, moa = np.nonzero(moas.members[moas.code])
    return _summary(ap, rows, moa, moas.moas, np.arange(len(moas.moas)))


def replicate_precision(wells: ProfileTable, metric: str = "cosine") -> dict[str, Any] | None:
    """Precision per treatment: wells of the same treatment, among wells of other compounds.

    Equivalent to copairs with pos_sameby compound and concentration, neg_diffby compound.
    """
    metadata = wells.metadata
    key = [c for c in (names.COMPOUND, names.CONCENTRATION) if c in metadata]
    # copairs refuses missing values in these columns; an unknown concentration is a value of its own here.
    filled = metadata.assign(**{c: metadata[c].fillna(-1.0) for c in key if c == names.CONCENTRATION})
    ap = average_precision(filled, wells.features, key, [], [], [names.COMPOUND], metric)
    codes = filled.groupby(key, sort=True, dropna=False).ngroup().to_numpy()
    first = np.unique(codes, return_index=True)[1]
    labels = [
        " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in row)
        for row in filled[key].iloc[first].itertuples(index=False, name=None)
    ]
    cluster = moa_labels(metadata[names.MOA]).clusters() if names.MOA in metadata else pd.factorize(metadata[names.COMPOUND])[0]
    return _summary(ap, np.arange(len(codes)), codes, labels, cluster[first])


def _summary(
    precision: AveragePrecision, rows: np.ndarray, group: np.ndarray, labels: list[str], cluster: np.ndarray
) -> dict[str, Any] | None:
    """``rows`` and ``group``: which query counts in which group; ``cluster``: of each group, for the interval."""
    have = np.isfinite(precision.values)
    if not have.any():
        return None
    rows, group = rows[have[rows]], group[have[rows]]
    sizes = np.bincount(group, minlength=len(labels))
    chance = np.zeros(len(have))
    chance[have] = expected_average_precision(precision.num_positive[have], precision.num_total[have])
    means, chances = (
        np.bincount(group, weights=of[rows], minlength=len(labels)) / np.maximum(sizes, 1) for of in (precision.values, chance)
    )
    found = sizes > 0
    return {
        "mean": float(means[found].mean()),
        "chance": float(chances[found].mean()),
        "interval_95": mean_interval(means[found], cluster[found]),
        "num_groups": int(found.sum()),
        "num_queries": int(have.sum()),
        "num_queries_with_ties": int((precision.tied & have).sum()),
        "num_queries_without_positive": int((~have).sum()),
        "per_group": {labels[g]: float(means[g]) for g in np.flatnonzero(found)},
    }
