"""Cells to sites and wells, wells to treatments: exact means and medians over groups of rows, in memory or streamed from
files.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

METHODS = ("mean", "median")

#: Wells to treatments.
CONSENSUS = (*METHODS, "modz")


@dataclass
class GroupedProfiles:
    """Aggregates of groups of rows.

    Attributes:
        values: float64 [groups, D]; NaN where a group has no finite value of a feature.
        counts: int64 [groups], rows per group, or the sum of their weights.
        num_nan: NaN values left out.
        num_inf: infinite values left out.
    """

    values: np.ndarray
    counts: np.ndarray
    num_nan: int
    num_inf: int


def num_threads() -> int:
    """Threads to use: the processors this process may run on, or ``OMP_NUM_THREADS`` if that is less."""
    available = len(os.sched_getaffinity(0))
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(available, int(limit))) if limit.isdigit() else available


class GroupSums:
    """Running sums of groups over blocks of rows, in float64.

    Equivalent to ``pandas.DataFrame.groupby(codes).mean()`` over everything added: values that are not finite are left out,
    feature by feature. With weights, the means of rows that are means of so many cells themselves.
    """

    def __init__(self, num_groups: int, num_features: int) -> None:
        self.sums = np.zeros((num_groups, num_features))
        self.counts = np.zeros(num_groups, np.int64)
        self._missing: np.ndarray | None = None
        self.num_nan = self.num_inf = 0

    def add(self, block: np.ndarray, codes: np.ndarray, first_column: int = 0, weights: np.ndarray | None = None) -> None:
        """Add block float [n, d] of columns first_column…; codes int32 [n] are the groups, negative ones are skipped; weights
        int64 [n], 1 by default."""
        from cellfast.profiles import kernels

        stop = first_column + block.shape[1]
        sums = self.sums[:, first_column:stop]
        if first_column == 0:
            known = codes >= 0
            of_rows = None if weights is None else weights[known]
            self.counts += np.bincount(codes[known], of_rows, minlength=len(self.counts)).astype(np.int64)
        if weights is not None:
            self._add_weighted(block, codes, weights, first_column)
            return
        # Finite sums mean finite input (a sum cannot become finite again): the careful pass is only for blocks that need it.
        with np.errstate(all="ignore"):
            total = block.sum(dtype=np.float64)
        if np.isfinite(total):
            kernels.add_rows(block, codes, sums)
            return
        if self._missing is None:
            self._missing = np.zeros(self.sums.shape, np.int64)
        num_nan, num_inf = kernels.add_finite_rows(block, codes, sums, self._missing[:, first_column:stop])
        self.num_nan += num_nan
        self.num_inf += num_inf

    def _add_weighted(self, block: np.ndarray, codes: np.ndarray, weights: np.ndarray, first_column: int) -> None:
        from cellfast.profiles import kernels

        columns = slice(first_column, first_column + block.shape[1])
        finite = np.isfinite(block)
        kernels.add_rows(np.where(finite, block, 0.0) * weights[:, None], codes, self.sums[:, columns])
        if not finite.all():
            if self._missing is None:
                self._missing = np.zeros(self.sums.shape, np.int64)
            np.add.at(self._missing[:, columns], codes[codes >= 0], np.where(finite, 0, weights[:, None])[codes >= 0])
            num_nan = int(np.isnan(block[codes >= 0]).sum())
            self.num_nan += num_nan
            self.num_inf += int((~finite[codes >= 0]).sum()) - num_nan

    def result(self) -> GroupedProfiles:
        """The means so far."""
        counts = self.counts[:, None] if self._missing is None else self.counts[:, None] - self._missing
        with np.errstate(invalid="ignore", divide="ignore"):
            return GroupedProfiles(self.sums / counts, self.counts, self.num_nan, self.num_inf)


def group_means(values: np.ndarray, codes: np.ndarray, num_groups: int) -> GroupedProfiles:
    """Means of groups of rows: ``pandas.DataFrame(values).groupby(codes).mean()`` in float64.

    Args:
        values: float32 or float64 [n, d]; NaN and ±inf are left out and counted.
        codes: integers [n], the group of each row, 0 … num_groups − 1; negative: left out.
        num_groups: number of groups.
    """
    from cellfast.profiles import kernels

    codes = np.ascontiguousarray(codes, np.int32)
    _check(values, codes, num_groups)
    order, starts = group_rows(codes, num_groups)
    sums = np.zeros((num_groups, values.shape[1]))
    _by_rows(starts, values.size, lambda first, last: kernels.grouped_sum(values, order, starts, first, last, sums))
    if np.isfinite(sums).all():
        counts = np.diff(starts)
        with np.errstate(invalid="ignore"):
            return GroupedProfiles(sums / counts[:, None], counts, 0, 0)
    # Something was not finite: once more, with a look at every value.
    running = GroupSums(num_groups, values.shape[1])
    running.add(values, codes)
    return running.result()


def group_rows(codes: np.ndarray, num_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows listed by group: group g's are ``order[starts[g]:starts[g + 1]]``, in row order; negative codes are left out.

    Returns:
        (order int64 [rows with a group], starts int64 [num_groups + 1]).
    """
    # NumPy sorts 16-bit integers by radix, ten times faster than wider ones.
    keys = (codes + 1).astype(np.uint16) if num_groups < 65535 else codes
    order = np.argsort(keys, kind="stable")
    counts = np.bincount(codes[codes >= 0], minlength=num_groups)
    starts = np.concatenate([[0], np.cumsum(counts)])
    return order[len(order) - starts[-1] :], starts


def group_medians(values: np.ndarray, codes: np.ndarray, num_groups: int) -> GroupedProfiles:
    """Exact medians of groups of rows: ``pandas.DataFrame(values).groupby(codes).median()``, the mean of the middle two for
    even counts.

    Args and result as ``group_means``.
    """
    from cellfast.profiles import kernels

    codes = np.ascontiguousarray(codes, np.int32)
    _check(values, codes, num_groups)
    order, starts = group_rows(codes, num_groups)
    medians = np.empty((num_groups, values.shape[1]))
    missing = np.zeros((num_groups, values.shape[1]), np.int64)
    kind = np.int32 if values.dtype == np.float32 else np.int64
    mask = kind(np.iinfo(kind).max)

    def work(first: int, last: int) -> tuple[int, int]:
        longest = int(np.diff(starts[first : last + 1]).max(initial=1))
        # 64 columns of a row are four cache lines; long groups take fewer, so that the tile stays in the second-level cache.
        tile = np.empty((min(values.shape[1], 64 if longest <= 4096 else 16), longest), values.dtype)
        value = np.zeros(1, values.dtype)
        return kernels.grouped_median(
            values, order, starts, first, last, tile, tile.view(kind), value, value.view(kind), mask, medians, missing
        )

    found = _by_rows(starts, values.size, work)
    return GroupedProfiles(medians, np.diff(starts), sum(f[0] for f in found), sum(f[1] for f in found))


def group_modz(values: np.ndarray, codes: np.ndarray, num_groups: int) -> GroupedProfiles:
    """Means of groups of rows, each row weighted by its mean Spearman correlation with the others of its group (MODZ).

    Correlations below 0 count as 0, weights below 0.01 as 0.01; of two rows both count alike. Args and result as ``group_means``, but
    values must be finite. Source: Subramanian et al. 2017; pycytominer's modz, which rounds the weights to four digits.
    """
    from scipy.stats import rankdata

    codes = np.ascontiguousarray(codes, np.int32)
    _check(values, codes, num_groups)
    order, starts = group_rows(codes, num_groups)
    means = np.full((num_groups, values.shape[1]), np.nan)
    for group in range(num_groups):
        rows = values[order[starts[group] : starts[group + 1]]].astype(np.float64)
        n = len(rows)
        if n < 3:
            means[group] = rows.mean(axis=0) if n else np.nan
            continue
        ranks = rankdata(rows, axis=1)
        ranks -= ranks.mean(axis=1, keepdims=True)
        lengths = np.linalg.norm(ranks, axis=1, keepdims=True)
        ranks /= np.where(lengths > 0, lengths, 1.0)
        weights = np.empty(n)
        for first in range(0, n, 1024):  # a control has thousands of wells: n × n numbers would not fit
            similarity = ranks[first : first + 1024] @ ranks.T
            own = np.arange(len(similarity))
            similarity[own, first + own] = 0.0
            weights[first : first + 1024] = np.maximum(similarity, 0.0).sum(axis=1) / (n - 1)
        weights = np.maximum(weights, 0.01)
        means[group] = weights @ rows / weights.sum()
    return GroupedProfiles(means, np.diff(starts), 0, 0)


def _by_rows(starts: np.ndarray, size: int, work: Callable[[int, int], Any]) -> list[Any]:
    """Call ``work(first, last)`` on consecutive ranges of groups, on threads if there is enough to do; results in order."""
    num_groups = len(starts) - 1
    threads = num_threads() if size >= 1 << 18 else 1
    if threads == 1:
        return [work(0, num_groups)]
    # Equal numbers of rows, not of groups; several shares a thread, so that one long group does not hold up the end.
    inner = np.searchsorted(starts, np.linspace(0, starts[-1], 8 * threads + 1)[1:-1])
    edges = [int(e) for e in np.unique(np.concatenate([[0], inner, [num_groups]])) if e <= num_groups]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda share: work(*share), pairwise(edges)))


def aggregate(
    values: np.ndarray, codes: np.ndarray, num_groups: int, method: str, weights: np.ndarray | None = None
) -> GroupedProfiles:
    """``group_means``, ``group_medians`` or ``group_modz`` by name; ``weights`` int64 [n] are those of the means."""
    if method not in CONSENSUS:
        raise ValueError(f"method must be one of {', '.join(CONSENSUS)}, got {method!r}")
    if method == "modz":
        return group_modz(values, codes, num_groups)
    if method == "mean" and weights is not None:
        sums = GroupSums(num_groups, values.shape[1])
        sums.add(values, np.ascontiguousarray(codes, np.int32), weights=weights)
        return sums.result()
    return group_means(values, codes, num_groups) if method == "mean" else group_medians(values, codes, num_groups)


def _check(values: np.ndarray, codes: np.ndarray, num_groups: int) -> None:
    if values.ndim != 2 or len(values) != len(codes):
        raise ValueError(f"values must have shape [{len(codes)}, features] for {len(codes)} codes, got {list(values.shape)}")
    if len(codes) and codes.max() >= num_groups:
        raise ValueError(f"codes must be below num_groups = {num_groups}, got {codes.max()}")
