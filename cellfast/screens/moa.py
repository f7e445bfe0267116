"""Joins what treatments are and do to an image table; what does not join is listed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from cellfast.errors import CellfastError, option
from cellfast.metadata import joins
from cellfast.metadata.columns import BATCH, COMPOUND, CONCENTRATION, IMAGE_NUMBER, MOA, PLATE, WELL
from cellfast.metadata.treatments import treatment_name
from cellfast.metadata.values import spelling_notes, unify_spellings
from cellfast.screens.image_table import Field, ImageTable


@dataclass(frozen=True)
class JoinReport:
    """What did not join: wells or treatments without a row in the table, and rows that no field uses; ``placed``: the columns
    chosen by the user that the table has.
    """

    unmatched: tuple[str, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...] = ()
    placed: tuple[str, ...] = ()


def _frame(table: ImageTable) -> pd.DataFrame:
    fields = table.fields
    frame = pd.DataFrame(
        {
            PLATE: [f.plate for f in fields],
            WELL: [f.well for f in fields],
            IMAGE_NUMBER: [str(f.image_number) if f.image_number >= 0 else "" for f in fields],
            BATCH: [f.batch for f in fields],
            COMPOUND: [f.compound for f in fields],
            MOA: [f.moa for f in fields],
        },
        dtype="str",
    )
    return frame.assign(**{CONCENTRATION: [f.concentration for f in fields]})


def _fields(table: ImageTable, frame: pd.DataFrame) -> tuple[Field, ...]:
    columns = zip(frame[COMPOUND], frame[CONCENTRATION], frame[MOA], frame[BATCH])
    return tuple(
        replace(field, compound=str(c), concentration=float(d), moa=str(m), batch=str(b))
        for field, (c, d, m, b) in zip(table.fields, columns)
    )


def join_metadata(
    table: ImageTable, path: str | Path, overrides: Mapping[str, str] | None = None
) -> tuple[ImageTable, JoinReport]:
    """Give each field compound, concentration, batch and MoA, as `cellfast.metadata.joins.join_plate_map`.

    Raises:
        CellfastError: as there.
    """
    frame = _frame(table)
    if not (frame[IMAGE_NUMBER] != "").any():
        frame = frame.drop(columns=IMAGE_NUMBER)
    joined, report = joins.join_plate_map(frame, path, overrides)
    where = Counter(f"plate {p}, well {w}" for p, w in zip(frame[PLATE], frame[WELL]))
    missing = [f"plate {name.rpartition(' ')[0]}, well {name.rpartition(' ')[2]}" for name in report["all_not_joined"]]
    unmatched = tuple(f"{name} ({where[name]} fields)" if name in where else name for name in missing)
    unused = tuple(f"{Path(str(path)).name}: {name}" for name in report["all_unused"])
    return replace(table, fields=_fields(table, joined)), JoinReport(unmatched, unused, _said(report), tuple(report["placed"]))


def join_moa(table: ImageTable, path: str | Path, overrides: Mapping[str, str] | None = None) -> tuple[ImageTable, JoinReport]:
    """Give each field the MoA of its treatment, as `cellfast.metadata.joins.join_moa`; a treatment keeps the MoA it has where no
    row names it.

    Raises:
        CellfastError: as there, or fields without compounds.
    """
    if not any(f.compound for f in table.fields):
        raise CellfastError(
            f"{path}: the image table has no compounds to join a MoA to; join them first with {option('metadata')}"
        )
    joined, report = joins.join_moa(_frame(table), path, overrides)
    fields = _fields(table, joined)
    missing = Counter(treatment_name(f.compound, f.concentration) for f in fields if not f.moa)
    unmatched = tuple(f"{treatment} ({count} fields)" for treatment, count in sorted(missing.items()))
    return replace(table, fields=fields), JoinReport(
        unmatched, tuple(report["all_unused"]), tuple(report["notes"]), tuple(report["placed"])
    )


def one_spelling(table: ImageTable) -> ImageTable:
    """The table with one spelling, the commonest, of each compound, MoA and batch; what was merged is noted."""
    frame, merged = unify_spellings(_frame(table), (BATCH, COMPOUND, MOA))
    return replace(table, fields=_fields(table, frame), notes=(*table.notes, *spelling_notes(merged))) if merged else table


def _said(report: dict[str, Any]) -> tuple[str, ...]:
    replaced = [
        f"{count:,} fields have another {c.removeprefix('Metadata_')} in the plate map, which is taken"
        for c, count in report["values_replaced"].items()
    ]
    added = [c.removeprefix("Metadata_") for c in report["columns_added"]]
    kept_out = [
        f"{report['file']}: {', '.join(added[:12])}{' …' if added[12:] else ''} {'is' if len(added) == 1 else 'are'} not kept "
        "with the cells; join the file to profiles again to use it"
    ]
    return (*report["notes"], *replaced, *(kept_out if added else []))
