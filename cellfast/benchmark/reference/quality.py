"""Equal quality: both sides train on the same cells for the same number of steps and for the same wall-clock time, and are scored alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from cellfast.benchmark.reference.cells import Cells
from cellfast.benchmark.reference.parts import Settings, label
from cellfast.benchmark.reference.sides import Side
from cellfast.errors import CellfastError


def measure_quality(
    sides: Sequence[Side],
    cells: Cells,
    settings: Settings,
    *,
    steps: int,
    seeds: Sequence[int] = (0,),
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train and score.

    The last side trains for ``steps`` minibatches and takes some time for it, loading included; the others train for as many steps, and
    then anew for as long. All features are scored by `score_features`.

    Returns:
        ``{"steps", "runs": [{"side", "limit", "seed", "steps", "seconds", "nsc", …}]}``
    """
    other = sides[-1]
    metadata = pd.read_csv(cells.metadata)
    runs: list[dict[str, Any]] = []

    def train(side: Side, seed: int, limits: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        found = _train(side, cells, settings, metadata, seed, limits)
        for run in found:
            say(_line(run))
        runs.extend(found)
        return found

    for seed in seeds:
        anew = {"random weights": {"steps": 0}, "same steps": {"steps": steps}}
        seconds = train(other, seed, anew)[-1]["seconds"]
        for side in sides[:-1]:
            train(side, seed, {**anew, "same time": {"wall_seconds": seconds}})
    return {"steps": steps, "batch_size": settings.batch_size, "size": settings.size, "encoder": settings.encoder,
            "cells": cells.num_cells, "origin": cells.origin, "seeds": list(seeds), "runs": runs}  # fmt: skip


def _train(
    side: Side, cells: Cells, settings: Settings, metadata: pd.DataFrame, seed: int, limits: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """One run for each limit, each from weights of its own."""
    files = [cells.folder / f"features-{os.getpid()}-{number}.npy" for number in range(len(limits))]
    jobs = [
        {"part": "train", **cells.job(), **settings.job(), "seed": seed, "features_file": str(file), **until}
        for file, until in zip(files, limits.values())
    ]
    results = [side.run_several([job], threads=settings.threads)[0] for job in jobs]
    runs = []
    for limit, file, result in zip(limits, files, results):
        if "seconds" not in result:
            raise CellfastError(f"{side.name}: training for the comparison of quality did not finish: {result}")
        values = np.load(file, allow_pickle=False)
        file.unlink()
        runs.append({
            "side": label(side), "limit": limit, "seed": seed, "steps": result["steps"], "seconds": result["seconds"][0],
            "loss": result["loss"] if result["steps"] else None, "peak_bytes": result["peak_bytes"],
            **score_features(values, metadata),
        })  # fmt: skip
    return runs


def score_features(features: np.ndarray, metadata: pd.DataFrame) -> dict[str, Any]:
    """NSC and NSCB with their 95 % intervals after cellfast's default normalisation, and same-treatment retrieval of single cells.

    Retrieval: the share of treated cells whose nearest neighbour (cosine) among the cells of other wells has their treatment, beside what
    a neighbour drawn at random would give.
    """
    from cellfast.metadata.batches import fill_batches
    from cellfast.metadata.canonical import canonical_metadata
    from cellfast.metadata.columns import find_columns
    from cellfast.profiles.build import ProfileTable, collapse
    from cellfast.profiles.evaluate import EvaluationOptions, evaluate_profiles
    from cellfast.profiles.normalize import normalize_profiles
    from cellfast.profiles.steps import RECIPES, parse_steps

    frame = metadata.drop(columns="Replicate")
    known, _ = fill_batches(canonical_metadata(frame, find_columns(list(frame.columns))))
    table = ProfileTable(known, np.ascontiguousarray(features), [f"h{i:03d}" for i in range(features.shape[1])])
    wells = collapse(table, ["Metadata_Plate", "Metadata_Well"], "mean")
    wells, _ = normalize_profiles(wells, parse_steps(RECIPES["default"]))
    result = evaluate_profiles(wells, EvaluationOptions(num_permutations=0, average_precision=False)).result
    scores = {
        key: {k: result[key][k] for k in ("accuracy", "num_correct", "num_evaluated", "interval_95")} for key in ("nsc", "nscb")
    }
    return {**scores, "normalize": list(RECIPES["default"]), **_retrieval(features, metadata)}


def _retrieval(features: np.ndarray, metadata: pd.DataFrame) -> dict[str, Any]:
    well = pd.factorize(metadata["Metadata_Plate"].astype(str) + "\0" + metadata["Metadata_Well"].astype(str))[0]
    treatment = pd.factorize(metadata["compound"].astype(str) + "\0" + metadata["concentration"].astype(str))[0]
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    other = well[:, None] != well[None, :]
    same = (treatment[:, None] == treatment[None, :]) & other
    query = (metadata["compound"] != "DMSO").to_numpy() & same.any(axis=1)
    if not query.any():
        return {"retrieval": None, "retrieval_chance": None, "retrieval_queries": 0}
    similarity = np.where(other, unit @ unit.T, -np.inf)
    nearest = similarity >= similarity.max(axis=1, keepdims=True) - 1e-6  # several where float32 cannot tell them apart
    rows = np.flatnonzero(query)
    return {
        "retrieval": float(((same & nearest)[rows].sum(axis=1) / nearest[rows].sum(axis=1)).mean()),
        "retrieval_chance": float((same[rows].sum(axis=1) / other[rows].sum(axis=1)).mean()),
        "retrieval_queries": int(query.sum()),
    }


def _line(run: dict[str, Any]) -> str:
    retrieval = (
        ""
        if run["retrieval"] is None
        else f"  retrieval {100 * run['retrieval']:.1f} % (chance {100 * run['retrieval_chance']:.1f} %)"
    )
    scores = "  ".join(f"{k.upper()} {run[k]['num_correct']:.6g}/{run[k]['num_evaluated']}" for k in ("nsc", "nscb"))
    return f"{run['limit']:<14} {run['side']:<26} {run['steps']:>4} steps {run['seconds']:6.0f} s  {scores}{retrieval}"
