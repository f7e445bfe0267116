"""Do replicate wells of a treatment resemble each other more than wells of different treatments do?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from cellfast.metadata import columns as names
from cellfast.profiles.neighbours import prepare
from cellfast.profiles.table import ProfileTable


def replicate_reproducibility(
    wells: ProfileTable, metric: str = "cosine", seed: int = 0, num_null: int = 1000
) -> dict[str, Any] | None:
    """Share of treatments whose replicates' median pairwise similarity exceeds the 95th percentile of a null of equally many
    unrelated wells.

    The null draws, for each replicate count, ``num_null`` sets of wells of distinct treatments. Treatments with one well are
    left out and counted. None where no treatment has two wells. Source: the percent replicating score of Way et al. 2022.

    Args:
        wells: treated wells; metric: cosine, correlation, or euclidean (similarity is then −distance).
    """
    key = [c for c in (names.COMPOUND, names.CONCENTRATION) if c in wells.metadata]
    codes = wells.metadata.groupby(key, dropna=False, sort=False).ngroup().to_numpy()
    sizes = np.bincount(codes)
    tested = np.flatnonzero(sizes >= 2)
    if len(tested) == 0:
        return None
    x, _ = prepare(wells.features, metric)
    rng = np.random.default_rng(seed)
    by_treatment = [np.flatnonzero(codes == t) for t in range(len(sizes))]
    thresholds: dict[int, float] = {}
    for size in sorted({int(min(sizes[t], len(sizes))) for t in tested}):
        draws = []
        for _ in range(num_null):
            chosen = rng.choice(len(sizes), size, replace=False)
            draws.append(_median_similarity(x[[rng.choice(by_treatment[t]) for t in chosen]], metric))
        thresholds[size] = float(np.percentile(draws, 95))
    similarity = {int(t): _median_similarity(x[by_treatment[t]], metric) for t in tested}
    passed = {}
    for t, s in similarity.items():
        # Equal similarities differ by rounding; a treatment passes only where its own is truly higher.
        threshold = thresholds[int(min(sizes[t], len(sizes)))]
        passed[t] = s > threshold + 1e-12 * max(1.0, abs(threshold))
    first = pd.Series(np.arange(len(codes))).groupby(codes).first().to_numpy()
    labels = [
        " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in row)
        for row in wells.metadata[key].iloc[first].itertuples(index=False)
    ]
    return {
        "percent_replicating": 100.0 * float(np.mean(list(passed.values()))),
        "num_reproducible": int(sum(passed.values())),
        "num_treatments": len(tested),
        "num_single_well_treatments": int((sizes == 1).sum()),
        "median_replicate_similarity": float(np.median(list(similarity.values()))),
        "per_treatment": {
            labels[t]: {"num_wells": int(sizes[t]), "similarity": s, "reproducible": bool(passed[t])}
            for t, s in similarity.items()
        },
    }


def _median_similarity(x: np.ndarray, metric: str) -> float:
    # A treatment on every plate has hundreds of wells: the pairs of the first 500 are enough, and bounded.
    x = x[:500]
    rows, cols = np.triu_indices(len(x), 1)
    if metric == "euclidean":
        return float(np.median([-np.linalg.norm(x[r] - x[c]) for r, c in zip(rows, cols)]))
    return float(np.median((x @ x.T)[rows, cols]))
