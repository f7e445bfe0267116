"""Equal quality: all sides train for the same steps on as many images from the same seeds, are scored alike, and are compared seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from cellfast.benchmark.reference.cells import Cells
from cellfast.benchmark.reference.sides import Side
from cellfast.benchmark.reference.table import LEAST_SEEDS, Settings
from cellfast.errors import CellfastError

# Fixed, whatever the default of `cellfast profile` is: figures of different versions can be compared, no plate needs a control, and
# with the reference's regularisation two control wells are enough, as `drawn_cells` promises.
STEPS = ("standardize:by=all,controls=all", "tvn:lambda=1")
TRAINED, UNTRAINED = "same steps", "random weights"
MEASURES = ("nsc", "nscb", "retrieval")


def measure_quality(
    sides: Sequence[Side],
    cells: Cells,
    settings: Settings,
    *,
    steps: int,
    seeds: Sequence[int],
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train every side for ``steps`` minibatches from each seed, and score its features and those of its untrained weights.

    Returns:
        ``{"steps", "images", "seeds", "runs": [{"side", "limit", "seed", "steps", "seconds", "nsc", …}]}``; ``limit`` is ``random
        weights`` or ``same steps``, ``images`` the cells seen in a training, each in two views.
    """
    metadata, runs = pd.read_csv(cells.metadata), []
    file = cells.folder / "trained.npy"
    for seed in seeds:
        for side in sides:
            for limit, count in ((UNTRAINED, 0), (TRAINED, steps)):
                job = {**cells.job(), **settings.job(), "seed": seed, "features_file": str(file), "steps": count}
                result = side.run("train", **job)
                if "seconds" not in result:
                    raise CellfastError(f"{side.name}: training for the comparison of quality did not finish: {result}")
                runs.append({
                    "side": side.label, "limit": limit, "seed": seed, "steps": result["steps"], "seconds": result["seconds"][0],
                    "loss": result["loss"], "peak_bytes": result["peak_bytes"],
                    **score_features(np.load(file, allow_pickle=False), metadata),
                })  # fmt: skip
                say(_line(runs[-1]))
    return {"steps": steps, "batch_size": settings.batch_size, "images": steps * settings.batch_size, "size": settings.size,
            "encoder": settings.encoder, "cells": cells.num_cells, "origin": cells.origin, "seeds": list(seeds), "runs": runs}  # fmt: skip


def score_features(features: np.ndarray, metadata: pd.DataFrame) -> dict[str, Any]:
    """NSC and NSCB after `STEPS`, and same-treatment retrieval of single cells as training's validation measures it, without controls."""
    import torch

    from cellfast.benchmark.reference.ours import evaluated_wells
    from cellfast.training.validation import retrieval

    result = evaluated_wells(features, metadata, list(STEPS)).result
    scores = {key: {k: result[key][k] for k in ("accuracy", "num_correct", "num_evaluated")} for key in ("nsc", "nscb")}
    well = metadata.groupby(["Metadata_Plate", "Metadata_Well"]).ngroup().to_numpy()
    treatment = metadata.groupby(["compound", "concentration"], dropna=False).ngroup().to_numpy()
    treatment = np.where(metadata["compound"] == "DMSO", -1, treatment)
    share, chance, queries = retrieval(torch.from_numpy(features), treatment, well)
    return {**scores, "normalize": list(STEPS), "retrieval": share, "retrieval_chance": chance, "retrieval_queries": queries}


def value_of(run: dict[str, Any], measure: str) -> float | None:
    """A run's NSC or NSCB accuracy, or its retrieval, as a share."""
    return run[measure] if measure == "retrieval" else run[measure]["accuracy"]


def paired_differences(quality: dict[str, Any], other: str) -> list[dict[str, Any]]:
    """cellfast's sides minus ``other``, trained from the same seeds for the same steps.

    Per side and measure the mean of the seeds' differences and its 95 % interval: mean ± t(0.975, n − 1) · s / √n over n seeds. It tells
    how much seeds vary; cells and treatments are the same in all. Nothing is returned for fewer than `LEAST_SEEDS` seeds.
    """
    from scipy.stats import t

    trained = {(run["side"], run["seed"]): run for run in quality["runs"] if run["limit"] == TRAINED}
    rows = []
    for side in dict.fromkeys(side for side, _ in trained if side != other):
        for measure in MEASURES:
            pairs = [
                (run, trained[other, seed]) for (name, seed), run in trained.items() if name == side and (other, seed) in trained
            ]
            values = [(value_of(here, measure), value_of(there, measure)) for here, there in pairs]
            differences = [here - there for here, there in values if here is not None and there is not None]
            n = len(differences)
            if n < LEAST_SEEDS:
                continue
            mean, half = statistics.fmean(differences), float(t.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
            rows.append({"side": side, "measure": measure, "seeds": n, "mean": mean, "interval_95": [mean - half, mean + half]})
    return rows


def _line(run: dict[str, Any]) -> str:
    scores = "  ".join(f"{k.upper()} {run[k]['num_correct']:.6g}/{run[k]['num_evaluated']}" for k in ("nsc", "nscb"))
    if run["retrieval"] is not None:
        scores += f"  retrieval {100 * run['retrieval']:.1f} % (chance {100 * run['retrieval_chance']:.1f} %)"
    return f"seed {run['seed']}  {run['limit']:<14} {run['side']:<26} {run['steps']:>4} steps {run['seconds']:6.0f} s  {scores}"
