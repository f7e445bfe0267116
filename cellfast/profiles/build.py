"""From cells (or wells) in files to normalised profiles: the work of ``cellfast profile``, with a report of every decision."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from cellfast.errors import CellfastError
from cellfast.metadata import columns as names
from cellfast.metadata.batches import SEPARATOR, fill_batches
from cellfast.metadata.canonical import ordered
from cellfast.metadata.counts import CELL_COUNT
from cellfast.metadata.doses import unify_doses
from cellfast.metadata.joins import join_moa, join_plate_map, unplaced_overrides
from cellfast.metadata.treatments import find_controls, treatment_key
from cellfast.metadata.values import unify_spellings
from cellfast.profiles.aggregate import CONSENSUS, METHODS, aggregate
from cellfast.profiles.batch_metrics import batch_metrics
from cellfast.profiles.feature_files import open_source
from cellfast.profiles.normalize import natural_key, normalize_profiles
from cellfast.profiles.select import drop_missing, select_features
from cellfast.profiles.steps import MIXING, RECIPES, Step, parse_steps
from cellfast.profiles.streaming import read_cells, read_units
from cellfast.profiles.table import ProfileTable

LEVELS = ("cell", "site", "well", "treatment")

CONTROL, NUM_WELLS = "Metadata_Control", "Metadata_NumWells"


@dataclass
class ProfileOptions:
    """What ``cellfast profile`` can be told; the defaults are its defaults.

    Attributes:
        level: what is returned: cell, site, well or treatment profiles.
        normalize_at: the level normalised: cell, site or well.
        cell_aggregate: mean or median, cells → sites and wells.
        aggregate: mean, median or modz, wells → treatments.
        steps: normalisation steps (``steps.parse_steps``); None is the recipe ``default`` of ``steps.RECIPES``.
        controls: query for the controls, the default of steps that name none.
        metadata: plate map to join (``joins.join_plate_map``).
        moa: MoA table to join (``joins.join_moa``).
        features: prefixes or regular expressions of feature names.
        columns: canonical metadata name → column of the input, or of a table that is joined.
        group_by: columns that tell treatments apart beside compound and concentration.
        pool: columns of biology whose different values are taken as one treatment.
        batch_regex: regular expression that takes the batch from the plate name.
        select: feature selection rules, applied before the first step that mixes features (``steps.MIXING``), else after the last.
        missing_cutoff: features missing in more than this share of the wells are dropped.
        allow_unfinished: take what is there of an embedding that is not finished.
    """

    level: str = "treatment"
    normalize_at: str = "well"
    cell_aggregate: str = "mean"
    aggregate: str = "median"
    steps: Sequence[Step] | None = None
    controls: str | None = None
    metadata: str | os.PathLike[str] | None = None
    moa: str | os.PathLike[str] | None = None
    features: Sequence[str] = ()
    columns: dict[str, str] = field(default_factory=dict)
    group_by: Sequence[str] = ()
    pool: Sequence[str] = ()
    batch_regex: str | None = None
    select: Sequence[str] = ()
    missing_cutoff: float = 0.05
    allow_unfinished: bool = False


@dataclass
class BuiltProfiles:
    """Result of ``build_profiles``.

    Attributes:
        profiles: the level asked for.
        wells: the normalised wells the treatments were made of (or the rows of the input if it has no wells).
        report: what was read, joined, dropped, fitted; JSON-serialisable.
    """

    profiles: ProfileTable
    wells: ProfileTable | None
    report: dict[str, Any]


def build_profiles(
    inputs: Sequence[str | os.PathLike[str]],
    options: ProfileOptions | None = None,
    *,
    outputs: Sequence[str | os.PathLike[str]] = (),
) -> BuiltProfiles:
    """Read features, aggregate cells to wells, normalise on controls, aggregate wells to treatments.

    ``outputs``: files that the caller will write; they are not read where they lie among the inputs.

    Cells are streamed: memory is that of the profiles plus a bounded block of columns, unless cells themselves are asked for.

    Raises:
        CellfastError: whatever the user can mend: files, columns, joins, controls, conflicting metadata.
    """
    options = options or ProfileOptions()
    _check_options(options)
    steps = list(options.steps) if options.steps is not None else parse_steps(RECIPES["default"], {"controls": options.controls})
    source = open_source(
        inputs,
        features=options.features,
        overrides=options.columns,
        outputs=outputs,
        allow_unfinished=options.allow_unfinished,
    )
    report: dict[str, Any] = {
        "inputs": {"files": len(source.files), "rows": source.num_rows, "features": len(source.feature_names)},
        "level": options.level,
    }
    if source.unfinished:
        report["inputs"]["unfinished"] = source.unfinished
    at = "cell" if options.level == "cell" else "site" if options.level == "site" else options.normalize_at
    table, counts = read_cells(source) if at == "cell" else read_units(source, at, options.cell_aggregate)
    report["rows"] = counts
    metadata, joins = annotated(table.metadata, options.metadata, options.moa, source.later)
    report.update(joins)
    report["notes"] = source.notes
    metadata, spellings = unify_spellings(metadata, (names.PLATE, names.BATCH, names.COMPOUND, names.MOA))
    report["spellings"] = _merged(counts.get("spellings", {}), spellings)
    metadata, report["batch_source"] = fill_batches(metadata, options.batch_regex)
    table = ProfileTable(metadata, table.features, table.feature_names)
    table, report["missing"] = drop_missing(table, options.missing_cutoff)
    dtype = source.dtype
    try:
        controls, rule = find_controls(table.metadata, options.controls)
    except CellfastError:
        # Without controls nothing can be fitted on them, but plain aggregation needs none.
        if options.controls is not None or any(step.needs_controls for step in steps):
            raise
        controls, rule = np.zeros(len(table), bool), "none found"
    if rule == "all rows":
        # "all" says what to fit on; it does not make every well a control.
        try:
            controls, _ = find_controls(table.metadata)
        except CellfastError:
            controls = np.zeros(len(table), bool)
    report["controls"] = {"rule": rule, "num": int(controls.sum()), "level": at}
    before = batch_metrics(table, controls)
    # A mixture of features holds a part of each: what is to be left out is left out before.
    mixing = next((i for i, step in enumerate(steps) if step.method in MIXING), len(steps))
    table, report["normalization"] = normalize_profiles(table, steps[:mixing])
    if options.select:
        table, report["selection"] = select_features(table, options.select)
    table, mixed = normalize_profiles(table, steps[mixing:])
    report["normalization"] += mixed
    report["batch_metrics"] = {"before": before, "after": batch_metrics(table, controls)}
    table = ProfileTable(table.metadata.assign(**{CONTROL: controls}), table.features, table.feature_names)
    wells: ProfileTable | None = table
    if at in ("cell", "site"):
        wells = None
        if options.level == "well" or (options.level == "treatment" and at == "cell"):
            if at == "cell" and "cells" in counts and CELL_COUNT not in table.metadata:
                table = ProfileTable(table.metadata.assign(**{CELL_COUNT: 1}), table.features, table.feature_names)
            table = wells = collapse(table, [names.PLATE, names.WELL], options.cell_aggregate)
    if options.level == "treatment":
        table = treatments(table, options.aggregate, report, options.group_by, options.pool)
    if wells is not None:
        wells = wells.with_features(wells.features.astype(dtype))
    table = table.with_features(table.features.astype(dtype))
    report["profiles"] = {"rows": len(table), "features": len(table.feature_names)}
    table.provenance = {
        "level": options.level,
        "steps": report["normalization"],
        "aggregate": options.aggregate,
        "cell_aggregate": options.cell_aggregate,
        "group_by": list(options.group_by),
        "pool": list(options.pool),
        "batch_metrics": report["batch_metrics"],
    }
    if wells is not None and wells is not table:
        wells.provenance = {**table.provenance, "level": "well"}
    return BuiltProfiles(table, wells, report)


def annotated(
    metadata: pd.DataFrame,
    plate_map: str | os.PathLike[str] | None,
    moa: str | os.PathLike[str] | None,
    overrides: dict[str, str],
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Join a plate map and MoAs where they are given; ``overrides`` are the ``--column`` choices that the input does not have.

    Raises:
        CellfastError: as the joins, or a choice that no table has.
    """
    report: dict[str, Any] = {}
    if plate_map is not None:
        metadata, report["metadata_join"] = join_plate_map(metadata, plate_map, overrides)
    if moa is not None:
        metadata, report["moa_join"] = join_moa(metadata, moa, overrides)
    for join in report.values():
        # Reports list the first names; whole lists are for the ledger of an ingest.
        join.pop("all_not_joined", None)
        join.pop("all_unused", None)
    placed = {name for name in overrides if any(name in join["placed"] for join in report.values())}
    unplaced_overrides(overrides, placed, "neither the input nor a joined table")
    return metadata, report


def _merged(*found: dict[str, dict[str, list[str]]]) -> dict[str, dict[str, list[str]]]:
    """Reports of merged spellings as one."""
    result: dict[str, dict[str, list[str]]] = {}
    for one in found:
        for column, merged in one.items():
            result.setdefault(column, {}).update(merged)
    return result


def _check_options(options: ProfileOptions) -> None:
    for name, value, allowed in (
        ("--level", options.level, LEVELS),
        ("--normalize-at", options.normalize_at, ("cell", "site", "well")),
        ("--cell-aggregate", options.cell_aggregate, METHODS),
        ("--aggregate", options.aggregate, CONSENSUS),
    ):
        if value not in allowed:
            raise CellfastError(f"{name} must be one of {', '.join(allowed)}; got '{value}'.")
    if not 0 <= options.missing_cutoff <= 1:
        raise CellfastError(f"--missing-cutoff must be between 0 and 1, got {options.missing_cutoff}.")


def collapse(table: ProfileTable, key: Sequence[str], method: str) -> ProfileTable:
    """One profile per distinct value of the ``key`` columns; other metadata columns stay where they are constant within every
    group.

    Counts of cells are summed, and weigh in means.
    """
    lacking = [c for c in key if c not in table.metadata]
    if lacking:
        raise CellfastError(f"The input has no column {', '.join(lacking)}, needed for these profiles: name it with --column.")
    codes, groups = group_codes(table.metadata, key)
    counts = table.metadata[CELL_COUNT].to_numpy() if CELL_COUNT in table.metadata else None
    weights = counts if counts is not None and (counts != 1).any() else None
    result = aggregate(table.features, codes, len(groups), method, weights)
    metadata = groups.copy()
    for column in table.metadata.columns:
        if column in key or column == CELL_COUNT:
            continue
        values = constant_within(table.metadata[column], codes, len(groups))
        if values is not None:
            metadata[column] = values
        elif column in (names.COMPOUND, names.CONCENTRATION, names.MOA):
            raise CellfastError(
                f"{_first_conflict(table.metadata, column, codes, groups)}: a well holds one treatment. Look at the metadata."
            )
    if counts is not None:
        metadata[CELL_COUNT] = np.bincount(codes, counts, len(groups)).astype(np.int64)
    return ProfileTable(ordered(metadata), result.values, table.feature_names, table.provenance)


def treatments(
    table: ProfileTable,
    method: str,
    report: dict[str, Any] | None = None,
    group_by: Sequence[str] = (),
    pool: Sequence[str] = (),
) -> ProfileTable:
    """Wells (or sites) → treatments, compound × concentration × ``group_by``; their batches and plates are joined by ``;``.

    Rows without a compound are left out and counted in the report; columns that vary within a treatment and are not carried over are
    named there.

    Raises:
        CellfastError: no compound column, no compound at all, a treatment with two MoAs, or cells that differ in a column of biology
            (cell line, time, …) that neither ``group_by`` nor ``pool`` names.
    """
    report = {} if report is None else report
    metadata = table.metadata
    if names.COMPOUND not in metadata or not (metadata[names.COMPOUND] != "").any():
        raise CellfastError(
            "Treatment profiles need to know each well's compound, and the input has none: give --metadata CSV (plate, "
            "well, compound, "
            "concentration), name the column with --column compound=COLUMN, or write wells with --level well."
        )
    known = (metadata[names.COMPOUND] != "").to_numpy()
    report["wells_without_compound"] = int((~known).sum())
    if not known.all():
        table = table.rows(known)
        metadata = table.metadata
    key = treatment_key(metadata, group_by, pool)
    rounded = metadata[key].copy()
    if names.CONCENTRATION in rounded:
        rounded[names.CONCENTRATION] = unify_doses(rounded[names.CONCENTRATION].to_numpy())
    codes, groups = group_codes(rounded, key)
    left_out: list[str] = []
    result = aggregate(table.features, codes, len(groups), method)
    out = groups.copy()
    for column in metadata.columns:
        if column in key or column in (names.WELL, names.SITE):
            continue
        if column in (names.BATCH, names.PLATE):
            out[column] = _joined(metadata[column], codes, len(groups))
        elif column == CELL_COUNT:
            out[column] = np.bincount(codes, weights=metadata[column].to_numpy(dtype=float), minlength=len(groups)).astype(
                np.int64
            )
        elif column == CONTROL:
            out[column] = np.bincount(codes, weights=metadata[column], minlength=len(groups)) == result.counts
        else:
            values = constant_within(metadata[column], codes, len(groups))
            if values is not None:
                out[column] = values
            elif column == names.MOA:
                raise CellfastError(
                    f"{_first_conflict(metadata, column, codes, groups)}: a treatment has one MoA. Look at the --moa table."
                )
            else:
                left_out.append(column)
    out[NUM_WELLS] = result.counts
    report["treatments_vary_in"] = left_out
    return ProfileTable(ordered(out), result.values, table.feature_names, table.provenance)


def group_codes(metadata: pd.DataFrame, key: Sequence[str]) -> tuple[np.ndarray, pd.DataFrame]:
    """int32 [N] codes of the distinct key values, numbered in natural sort order, and those values [groups, len(key)]."""
    parts = [pd.factorize(metadata[c], use_na_sentinel=False) for c in key]
    combined = np.zeros(len(metadata), np.int64)
    for codes, values in parts:
        combined = combined * max(len(values), 1) + codes
    unique, first, codes = np.unique(combined, return_index=True, return_inverse=True)
    groups = metadata[list(key)].iloc[first].reset_index(drop=True)

    rows = list(zip(*[groups[c].tolist() for c in key]))

    def sort_key(i: int) -> list[Any]:
        return [(0, v, ()) if isinstance(v, float) and v == v else (1, 0.0, natural_key(str(v))) for v in rows[i]]

    order = np.array(sorted(range(len(unique)), key=sort_key), np.int64).reshape(-1)
    rank = np.empty(len(unique), np.int32)
    rank[order] = np.arange(len(unique), dtype=np.int32)
    return rank[codes.reshape(-1)], groups.iloc[order].reset_index(drop=True)


def constant_within(column: pd.Series, codes: np.ndarray, num_groups: int) -> pd.Series | None:
    """The column's value in each group if it is the same throughout every group, else None."""
    values, unique = pd.factorize(column, use_na_sentinel=False)
    low = np.full(num_groups, np.iinfo(np.int64).max)
    high = np.full(num_groups, -1)
    np.minimum.at(low, codes, values)
    np.maximum.at(high, codes, values)
    if (low != high).any():
        return None
    return pd.Series(unique.take(low) if hasattr(unique, "take") else unique[low]).reset_index(drop=True)


def _joined(column: pd.Series, codes: np.ndarray, num_groups: int) -> pd.Series:
    members: list[set[str]] = [set() for _ in range(num_groups)]
    for code, value in zip(codes, column):
        members[code].add(str(value))
    return pd.Series([SEPARATOR.join(sorted(m - {""}, key=natural_key)) for m in members], dtype="str")


def _first_conflict(metadata: pd.DataFrame, column: str, codes: np.ndarray, groups: pd.DataFrame) -> str:
    for code in range(len(groups)):
        found = sorted({str(v) for v in metadata[column].to_numpy()[codes == code]})
        if len(found) > 1:
            where = " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in groups.iloc[code])
            return f"{where} has {len(found)} values of {column}: {', '.join(found[:4])}"
    raise AssertionError("no conflict")
