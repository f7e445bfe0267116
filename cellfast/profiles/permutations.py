"""What chance gives: the mechanisms of action exchanged among compounds of the same batches, with the neighbours fixed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellfast.profiles.moas import MoaLabels
from cellfast.profiles.neighbours import AllowedPairs


@dataclass
class Answers:
    """How many candidates of its MoA each profile has: of other compounds (and batches), also under exchanged labels.

    Attributes:
        pool: int64 [labels, sets]: compounds with a matching label and a batch that is allowed for a profile of this batch set.
        batch_set: int64 [n], the column of each profile.
        own: int64 [n], how many of these are its own compound.
    """

    pool: np.ndarray
    batch_set: np.ndarray
    own: np.ndarray

    def answerable(self, code: np.ndarray) -> np.ndarray:
        """Bool [n]: some candidate has its MoA, the labels being ``code``."""
        return self.pool[code, self.batch_set] > self.own


def count_answers(labels: MoaLabels, pairs: AllowedPairs, not_same_batch: bool) -> Answers:
    """Count the candidates of each profile's MoA without an n × n table.

    Exchanging labels among compounds of the same batch sets leaves ``pool`` and ``own`` as they are.
    """
    candidate = pairs.candidate_b if not_same_batch else pairs.candidate
    if not_same_batch:
        sets, batch_set = np.unique(pairs.batch, axis=0, return_inverse=True)
        batch_set = batch_set.reshape(-1).astype(np.int64)
    else:
        sets, batch_set = np.zeros((1, 1), np.int64), np.zeros(len(labels.code), np.int64)
    # One entry per compound, label and batch set among the candidates.
    units = np.unique(np.stack([pairs.compound, labels.code, batch_set])[:, candidate], axis=1)
    pool = np.zeros((len(labels.labels), len(sets)))
    np.add.at(pool, (units[1], units[2]), 1.0)
    if not labels.single:
        pool = labels.match @ pool
    if not_same_batch:
        pool = pool @ _apart(sets).T if pairs.overlap else pool.sum(axis=1, keepdims=True) - pool
    own = np.zeros(len(labels.code), np.int64)
    order = np.argsort(units[0], kind="stable")
    starts = np.searchsorted(units[0][order], np.arange(int(pairs.compound.max(initial=0)) + 2))
    for rank in range(int(np.diff(starts).max(initial=0))):
        have = np.flatnonzero(starts[pairs.compound] + rank < starts[pairs.compound + 1])
        unit = order[starts[pairs.compound[have]] + rank]
        theirs, mine = sets[units[2][unit]], sets[batch_set[have]]
        apart = ~(theirs & mine).any(axis=1) if pairs.overlap else (theirs != mine).any(axis=1)
        own[have] += (apart | (not not_same_batch)) & labels.match[labels.code[have], units[1][unit]]
    return Answers(np.round(pool).astype(np.int64), batch_set, own)


def _apart(sets: np.ndarray) -> np.ndarray:
    meet = np.zeros((len(sets), len(sets)), bool)
    for word in range(sets.shape[1]):
        meet |= (sets[:, word][:, None] & sets[None, :, word]) != 0
    return ~meet


def permutation_test(
    score: Callable[[np.ndarray], np.ndarray],
    labels: MoaLabels,
    compound: np.ndarray,
    strata: np.ndarray,
    evaluated: Callable[[np.ndarray], np.ndarray],
    num_permutations: int,
    seed: int,
) -> dict[str, Any]:
    """The share right when MoAs are exchanged at random among compounds of the same batches.

    Only the labels of what is evaluated are exchanged, and what can be answered is found again, so that every exchange is a score
    the screen could have had if the MoAs had nothing to do with the profiles. Doses of a compound stay together. With batch effects
    alone, the p-value is below 5 % in 5 % of screens; MoAs that are confounded with batches are chance, not evidence.

    Args:
        score: labels [n] → how right each profile is, float [n]; compound: int [n].
        strata: int [n], the batch set of each profile.
        evaluated: labels [n] → bool [n].

    Returns:
        ``p_value`` (1 + #{as good}) / (1 + permutations), ``chance`` (mean of the exchanges) and ``num_exchangeable`` (compounds that
        share their batches with one of another MoA); p-value and chance None where nothing is evaluated or exchanged.

    Source: Phipson & Smyth 2010 (p-values of random permutations); Winkler et al. 2015 (exchange within blocks).
    """
    base = evaluated(labels.code)
    result: dict[str, Any] = {"p_value": None, "chance": None, "num_exchangeable": 0}
    if not base.any() or num_permutations == 0:
        return result
    observed = score(labels.code)[base].mean()
    unit, stratum, label, taken = _units(labels.code, compound, strata, base)
    result["num_exchangeable"] = _num_exchangeable(stratum[taken], label[taken])
    places = np.flatnonzero(taken)
    places = places[np.argsort(stratum[places], kind="stable")]
    fixed = stratum[places].astype(np.float64)
    rng = np.random.default_rng(seed)
    values = np.empty(num_permutations)
    for i in range(num_permutations):
        exchanged = label.copy()
        exchanged[places] = label[places][np.argsort(fixed + 0.999 * rng.random(len(fixed)))]
        code = exchanged[unit]
        mask = evaluated(code)
        values[i] = score(code)[mask].mean() if mask.any() else 0.0
    result["p_value"] = float((1 + (values >= observed - 1e-9).sum()) / (1 + num_permutations))
    result["chance"] = float(values.mean())
    return result


def _units(
    code: np.ndarray, compound: np.ndarray, strata: np.ndarray, base: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What is exchanged, a compound (where its doses differ in MoA, those of one MoA): the unit of each profile; of each unit the
    stratum (its batch sets as a whole), the label, and whether some profile of it is evaluated.
    """
    units, unit = np.unique(np.stack([compound, code]), axis=1, return_inverse=True)
    unit = unit.reshape(-1)
    members: list[set[int]] = [set() for _ in range(units.shape[1])]
    for u, s in np.unique(np.stack([unit, strata]), axis=1).T:
        members[u].add(int(s))
    numbers: dict[tuple[int, ...], int] = {}
    stratum = np.array([numbers.setdefault(tuple(sorted(m)), len(numbers)) for m in members], np.int64)
    return unit, stratum, units[1], np.bincount(unit, weights=base) > 0


def _num_exchangeable(stratum: np.ndarray, label: np.ndarray) -> int:
    of = np.unique(np.stack([stratum, label]), axis=1)[0]
    several = np.flatnonzero(np.bincount(of, minlength=1) > 1)
    return int(np.isin(stratum, several).sum())
