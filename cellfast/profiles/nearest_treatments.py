"""What a treatment resembles: its nearest treatments of other compounds, and by how much its nearest MoA leads."""

from __future__ import annotations

import numpy as np
import pandas as pd

from cellfast.metadata import columns as names
from cellfast.profiles.aggregate import group_means
from cellfast.profiles.moas import moa_labels, moa_parts
from cellfast.profiles.neighbours import prepare
from cellfast.profiles.table import ProfileTable

_ENTRIES = 1 << 23


def nearest_treatments(wells: ProfileTable, codes: np.ndarray, treatments: pd.DataFrame, metric: str, num: int) -> pd.DataFrame:
    """Add ``nearest_1`` … and ``nearest_1_similarity`` …, ``nearest_moa`` and ``moa_margin`` to the treatments.

    The profile of a treatment is the mean of its wells. ``moa_margin`` is the similarity of the nearest treatment with a MoA less that
    of the nearest one that shares no MoA with it: large where the MoA is clear, near 0 where another is as near.

    Args:
        wells: [n]; codes: int64 [n], the rows of ``treatments``, −1 for controls; metric: similarities are its (of euclidean −distance² / 2
            up to a term that all share).
    """
    if len(treatments) < 2:
        return treatments
    x, offset = prepare(_means(wells.features, codes, len(treatments)), metric)
    x, offset = x.astype(np.float32), offset.astype(np.float32)
    compound = pd.factorize(treatments[names.COMPOUND])[0]
    labels = treatments[names.COMPOUND].tolist()
    if names.CONCENTRATION in treatments:
        labels = [c if d != d else f"{c} {d:g}" for c, d in zip(labels, treatments[names.CONCENTRATION].tolist())]
    known = (
        np.array([bool(moa_parts(str(v))) for v in treatments[names.MOA]]) if names.MOA in treatments else np.zeros(len(x), bool)
    )
    moas = moa_labels(treatments[names.MOA].where(known, "?")) if known.any() else None
    num = min(num, len(x) - 1)
    near = np.full((len(x), num), -1)
    similar = np.full((len(x), num), np.nan)
    nearest_moa, margin = [""] * len(x), np.full(len(x), np.nan)
    step = max(1, _ENTRIES // len(x))
    for start in range(0, len(x), step):
        rows = np.arange(start, min(len(x), start + step))
        similarity = x[rows] @ x.T - offset
        similarity[compound[rows][:, None] == compound[None, :]] = -np.inf
        for i, row in enumerate(rows):
            order = np.argpartition(-similarity[i], num - 1)[:num]
            order = order[np.argsort(-similarity[i, order], kind="stable")]
            order = order[np.isfinite(similarity[i, order])]
            near[row, : len(order)], similar[row, : len(order)] = order, similarity[i, order]
            if moas is not None:
                of_known = np.where(known, similarity[i], -np.inf)
                best = int(of_known.argmax())
                if np.isfinite(of_known[best]):
                    nearest_moa[row] = moas.labels[moas.code[best]]
                    other = of_known[~moas.match[moas.code[best]][moas.code]].max(initial=-np.inf)
                    margin[row] = of_known[best] - other if np.isfinite(other) else np.nan
    columns: dict[str, object] = {}
    for k in range(num):
        columns[f"nearest_{k + 1}"] = [labels[j] if j >= 0 else "" for j in near[:, k].tolist()]
        columns[f"nearest_{k + 1}_similarity"] = similar[:, k]
    if moas is not None:
        columns |= {"nearest_moa": nearest_moa, "moa_margin": margin}
    return treatments.assign(**columns)


def _means(features: np.ndarray, codes: np.ndarray, num: int) -> np.ndarray:
    chosen = codes >= 0
    return group_means(features[chosen], codes[chosen].astype(np.int32), num).values
