"""The ledger of an ingest: every cell that was found is written or dropped with a reason, and the sums must agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cellfast import __version__
from cellfast.atomic import write_json
from cellfast.errors import CellfastError
from cellfast.printable import printable
from cellfast.screens import unfinished
from cellfast.screens.unfinished import LEDGER_FILE

LEDGER_VERSION = 1


def why_no_cell(
    fields_listed: int, fields_refused: dict[str, int], cells_found: int, cells_dropped: dict[str, int], first: str
) -> str:
    """A sentence that says why no cell was written, with the counts by reason; ``first``: the first refusal's message."""
    refused, dropped = (
        ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))
        for counts in (fields_refused, cells_dropped)
    )
    left = fields_listed - sum(fields_refused.values())
    if refused and not left:
        why = f"no field could be used; the first was refused because: {first} Fields refused: {refused}"
    elif not cells_found:
        why = "no cell was written: none is located" + (f" in the {left:,} fields that could be used" if fields_listed else "")
        why += f" (refused: {refused})" if refused else ""
    else:
        why = f"no cell was written: of {cells_found:,} located all were dropped"
    return why + (f"; cells dropped: {dropped}" if dropped else "")


@dataclass
class PlateLedger:
    """What became of one plate's fields and cells.

    ``cells_found = cells_written + sum(cells_dropped.values())`` and
    ``fields_listed = fields_written + sum(fields_refused.values())``.
    """

    plate: str
    fields_listed: int = 0
    fields_written: int = 0
    fields_refused: dict[str, int] = field(default_factory=dict)
    cells_found: int = 0
    cells_written: int = 0
    cells_padded: int = 0
    cells_dropped: dict[str, int] = field(default_factory=dict)
    wells_listed: int = 0
    wells_without_cells: list[str] = field(default_factory=list)
    refusals: list[dict[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def refuse_field(self, reason: str, where: str, message: str) -> None:
        """Count a field that was not read, and remember why."""
        self.fields_refused[reason] = self.fields_refused.get(reason, 0) + 1
        self.refusals.append({"reason": reason, "where": where, "message": message})

    def drop_cells(self, reason: str, count: int) -> None:
        """Count cells that were found and not written."""
        if count:
            self.cells_dropped[reason] = self.cells_dropped.get(reason, 0) + int(count)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PlateLedger:
        """The ledger that ``asdict`` made a JSON value of; what is unknown of it is left out."""
        return cls(**{key: value[key] for key in cls.__dataclass_fields__ if key in value})

    def add(self, other: PlateLedger) -> None:
        """Add the counts, refusals and warnings of another part of the plate."""
        for name in ("fields_listed", "fields_written", "cells_found", "cells_written", "cells_padded"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, count in other.cells_dropped.items():
            self.drop_cells(reason, count)
        for reason, count in other.fields_refused.items():
            self.fields_refused[reason] = self.fields_refused.get(reason, 0) + count
        self.refusals += other.refusals
        self.warnings += other.warnings

    def check(self) -> None:
        """Raise `CellfastError` when the sums do not agree: then a cell was lost, which is a defect of this program."""
        if self.cells_found != self.cells_written + sum(self.cells_dropped.values()):
            raise CellfastError(
                f"plate {self.plate}: {self.cells_found} cells found, but {self.cells_written} written and "
                f"{dict(self.cells_dropped)} dropped; a cell was lost, please report this"
            )
        if self.fields_listed != self.fields_written + sum(self.fields_refused.values()):
            raise CellfastError(
                f"plate {self.plate}: {self.fields_listed} fields listed, but {self.fields_written} written and "
                f"{dict(self.fields_refused)} refused; a field was lost, please report this"
            )


@dataclass
class Ledger:
    """The ledger of a screen: its plates, what the tables were told apart by, and what did not join."""

    source: str
    locations: str
    options: dict[str, Any]
    plates: list[PlateLedger]
    notes: list[str] = field(default_factory=list)
    unmatched_metadata: list[str] = field(default_factory=list)
    unused_metadata: list[str] = field(default_factory=list)

    def totals(self) -> dict[str, Any]:
        """Sums over the plates."""
        dropped: Counter[str] = Counter()
        refused: Counter[str] = Counter()
        for plate in self.plates:
            dropped.update(plate.cells_dropped)
            refused.update(plate.fields_refused)
        return {
            "plates": len(self.plates),
            "wells_listed": sum(p.wells_listed for p in self.plates),
            "wells_without_cells": sum(len(p.wells_without_cells) for p in self.plates),
            "fields_listed": sum(p.fields_listed for p in self.plates),
            "fields_written": sum(p.fields_written for p in self.plates),
            "fields_refused": dict(refused),
            "cells_found": sum(p.cells_found for p in self.plates),
            "cells_written": sum(p.cells_written for p in self.plates),
            "cells_padded": sum(p.cells_padded for p in self.plates),
            "cells_dropped": dict(dropped),
        }

    def check_written(self, screen: Path) -> None:
        """Raise `CellfastError` when the ingest wrote no cell at all."""
        t = self.totals()
        if not t["cells_written"]:
            first = next((refusal["message"] for plate in self.plates for refusal in plate.refusals), "no reason noted")
            why = why_no_cell(t["fields_listed"], t["fields_refused"], t["cells_found"], t["cells_dropped"], first)
            raise CellfastError(f"{why} (all reasons are in {screen / LEDGER_FILE})")

    def write(self, screen: Path) -> Path:
        """Check the sums and write ``ledger.json`` in the screen folder, atomically."""
        for plate in self.plates:
            plate.check()
        path = screen / LEDGER_FILE
        body = {"ledger_version": LEDGER_VERSION, "cellfast_version": __version__, "totals": self.totals(), **asdict(self)}
        write_json(path, body)
        unfinished.end(screen, [plate.plate for plate in self.plates])
        return path

    def table(self, limit: int = 12) -> str:
        """The ledger as text for the screen: sums, reasons, and the first ``limit`` of each kind of complaint."""
        t = self.totals()
        without, padded = t["wells_without_cells"], t["cells_padded"]
        counts = [
            ("plates", t["plates"], ""),
            ("wells listed", t["wells_listed"], f"   without cells: {without:,}" if without else ""),
            ("fields listed", t["fields_listed"], ""),
            ("  written", t["fields_written"], ""),
            *((f"  refused: {reason}", count, "") for reason, count in sorted(t["fields_refused"].items())),
            ("cells found", t["cells_found"], ""),
            ("  written", t["cells_written"], f"   of them padded at the border: {padded:,}" if padded else ""),
            *((f"  dropped: {reason}", count, "") for reason, count in sorted(t["cells_dropped"].items())),
        ]
        complaints = {
            "Refused": [f"{p.plate} {r['where']}: {r['message']}" for p in self.plates for r in p.refusals],
            "Wells without cells": [f"{p.plate} {well}" for p in self.plates for well in p.wells_without_cells],
            "Warnings": [f"{p.plate}: {w}" for p in self.plates for w in p.warnings],
            "Treatments without a row in the metadata": self.unmatched_metadata,
            "Metadata rows no field uses": self.unused_metadata,
            "Notes": self.notes,
        }
        return ledger_text(counts, complaints, LEDGER_FILE, limit)


def ledger_text(counts: Iterable[tuple[str, int, str]], complaints: Mapping[str, Sequence[str]], file: str, limit: int) -> str:
    """A ledger as text: a line per count (name, number, remark), then the first ``limit`` complaints of each kind; ``file`` has
    the rest."""
    lines = [f"{printable(name):<34}{number:>14,}{remark}" for name, number, remark in counts]
    for title, items in complaints.items():
        if items:
            lines.append(f"{title} ({len(items)}):")
            lines += [f"  {printable(item)}" for item in items[:limit]]
            if len(items) > limit:
                lines.append(f"  … and {len(items) - limit} more in {file}")
    return "\n".join(lines)
