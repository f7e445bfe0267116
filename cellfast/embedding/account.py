"""The account of an embedding: locations = rows + dropped by reason, per plate; ``embeddings.json`` and ``quarantine.csv``."""

from __future__ import annotations

import csv
import io
import json
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cellfast import __version__
from cellfast.embedding.options import EmbedOptions
from cellfast.embeddings_folder import ACCOUNT_FILE
from cellfast.errors import CellfastError
from cellfast.printable import masked_values, printable
from cellfast.screens.ledger import why_no_cell
from cellfast.storage.folder import Folder

if TYPE_CHECKING:
    from cellfast.embedding.encoder import CropEncoder
    from cellfast.embedding.outputs import Finished, PlateOutput
    from cellfast.embedding.sources import CellSource, PlatePlan

QUARANTINE_FILE = "quarantine.csv"
_QUARANTINE_COLUMNS = ("plate", "well", "site", "image_number", "reason", "tries", "message", "files")


@dataclass(frozen=True)
class Account:
    """``embeddings.json`` as it was written."""

    content: dict[str, Any]

    @property
    def totals(self) -> dict[str, Any]:
        return self.content["totals"]

    def table(self, limit: int = 12) -> str:
        """The account as text: sums, reasons, and the first ``limit`` quarantined fields and complaints."""
        t, lines = self.totals, []
        lines.append(f"{'plates':<34}{t['plates']:>14,}")
        if t["fields_listed"]:
            lines.append(f"{'fields':<34}{t['fields_listed']:>14,}")
            lines.append(f"{'  used':<34}{t['fields_written']:>14,}")
            lines += [
                f"{'  quarantined or refused: ' + printable(r):<34}{n:>14,}" for r, n in sorted(t["fields_refused"].items())
            ]
        lines.append(f"{'locations':<34}{t['locations']:>14,}")
        lines.append(
            f"{'  cells embedded':<34}{t['cells']:>14,}" + (f" in {t['rows']:,} wells" if t["rows"] != t["cells"] else "")
        )
        lines += [f"{'  dropped: ' + printable(r):<34}{n:>14,}" for r, n in sorted(t["dropped"].items())]
        quarantined = [f"{q['plate']} {q['well']} site {q['site']}: {q['message']}" for q in self.content["quarantined"]]
        empty = [f"{p['plate']} {well}" for p in self.content["plates"] for well in p["wells_without_cells"]]
        warnings = [f"{p['plate']}: {w}" for p in self.content["plates"] for w in p["warnings"]]
        for title, items in (
            ("Quarantined fields", quarantined),
            ("Wells without cells", empty),
            ("Warnings", warnings),
            ("Treatments without a row in the metadata", self.content["unmatched_metadata"]),
            ("Metadata rows no field uses", self.content["unused_metadata"]),
            ("Notes", self.content["notes"]),
        ):
            if items:
                lines.append(f"{title} ({len(items)}):")
                lines += [f"  {printable(item)}" for item in items[:limit]]
                if len(items) > limit:
                    lines.append(f"  … and {len(items) - limit} more in {ACCOUNT_FILE}")
        return "\n".join(lines)


def write_account(
    place: Folder,
    source: CellSource,
    encoder: CropEncoder,
    options: EmbedOptions,
    names: list[str],
    plates: Sequence[tuple[PlatePlan, list[Finished]]],
    outputs: Sequence[PlateOutput],
    notes: Sequence[str],
    unmatched: Sequence[str],
    unused: Sequence[str],
    decoding: dict[str, Any] | None = None,
) -> Account:
    """Check that every location is a row or dropped with a reason, and write ``embeddings.json`` and ``quarantine.csv``.

    Raises:
        CellfastError: the sums do not agree (a defect of this program), or there is no cell at all.
    """
    rows: list[dict[str, Any]] = []
    quarantined: list[dict[str, str]] = []
    for plan, finished in plates:
        ledger = finished[0].ledger
        files = [file for one in finished for file in one.files]
        seals = {output.sealing_file(plan): one.seal for output, one in zip(outputs, finished) if one.seal is not None}
        ledger.check()
        quarantined += finished[0].quarantined
        wells = len(plan.wells) - len(ledger.wells_without_cells)
        rows.append(
            {
                "plate": plan.plate,
                "batch": plan.batch,
                "locations": ledger.cells_found,
                "cells": ledger.cells_written,
                "rows": wells if options.aggregate_wells else ledger.cells_written,
                "padded": ledger.cells_padded,
                "dropped": ledger.cells_dropped,
                "fields_listed": ledger.fields_listed,
                "fields_written": ledger.fields_written,
                "fields_refused": ledger.fields_refused,
                "wells_without_cells": ledger.wells_without_cells,
                "warnings": ledger.warnings,
                "file": files[0] if len(files) == 1 else files[-1],
                "files": files,
                "checksums": {name: seal.checksum for name, seal in seals.items()},
                "origin": next((seal.origin for seal in seals.values()), None),
            }
        )
    dropped: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for row in rows:
        dropped.update(row["dropped"])
        refused.update(row["fields_refused"])
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
    model = encoder.loaded
    content = {
        "cellfast_version": __version__,
        "screen": source.name,
        "source": source.kind,
        "model": str(model.path),
        "model_digest": model.digest,
        "features": options.features,
        "num_features": len(names),
        "dtype": options.dtype,
        "tta": options.tta,
        "amp": options.amp,
        "aggregate": "well" if options.aggregate_wells else "none",
        "formats": list(options.formats),
        "cells": totals["cells"],
        "rows": totals["rows"],
        "totals": totals,
        "plates": rows,
        "quarantined": quarantined,
        "checksums": {},
        # What this run did: the pixels, and so the rows, are the same either way.
        "decode": decoding,
        "notes": list(notes),
        "unmatched_metadata": list(unmatched),
        "unused_metadata": list(unused),
        "names_crc32": zlib.crc32(",".join(names).encode()),
    }
    for output in outputs:
        content["checksums"] |= output.collate([plan for plan, _ in plates])
    if quarantined:
        text = io.StringIO()
        writer = csv.DictWriter(text, _QUARANTINE_COLUMNS)
        writer.writeheader()
        writer.writerows(masked_values(quarantined))
        place.write_bytes(QUARANTINE_FILE, text.getvalue().encode())
    else:
        place.remove(QUARANTINE_FILE)
    place.write_bytes(
        ACCOUNT_FILE, (json.dumps(masked_values(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    )
    if not totals["cells"]:
        first = quarantined[0]["message"] if quarantined else "no reason noted"
        why = why_no_cell(totals["fields_listed"], totals["fields_refused"], totals["locations"], totals["dropped"], first)
        raise CellfastError(f"{why} (all reasons are in {place.path(QUARANTINE_FILE if quarantined else ACCOUNT_FILE)})")
    return Account(content)
