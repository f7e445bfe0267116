"""Which rows of a table are evaluated, and in which batches they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from cellfast.errors import CellfastError
from cellfast.metadata import columns as names
from cellfast.metadata.batches import SEPARATOR, fill_batches
from cellfast.metadata.treatments import find_controls
from cellfast.profiles.build import CONTROL
from cellfast.profiles.moas import moa_parts
from cellfast.profiles.table import ProfileTable

UNKNOWN_BATCH = "(unknown)"


def choose_rows(
    table: ProfileTable, controls_query: str | None = None, batch_regex: str | None = None
) -> tuple[ProfileTable, dict[str, Any]]:
    """Leave out controls, rows without a compound and rows without a MoA; counts of each."""
    metadata = table.metadata
    for column, how in (
        (names.COMPOUND, "--column compound=COLUMN, or --metadata CSV"),
        (names.MOA, "--column moa=COLUMN, or --moa CSV"),
    ):
        if column not in metadata or not (metadata[column] != "").any():
            raise CellfastError(f"The profiles have no {column}; their metadata: {', '.join(metadata.columns)}. Give {how}.")
    metadata, source = fill_batches(metadata, batch_regex)
    table = ProfileTable(metadata, table.features, table.feature_names, table.provenance)
    if controls_query is not None:
        controls, rule = find_controls(metadata, controls_query)
    elif CONTROL in metadata:
        controls, rule = metadata[CONTROL].to_numpy(dtype=bool), CONTROL
    else:
        try:
            controls, rule = find_controls(metadata)
        except CellfastError:
            # Treated profiles alone are a complete input here.
            controls, rule = np.zeros(len(metadata), bool), "none found"
    no_compound = ~controls & (metadata[names.COMPOUND] == "").to_numpy()
    none = {value for value in set(metadata[names.MOA]) if not moa_parts(value)}
    no_moa = ~controls & ~no_compound & metadata[names.MOA].isin(none).to_numpy()
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
            raise CellfastError(f"batch_rule plates needs {names.PLATE}; the profiles have {', '.join(metadata.columns)}.")
        # One batch that nobody knows: nothing is in another, and NSCB is not defined; NSC is.
        return [(UNKNOWN_BATCH,)] * len(metadata)
    # A comma joins batches in tables of other tools; none of ours has one in a batch name.
    found = {
        v: tuple(p.strip() for p in str(v).replace(",", SEPARATOR).split(SEPARATOR) if p.strip()) for v in set(metadata[column])
    }
    return [found[v] or (UNKNOWN_BATCH,) for v in metadata[column]]
