"""Compiled loops over pairs of profiles: ranks of positives, and statistics under exchanged labels."""

from __future__ import annotations

import numpy as np

from cellfast.compiled import njit

_EPSILON = np.finfo(np.float64).eps
_MANY = 12  # positives of a query beyond which its negatives are sorted in among them


@njit()
def _exact(x, offset, q, c):
    total = 0.0
    for d in range(x.shape[1]):
        total += x[q, d] * x[c, d]
    return total - offset[c]


@njit()
def _num_below(sorted_values, value):
    low, high = 0, len(sorted_values)
    while low < high:
        middle = (low + high) // 2
        if sorted_values[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low


@njit()
def _count_around(similarity, offset, scaled, added, length, low, high):
    """Entries that are surely above ``high``, and those that are perhaps not below ``low``, float32's rounding considered."""
    surely, perhaps = np.int32(0), np.int32(0)
    for j in range(len(similarity)):
        s = similarity[j] - offset[j]
        unsure = scaled[j] * length + added[j]
        # Written so that it is compiled to vectors.
        surely += np.int32(1) if s - unsure > high else np.int32(0)
        perhaps += np.int32(1) if s + unsure >= low else np.int32(0)
    return surely, perhaps


@njit()
def _count_kind(kind, value):
    count = np.int32(0)
    for j in range(len(kind)):
        count += np.int32(1) if kind[j] == value else np.int32(0)
    return count


@njit()
def rank_rows(similarity, kind, rows, columns, x, offset, norm, slack, euclidean, values, num_positive, num_total, tied):
    """Average precision of each of ``rows`` into ``values``; ``tied`` where some negative is as near as a positive (value to be made
    anew).

    ``similarity`` float32 (written over) and ``kind`` uint8 (1 positive, 2 negative) [rows, columns]; ``columns`` are rows of ``x`` [n, D].
    ``slack`` [2, n]: what float32 can be wrong by, a factor of the query's length for each candidate and an addition. Few
    positives: for each the negatives above it are counted in a vectorised pass. What is too near for float32 is looked at one by one.
    """
    scale = 2 * _EPSILON * (8 + x.shape[1] ** 0.5)
    num = len(columns)
    offsets, scaled, added = np.empty(num, np.float32), np.empty(num, np.float32), np.empty(num, np.float32)
    for j in range(num):
        c = columns[j]
        offsets[j], scaled[j], added[j] = offset[c], slack[0, c], slack[1, c]
    for i in range(len(rows)):
        q = rows[i]
        p = _count_kind(kind[i], 1)
        num_positive[q], num_total[q] = p, p + _count_kind(kind[i], 2)
        if p == 0:
            continue
        good = np.empty(p)
        k = 0
        for j in range(num):
            if kind[i, j] == 1:
                good[k] = _exact(x, offset, q, columns[j])
                k += 1
            if kind[i, j] != 2:
                similarity[i, j] = -np.inf
        good.sort()
        low, high = np.empty(p), np.empty(p)
        for k in range(p):
            square = norm[q] ** 2 + (0.0 if euclidean else 1.0) - 2 * good[k]
            tolerance = scale * (norm[q] + max(square, 0.0) ** 0.5) ** 2
            low[k], high[k] = good[k] - tolerance, good[k] + tolerance
        above, length = np.zeros(p, np.int64), np.float32(norm[q])
        if p > _MANY:
            # Each negative is put between two positives.
            between = np.zeros(p + 1, np.int64)
            for j in range(num):
                s = np.float64(similarity[i, j]) - offset[columns[j]]
                unsure = slack[0, columns[j]] * norm[q] + slack[1, columns[j]]
                if s + unsure < low[0]:
                    continue
                k = _num_below(good, s)
                if (k > 0 and s - unsure <= high[k - 1]) or (k < p and s + unsure >= low[k]):
                    s = _exact(x, offset, q, columns[j])
                    k = _num_below(good, s)
                    tied[q] = tied[q] or (k > 0 and s <= high[k - 1]) or (k < p and s >= low[k])
                between[k] += 1
            nearer = 0
            for k in range(p - 1, -1, -1):
                nearer += between[k + 1]
                above[k] = nearer
        else:
            for k in range(p):
                surely, perhaps = _count_around(
                    similarity[i], offsets, scaled, added, length, np.float32(low[k]), np.float32(high[k])
                )
                above[k] = surely
                if perhaps > surely:
                    for j in range(num):
                        s = similarity[i, j] - offsets[j]
                        unsure = scaled[j] * length + added[j]
                        if s + unsure >= np.float32(low[k]) and not s - unsure > np.float32(high[k]):
                            exact = _exact(x, offset, q, columns[j])
                            above[k] += exact > high[k]
                            tied[q] = tied[q] or low[k] <= exact <= high[k]
        total = 0.0
        for k in range(p):
            total += (p - k) / (p - k + above[k])
        values[q] = total / p


@njit()
def _draw_below(state, limit):
    """A whole number below ``limit``, and the next ``state`` uint64 [1] (splitmix64; the bias of the remainder is below 1e-9)."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.int64((z >> np.uint64(1)) % np.uint64(limit))


@njit()
def _insert(values, count, value):
    """Put ``value`` into its place among the first ``count`` sorted ones."""
    while count > 0 and values[count - 1] > value:
        values[count] = values[count - 1]
        count -= 1
    values[count] = value


@njit()
def draw_precisions(positives, total, state, values):
    """Average precision of ``positives`` places drawn at random of ``total``, into ``values`` float32."""
    places = np.empty(positives, np.int64)
    for i in range(len(values)):
        # Floyd's draw without replacement; what is drawn last of equal ones is the largest possible.
        for k in range(positives):
            j = total - positives + k
            place = _draw_below(state, j + 1)
            at = _num_below(places[:k], place)
            _insert(places, k, j if at < k and places[at] == place else place)
        found = 0.0
        for k in range(positives):
            found += (k + 1) / (places[k] + 1)
        values[i] = found / positives


@njit()
def exchange_labels(starts, wanted, ranks, apart, forms, sides, constants, weight, num, state, result):
    """Statistics of the wells called treated, and of ``num`` random calls of as many in each stratum, into ``result`` [1 + forms, 1 + num].

    The pool is ordered by stratum, stratum s is ``starts[s]:starts[s + 1]`` and its first ``wanted[s]`` are the treated.
    Row 0: mean average precision, ``ranks`` int [n, n] the place of every other one in a query's order, from 0; only pairs
    whose ``apart`` differ are ranked (negative: all). Rows 1…: the quadratic forms aᵀMa of the contrast a between treated and
    other wells of each stratum: ``forms`` [f, n, n], ``weight`` [n] what a call adds to a, ``sides`` [f, n] and ``constants`` [f]
    M w and wᵀMw for the contrast −w of none called.
    """
    n = starts[-1]
    r = wanted.sum()
    order = np.arange(n)
    called, nearest = np.empty(r, np.int64), np.empty(r, np.int64)
    for i in range(num + 1):
        k = 0
        for s in range(len(wanted)):
            for j in range(wanted[s]):
                at = starts[s] + j
                if i > 0:
                    other = at + _draw_below(state, starts[s + 1] - at)
                    order[at], order[other] = order[other], order[at]
                called[k] = order[at]
                k += 1
        total, queries = 0.0, 0
        for a in range(r):
            q, p = called[a], 0
            for b in range(r):
                if a != b and (apart[q] < 0 or apart[q] != apart[called[b]]):
                    _insert(nearest, p, ranks[q, called[b]])
                    p += 1
            if p > 0:
                found = 0.0
                for b in range(p):
                    found += (b + 1) / (nearest[b] + 1)
                total += found / p
                queries += 1
        result[0, i] = total / queries if queries > 0 else np.nan
        for f in range(len(forms)):
            value = constants[f]
            for a in range(r):
                q = called[a]
                value -= 2 * weight[q] * sides[f, q]
                for b in range(r):
                    value += weight[q] * weight[called[b]] * forms[f, q, called[b]]
            result[1 + f, i] = value
