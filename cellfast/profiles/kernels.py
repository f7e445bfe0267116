"""Compiled inner loops: grouped sums, exact grouped medians, masked nearest neighbours. All release the GIL; threads are the callers'."""

from __future__ import annotations

import numpy as np
from numba import njit

# Compiled for the types they are called with, on the first call, and kept in numba's cache for later processes. Plain threads share the
# work instead of numba's parallel loops: those take several seconds to compile, and BLAS can then be kept to one thread per worker.


@njit(cache=True, nogil=True)
def add_rows(values, codes, sums):
    """``np.add.at(sums, codes, values)`` for values [n, d], codes int32 [n] (negative: skip), sums float64 [groups, d]."""
    for i in range(values.shape[0]):
        g = codes[i]
        if g >= 0:
            for j in range(values.shape[1]):
                sums[g, j] += values[i, j]


@njit(cache=True, nogil=True)
def add_finite_rows(values, codes, sums, num_missing):
    """As ``add_rows``, leaving out NaN and ±inf and counting them in num_missing int64 [groups, d]; returns (NaN, inf) counts."""
    num_nan = 0
    num_inf = 0
    for i in range(values.shape[0]):
        g = codes[i]
        if g < 0:
            continue
        for j in range(values.shape[1]):
            v = values[i, j]
            if np.isfinite(v):
                sums[g, j] += v
            else:
                num_missing[g, j] += 1
                if np.isnan(v):
                    num_nan += 1
                else:
                    num_inf += 1
    return num_nan, num_inf


@njit(cache=True, nogil=True)
def group_rows(codes, num_groups):
    """Counting sort: ``order`` lists the rows of group 0, then 1, …; group g's are ``order[starts[g]:starts[g+1]]`` in row order."""
    starts = np.zeros(num_groups + 1, np.int64)
    for i in range(codes.shape[0]):
        if codes[i] >= 0:
            starts[codes[i] + 1] += 1
    for g in range(num_groups):
        starts[g + 1] += starts[g]
    fill = starts[:-1].copy()
    order = np.empty(starts[num_groups], np.int64)
    for i in range(codes.shape[0]):
        g = codes[i]
        if g >= 0:
            order[fill[g]] = i
            fill[g] += 1
    return order, starts


@njit(cache=True, nogil=True)
def _kth(scratch, left, right, k):
    """The k-th smallest of scratch[left:right+1] (0-based from scratch[0]) by Hoare's selection; reorders scratch so that scratch[k] is it."""
    while right > left:
        # Median of three as pivot: sorted and constant columns stay linear.
        middle = (left + right) >> 1
        if scratch[middle] < scratch[left]:
            scratch[middle], scratch[left] = scratch[left], scratch[middle]
        if scratch[right] < scratch[left]:
            scratch[right], scratch[left] = scratch[left], scratch[right]
        if scratch[right] < scratch[middle]:
            scratch[right], scratch[middle] = scratch[middle], scratch[right]
        pivot = scratch[middle]
        i = left
        j = right
        while i <= j:
            while scratch[i] < pivot:
                i += 1
            while pivot < scratch[j]:
                j -= 1
            if i <= j:
                scratch[i], scratch[j] = scratch[j], scratch[i]
                i += 1
                j -= 1
        if k <= j:
            right = j
        elif k >= i:
            left = i
        else:
            break
    return scratch[k]


@njit(cache=True, nogil=True)
def grouped_median(values, order, starts, first, last, medians, num_missing):
    """Exact medians of groups first…last−1: medians float64 [groups, d]; NaN and ±inf are left out and counted; an empty column gives NaN.

    The mean of the two middle values where the count is even, as ``np.nanmedian``. Returns (NaN, inf) counts.
    """
    d = values.shape[1]
    longest = 1
    for g in range(first, last):
        longest = max(longest, starts[g + 1] - starts[g])
    width = 16
    tile = np.empty((width, longest), values.dtype)
    sizes = np.empty(width, np.int64)
    num_nan = 0
    num_inf = 0
    for g in range(first, last):
        for column in range(0, d, width):
            columns = min(width, d - column)
            sizes[:] = 0
            for r in range(starts[g], starts[g + 1]):
                row = order[r]
                for c in range(columns):
                    v = values[row, column + c]
                    if np.isfinite(v):
                        tile[c, sizes[c]] = v
                        sizes[c] += 1
                    elif np.isnan(v):
                        num_nan += 1
                    else:
                        num_inf += 1
            for c in range(columns):
                n = sizes[c]
                num_missing[g, column + c] += starts[g + 1] - starts[g] - n
                if n == 0:
                    medians[g, column + c] = np.nan
                    continue
                scratch = tile[c]
                k = (n - 1) >> 1
                lower = _kth(scratch, 0, n - 1, k)
                if n & 1:
                    medians[g, column + c] = lower
                else:
                    upper = scratch[k + 1]
                    for i in range(k + 2, n):
                        if scratch[i] < upper:
                            upper = scratch[i]
                    medians[g, column + c] = 0.5 * (np.float64(lower) + np.float64(upper))
    return num_nan, num_inf


@njit(cache=True, nogil=True, fastmath={"reassoc", "nsz", "contract"})
def best_of_block(
    similarity, row0, col0, mirror, offset, compound, batch, overlap, candidate, candidate_b, best, index, best_b, index_b, peak
):
    """Offer one block of similarities [rows, cols] of profiles row0…, col0… to the best lists of both rules.

    A pair is allowed for NSC when its ``compound`` codes differ and the other profile is a ``candidate``; for NSCB when also its batches differ and
    it is a ``candidate_b``: the ``batch`` words [n, words] share no bit (``overlap``) or first words are not equal. ``offset`` [n] is subtracted
    from the candidate's similarity. ``best``/``index`` [n, k]: descending lists. With ``mirror`` the block also serves as its transpose.
    ``peak`` [cols] is scratch. Maxima of rows and columns are taken first: only those above a list's last entry are looked at one by one.
    """
    rows, cols = similarity.shape
    last = best.shape[1] - 1
    for i in range(rows):
        q = row0 + i
        top = similarity[i, 0] - offset[col0]
        for j in range(1, cols):
            top = max(top, similarity[i, j] - offset[col0 + j])
        if top > best_b[q, last] or top > best[q, last]:
            for j in range(cols):
                c = col0 + j
                s = similarity[i, j] - offset[c]
                if (s > best_b[q, last] or s > best[q, last]) and compound[q] != compound[c]:
                    if candidate[c]:
                        _offer(s, c, best[q], index[q])
                    if candidate_b[c] and not _same_batch(batch, q, c, overlap):
                        _offer(s, c, best_b[q], index_b[q])
    if not mirror:
        return
    for j in range(cols):
        peak[j] = -np.inf
    for i in range(rows):
        o = offset[row0 + i]
        for j in range(cols):
            peak[j] = max(peak[j], similarity[i, j] - o)
    for j in range(cols):
        q = col0 + j
        if peak[j] > best_b[q, last] or peak[j] > best[q, last]:
            for i in range(rows):
                c = row0 + i
                s = similarity[i, j] - offset[c]
                if (s > best_b[q, last] or s > best[q, last]) and compound[q] != compound[c]:
                    if candidate[c]:
                        _offer(s, c, best[q], index[q])
                    if candidate_b[c] and not _same_batch(batch, q, c, overlap):
                        _offer(s, c, best_b[q], index_b[q])


@njit(cache=True, nogil=True, inline="always")
def _same_batch(batch, a, b, overlap):
    if not overlap:
        return batch[a, 0] == batch[b, 0]
    for w in range(batch.shape[1]):
        if batch[a, w] & batch[b, w]:
            return True
    return False


@njit(cache=True, nogil=True, inline="always")
def _offer(s, candidate, best, index):
    k = best.shape[0]
    if s > best[k - 1]:
        p = k - 1
        while p > 0 and best[p - 1] < s:
            best[p] = best[p - 1]
            index[p] = index[p - 1]
            p -= 1
        best[p] = s
        index[p] = candidate
