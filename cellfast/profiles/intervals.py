"""How sure a score is: bootstrap over compounds, permutation of the MoAs."""

from __future__ import annotations

import numpy as np

from cellfast.profiles.neighbours import Ties
from cellfast.profiles.votes import correct_shares


def bootstrap_weights(compound: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """How often each compound is drawn: int16 [num_resamples, compounds], each row a draw with replacement of as many compounds.

    Compounds, not treatments, are drawn: the doses of one compound are not independent.
    """
    num = int(compound.max(initial=-1)) + 1
    rng = np.random.default_rng(seed)
    weights = np.zeros((num_resamples, num), np.int16)
    for start in range(0, num_resamples, 256):
        part = weights[start : start + 256]
        draws = rng.integers(0, num, (len(part), num))
        np.add.at(part, (np.arange(len(part))[:, None], draws), 1)
    return weights


def bootstrap_accuracies(correct: np.ndarray, evaluated: np.ndarray, compound: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Accuracy in each resample, float64 [num_resamples]; NaN where no evaluated treatment was drawn.

    Args:
        correct: bool or float [n]: right or wrong, or how probably right.
        evaluated: bool [n].
        compound: int [n], codes into the columns of weights.
        weights: from ``bootstrap_weights``.
    """
    num = weights.shape[1]
    right = np.bincount(compound, weights=correct * evaluated, minlength=num)
    total = np.bincount(compound, weights=evaluated, minlength=num)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights @ right) / (weights @ total)


def percentile_interval(values: np.ndarray, level: float = 0.95) -> list[float] | None:
    """The central ``level`` of finite values as [low, high]; None where there are none."""
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return None
    tail = 50 * (1 - level)
    low, high = np.percentile(values, [tail, 100 - tail])
    return [float(low), float(high)]


def permutation_p_value(
    moa: np.ndarray,
    compound: np.ndarray,
    neighbours: np.ndarray,
    evaluated: np.ndarray,
    num_correct: float,
    num_permutations: int,
    seed: int,
    ties: Ties | None = None,
) -> float | None:
    """Share of random assignments of MoAs to compounds that are right at least as often: (1 + #{≥}) / (1 + permutations).

    The neighbours stay; MoAs are permuted among compounds (a compound with several MoAs: among profiles), so doses of a
    compound stay together.

    Args:
        moa: int [n]; compound: int [n]; neighbours: int [n, k], −1 for none; evaluated: bool [n]; ties: of the neighbours.
    """
    if not evaluated.any():
        return None
    rng = np.random.default_rng(seed)
    num = int(compound.max()) + 1
    low, high = np.full(num, np.iinfo(np.int64).max), np.full(num, -1)
    np.minimum.at(low, compound, moa)
    np.maximum.at(high, compound, moa)
    whole = bool((low[compound] == high[compound]).all())
    as_good = 0
    present, codes = np.unique(compound, return_inverse=True)
    for _ in range(num_permutations):
        labels = low[present][rng.permutation(len(present))][codes.reshape(-1)] if whole else moa[rng.permutation(len(moa))]
        as_good += bool(correct_shares(labels, neighbours, ties)[evaluated].sum() >= num_correct - 1e-9)
    return (1 + as_good) / (1 + num_permutations)
