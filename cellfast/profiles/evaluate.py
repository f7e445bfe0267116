"""NSC and NSCB: is the nearest profile of another compound (and another batch) one of the same mechanism of action?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from cellfast.errors import CellfastError
from cellfast.metadata import columns as names
from cellfast.metadata.batches import SEPARATOR, fill_batches
from cellfast.metadata.counts import CELL_COUNT
from cellfast.metadata.treatments import find_controls, treatment_key
from cellfast.profiles.build import CONTROL, treatments
from cellfast.profiles.identical import refuse_identical
from cellfast.profiles.intervals import (
    bootstrap_accuracies,
    bootstrap_weights,
    percentile_interval,
    permutation_p_value,
)
from cellfast.profiles.mean_average_precision import moa_precision, replicate_precision
from cellfast.profiles.neighbours import BATCH_RULES, METRICS, AllowedPairs, Neighbours, batch_codes, nearest_neighbours
from cellfast.profiles.replicates import replicate_reproducibility
from cellfast.profiles.table import ProfileTable
from cellfast.profiles.votes import correct_shares, majority_vote, number, vote_shares

UNKNOWN_BATCH = "(unknown)"

ONE_BATCH_RULES = ("exclude", "queries", "keep")


@dataclass
class EvaluationOptions:
    """What ``cellfast evaluate`` can be told; the defaults are its defaults.

    Attributes:
        level: ``treatment`` (several rows of one treatment are made one by ``aggregate``) or ``well`` (rows as they are).
        aggregate: mean or median.
        metric: cosine, correlation or euclidean.
        k: neighbours that vote.
        batch_rule: ``joined``, ``overlap`` or ``plates`` (``neighbours.batch_codes``).
        batch_regex: regular expression that takes the batch from the plate name.
        group_by: columns that tell treatments apart beside compound and concentration; empty: as the profiles were made.
        pool: columns of biology whose different values are taken as one treatment; empty: as the profiles were made.
        one_batch_moas: MoAs that occur in one batch only under NSCB: ``exclude`` as queries and candidates, as ``queries``
        only, or ``keep``.
        controls: query for the rows left out as controls.
        num_resamples: bootstrap resamples.
        num_permutations: random assignments of MoAs.
        average_precision: compute mean average precision.
        seed: of the bootstrap and the permutations.
    """

    level: str = "treatment"
    aggregate: str = "median"
    metric: str = "cosine"
    k: int = 1
    batch_rule: str = "joined"
    batch_regex: str | None = None
    group_by: Sequence[str] = ()
    pool: Sequence[str] = ()
    one_batch_moas: str = "exclude"
    controls: str | None = None
    num_resamples: int = 10_000
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
    without candidates is not evaluated under that rule, and counted. Where several neighbours are equally near, the score counts
    the expectation over a random choice among them, and says for how many profiles.

    Args:
        profiles: treatments or wells with compound and MoA.
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
    profiles, counts = _choose_rows(profiles, options)
    if options.level == "treatment":
        # Profiles know by what their treatments were told apart when they were made.
        group_by = options.group_by or profiles.provenance.get("group_by", ())
        pool = options.pool or profiles.provenance.get("pool", ())
        codes = profiles.metadata[treatment_key(profiles.metadata, group_by, pool)]
        counts["rows_per_treatment_aggregated"] = bool(codes.duplicated().any())
        if counts["rows_per_treatment_aggregated"]:
            wells = profiles if wells is None else wells
            profiles = treatments(profiles, options.aggregate, None, group_by, pool)
    elif wells is None:
        wells = profiles
    metadata = profiles.metadata
    compound, compounds = pd.factorize(metadata[names.COMPOUND], sort=True)
    moa, moas = pd.factorize(metadata[names.MOA], sort=True)
    moa_names = [str(name) for name in moas]
    if len(compounds) < 2:
        raise CellfastError(
            f"NSC needs profiles of at least two compounds with a MoA; found {len(compounds)} ({', '.join(compounds)})."
        )
    refuse_identical(profiles)
    batches = batch_sets(metadata, options.batch_rule)
    words, overlap = batch_codes(batches, options.batch_rule)
    one_batch = [] if batches[0] == (UNKNOWN_BATCH,) else _one_batch_moas(moa, len(moas), batches)
    excluded = np.isin(moa, one_batch) if options.one_batch_moas != "keep" else np.zeros(len(moa), bool)
    candidate_b = ~excluded if options.one_batch_moas == "exclude" else np.ones(len(moa), bool)
    pairs = AllowedPairs(compound.astype(np.int64), words, overlap, np.ones(len(moa), bool), candidate_b)
    found = nearest_neighbours(profiles.features, pairs, options.metric, options.k)
    weights = bootstrap_weights(compound, options.num_resamples, options.seed)
    result: dict[str, Any] = {"nsc": {}, "nscb": {}, "drop": None}
    labels = _labels(metadata)
    columns: dict[str, Any] = {}
    resampled = []
    for rule, neighbours in zip(("nsc", "nscb"), found):
        evaluated = neighbours.index[:, 0] >= 0
        if rule == "nscb":
            evaluated &= ~excluded
        called = majority_vote(moa, neighbours.index)
        correct = evaluated * correct_shares(moa, neighbours.index, neighbours.ties)
        score = _score(correct, evaluated, compound, moa, moa_names, _called(moa, called, evaluated, neighbours, len(moas)))
        score["ties"], num_tied = _ties(neighbours, correct, evaluated)
        resampled.append(bootstrap_accuracies(correct, evaluated, compound, weights))
        score["interval_95"] = percentile_interval(resampled[-1])
        score["p_value"] = permutation_p_value(
            moa, compound, neighbours.index, evaluated, float(correct.sum()), options.num_permutations, options.seed,
            neighbours.ties,
        )  # fmt: skip
        no_candidates = neighbours.index[:, 0] < 0
        score["excluded"] = {
            "no_candidates": _named(labels, no_candidates & ~(excluded if rule == "nscb" else False)),
            "one_batch_moa": _named(labels, excluded if rule == "nscb" else np.zeros(len(moa), bool)),
        }
        pool = neighbours.pool_size
        score["candidate_pool_size"] = {"min": int(pool.min()), "median": float(np.median(pool)), "max": int(pool.max())}
        result[rule] = score
        nearest = neighbours.index[:, 0].tolist()
        columns |= {
            f"{rule}_evaluated": evaluated,
            f"{rule}_correct": correct if (correct % 1).any() else correct.astype(bool),
            f"{rule}_called_moa": [moa_names[c] if e else "" for c, e in zip(called.tolist(), evaluated.tolist())],
            f"{rule}_neighbour": [labels[i] if i >= 0 else "" for i in nearest],
            f"{rule}_neighbour_moa": [moa_names[moa[i]] if i >= 0 else "" for i in nearest],
            f"{rule}_distance": neighbours.distance[:, 0],
            f"{rule}_pool_size": pool,
            f"{rule}_equally_near": num_tied,
        }
    table = pd.concat([_identity(metadata), pd.DataFrame(columns)], axis=1)
    if result["nsc"]["accuracy"] is not None and result["nscb"]["accuracy"] is not None:
        result["drop"] = result["nsc"]["accuracy"] - result["nscb"]["accuracy"]
    result["drop_interval_95"] = percentile_interval(resampled[0] - resampled[1])
    per_moa = [np.unique(compound[moa == m]).size for m in range(len(moas))]
    result["one_batch_moas"] = [moa_names[m] for m in one_batch]
    result["one_compound_moas"] = [moa_names[m] for m in range(len(moas)) if per_moa[m] == 1]
    result["counts"] = {**counts, "profiles": len(profiles), "compounds": len(compounds), "moas": len(moas),
                        "batches": len({b for s in batches for b in s}), "features": len(profiles.feature_names),
                        "cells": int(metadata[CELL_COUNT].sum()) if CELL_COUNT in metadata else None}  # fmt: skip
    result["replicate_reproducibility"] = None
    result["mean_average_precision"] = None
    if options.average_precision:
        result["mean_average_precision"] = {"moa": moa_precision(profiles, options.metric)}
    if wells is not None and options.average_precision:
        chosen, _ = _choose_rows(wells, options)
        refuse_identical(chosen)
        result["replicate_reproducibility"] = replicate_reproducibility(chosen, options.metric, options.seed)
        result["mean_average_precision"]["treatment"] = replicate_precision(chosen, options.metric)
    result["batch_metrics"] = profiles.provenance.get("batch_metrics")
    result["options"] = {k: v for k, v in vars(options).items()}
    return Evaluation(result, profiles, table)


def _check_options(options: EvaluationOptions) -> None:
    for name, value, allowed in (
        ("--level", options.level, ("treatment", "well")),
        ("--aggregate", options.aggregate, ("mean", "median")),
        ("--metric", options.metric, METRICS),
        ("--batch-rule", options.batch_rule, BATCH_RULES),
        ("--one-batch-moas", options.one_batch_moas, ONE_BATCH_RULES),
    ):
        if value not in allowed:
            raise CellfastError(f"{name} must be one of {', '.join(allowed)}; got '{value}'.")


def _choose_rows(table: ProfileTable, options: EvaluationOptions) -> tuple[ProfileTable, dict[str, Any]]:
    """Leave out controls, rows without a compound and rows without a MoA; counts of each."""
    metadata = table.metadata
    for column, how in (
        (names.COMPOUND, "--column compound=COLUMN, or --metadata CSV"),
        (names.MOA, "--column moa=COLUMN, or --moa CSV"),
    ):
        if column not in metadata or not (metadata[column] != "").any():
            raise CellfastError(f"The profiles have no {column}; their metadata: {', '.join(metadata.columns)}. Give {how}.")
    metadata, source = fill_batches(metadata, options.batch_regex)
    table = ProfileTable(metadata, table.features, table.feature_names, table.provenance)
    if options.controls is not None:
        controls, rule = find_controls(metadata, options.controls)
    elif CONTROL in metadata:
        controls, rule = metadata[CONTROL].to_numpy(dtype=bool), CONTROL
    else:
        try:
            controls, rule = find_controls(metadata)
        except CellfastError:
            # Treated profiles alone are a complete input here.
            controls, rule = np.zeros(len(metadata), bool), "none found"
    no_compound = ~controls & (metadata[names.COMPOUND] == "").to_numpy()
    no_moa = ~controls & ~no_compound & (metadata[names.MOA] == "").to_numpy()
    keep = ~(controls | no_compound | no_moa)
    if not keep.any():
        raise CellfastError(
            f"No profile is left to evaluate: {len(metadata)} rows, {int(controls.sum())} controls ({rule}), "
            f"{int(no_compound.sum())} without a compound, "
            f"{int(no_moa.sum())} without a MoA."
        )
    counts = {
        "rows": len(metadata),
        "controls": int(controls.sum()),
        "controls_rule": rule,
        "without_compound": int(no_compound.sum()),
        "without_moa": int(no_moa.sum()),
        "without_moa_compounds": sorted(set(metadata[names.COMPOUND][no_moa])),
        "batch_source": source,
    }
    return (table if keep.all() else table.rows(keep)), counts


def batch_sets(metadata: pd.DataFrame, rule: str) -> list[tuple[str, ...]]:
    """The batches (for the rule ``plates`` the plates) each profile is in, from the ``;``-joined metadata column; one unknown batch
    where there is no batch column.

    Raises:
        CellfastError: the rule is ``plates`` and there is no plate column.
    """
    column = names.PLATE if rule == "plates" else names.BATCH
    if column not in metadata:
        if rule == "plates":
            raise CellfastError(f"--batch-rule plates needs {names.PLATE}; the profiles have {', '.join(metadata.columns)}.")
        # One batch that nobody knows: nothing is in another, and NSCB is not defined; NSC is.
        return [(UNKNOWN_BATCH,)] * len(metadata)
    # A comma joins batches in tables of other tools; none of ours has one in a batch name.
    return [tuple(p.strip() for p in str(v).replace(",", SEPARATOR).split(SEPARATOR) if p.strip()) for v in metadata[column]]


def _one_batch_moas(moa: np.ndarray, num: int, batches: list[tuple[str, ...]]) -> list[int]:
    found: list[set[str]] = [set() for _ in range(num)]
    for m, names_ in zip(moa, batches):
        found[m].update(names_)
    return [m for m in range(num) if len(found[m]) == 1]


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
    correct: np.ndarray, evaluated: np.ndarray, compound: np.ndarray, moa: np.ndarray, moas: list[str], counts: np.ndarray
) -> dict[str, Any]:
    total = int(evaluated.sum())
    present = np.flatnonzero(counts.any(axis=0) | counts.any(axis=1))
    of_moa = np.bincount(moa[evaluated], minlength=len(moas))
    correct_of_moa = np.bincount(moa, weights=correct, minlength=len(moas)).tolist()
    of_compound = np.bincount(compound[evaluated])
    right = np.bincount(compound[evaluated], weights=correct[evaluated], minlength=len(of_compound))
    by_compound = (right / np.maximum(of_compound, 1))[of_compound > 0]
    most = int(of_moa.argmax())
    return {
        "accuracy": float(correct.sum()) / total if total else None,
        "num_correct": number(correct.sum()),
        "num_evaluated": total,
        "num_excluded": int((~evaluated).sum()),
        "compound_macro_accuracy": float(np.mean(by_compound)) if len(by_compound) else None,
        "majority_baseline": {"moa": moas[most], "accuracy": float(of_moa[most] / total)} if total else None,
        "per_moa": {
            name: {"num_correct": number(right), "num_evaluated": evaluated}
            for name, right, evaluated in zip(moas, correct_of_moa, of_moa.tolist())
        },
        "confusion": {
            "moas": [moas[m] for m in present],
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
