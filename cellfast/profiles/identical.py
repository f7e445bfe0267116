"""Identical profiles: no two treatments look exactly alike, so one is listed twice, or no feature is left that tells them apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cellfast.errors import CellfastError
from cellfast.metadata import columns as names
from cellfast.profiles.table import ProfileTable


def identical_groups(features: np.ndarray) -> list[np.ndarray]:
    """Row numbers of the rows that are equal in every feature, a list for each such value; rows with NaN equal none."""
    groups: dict[bytes, list[int]] = {}
    for i in np.flatnonzero(np.isfinite(features).all(axis=1)):
        # −0 is 0.
        groups.setdefault((features[i] + 0.0).tobytes(), []).append(int(i))
    return [np.array(rows) for rows in groups.values() if len(rows) > 1]


def refuse_identical(profiles: ProfileTable, group_by: Sequence[str] = ()) -> None:
    """Check that profiles of different treatments differ; those of one treatment (a well read twice) may be equal.

    Treatments are told apart by compound, concentration and the columns of ``group_by``.

    Raises:
        CellfastError: says how many are identical, names the first, and what to do.
    """
    columns = list(profiles.metadata.columns)
    more = [names.require_column(names.SHORT_NAMES.get(c.lower(), c), columns, "the metadata") for c in group_by]
    key = [c for c in dict.fromkeys((names.COMPOUND, names.CONCENTRATION, *more)) if c in columns]
    rows = list(profiles.metadata[key].itertuples(index=False, name=None))
    named = [" ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in row if v == v) for row in rows]
    found = [group for group in identical_groups(profiles.features) if len({named[i] for i in group}) > 1]
    if not found:
        return
    shown = "; ".join(
        " = ".join(list(dict.fromkeys(named[i] for i in group))[:3])
        + (f" and {more} more" if (more := len({named[i] for i in group}) - 3) > 0 else "")
        + (" (all features 0)" if not profiles.features[group[0]].any() else "")
        for group in found[:3]
    )
    raise CellfastError(
        f"{sum(map(len, found)):,} of {len(rows):,} profiles are identical to one of another treatment: {shown}"
        f"{'; …' if len(found) > 3 else ''}. Each would be the other's nearest neighbour by construction, which no score should "
        "count. If these are one treatment under two names, or the same wells joined twice, correct the table; if no feature is "
        "left that tells them apart, profile with other features; else leave these rows out."
    )
