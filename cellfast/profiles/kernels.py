"""Compiled inner loops: grouped sums, exact grouped medians, masked nearest neighbours. All release the GIL; threads are the
callers'.
"""

from __future__ import annotations

import numpy as np

from cellfast.compiled import njit

# What the options save is compile time: no wrappers for functions that only other kernels call, no reference counting in them,
# no checks for
# division by zero (there is none by a variable that can be zero).
_ENTRY = {"no_cfunc_wrapper": True, "error_model": "numpy", "_nrt": False}
_INNER = {**_ENTRY, "no_cpython_wrapper": True}
_FAST = {"reassoc", "nsz", "contract"}

# Compiled for the types they are called with, on the first call, and kept in numba's cache for later processes. Plain threads
# share the
# work instead of numba's parallel loops: those take several seconds to compile, and BLAS can then be kept to one thread per
# worker.


@njit(**_ENTRY)
def add_rows(values, codes, sums):
    """``np.add.at(sums, codes, values)`` for values [n, d], codes int32 [n] (negative: skip), sums float64 [groups, d]."""
    for i in range(values.shape[0]):
        g = codes[i]
        if g >= 0:
            for j in range(values.shape[1]):
                sums[g, j] += values[i, j]


@njit(**_ENTRY)
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


@njit(**_ENTRY)
def grouped_sum(values, order, starts, first, last, sums):
    """Sums of groups first…last−1 in float64: sums [groups, d]. Rows of a group are added four at a time, so its sums stay in
    the first cache.
    """
    d = values.shape[1]
    for g in range(first, last):
        r = starts[g]
        while r + 4 <= starts[g + 1]:
            a, b, c, e = order[r], order[r + 1], order[r + 2], order[r + 3]
            for j in range(d):
                sums[g, j] += (np.float64(values[a, j]) + np.float64(values[b, j])) + (
                    np.float64(values[c, j]) + np.float64(values[e, j])
                )
            r += 4
        while r < starts[g + 1]:
            a = order[r]
            for j in range(d):
                sums[g, j] += values[a, j]
            r += 1


# The loops below run over whole arrays from 0, never over a range with a start of its own: numba allows negative indices
# there, and that check
# keeps the compiler from using vector instructions.
@njit(**_INNER, fastmath=_FAST)
def _all_finite(x):
    total = x[0] * np.float32(0)
    for i in range(x.shape[0]):
        total += x[i] * np.float32(0)
    return total == 0


@njit(**_INNER)
def _keep_finite(x):
    """Move the finite values to the front, in order; returns (how many, number of NaN)."""
    n = 0
    num_nan = 0
    for i in range(x.shape[0]):
        v = x[i]
        if np.isfinite(v):
            x[n] = v
            n += 1
        elif np.isnan(v):
            num_nan += 1
    return n, num_nan


@njit(**_INNER)
def _order_keys(keys, mask):
    """Turn the bit patterns of floats into integers of the same order, in place, and return the lowest and the highest.

    The lower bits of negative numbers are inverted; the same turns them back.
    """
    low = keys[0] ^ ((keys[0] >> np.int64(63)) & mask)
    high = low
    for i in range(keys.shape[0]):
        key = keys[i] ^ ((keys[i] >> np.int64(63)) & mask)
        keys[i] = key
        low = min(low, key)
        high = max(high, key)
    return low, high


@njit(**_INNER, fastmath=_FAST)
def _count_short(keys, threshold):
    # Counted in float32, which the vector units do fastest and exactly up to 2^24.
    count = np.float32(0)
    for i in range(keys.shape[0]):
        count += np.float32(1) if keys[i] <= threshold else np.float32(0)
    return np.int64(count)


@njit(**_INNER)
def _count_up_to(keys, threshold):
    """Number of keys ≤ threshold."""
    count = 0
    for start in range(0, keys.shape[0], 65536):
        count += _count_short(keys[start : start + 65536], threshold)
    return count


@njit(**_INNER)
def _smallest_above(keys, threshold, otherwise):
    """The smallest key > threshold; ``otherwise``, no less than any, where there is none."""
    low = otherwise
    for i in range(keys.shape[0]):
        low = min(low, keys[i] if keys[i] > threshold else otherwise)
    return low


@njit(**_INNER)
def _flipped(key, mask):
    return key ^ ((key >> np.int64(63)) & mask)


@njit(**_INNER)
def _middle_keys(keys, cell, value, mask):
    """The lower and the upper median of floats' bit patterns, by narrowing an interval: about ten vectorised counts instead of a
    partial sort. The keys are turned into ordered ones.

    Invariant: ``below`` keys are ≤ low, and the k-th smallest (from 0) lies in (low, high]. Thresholds are interpolated between
    the values; every fourth halves the interval of keys, so that no distribution takes more than four times as many counts as a
    key has bits. ``cell`` [1] is scratch of the keys' type (a threshold of a wider type would halve the speed), ``value`` [1]
    the same memory as a float.
    """
    n = keys.shape[0]
    k = (n - 1) >> 1
    first, largest = _order_keys(keys, mask)
    low = np.int64(first) - 1
    high = np.int64(largest)
    below = 0
    inside = n
    turn = 0
    while True:
        # One place each calls the two loops: every copy the compiler makes of them costs tenths of a second.
        last = inside <= 3 or low + 1 >= high
        if last:
            cell[0] = low
            middle = np.int64(_smallest_above(keys, cell[0], largest))
        else:
            turn += 1
            if turn & 3 == 0:
                middle = (low & high) + ((low ^ high) >> 1)
            else:
                cell[0] = _flipped(low, mask)
                a = np.float64(value[0])
                cell[0] = _flipped(high, mask)
                b = np.float64(value[0])
                # Towards the middle of the interval: an estimate on the safe side of the target cuts off the other end as well.
                share = 0.5 if turn & 3 == 3 else 0.05 + 0.9 * (k - below + 0.5) / inside
                value[0] = a * (1.0 - share) + b * share
                middle = _flipped(np.int64(cell[0]), mask)
            middle = min(max(middle, low + 1), high - 1)
        cell[0] = middle
        count = _count_up_to(keys, cell[0])
        if count <= k:
            low = middle
            inside -= count - below
            below = count
        elif last:
            break
        else:
            high = middle
            inside = count - below
    if n & 1 or count > k + 1:
        return middle, middle
    return middle, np.int64(_smallest_above(keys, cell[0], largest))


@njit(**_ENTRY)
def grouped_median(values, order, starts, first, last, tile, keys, value, cell, mask, medians, num_missing):
    """Exact medians of groups first…last−1: medians float64 [groups, d]; NaN and ±inf are left out and counted; an empty
    column gives NaN.

    The mean of the two middle values where the count is even, as ``np.nanmedian``. ``tile`` [width, longest group] is scratch
    of the values' type, ``keys`` the same memory as integers, ``mask`` their largest value. Returns (NaN, inf) counts.
    """
    d = values.shape[1]
    width = tile.shape[0]
    num_nan = 0
    num_inf = 0
    for g in range(first, last):
        rows = starts[g + 1] - starts[g]
        for column in range(0, d, width):
            columns = min(width, d - column)
            for r in range(rows):
                row = values[order[starts[g] + r], column : column + columns]
                for c in range(columns):
                    tile[c, r] = row[c]
            for c in range(columns):
                n = rows
                if rows > 0 and not _all_finite(tile[c, :rows]):
                    n, found = _keep_finite(tile[c, :rows])
                    num_nan += found
                    num_inf += rows - n - found
                    num_missing[g, column + c] += rows - n
                if n == 0:
                    medians[g, column + c] = np.nan
                    continue
                lower, upper = _middle_keys(keys[c, :n], cell, value, mask)
                cell[0] = _flipped(lower, mask)
                low_value = np.float64(value[0])
                cell[0] = _flipped(upper, mask)
                medians[g, column + c] = 0.5 * (low_value + np.float64(value[0]))
    return num_nan, num_inf


@njit(**_INNER, fastmath=_FAST)
def _num_above(row, offset, threshold):
    count = np.float32(0)
    for j in range(row.shape[0]):
        count += np.float32(1) if row[j] - offset[j] > threshold else np.float32(0)
    return count


@njit(**_INNER)
def _flag_above(row, offset, thresholds, flags):
    for j in range(row.shape[0]):
        flags[j] += np.float32(1) if row[j] - offset > thresholds[j] else np.float32(0)


@njit(**_INNER)
def _consider(s, q, c, pairs, best, index):
    compound, batch, overlap, candidate = pairs
    last = best.shape[2] - 1
    if (s <= best[0, q, last] and s <= best[1, q, last]) or compound[q] == compound[c]:
        return
    same = batch[q, 0] == batch[c, 0]
    if overlap:
        same = False
        for w in range(batch.shape[1]):
            same |= (batch[q, w] & batch[c, w]) != 0
    for rule in range(2):
        if candidate[rule, c] and not (rule == 1 and same) and s > best[rule, q, last]:
            p = last
            while p > 0 and best[rule, q, p - 1] < s:
                best[rule, q, p] = best[rule, q, p - 1]
                index[rule, q, p] = index[rule, q, p - 1]
                p -= 1
            best[rule, q, p] = s
            index[rule, q, p] = c


@njit(**_ENTRY)
def best_of_block(similarity, row0, col0, mirror, offset, pairs, best, index, thresholds, flags, hits):
    """Offer one block of similarities [rows, cols] of profiles row0…, col0… to the best lists of both rules.

    ``pairs`` is (compound, batch, overlap, candidate): a pair is allowed when its ``compound`` codes differ and the other profile is
    a ``candidate`` [2, n] under the rule (0 NSC, 1 NSCB); for NSCB also its batches must differ: the ``batch`` words [n, words]
    share no bit (``overlap``), or first words are not equal. ``offset`` [n] is subtracted from the candidate's similarity.
    ``best``/``index`` [2, n, k]: descending lists. With ``mirror`` the block also serves as its transpose.
    ``thresholds``, ``flags`` and ``hits`` [cols] are scratch. Whether anything is above a list's last entry is found first, by vectorised
    counts over stretches of 64; only stretches with such entries are looked at one by one.
    """
    rows, cols = similarity.shape
    last = best.shape[2] - 1
    for i in range(rows):
        q = row0 + i
        for start in range(0, cols, 64):
            threshold = min(best[0, q, last], best[1, q, last])
            stop = min(start + 64, cols)
            if _num_above(similarity[i, start:stop], offset[col0 + start : col0 + stop], threshold) > 0:
                for j in range(start, stop):
                    _consider(similarity[i, j] - offset[col0 + j], q, col0 + j, pairs, best, index)
    if not mirror:
        return
    for start in range(0, rows, 64):
        stop = min(start + 64, rows)
        for j in range(cols):
            thresholds[j] = min(best[0, col0 + j, last], best[1, col0 + j, last])
            flags[j] = 0
        for i in range(start, stop):
            _flag_above(similarity[i], offset[row0 + i], thresholds, flags)
        num_hits = 0
        for j in range(cols):
            if flags[j] > 0:
                hits[num_hits] = j
                num_hits += 1
        # Along the rows, as memory lies: down a column every step would miss the cache.
        if num_hits > 0:
            for i in range(start, stop):
                for h in range(num_hits):
                    j = hits[h]
                    s = similarity[i, j] - offset[row0 + i]
                    if s > thresholds[j]:
                        _consider(s, col0 + j, row0 + i, pairs, best, index)
