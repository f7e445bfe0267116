"""Tells a screen whose ingest has not ended: marks it at the beginning, takes the mark away at the end, and says what is missing.

While an ingest writes plates there is no ``ledger.json``; ``.ingest-<digest of its plates>.json`` holds the plates it is to write
and its command line. A ledger replaces it at the end. An ingest that was stopped leaves its mark, also where another one ends
well later.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cellfast.atomic import write_json
from cellfast.errors import CellfastError
from cellfast.printable import masked

LEDGER_FILE = "ledger.json"
_MARKS = ".ingest-*.json"


def _mark(screen: Path, plates: Iterable[str]) -> Path:
    return screen / _MARKS.replace("*", hashlib.sha256(json.dumps(sorted(plates)).encode()).hexdigest()[:12])


def begin(screen: Path, plates: Iterable[str]) -> None:
    """Mark the screen as unfinished, before the first plate is written."""
    plates = sorted(plates)
    write_json(_mark(screen, plates), {"plates": plates, "command": command_line()})
    (screen / LEDGER_FILE).unlink(missing_ok=True)


def end(screen: Path, plates: Iterable[str]) -> None:
    """Take away the mark of the ingest of these plates, after its ledger is written."""
    _mark(screen, plates).unlink(missing_ok=True)


def command_line() -> str:
    """The command line of this process where it is cellfast's, secrets masked; else empty."""
    program = Path(sys.argv[0])
    if program.stem != "cellfast" and program.parts[-2:] != ("cellfast", "__main__.py"):
        return ""
    return shlex.join(["cellfast", *map(masked, sys.argv[1:])])


def what_is_missing(screen: Path, there: set[str]) -> str:
    """Why the screen with the plates ``there`` is not finished and what finishes it, in a sentence or two; empty where it is.

    Raises:
        CellfastError: a ledger or mark that cannot be read.
    """
    ledger, command, reasons = screen / LEDGER_FILE, "", []
    listed: set[str] = set()
    if ledger.is_file():
        listed = {str(plate["plate"]) for plate in _plates(ledger)}
        if absent := listed - there:
            reasons.append(f"of the plates in {LEDGER_FILE} {_some(absent)}")
    else:
        reasons.append(f"there is no {LEDGER_FILE}")
    for mark in sorted(screen.glob(_MARKS)):
        content = _read(mark)
        planned = {str(plate) for plate in content.get("plates", ())}
        absent = planned - there
        if absent or not ledger.is_file():
            command = str(content.get("command", "")) or command
            if absent:
                reasons.append(f"of {len(planned):,} plates that were to be written {_some(absent)}")
    if not reasons:
        return ""
    how = f"run again: {command}" if command else "run the `cellfast ingest` command again that wrote it"
    return f"the ingest was not finished or is under way ({'; '.join(reasons)}); to finish it, {how} (finished plates are kept)"


def _some(plates: set[str]) -> str:
    names = sorted(plates)
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more} {'is' if len(names) == 1 else 'are'} not there"


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        error: object = "no JSON object"
    except FileNotFoundError:
        return {}  # the ingest ended meanwhile
    except (OSError, ValueError, RecursionError, MemoryError) as caught:
        error = caught
    raise CellfastError(f"{path}: damaged ({error}); run the `cellfast ingest` command again: finished plates are kept")


def _plates(ledger: Path) -> list[dict[str, Any]]:
    plates = _read(ledger).get("plates", [])
    if not isinstance(plates, list) or not all(isinstance(plate, dict) and "plate" in plate for plate in plates):
        raise CellfastError(
            f"{ledger}: damaged (no list of plates); run the `cellfast ingest` command again: finished plates are kept"
        )
    return plates
