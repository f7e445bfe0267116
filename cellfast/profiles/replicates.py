"""Do replicate wells of a treatment resemble each other more than wells of different treatments on the same plates do?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from cellfast.metadata import columns as names
from cellfast.profiles.intervals import ratio_interval
from cellfast.profiles.moas import moa_labels
from cellfast.profiles.neighbours import prepare
from cellfast.profiles.table import ProfileTable

SCOPES = ("all", "across_plates", "across_batches")

MOST_WELLS = 32  # of one treatment; a treatment on every plate has hundreds

_DRAWS = 200_000  # over all layouts


def replicate_reproducibility(
    wells: ProfileTable, metric: str = "cosine", seed: int = 0, num_null: int = 1000
) -> dict[str, Any] | None:
    """Share of treatments whose wells' median pairwise similarity exceeds the 95th percentile of unrelated wells on the same plates.

    For each layout (how many wells on which plates) the null draws ``num_null`` sets of wells of distinct treatments with that very
    layout, so that effects of plates and batches are in it: without an effect of the treatments 5 % pass. The share is given for all
    pairs, and apart for pairs of different plates and of different batches. Treatments with one well, and those on whose
    plates there are too few others, are left out and counted. None where no treatment has two wells.

    Source: the percent replicating score of Way et al. 2022; the matched null is cellfast's.

    Args:
        wells: treated wells; metric: cosine, correlation, or euclidean (similarity is then −distance).
    """
    metadata = wells.metadata
    key = [c for c in (names.COMPOUND, names.CONCENTRATION) if c in metadata]
    codes = metadata.groupby(key, dropna=False, sort=False).ngroup().to_numpy()
    sizes = np.bincount(codes)
    if sizes.max(initial=0) < 2:
        return None
    x, _ = prepare(wells.features, metric)
    rng = np.random.default_rng(seed)
    batch = pd.factorize(metadata[names.BATCH])[0] if names.BATCH in metadata else np.zeros(len(codes), np.int64)
    plate = pd.factorize(metadata[names.PLATE])[0] if names.PLATE in metadata else batch
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(sizes) + 1))
    layouts: dict[tuple[int, ...], list[int]] = {}
    rows_of: dict[int, np.ndarray] = {}
    for treatment in np.flatnonzero(sizes >= 2):
        rows = order[bounds[treatment] : bounds[treatment + 1]]
        if len(rows) > MOST_WELLS:
            rows = rng.choice(rows, MOST_WELLS, replace=False)
        rows_of[int(treatment)] = rows = rows[np.argsort(plate[rows], kind="stable")]
        layouts.setdefault(tuple(plate[rows].tolist()), []).append(int(treatment))
    by_plate = [np.flatnonzero(plate == p) for p in range(int(plate.max()) + 1)]
    draws = int(np.clip(_DRAWS // len(layouts), 100, num_null))
    passed: dict[str, dict[int, bool]] = {scope: {} for scope in SCOPES}
    similarity: dict[str, dict[int, float]] = {scope: {} for scope in SCOPES}
    untested = 0
    for layout, members in layouts.items():
        null = _draw(layout, by_plate, codes, draws, rng)
        if null is None:
            untested += len(members)
            continue
        pairs = np.array(np.triu_indices(len(layout), 1))
        plates, first = np.array(layout), rows_of[members[0]]
        apart = plates[pairs[0]] != plates[pairs[1]]
        other_batch = batch[first][pairs[0]] != batch[first][pairs[1]]
        at = np.stack([rows_of[treatment] for treatment in members])
        # A plate is of one batch, so the layout says which pairs are of different batches.
        for scope, chosen in zip(SCOPES, (np.ones(len(apart), bool), apart, other_batch)):
            if chosen.any():
                threshold = float(np.percentile(_medians(x, null, pairs[:, chosen], metric), 95))
                for treatment, value in zip(members, _medians(x, at, pairs[:, chosen], metric).tolist()):
                    similarity[scope][treatment] = value
                    # Equal similarities differ by rounding; a treatment passes only where its own is truly higher.
                    passed[scope][treatment] = value > threshold + 1e-12 * max(1.0, abs(threshold))
    cluster = moa_labels(metadata[names.MOA]).clusters() if names.MOA in metadata else pd.factorize(metadata[names.COMPOUND])[0]
    first = order[bounds[:-1]]
    labels = [
        " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in row)
        for row in metadata[key].iloc[first].itertuples(index=False, name=None)
    ]
    # Treatments of one layout share plates, and with these how easily wells resemble each other.
    layout_of = np.full(len(sizes), -1)
    for number, members in enumerate(layouts.values()):
        layout_of[members] = number
    scores = {scope: _share(passed[scope], similarity[scope], cluster[first], layout_of) for scope in SCOPES}
    return {
        **(scores["all"] or {"percent_replicating": None, "num_reproducible": 0, "num_treatments": 0}),
        "across_plates": scores["across_plates"],
        "across_batches": scores["across_batches"],
        "num_single_well_treatments": int((sizes == 1).sum()),
        "num_without_null": untested,
        "num_layouts": len(layouts),
        "per_treatment": {
            labels[t]: {"num_wells": int(sizes[t]), "similarity": s, "reproducible": bool(passed["all"][t])}
            for t, s in similarity["all"].items()
        },
    }


def _share(
    passed: dict[int, bool], similarity: dict[int, float], cluster: np.ndarray, layout: np.ndarray
) -> dict[str, Any] | None:
    if not passed:
        return None
    right = np.array(list(passed.values()), np.float64)
    tested = list(passed)
    interval = ratio_interval(right, np.ones(len(right)), cluster[tested], also=layout[tested])
    return {
        "percent_replicating": 100.0 * float(right.mean()),
        "interval_95": [100.0 * v for v in interval],
        "num_reproducible": int(right.sum()),
        "num_treatments": len(right),
        "median_replicate_similarity": float(np.median(list(similarity.values()))),
    }


def _draw(
    layout: tuple[int, ...], by_plate: list[np.ndarray], codes: np.ndarray, num: int, rng: np.random.Generator
) -> np.ndarray | None:
    """Wells of distinct treatments in the layout, int64 [draws, len(layout)]; None where the plates hold too few treatments."""
    drawn = np.stack([rng.choice(by_plate[plate], num) for plate in layout], axis=1)
    for _ in range(100):
        treatments = np.sort(codes[drawn], axis=1)
        again = np.flatnonzero((treatments[:, 1:] == treatments[:, :-1]).any(axis=1))
        if len(again) == 0:
            return drawn
        # Only a well whose treatment stands before it is drawn again, or a layout of many wells would hardly ever be met.
        for row in again:
            seen: set[int] = set()
            for place, plate in enumerate(layout):
                if int(codes[drawn[row, place]]) in seen:
                    drawn[row, place] = rng.choice(by_plate[plate])
                seen.add(int(codes[drawn[row, place]]))
    keep = np.ones(num, bool)
    keep[again] = False
    return drawn[keep] if keep.sum() >= num // 2 else None


def _medians(x: np.ndarray, wells: np.ndarray, pairs: np.ndarray, metric: str) -> np.ndarray:
    """Median similarity over the pairs of each row of wells [n, wells], float64 [n]."""
    result = np.empty(len(wells))
    step = max(1, (1 << 22) // (wells.shape[1] * x.shape[1]))
    for start in range(0, len(wells), step):
        part = x[wells[start : start + step]]
        products = part @ part.transpose(0, 2, 1)
        values = products[:, pairs[0], pairs[1]]
        if metric == "euclidean":
            square = np.einsum("nwd,nwd->nw", part, part)
            values = -np.sqrt(np.maximum(square[:, pairs[0]] + square[:, pairs[1]] - 2 * values, 0.0))
        result[start : start + step] = np.median(values, axis=1)
    return result
