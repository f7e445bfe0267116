"""What the number of cells alone gets: a profile of one feature, scored as the others are."""

from __future__ import annotations

from typing import Any

import numpy as np

from cellfast.metadata.counts import CELL_COUNT
from cellfast.profiles.build import NUM_WELLS
from cellfast.profiles.mean_average_precision import moa_precision
from cellfast.profiles.moas import MoaLabels
from cellfast.profiles.neighbours import AllowedPairs, nearest_neighbours
from cellfast.profiles.table import ProfileTable
from cellfast.profiles.votes import correct_shares

#: Beyond this every profile has others of equal count, and all would be compared with all in float64.
MOST_PROFILES = 5_000


def count_baseline(
    profiles: ProfileTable, pairs: AllowedPairs, moas: MoaLabels, evaluated: list[np.ndarray]
) -> dict[str, Any] | None:
    """NSC, NSCB and mAP per MoA of the log cell count (per well) as the only feature, on the same queries and candidates.

    None without counts, or for more than ``MOST_PROFILES`` profiles. Source: a baseline for every benchmark of profiles (Nat. Commun.
    2026, s41467-026-68725-5).

    Args:
        evaluated: bool [n] under NSC and under NSCB.
    """
    metadata = profiles.metadata
    if CELL_COUNT not in metadata or len(profiles) > MOST_PROFILES:
        return None
    counts = metadata[CELL_COUNT].to_numpy(np.float64)
    if not np.isfinite(counts).all():
        return None
    wells = metadata[NUM_WELLS].to_numpy(np.float64) if NUM_WELLS in metadata else 1.0
    alone = profiles.with_features(np.log1p(counts / wells)[:, None], ["log_cell_count"])
    result: dict[str, Any] = {}
    members = None if moas.single else moas.members
    for rule, found, which in zip(("nsc", "nscb"), nearest_neighbours(alone.features, pairs, "euclidean"), evaluated):
        right = correct_shares(moas.code, found.index, found.ties, members)
        result[rule] = float(right[which].mean()) if which.any() else None
    precision = moa_precision(alone, "euclidean")
    return {**result, "mean_average_precision": precision and precision["mean"]}
