"""NSC and NSCB: is the nearest profile of another compound (and another batch) one of the same mechanism of action?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from cellfast.errors import CellfastError
from cellfast.metadata import columns as names
from cellfast.metadata.counts import CELL_COUNT
from cellfast.metadata.treatments import treatment_key
from cellfast.profiles.build import treatments
from cellfast.profiles.count_baseline import count_baseline
from cellfast.profiles.evaluated_rows import UNKNOWN_BATCH, batch_sets, choose_rows
from cellfast.profiles.identical import refuse_identical
from cellfast.profiles.intervals import difference_interval, ratio_interval
from cellfast.profiles.mean_average_precision import moa_precision, replicate_precision
from cellfast.profiles.moas import MoaLabels, moa_labels
from cellfast.profiles.neighbours import BATCH_RULES, METRICS, AllowedPairs, Neighbours, batch_codes, nearest_neighbours
from cellfast.profiles.permutations import Answers, count_answers, permutation_test
from cellfast.profiles.replicates import replicate_reproducibility
from cellfast.profiles.table import ProfileTable
from cellfast.profiles.votes import correct_shares, majority_vote, number, vote_shares

ONE_BATCH_RULES = ("exclude", "queries", "keep")
UNANSWERABLE = ("exclude", "count")


@dataclass
class EvaluationOptions:
    """What ``cellfast evaluate`` can be told; the defaults are its defaults.

    Attributes:
        level: ``treatment`` (several rows of one treatment are made one by ``aggregate``) or ``well`` (rows as they are).
        aggregate: mean or median.
        metric: cosine, correlation or euclidean.
        k: neighbours that vote.
        batch_rule: ``overlap``, ``joined`` or ``plates`` (``neighbours.batch_codes``).
        batch_regex: regular expression that takes the batch from the plate name.
        group_by: columns that tell treatments apart beside compound and concentration; empty: as the profiles were made.
        pool: columns of biology whose different values are taken as one treatment; empty: as the profiles were made.
        one_batch_moas: MoAs that occur in one batch only under NSCB: ``exclude`` as queries and candidates, as ``queries``
        only, or ``keep``.
        unanswerable: profiles without any candidate of their MoA: ``exclude`` as queries, or ``count`` as wrong, the published convention.
        controls: query for the rows left out as controls.
        num_permutations: random assignments of MoAs.
        average_precision: compute mean average precision.
        seed: of the permutations and the replicates' null.
    """

    level: str = "treatment"
    aggregate: str = "median"
    metric: str = "cosine"
    k: int = 1
    batch_rule: str = "overlap"
    batch_regex: str | None = None
    group_by: Sequence[str] = ()
    pool: Sequence[str] = ()
    one_batch_moas: str = "exclude"
    unanswerable: str = "exclude"
    controls: str | None = None
    num_permutations: int = 1_000
    average_precision: bool = True
    seed: int = 0


@dataclass
class Evaluation:
    """Result of ``evaluate_profiles``.

    Attributes:
        result: what is written to RESULT.json.
        profiles: the evaluated profiles, in the order of ``table``.
        table: one row per profile: identity, pool sizes, neighbours, distances, right or wrong.
    """

    result: dict[str, Any]
    profiles: ProfileTable
    table: pd.DataFrame


def evaluate_profiles(
    profiles: ProfileTable, options: EvaluationOptions | None = None, wells: ProfileTable | None = None
) -> Evaluation:
    """Score profiles by the MoA of their nearest allowed neighbours.

    NSC: candidates of the same compound are left out. NSCB: those of the same batch as well. Drop = NSC − NSCB. A profile
    without candidates, or without a candidate of its MoA, is not evaluated under that rule, and counted. Where several neighbours are
    equally near, the score counts the expectation over a random choice among them, and says for how many profiles.

    Args:
        profiles: treatments or wells with compound and MoA (``a|b``: either is right).
        options: see ``EvaluationOptions``.
        wells: the wells of these treatments, for replicate reproducibility and precision; taken from ``profiles`` where it
        holds wells.

    Raises:
        CellfastError: no MoA, fewer than two compounds, profiles that are not finite or have no direction, identical
        profiles of different treatments.

    Source: Ljosa et al. 2013 (NSC), Ando et al. 2017 (NSCB).
    """
    options = options or EvaluationOptions()
    _check_options(options)
    profiles, counts = choose_rows(profiles, options.controls, options.batch_regex)
    # Profiles know by what their treatments were told apart when they were made.
    group_by = options.group_by or profiles.provenance.get("group_by", ())
    pool = options.pool or profiles.provenance.get("pool", ())
    if options.level == "treatment":
        codes = profiles.metadata[treatment_key(profiles.metadata, group_by, pool)]
        counts["rows_per_treatment_aggregated"] = bool(codes.duplicated().any())
        if counts["rows_per_treatment_aggregated"]:
            wells = profiles if wells is None else wells
            profiles = treatments(profiles, options.aggregate, None, group_by, pool)
    elif wells is None:
        wells = profiles
    metadata = profiles.metadata
    compound, compounds = pd.factorize(metadata[names.COMPOUND], sort=True)
    compound = compound.astype(np.int64)
    moas = moa_labels(metadata[names.MOA])
    if len(compounds) < 2:
        raise CellfastError(
            f"NSC needs profiles of at least two compounds with a MoA; found {len(compounds)} ({', '.join(compounds)})."
        )
    refuse_identical(profiles, group_by)
    batches = batch_sets(metadata, options.batch_rule)
    one_batch = np.zeros(0, np.int64) if batches[0] == (UNKNOWN_BATCH,) else _one_batch_moas(moas, batches)
    # A profile of several MoAs is left out where all of them are of one batch.
    excluded = ~np.delete(moas.members, one_batch, axis=1).any(axis=1)[moas.code]
    excluded &= options.one_batch_moas != "keep"
    everyone = np.ones(len(compound), bool)
    candidate_b = ~excluded if options.one_batch_moas == "exclude" else everyone
    words, overlap = batch_codes(batches, options.batch_rule)
    pairs = AllowedPairs(compound, words, overlap, everyone, candidate_b)
    result: dict[str, Any] = {"nsc": {}, "nscb": {}, "drop": None}
    labels = _labels(metadata)
    columns: dict[str, Any] = {}
    cluster = moas.clusters()
    strata = np.unique(words, axis=0, return_inverse=True)[1].reshape(-1)
    counted: list[tuple[np.ndarray, np.ndarray]] = []
    for rule, neighbours in zip(("nsc", "nscb"), nearest_neighbours(profiles.features, pairs, options.metric, options.k)):
        base = neighbours.index[:, 0] >= 0
        if rule == "nscb":
            base &= ~excluded
        answers = count_answers(moas, pairs, rule == "nscb")
        evaluated = _evaluated(answers, base, options.unanswerable)
        members = None if moas.single else moas.members

        def right(code: np.ndarray, found: Neighbours = neighbours, members: np.ndarray | None = members) -> np.ndarray:
            return correct_shares(code, found.index, found.ties, members)

        counts_now = evaluated(moas.code)
        correct = counts_now * right(moas.code)
        counted.append((correct, counts_now.astype(np.float64)))
        score = _score(correct, counts_now, compound, moas, neighbours)
        score["ties"], num_tied = _ties(neighbours, correct, counts_now)
        score["interval_95"] = ratio_interval(*counted[-1], cluster)
        score |= permutation_test(right, moas, compound, strata, evaluated, options.num_permutations, options.seed)
        left_out = excluded if rule == "nscb" else ~everyone
        score["excluded"] = {
            "no_candidates": _named(labels, (neighbours.index[:, 0] < 0) & ~left_out),
            "no_candidate_of_its_moa": _named(labels, base & ~counts_now),
            "one_batch_moa": _named(labels, left_out),
        }
        pool = neighbours.pool_size
        score["candidate_pool_size"] = {"min": int(pool.min()), "median": float(np.median(pool)), "max": int(pool.max())}
        result[rule] = score
        columns |= _columns(rule, neighbours, correct, counts_now, moas, labels, num_tied)
    table = pd.concat([_identity(metadata), pd.DataFrame(columns)], axis=1)
    result["nscb"]["num_pairs_sharing_a_batch"] = _sharing(metadata, pairs, counted[1][1] > 0)
    result |= _drops(counted, cluster)
    result["one_batch_moas"] = [moas.moas[m] for m in one_batch]
    result["one_compound_moas"] = [moas.moas[m] for m in np.flatnonzero(moas.num_compounds(compound) == 1)]
    result["counts"] = {**counts, "profiles": len(profiles), "compounds": len(compounds), "moas": len(moas.moas),
                        "batches": len({b for s in batches for b in s}), "features": len(profiles.feature_names),
                        "moa_clusters": int(cluster.max()) + 1,
                        "cells": int(metadata[CELL_COUNT].sum()) if CELL_COUNT in metadata else None}  # fmt: skip
    result["cell_count_baseline"] = count_baseline(profiles, pairs, moas, [total > 0 for _, total in counted])
    result["replicate_reproducibility"] = None
    result["mean_average_precision"] = None
    if options.average_precision:
        result["mean_average_precision"] = {"moa": moa_precision(profiles, options.metric)}
    if wells is not None and options.average_precision:
        chosen, _ = choose_rows(wells, options.controls, options.batch_regex)
        refuse_identical(chosen, group_by)
        result["replicate_reproducibility"] = replicate_reproducibility(chosen, options.metric, options.seed)
        result["mean_average_precision"]["treatment"] = replicate_precision(chosen, options.metric)
    result["batch_metrics"] = profiles.provenance.get("batch_metrics")
    result["options"] = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(options).items()}
    return Evaluation(result, profiles, table)


def _check_options(options: EvaluationOptions) -> None:
    for name, allowed in (
        ("level", ("treatment", "well")),
        ("aggregate", ("mean", "median")),
        ("metric", METRICS),
        ("batch_rule", BATCH_RULES),
        ("one_batch_moas", ONE_BATCH_RULES),
        ("unanswerable", UNANSWERABLE),
    ):
        if getattr(options, name) not in allowed:
            raise CellfastError(f"{name} must be one of {', '.join(allowed)}; got '{getattr(options, name)}'.")


def _evaluated(answers: Answers, base: np.ndarray, unanswerable: str) -> Callable[[np.ndarray], np.ndarray]:
    """Which profiles are evaluated when the labels are ``code``."""
    if unanswerable == "count":
        return lambda code: base
    return lambda code: base & answers.answerable(code)


def _drops(counted: list[tuple[np.ndarray, np.ndarray]], cluster: np.ndarray) -> dict[str, Any]:
    """NSC − NSCB of all that each evaluates, and of the profiles that both evaluate."""
    (nsc, by_nsc), (nscb, by_nscb) = counted
    both = by_nsc * by_nscb
    result: dict[str, Any] = {"drop": None, "drop_interval_95": None, "drop_common": None}
    for name, one, other in (("", by_nsc, by_nscb), ("_common", both, both)):
        if one.sum() and other.sum():
            drop = float((nsc * one).sum() / one.sum() - (nscb * other).sum() / other.sum())
            interval = difference_interval((nscb, other), (nsc, one), cluster)
            if name:
                result["drop_common"] = {"drop": drop, "interval_95": interval, "num_evaluated": int(both.sum())}
            else:
                result |= {"drop": drop, "drop_interval_95": interval}
    return result


def _sharing(metadata: pd.DataFrame, pairs: AllowedPairs, evaluated: np.ndarray) -> int:
    """How many pairs of an evaluated profile and an NSCB candidate have a batch in common all the same: 0 under ``overlap``."""
    words, overlap = batch_codes(batch_sets(metadata, "overlap"), "overlap")
    apart = AllowedPairs(pairs.compound, words, overlap, pairs.candidate, pairs.candidate_b)
    return int((pairs.pool_sizes(True) - apart.pool_sizes(True))[evaluated].sum())


def _columns(
    rule: str, neighbours: Neighbours, correct: np.ndarray, evaluated: np.ndarray, moas: MoaLabels, labels: list[str],
    num_tied: np.ndarray,
) -> dict[str, Any]:  # fmt: skip
    nearest = neighbours.index[:, 0].tolist()
    called = [[c] for c in majority_vote(moas.code, neighbours.index).tolist()]
    near = [[i] if i >= 0 else [] for i in nearest]
    # Of equally near neighbours none is the first.
    for i, row in enumerate(neighbours.ties.rows):
        members, groups = neighbours.ties.of(i)
        near[row] = members[groups == 0].tolist()
        called[row] = sorted(vote_shares(moas.code, neighbours.ties, i, neighbours.index.shape[1]))
    return {
        f"{rule}_evaluated": evaluated,
        f"{rule}_correct": correct if (correct % 1).any() else correct.astype(bool),
        f"{rule}_called_moa": [
            _either([moas.labels[c] for c in found]) if e else "" for found, e in zip(called, evaluated.tolist())
        ],
        f"{rule}_neighbour": [_either([labels[i] for i in found]) for found in near],
        f"{rule}_neighbour_moa": [_either([moas.labels[moas.code[i]] for i in found]) for found in near],
        f"{rule}_distance": neighbours.distance[:, 0],
        f"{rule}_pool_size": neighbours.pool_size,
        f"{rule}_equally_near": num_tied,
    }  # fmt: skip


def _either(found: list[str], most: int = 4) -> str:
    distinct = list(dict.fromkeys(found))
    return " or ".join(distinct[:most]) + (f" or {len(distinct) - most} more" if len(distinct) > most else "")


def _one_batch_moas(moas: MoaLabels, batches: list[tuple[str, ...]]) -> np.ndarray:
    found: list[set[str]] = [set() for _ in moas.labels]
    for label, its in zip(moas.code.tolist(), batches):
        found[label].update(its)
    of_moa = [set().union(*(found[label] for label in np.flatnonzero(having))) for having in moas.members.T]
    return np.array([m for m, its in enumerate(of_moa) if len(its) == 1], np.int64)


def _called(moa: np.ndarray, called: np.ndarray, evaluated: np.ndarray, neighbours: Neighbours, num: int) -> np.ndarray:
    """float64 [num, num]: how often profiles of MoA i are expected to be called MoA j."""
    sure = evaluated.copy()
    sure[neighbours.ties.rows] = False
    counts = np.bincount(moa[sure] * num + called[sure], minlength=num**2).reshape(num, num).astype(np.float64)
    for i, row in enumerate(neighbours.ties.rows):
        if evaluated[row]:
            for label, share in vote_shares(moa, neighbours.ties, i, neighbours.index.shape[1]).items():
                counts[moa[row], label] += share
    return counts


def _ties(neighbours: Neighbours, correct: np.ndarray, evaluated: np.ndarray) -> tuple[dict[str, int], np.ndarray]:
    """What is reported of ties, and for each profile how many candidates are as near as its nearest."""
    ties = neighbours.ties
    as_near = (neighbours.index[:, 0] >= 0).astype(np.int64)
    concerned, most = 0, 1
    for i, row in enumerate(ties.rows):
        sizes = np.bincount(ties.of(i)[1])
        as_near[row] = sizes[0]
        if evaluated[row]:
            concerned, most = concerned + 1, max(most, int(sizes.max()))
    undecided = int((correct % 1 != 0).sum())
    return {"num_profiles": concerned, "num_undecided": undecided, "most_equally_near": most}, as_near


def _score(
    correct: np.ndarray, evaluated: np.ndarray, compound: np.ndarray, moas: MoaLabels, neighbours: Neighbours
) -> dict[str, Any]:
    moa, num = moas.code, len(moas.labels)
    counts = _called(moa, majority_vote(moa, neighbours.index), evaluated, neighbours, num)
    total = int(evaluated.sum())
    present = np.flatnonzero(counts.any(axis=0) | counts.any(axis=1))
    of_label = np.bincount(moa[evaluated], minlength=num)
    correct_of_label = np.bincount(moa, weights=correct, minlength=num).tolist()
    of_compound = np.bincount(compound[evaluated])
    right = np.bincount(compound[evaluated], weights=correct[evaluated], minlength=len(of_compound))
    by_compound = (right / np.maximum(of_compound, 1))[of_compound > 0]
    of_moa = moas.members.T.astype(np.int64) @ of_label
    most = np.flatnonzero(of_moa == of_moa.max())
    return {
        "accuracy": float(correct.sum()) / total if total else None,
        "num_correct": number(correct.sum()),
        "num_evaluated": total,
        "num_excluded": int((~evaluated).sum()),
        "compound_macro_accuracy": float(np.mean(by_compound)) if len(by_compound) else None,
        "majority_baseline": {"moa": _either([moas.moas[m] for m in most], 2), "accuracy": float(of_moa[most[0]] / total)}
        if total
        else None,
        "per_moa": {
            name: {"num_correct": number(right), "num_evaluated": evaluated}
            for name, right, evaluated in zip(moas.labels, correct_of_label, of_label.tolist())
        },
        "confusion": {
            "moas": [moas.labels[m] for m in present],
            "counts": [[number(c) for c in row] for row in counts[np.ix_(present, present)]],
        },
    }


def _labels(metadata: pd.DataFrame) -> list[str]:
    parts = [c for c in (names.COMPOUND, names.CONCENTRATION) if c in metadata]
    labels = _joined_values(metadata, parts)
    if len(set(labels)) < len(labels):
        labels = _joined_values(metadata, [*parts, *(c for c in (names.PLATE, names.WELL) if c in metadata)])
    return labels


def _joined_values(metadata: pd.DataFrame, parts: list[str]) -> list[str]:
    rows = zip(*[metadata[c].tolist() for c in parts])
    return [" ".join(("" if v != v else f"{v:g}") if isinstance(v, float) else str(v) for v in row).strip() for row in rows]


def _identity(metadata: pd.DataFrame) -> pd.DataFrame:
    keep = [c for c in names.CANONICAL if c in metadata and c != names.SITE]
    return metadata[keep].reset_index(drop=True).copy()


def _named(labels: list[str], mask: np.ndarray) -> list[str]:
    return [labels[i] for i in np.flatnonzero(mask)]
