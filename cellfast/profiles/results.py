"""Reading profiles for evaluation, and writing RESULT.json, the per-treatment table and the pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cellfast.atomic import atomic_path, write_json
from cellfast.errors import CellfastError
from cellfast.metadata import columns as names
from cellfast.metadata.counts import with_counts
from cellfast.metadata.values import spelling_notes, unify_spellings
from cellfast.profiles.build import CONTROL, annotated
from cellfast.profiles.evaluate import Evaluation
from cellfast.profiles.feature_files import read_profiles
from cellfast.profiles.table import ProfileTable


def read_annotated(
    path: str | os.PathLike[str],
    metadata: str | os.PathLike[str] | None = None,
    moa: str | os.PathLike[str] | None = None,
    features: Sequence[str] = (),
    columns: dict[str, str] | None = None,
) -> ProfileTable:
    """Read profiles and join a plate map and MoAs where they are given.

    Raises:
        CellfastError: as ``read_profiles`` and ``build.annotated``.
    """
    table = read_profiles(path, tuple(features), columns)
    frame, joins = annotated(with_counts(table.metadata), metadata, moa, table.later)
    frame, spellings = unify_spellings(frame, (names.PLATE, names.BATCH, names.COMPOUND, names.MOA))
    frame = _control_marks(frame, str(path))
    notes = [*table.notes, *(note for join in joins.values() for note in join["notes"]), *spelling_notes(spellings)]
    return ProfileTable(frame, table.features, table.feature_names, table.provenance, notes)


def _control_marks(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    """``Metadata_Control`` as bool: CSV carries it as text, and every text is true."""
    if CONTROL not in frame or pd.api.types.is_bool_dtype(frame[CONTROL]):
        return frame
    marks = (
        frame[CONTROL]
        .astype("str")
        .str.strip()
        .str.lower()
        .map({"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False})
    )
    if marks.isna().any():
        first = frame[CONTROL][marks.isna()].iloc[0]
        raise CellfastError(
            f"{where}: {CONTROL} must be True or False in every row; found '{first}'. Correct the column, or rename it."
        )
    return frame.assign(**{CONTROL: marks.astype(bool)})


def write_result(evaluation: Evaluation, output: str | os.PathLike[str], map_method: str | None = "tsne") -> list[Path]:
    """Write RESULT.json, ``<stem>_treatments.csv`` and, unless ``map_method`` is None, the pictures; returns the paths, the
    result last.

    The result is written last: where it is, everything is.
    """
    output = Path(output)
    written: list[Path] = []
    if map_method is not None:
        from cellfast.profiles.plots import write_pictures

        written += write_pictures(evaluation, output.with_suffix(""), map_method, evaluation.result["options"]["seed"])
    path = output.with_name(f"{output.stem}_{evaluation.result['options']['level']}s.csv")
    with atomic_path(path) as temporary:
        evaluation.table.to_csv(temporary, index=False)
    written.append(path)
    write_json(output, {**evaluation.result, "treatments": _rows(evaluation)})
    return [*written, output]


def _rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    table = evaluation.table
    key = [c for c in (names.COMPOUND, names.CONCENTRATION) if c in table]
    if table[key].duplicated().any():
        key += [c for c in (names.PLATE, names.WELL) if c in table]
    fields = [c for c in table.columns if c.startswith(("nsc_", "nscb_"))]
    rows = []
    for record in table.to_dict("records"):
        row = {"id": " ".join(_shown(record[c]) for c in key), "compound": record[names.COMPOUND], "moa": record[names.MOA]}
        rows.append({**row, **{f: _plain(record[f]) for f in fields}})
    return rows


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
