"""What an embeddings folder says of itself: whether it is finished, how to finish it, and the checksums of its files."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cellfast.errors import CellfastError, option
from cellfast.storage.folder import Checksum, checksum

EMBEDDINGS_FILE = "embeddings.json"
WORK_FOLDER = ".embed"
BLOCKS = f"{WORK_FOLDER}/blocks"
# Checksums of plates that no ledger names yet.
RECORDS = f"{WORK_FOLDER}/checksums"
# What is being made and by which command: there from a run's first write until its ledger is written.
RUN_FILE = f"{WORK_FOLDER}/run.json"
GALLERY = "workspace_dl"
LEDGER_KEY = b"cellfast_ledger"


@dataclass
class EmbeddingsFolder:
    """An output folder of ``cellfast embed`` on a local disk.

    Attributes:
        path: the folder.
        ledger: ``embeddings.json``, or None.
        run: ``.embed/run.json`` of a run that has not ended, or None.
        checksums: of the files in the folder that are known, by relative name with ``/``.
    """

    path: Path
    ledger: dict[str, Any] | None = None
    run: dict[str, Any] | None = None
    checksums: dict[str, Checksum] = field(default_factory=dict)

    def trouble(self) -> str:
        """What is missing of it; empty where it is finished."""
        if self.ledger is None:
            lacks = f"has no {EMBEDDINGS_FILE}"
            plates = self.run.get("plates", []) if self.run else []
            absent = [str(plate.get("plate")) for plate in plates if not _are_there(self.path, plate["files"])]
            if plates:
                lacks += f"; {len(absent)} of {len(plates)} plates are missing{_some(absent)}"
            return lacks
        files = [str(name) for plate in self.ledger["plates"] for name in plate["files"]]
        absent = [name for name in files if not (self.path / name).is_file()]
        if absent:
            return f"lacks {len(absent)} of the {len(files)} files that its {EMBEDDINGS_FILE} names{_some(absent)}"
        if self.run is not None or _has_files(self.path / BLOCKS):
            return "is being made again by a run that has not ended"
        return ""

    def remedy(self) -> str:
        """The command that finishes it."""
        if self.run and self.run.get("command"):
            return f"`{self.run['command']}` (in {self.run.get('folder', 'the same folder')})"
        model = f" --model {self.ledger['model']}" if self.ledger and self.ledger.get("model") else ""
        source = self.ledger["screen"] if self.ledger and self.ledger.get("source") == "store" else "…"
        return f"`cellfast embed {source}{model} -o {self.path}` with the options it was made with"

    def check_finished(self, *, allow_unfinished: bool) -> str:
        """Empty where it is finished, else what is missing.

        Raises:
            CellfastError: it is unfinished, and that is not allowed.
        """
        trouble = self.trouble()
        if trouble and not allow_unfinished:
            raise CellfastError(
                f"{self.path}: an unfinished embedding: it {trouble}. Finish it with {self.remedy()}, or use what is there with "
                f"{option('allow_unfinished', True)}"
            )
        return f"{self.path}: an unfinished embedding: it {trouble}" if trouble else ""

    def check(self, path: Path) -> None:
        """Compare a file of the folder with its checksum, where it is known.

        Raises:
            CellfastError: the file is not the one that was written.
        """
        known = self.checksums.get(os.path.relpath(path, self.path).replace(os.sep, "/"))
        if known is None:
            return
        with open(path, "rb") as handle:
            found = checksum(handle)
        if found != known:
            what = (
                f"it has {found['bytes']:,} bytes, {known.get('bytes'):,} were written"
                if found["bytes"] != known.get("bytes") and isinstance(known.get("bytes"), int)
                else f"its CRC-32 is {found['crc32']}, {known.get('crc32')} was written"
            )
            raise CellfastError(f"{path}: damaged or changed since it was written: {what}. Make it again with {self.remedy()}")

    def check_all(self) -> None:
        """`check` every file whose checksum is known and that is there."""
        for name in self.checksums:
            if (self.path / name).is_file():
                self.check(self.path / name)

    def describe(self) -> dict[str, Any]:
        """What was embedded with which model, for people and as JSON."""
        ledger = self.ledger or {}
        keys = ("screen", "model", "model_digest", "features", "num_features", "dtype", "aggregate", "formats", "cells", "rows")
        plates = ledger.get("plates") or (self.run or {}).get("plates", [])
        return {"embedding": str(self.path), "plates": len(plates), **{key: ledger[key] for key in keys if key in ledger}}


def open_folder(path: Path) -> EmbeddingsFolder | None:
    """The embeddings folder that ``path`` is, or is a part of in the Gallery's layout; None for any other folder.

    Raises:
        CellfastError: ``embeddings.json`` is damaged.
    """
    path = Path(os.path.abspath(path))
    inside = GALLERY in path.parts
    root = Path(*path.parts[: len(path.parts) - 1 - path.parts[::-1].index(GALLERY)]) if inside else path
    if not (root / EMBEDDINGS_FILE).is_file() and not (root / WORK_FOLDER).is_dir():
        return None
    found = EmbeddingsFolder(root, read_ledger(root / EMBEDDINGS_FILE), _read_json(root / RUN_FILE))
    if (root / RUN_FILE).is_file():
        found.run = found.run or {}
        if not is_ledger({"plates": found.run.get("plates")}):
            found.run["plates"] = []
    found.checksums = {**ledger_checksums(found.ledger), **_recorded(root / RECORDS)}
    if inside:
        for name in [name for name in found.checksums if name.startswith(f"{GALLERY}/profiles/") and (root / name).is_file()]:
            found.check(root / name)
            found.checksums |= _checksums_of_sites(root / name)
    return found


def read_ledger(path: Path) -> dict[str, Any] | None:
    """``embeddings.json``; None where there is none.

    Raises:
        CellfastError: it is damaged.
    """
    if not path.is_file():
        return None
    ledger = _read_json(path)
    if ledger is None or not is_ledger(ledger):
        raise CellfastError(f"{path}: damaged: not the ledger of an embedding. The command that made the folder writes it again")
    return ledger


def is_ledger(value: Any) -> bool:
    """Whether a JSON value has what is read of a ledger."""
    plates = value.get("plates") if isinstance(value, dict) else None
    return isinstance(plates, list) and all(isinstance(p, dict) and isinstance(p.get("files"), list) for p in plates)


def ledger_checksums(ledger: dict[str, Any] | None) -> dict[str, Checksum]:
    """The checksums in a ledger by file; of a ledger by an earlier version none."""
    if ledger is None:
        return {}
    pieces = [ledger.get("checksums"), *(plate.get("checksums") for plate in ledger["plates"])]
    return {name: one for piece in pieces if isinstance(piece, dict) for name, one in piece.items() if isinstance(one, dict)}


def _recorded(folder: Path) -> dict[str, Checksum]:
    found: dict[str, Checksum] = {}
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        record = _read_json(path)
        if record and isinstance(record.get("checksums"), dict):
            found |= {name: one for name, one in record["checksums"].items() if isinstance(one, dict)}
    return found


def _checksums_of_sites(path: Path) -> dict[str, Checksum]:
    """Of the sites' files, from the plate's last file, whose own checksum was compared."""
    import pyarrow.parquet as pq

    note = (pq.read_schema(path).metadata or {}).get(LEDGER_KEY)
    return json.loads(note).get("checksums", {}) if note else {}


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(path.is_file() for path in folder.rglob("*"))


def _are_there(folder: Path, names: list[str]) -> bool:
    return all((folder / str(name)).is_file() for name in names)


def _some(items: list[str]) -> str:
    shown = ", ".join(items[:3]) + (", …" if len(items) > 3 else "")
    return f" ({shown})" if items else ""
