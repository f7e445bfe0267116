"""Is a treatment unlike the controls of its plates? Its wells' labels are exchanged with theirs, plate by plate."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cellfast.profiles.aggregate import num_threads
from cellfast.profiles.neighbours import prepare

#: The statistics whose p-values come from exchanged labels.
STATISTICS = ("map", "mahalanobis", "e_distance", "count")

MOST_CONTROLS = 128  # of a treatment's plates together
MOST_WELLS = 48  # of a treatment

_FIRST, _CLEARLY = 1000, 0.1


@dataclass
class Exchanged:
    """What exchanged labels say of each treatment.

    Attributes:
        p_values: float64 [treatments, 4], in the order of ``STATISTICS``; NaN where a statistic cannot be had.
        e_distance: float64 [treatments], energy distance from the controls of the same plates.
        precision: float64 [treatments], mean average precision among these controls.
        num_wells, num_controls: int64 [treatments], compared.
    """

    p_values: np.ndarray
    e_distance: np.ndarray
    precision: np.ndarray
    num_wells: np.ndarray
    num_controls: np.ndarray


def exchange(
    features: np.ndarray,
    counts: np.ndarray | None,
    groups: Sequence[np.ndarray],
    controls: np.ndarray,
    stratum: np.ndarray,
    metric: str = "cosine",
    apart: np.ndarray | None = None,
    num_permutations: int = 10_000,
    seed: int = 0,
    keep_out: Sequence[np.ndarray] | None = None,
) -> Exchanged:
    """Compare each treatment with the controls of its plates (strata), and with random choices of as many wells of each of them.

    If the treatment does nothing, its wells and the controls of a plate could as well be each other, and a p-value below 5 % comes in 5 %
    of cases, whatever plates, features and numbers of wells: nothing else is assumed. The statistics: mean average precision of the
    treatment's wells among the controls; the distance of the means in the covariance of both (Ledoit-Wolf shrunk, within plates), which
    orders choices as Mahalanobis' distance does; the energy distance; the squared difference of mean log cell counts.

    Args:
        features: float [n, D]; counts: float [n] of cells, or None.
        groups: rows of each treatment; controls: rows; stratum: int [n], what is exchanged among.
        apart: int [n]: only wells that differ in it are positives and negatives of each other; None: all.
        num_permutations: where no p-value is at most 0.1 after 1,000, it stays at these.
        keep_out: for each treatment controls that are not compared with (calibration).

    Source: Phipson & Smyth 2010; Székely & Rizzo 2013 (energy distance); Ledoit & Wolf 2004.
    """
    from threadpoolctl import threadpool_limits

    num = len(groups)
    result = Exchanged(
        np.full((num, 4), np.nan), np.full(num, np.nan), np.full(num, np.nan), np.zeros(num, np.int64), np.zeros(num, np.int64)
    )
    rng = np.random.default_rng(seed)
    of_stratum = {int(s): rng.permutation(controls[stratum[controls] == s]) for s in np.unique(stratum[controls])}
    logs = None if counts is None else np.log1p(counts.astype(np.float64))

    def work(i: int) -> None:
        draw = np.random.default_rng([seed, i])
        rows = np.asarray(groups[i])
        rows = rows[np.isin(stratum[rows], list(of_stratum))]
        rows = draw.choice(rows, MOST_WELLS, replace=False) if len(rows) > MOST_WELLS else rows
        strata = np.unique(stratum[rows])
        pool, starts, wanted = [], [0], []
        for s in strata:
            own = of_stratum[int(s)]
            if keep_out is not None:
                own = own[~np.isin(own, keep_out[i])]
            own = own[: max(2, MOST_CONTROLS // len(strata))]
            treated = rows[stratum[rows] == s]
            if len(own):
                pool += [treated, own]
                wanted.append(len(treated))
                starts.append(starts[-1] + len(treated) + len(own))
        if wanted:
            _compare(result, i, np.concatenate(pool), np.array(starts), np.array(wanted), draw)

    def _compare(
        result: Exchanged, i: int, pool: np.ndarray, starts: np.ndarray, wanted: np.ndarray, draw: np.random.Generator
    ) -> None:
        from cellfast.profiles.ranking_kernels import exchange_labels

        n, r = len(pool), int(wanted.sum())
        x = features[pool].astype(np.float64)
        of = np.repeat(np.arange(len(wanted)), np.diff(starts))
        means = np.add.reduceat(x, starts[:-1], axis=0) / np.diff(starts)[:, None]
        centred = x - means[of]
        gram = centred @ centred.T
        square = np.diag(gram)
        distance = np.sqrt(np.maximum(square[:, None] + square[None, :] - 2 * gram, 0.0))
        np.fill_diagonal(distance, 0.0)
        forms = [_whitened(gram, x.shape[1]), -distance]
        if logs is not None:
            cells = logs[pool] - (np.add.reduceat(logs[pool], starts[:-1]) / np.diff(starts))[of]
            forms.append(np.outer(cells, cells))
        # The contrast: 1/r for a treated well, and for the others of its stratum what makes the stratum's sum 0.
        others = np.diff(starts) - wanted
        none = (wanted / (r * others))[of]
        weight = 1 / r + none
        stacked = np.stack(forms)
        sides = stacked @ none
        different = np.full(n, -1, np.int64) if apart is None else apart[pool].astype(np.int64)
        state = np.array([draw.integers(2**63)], np.uint64)
        ranks = _ranks(x, metric, different)
        constants, as_good, done = sides @ none, np.zeros(1 + len(forms), np.int64), 0
        # What is far from small after the first thousand needs no more of them; a p-value below is never made larger by that.
        for part in (min(num_permutations, _FIRST), num_permutations - _FIRST):
            if part <= 0 or (done and np.nanmin((1 + as_good) / (1 + done)) > _CLEARLY):
                break
            found = np.empty((1 + len(forms), 1 + part))
            exchange_labels(starts, wanted, ranks, different, stacked, sides, constants, weight, part, state, found)
            # Equal values differ by rounding.
            as_good += (found[:, 1:] >= found[:, :1] - 1e-9 * np.abs(found[:, :1])).sum(axis=1)
            done += part
        p = (1 + as_good) / (1 + done)
        p[np.isnan(found[:, 0])] = np.nan
        result.p_values[i, : len(p)] = p
        result.precision[i], result.e_distance[i] = found[0, 0], found[2, 0]
        result.num_wells[i], result.num_controls[i] = r, n - r

    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(num_threads()) as threads:
        list(threads.map(work, range(num)))
    return result


def _whitened(gram: np.ndarray, num_features: int) -> np.ndarray:
    """X Σ⁻¹ Xᵀ [n, n] from G = X Xᵀ of centred X, Σ the Ledoit-Wolf covariance of X: no D × D matrix is made."""
    n = len(gram)
    mean = np.trace(gram) / (n * num_features)
    if mean <= 0:
        return np.zeros_like(gram)
    squares = (gram**2).sum() / n**2
    spread = squares / num_features - mean**2
    error = ((np.diag(gram) ** 2).sum() / n**2 - squares / n) / num_features
    share = 1.0 if spread <= 0 else float(np.clip(error / spread, 0.0, 1.0))
    share = max(share, 1e-6)
    return np.linalg.solve(gram * ((1 - share) / n) + share * mean * np.eye(n), gram)


def _ranks(x: np.ndarray, metric: str, apart: np.ndarray) -> np.ndarray:
    """int32 [n, n]: the place of every other well in each well's order, nearest 0; wells that are not ranked come last."""
    vectors, offset = prepare(x, metric)
    similarity = vectors @ vectors.T - offset
    np.fill_diagonal(similarity, -np.inf)
    if apart[0] >= 0:
        similarity[apart[:, None] == apart[None, :]] = -np.inf
    # From the back: of equally near wells those that are called treated, which stand first, come last and win nothing.
    order = len(x) - 1 - np.argsort(-similarity[:, ::-1], axis=1, kind="stable")
    ranks = np.empty(order.shape, np.int32)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(len(x), dtype=np.int32), order.shape), axis=1)
    return ranks
