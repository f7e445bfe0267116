"""Compiled loops over pairs of profiles: ranks of positives, and statistics under exchanged labels."""

from __future__ import annotations

import numpy as np

from cellfast.compiled import njit

_EPSILON = np.finfo(np.float64).eps


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
def rank_rows(similarity, kind, rows, columns, x, offset, norm, slack, euclidean, values, num_positive, num_total, tied):
    """Average precision of each of ``rows`` into ``values``; ``tied`` where some negative is as near as a positive (value to be made
    anew).

    ``similarity`` float32 and ``kind`` uint8 (1 positive, 2 negative) [rows, columns]; ``columns`` are rows of ``x`` [n, D].
    ``slack`` [2, n]: what float32 can be wrong by, a factor of the query's length for each candidate and an addition.
    """
    scale = 2 * _EPSILON * (8 + x.shape[1] ** 0.5)
    for i in range(len(rows)):
        q = rows[i]
        p, m = 0, 0
        for j in range(len(columns)):
            p += kind[i, j] == 1
            m += kind[i, j] == 2
        num_positive[q], num_total[q] = p, p + m
        if p == 0:
            continue
        good = np.empty(p)
        k = 0
        for j in range(len(columns)):
            if kind[i, j] == 1:
                good[k] = _exact(x, offset, q, columns[j])
                k += 1
        good.sort()
        low, high = np.empty(p), np.empty(p)
        for k in range(p):
            square = norm[q] ** 2 + (0.0 if euclidean else 1.0) - 2 * good[k]
            tolerance = scale * (norm[q] + max(square, 0.0) ** 0.5) ** 2
            low[k], high[k] = good[k] - tolerance, good[k] + tolerance
        above = np.zeros(p + 1, np.int64)
        for j in range(len(columns)):
            if kind[i, j] != 2:
                continue
            c = columns[j]
            unsure = slack[0, c] * norm[q] + slack[1, c]
            s = similarity[i, j] - offset[c]
            if s + unsure < low[0]:
                continue
            k = _num_below(good, s)
            if (k > 0 and s - unsure <= high[k - 1]) or (k < p and s + unsure >= low[k]):
                s = _exact(x, offset, q, c)
                k = _num_below(good, s)
                if (k > 0 and s <= high[k - 1]) or (k < p and s >= low[k]):
                    tied[q] = True
            above[k] += 1
        total, nearer = 0.0, 0
        for k in range(p - 1, -1, -1):
            nearer += above[k + 1]
            total += (p - k) / (p - k + nearer)
        values[q] = total / p


@njit()
def draw_precisions(positives, total, seed, values):
    """Average precision of ``positives`` places drawn at random of ``total``, into ``values`` float32."""
    np.random.seed(seed)
    places = np.empty(positives, np.int64)
    for i in range(len(values)):
        # Floyd's draw without replacement.
        for k in range(positives):
            j = total - positives + k
            place = np.random.randint(0, j + 1)
            for seen in range(k):
                if places[seen] == place:
                    place = j
                    break
            places[k] = place
        ordered = np.sort(places)
        found = 0.0
        for k in range(positives):
            found += (k + 1) / (ordered[k] + 1)
        values[i] = found / positives
