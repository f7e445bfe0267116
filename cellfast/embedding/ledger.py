"""The ledger of an embedding: locations = rows + dropped by reason, per plate; ``embeddings.json`` and ``quarantine.csv``."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cellfast import __version__
from cellfast.embeddings_folder import EMBEDDINGS_FILE
from cellfast.errors import CellfastError
from cellfast.printable import masked_values
from cellfast.screens.ledger import ledger_text, why_no_cell
from cellfast.storage.folder import Folder

if TYPE_CHECKING:
    from cellfast.embedding.cells import PlatePlan
    from cellfast.embedding.plate_files import Finished

QUARANTINE_FILE = "quarantine.csv"
_QUARANTINE_COLUMNS = ("plate", "well", "site", "image_number", "reason", "tries", "message", "files")


@dataclass(frozen=True)
class EmbedLedger:
    """``embeddings.json`` as it was written."""

    content: dict[str, Any]

    @property
    def totals(self) -> dict[str, Any]:
        return self.content["totals"]

    def table(self, limit: int = 12) -> str:
        """The ledger as text: sums, reasons, and the first ``limit`` quarantined fields and complaints."""
        t, plates = self.totals, self.content["plates"]
        counts = [("plates", t["plates"], "")]
        if t["fields_listed"]:
            counts += [("fields", t["fields_listed"], ""), ("  used", t["fields_written"], "")]
            counts += [(f"  quarantined or refused: {reason}", n, "") for reason, n in sorted(t["fields_refused"].items())]
        wells = f" in {t['rows']:,} wells" if t["rows"] != t["cells"] else ""
        counts += [("locations", t["locations"], ""), ("  cells embedded", t["cells"], wells)]
        counts += [(f"  dropped: {reason}", n, "") for reason, n in sorted(t["dropped"].items())]
        complaints = {
            "Quarantined fields": [
                f"{q['plate']} {q['well']} site {q['site']}: {q['message']}" for q in self.content["quarantined"]
            ],
            "Wells without cells": [f"{p['plate']} {well}" for p in plates for well in p["wells_without_cells"]],
            "Warnings": [f"{p['plate']}: {w}" for p in plates for w in p["warnings"]],
            "Treatments without a row in the metadata": self.content["unmatched_metadata"],
            "Metadata rows no field uses": self.content["unused_metadata"],
            "Notes": self.content["notes"],
        }
        return ledger_text(counts, complaints, EMBEDDINGS_FILE, limit)


def make_ledger(plates: Sequence[tuple[PlatePlan, list[Finished]]], about: dict[str, Any]) -> EmbedLedger:
    """The ledger of the finished ``plates`` (what each format has of a plate); ``about``: of the run and its input.

    Raises:
        CellfastError: a location is neither a row nor dropped with a reason, which is a defect of this program.
    """
    rows = [_plate_row(plan, finished, of_wells=about["aggregate"] == "well") for plan, finished in plates]
    dropped: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for row in rows:
        dropped.update(row["dropped"])
        refused.update(row["fields_refused"])
    quarantined = [one for _, finished in plates for one in finished[0].quarantined]
    totals = {
        "plates": len(rows),
        **{key: sum(r[key] for r in rows) for key in ("locations", "cells", "rows", "padded", "fields_listed", "fields_written")},
        "dropped": dict(dropped),
        "fields_refused": dict(refused),
        "fields_quarantined": len(quarantined),
    }
    if totals["locations"] != totals["cells"] + sum(dropped.values()):
        raise CellfastError(
            f"{totals['locations']} locations are not {totals['cells']} cells + {dict(dropped)}; please report this"
        )
    counts = {"cells": totals["cells"], "rows": totals["rows"], "totals": totals, "plates": rows, "quarantined": quarantined}
    return EmbedLedger({"cellfast_version": __version__, **about, **counts})


def _plate_row(plan: PlatePlan, finished: list[Finished], *, of_wells: bool) -> dict[str, Any]:
    ledger = finished[0].ledger
    ledger.check()
    files = [file for one in finished for file in one.files]
    return {
        "plate": plan.plate,
        "batch": plan.batch,
        "locations": ledger.cells_found,
        "cells": ledger.cells_written,
        "rows": len(plan.wells) - len(ledger.wells_without_cells) if of_wells else ledger.cells_written,
        "padded": ledger.cells_padded,
        "dropped": ledger.cells_dropped,
        "fields_listed": ledger.fields_listed,
        "fields_written": ledger.fields_written,
        "fields_refused": ledger.fields_refused,
        "wells_without_cells": ledger.wells_without_cells,
        "warnings": ledger.warnings,
        "file": files[-1],
        "files": files,
        "checksums": {one.last_file: one.record.checksum for one in finished},
        "origin": finished[0].record.origin,
    }


def write_ledger(out: Folder, ledger: EmbedLedger) -> None:
    """Write ``embeddings.json`` and ``quarantine.csv``.

    Raises:
        CellfastError: there is no cell at all.
    """
    content, totals, quarantined = ledger.content, ledger.totals, ledger.content["quarantined"]
    if quarantined:
        text = io.StringIO()
        writer = csv.DictWriter(text, _QUARANTINE_COLUMNS)
        writer.writeheader()
        writer.writerows(masked_values(quarantined))
        out.write_bytes(QUARANTINE_FILE, text.getvalue().encode())
    else:
        out.remove(QUARANTINE_FILE)
    body = json.dumps(masked_values(content), indent=2, ensure_ascii=False, allow_nan=False)
    out.write_bytes(EMBEDDINGS_FILE, f"{body}\n".encode())
    if not totals["cells"]:
        first = quarantined[0]["message"] if quarantined else "no reason noted"
        why = why_no_cell(totals["fields_listed"], totals["fields_refused"], totals["locations"], totals["dropped"], first)
        raise CellfastError(f"{why} (all reasons are in {out.path(QUARANTINE_FILE if quarantined else EMBEDDINGS_FILE)})")
