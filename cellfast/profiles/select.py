"""Feature selection: missing values, variance, frequency, correlation; every dropped feature and row is named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cellfast.errors import CellfastError
from cellfast.profiles.table import ProfileTable

METHODS = ("variance", "frequency", "correlation", "nan")


def drop_missing(table: ProfileTable, cutoff: float = 0.05) -> tuple[ProfileTable, dict[str, Any]]:
    """Drop features that are missing (NaN, ±inf) in more than ``cutoff`` of the rows, then rows that still miss one.

    Returns:
        (table without missing values, report naming what was dropped).

    Raises:
        CellfastError: nothing is left.
    """
    finite = np.isfinite(table.features)
    if finite.all():
        return table, {"dropped_features": {}, "dropped_rows": []}
    share = 1.0 - finite.mean(axis=0)
    keep = share <= cutoff
    rows = finite[:, keep].all(axis=1)
    if not keep.any() or not rows.any():
        raise CellfastError(
            f"Missing values: {int((~keep).sum())} of {len(keep)} features miss more than {100 * cutoff:g} % of the rows "
            f"and {int((~rows).sum())} of "
            f"{len(rows)} rows miss one of the others; nothing is left. Look at the input, or choose features with --features."
        )
    report = {
        "dropped_features": {
            table.feature_names[j]: f"missing in {100 * share[j]:.3g} % of the rows" for j in np.flatnonzero(~keep)
        },
        "dropped_rows": [describe_row(table, i) for i in np.flatnonzero(~rows)],
    }
    result = ProfileTable(
        table.metadata, table.features[:, keep], [n for n, k in zip(table.feature_names, keep) if k], table.provenance
    )
    return result.rows(rows), report


def describe_row(table: ProfileTable, row: int) -> str:
    """A row by its plate, well and site, or compound and concentration, for messages."""
    metadata = table.metadata
    shown = [c for c in ("Metadata_Plate", "Metadata_Well", "Metadata_Site") if c in metadata]
    if "Metadata_Well" not in metadata:
        shown = [c for c in ("Metadata_Compound", "Metadata_Concentration") if c in metadata] or shown
    return " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in metadata.iloc[row][shown]) or f"row {row}"


def select_features(
    table: ProfileTable,
    methods: Sequence[str],
    *,
    least_variance: float = 1e-6,
    frequency_cutoff: float = 0.05,
    unique_cutoff: float = 0.01,
    correlation_cutoff: float = 0.9,
    missing_cutoff: float = 0.05,
) -> tuple[ProfileTable, dict[str, str]]:
    """Drop features by the rules named, in the order named; returns the table and why each dropped feature went.

    ``variance``: at most ``least_variance`` (divisor n). ``frequency``: the second most frequent value is less than ``frequency_cutoff``
    times as frequent as the first, or distinct values are fewer than ``unique_cutoff`` of the rows. ``correlation``: of each pair with
    |r| above the cutoff, the one that correlates more with all others goes. ``nan``: missing in more than ``missing_cutoff`` of the rows.
    Source: pycytominer 1.7's variance_threshold, frequency_threshold, correlation_threshold and drop_na_columns.

    Raises:
        CellfastError: unknown rule, or no feature is left.
    """
    dropped: dict[str, str] = {}
    for method in methods:
        x, labels = table.features, table.feature_names
        if method == "nan":
            share = 1.0 - np.isfinite(x).mean(axis=0)
            reasons = {j: f"missing in {100 * share[j]:.3g} % of the rows" for j in np.flatnonzero(share > missing_cutoff)}
        elif method == "variance":
            finite = np.isfinite(x)
            count = np.maximum(finite.sum(axis=0), 1)
            mean = np.where(finite, x, 0.0).sum(axis=0, dtype=np.float64) / count
            spread = (np.where(finite, x - mean, 0.0) ** 2).sum(axis=0) / count
            reasons = {j: f"variance {spread[j]:.3g}" for j in np.flatnonzero(~(spread > least_variance))}
        elif method == "frequency":
            reasons = _frequent(x, frequency_cutoff, unique_cutoff)
        elif method == "correlation":
            reasons = _correlated(x, labels, correlation_cutoff)
        else:
            raise CellfastError(f"--select must be one of {', '.join(METHODS)}; got '{method}'.")
        if len(reasons) == len(labels):
            raise CellfastError(f"--select {method} drops all {len(labels)} features; first: {labels[0]} ({reasons[0]}).")
        dropped.update({labels[j]: f"{method}: {why}" for j, why in sorted(reasons.items())})
        keep = np.setdiff1d(np.arange(len(labels)), list(reasons))
        table = table.with_features(x[:, keep], [labels[j] for j in keep])
    return table, dropped


def _frequent(x: np.ndarray, frequency_cutoff: float, unique_cutoff: float) -> dict[int, str]:
    reasons = {}
    for j in range(x.shape[1]):
        _, counts = np.unique(x[np.isfinite(x[:, j]), j], return_counts=True)
        if len(counts) < 2:
            reasons[j] = "constant"
            continue
        second, first = np.sort(counts)[-2:]
        if second / first < frequency_cutoff:
            reasons[j] = f"second most frequent value {second / first:.3g} times as frequent as the first"
        elif len(counts) / len(x) < unique_cutoff:
            reasons[j] = f"{len(counts)} distinct values in {len(x)} rows"
    return reasons


def _correlated(x: np.ndarray, labels: list[str], cutoff: float) -> dict[int, str]:
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.abs(np.nan_to_num(np.corrcoef(x, rowvar=False))) if x.shape[1] > 1 else np.ones((1, 1))
    total = r.sum(axis=0)
    reasons: dict[int, str] = {}
    for i, j in zip(*np.nonzero(np.triu(r > cutoff, 1))):
        # On equal totals the later of the two goes.
        loser, other = (i, j) if total[i] > total[j] else (j, i)
        reasons.setdefault(int(loser), f"|r| = {r[i, j]:.3f} with {labels[other]}")
    return reasons
