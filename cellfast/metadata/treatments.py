"""What a treatment is: compound × concentration × what else is asked for; which rows are controls."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from cellfast.errors import CellfastError, option
from cellfast.metadata.columns import COMPOUND, CONCENTRATION, MOA, SHORT_NAMES, plain_name, require_column
from cellfast.metadata.controls import select_rows
from cellfast.metadata.values import folded

CONTROL_COMPOUND = "DMSO"

# What cells are or were given besides the compound: profiles of different ones are not replicates of a treatment.
_BIOLOGY = {
    "cell_line", "cellline", "cell_type", "celltype", "cell_model", "strain", "species", "donor", "patient", "tissue", "clone",
    "time", "timepoint", "time_point", "time_h", "time_hours", "hours", "day", "days", "treatment_time", "incubation_time",
    "exposure_time", "pert_time", "genotype", "genetic_background", "mutation", "gene", "gene_symbol", "symbol", "guide",
    "guide_id", "sgrna", "grna", "sirna", "orf", "crispr", "stimulus", "stimulation", "medium", "media", "stain", "staining",
    "dye", "cell_density", "seeding_density", "density", "passage",
}  # fmt: skip


def is_control(compound: str) -> bool:
    """True for the default control: the compound is DMSO, case and blanks aside."""
    return folded(compound) == folded(CONTROL_COMPOUND)


def treatment_name(compound: str, concentration: float) -> str:
    """``compound @ 0.3 µM``, as messages name a treatment."""
    return (compound or "no compound") if math.isnan(concentration) else f"{compound or 'no compound'} @ {concentration:g} µM"


def is_biology(column: str) -> bool:
    """Whether a column says what the cells are or were given (cell line, time, genotype, guide, …)."""
    return plain_name(column) in _BIOLOGY


def treatment_key(metadata: pd.DataFrame, group_by: Sequence[str] = (), pool: Sequence[str] = ()) -> list[str]:
    """The columns that tell treatments apart: compound, concentration, and those of ``group_by``.

    Raises:
        CellfastError: a column of ``group_by`` or ``pool`` is not there, or the cells of one treatment differ in a column of
            biology that neither names (says how to tell them apart or to pool them).
    """
    columns = list(metadata.columns)
    groups = [require_column(SHORT_NAMES.get(c.lower(), c), columns, "the metadata", "group_by") for c in group_by]
    pooled = {require_column(c, columns, "the metadata", "pool") for c in pool}
    if both := sorted(set(groups) & pooled):
        raise CellfastError(f"{option('group_by')} and {option('pool')} both name {both[0]}: give it to one of them")
    key = [c for c in (COMPOUND, CONCENTRATION) if c in metadata]
    key += [c for c in groups if c not in key]
    codes = metadata.groupby(key, sort=False, dropna=False).ngroup().to_numpy()
    for column in columns:
        if column in key or column in pooled or not is_biology(column):
            continue
        values = metadata[column].astype("str").map(folded)
        pairs = pd.DataFrame({"treatment": codes, "value": values.to_numpy()}).drop_duplicates()
        several = pairs[pairs.duplicated("treatment", keep=False)]
        if len(several):
            one = several["treatment"].iloc[0]
            row = metadata[codes == one]
            compound = row[COMPOUND].iloc[0] if COMPOUND in row else "a treatment"
            found = ", ".join(sorted(map(str, row[column].unique()))[:4])
            raise CellfastError(
                f"{several['treatment'].nunique()} treatments have wells of different {column.removeprefix('Metadata_')} "
                f"({compound}: {found}). Tell them apart with {option('group_by', column)}, or take them as one with "
                f"{option('pool', column)}."
            )
    return key


def find_controls(metadata: pd.DataFrame, query: str | None = None) -> tuple[np.ndarray, str]:
    """Which rows are controls, and by which rule.

    Args:
        metadata: canonical metadata [N, …].
        query: a condition on the metadata in the language of `cellfast.metadata.controls` (short names such as ``compound`` work
            too);
            ``all``: every row; None: the compound is DMSO, else a control type column (``Metadata_pert_type``,
            ``Metadata_control_type``) says negcon, else the MoA is DMSO.

    Returns:
        (bool [N], the rule as text).

    Raises:
        CellfastError: the query is not of the language, or matches no row; no controls are found without one.
    """
    if query is not None and query.strip().lower() == "all":
        return np.ones(len(metadata), bool), "all rows"
    if query is not None:
        mask = select_rows(query, metadata, SHORT_NAMES)
        if not mask.any():
            raise CellfastError(
                f"{option('controls', query)} matches none of the {len(metadata)} rows. Compounds: {_some(metadata, COMPOUND)}."
            )
        return mask, query
    types = [c for c in metadata.columns if plain_name(c) in ("pert_type", "control_type")]
    for column, value in ((COMPOUND, CONTROL_COMPOUND), *((c, "negcon") for c in types), (MOA, CONTROL_COMPOUND)):
        if column in metadata:
            names = metadata[column].astype("str")
            mask = names.map({n: folded(n) == folded(value) for n in names.unique()}).to_numpy(dtype=bool)
            if mask.any():
                return mask, f"{column} is {value}"
    named = option("controls", "Metadata_Compound == 'NAME'")
    raise CellfastError(
        f"No control wells found: no compound is DMSO and no control type is negcon. Compounds: {_some(metadata, COMPOUND)}. Say "
        f"which they are with {named}, take every well with {option('controls', 'all')}, or use {option('normalize', 'none')}."
    )


def _some(metadata: pd.DataFrame, column: str) -> str:
    if column not in metadata:
        return f"(no column {column})"
    values = sorted(set(metadata[column]) - {""})
    return ", ".join(values[:12]) + (f" … ({len(values)} in all)" if len(values) > 12 else "") or "(none)"
