"""The files of a plate, in whatever format: written from its blocks, recognised when they are there and whole.

The last file of a plate carries its seal: what its rows are made from, what became of its cells, which files it has. Beside it,
in ``.embed`` and then in ``embeddings.json``, lies a record of that file's checksum.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from cellfast.embedding.blocks import BlockFiles
from cellfast.embedding.cells import PlatePlan
from cellfast.embeddings_folder import RECORDS, Checksum, checksum
from cellfast.errors import CellfastError, option
from cellfast.printable import masked_values
from cellfast.screens.inputs import changed_files, changed_options
from cellfast.screens.ledger import PlateLedger


@dataclass(frozen=True)
class Record:
    """What is known of a plate's last file beside it: its checksum, and what its rows were made from."""

    checksum: Checksum
    origin: dict[str, Any]


@dataclass(frozen=True)
class Finished:
    """A plate that is done: its ledger, its quarantined fields, its files relative to the output folder, and the last one's name
    and record."""

    ledger: PlateLedger
    quarantined: list[dict[str, str]]
    files: list[str]
    last_file: str
    record: Record


class PlateFiles(ABC):
    """Writes a plate's files from its blocks in one format, and recognises those that are there.

    Args:
        blocks: the blocks of the run.
        model: names the model in the paths of files.
    """

    kind: str

    def __init__(self, blocks: BlockFiles, model: str) -> None:
        self.blocks, self.model, self.out, self.names = blocks, model, blocks.out, blocks.names
        self.dtype, self.of_wells = blocks.options.dtype, blocks.options.aggregate == "well"
        # Of the ledger that an earlier run wrote, by the last file of a plate.
        self.records: dict[str, Record] = {}
        self.damaged: list[str] = []  # files that an earlier run finished and that changed since
        # Plates whose inputs changed, and how; plates made before files were recorded.
        self.remade: dict[str, str] = {}
        self.unrecorded: set[str] = set()

    @abstractmethod
    def last_file(self, plan: PlatePlan) -> str:
        """The file that is written last, and carries the seal."""

    @abstractmethod
    def write(self, plan: PlatePlan, content: dict[str, Any]) -> None:
        """Write the plate's files; ``content`` goes into the seal."""

    @abstractmethod
    def read_seal(self, name: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None, int]:
        """(origin, {ledger, quarantined, inputs, files}, rows) of a plate's last file; None where it has none."""

    def seal(
        self, plan: PlatePlan, content: dict[str, Any], files: list[str], checksums: dict[str, Checksum] | None = None
    ) -> tuple[str, str]:
        """(origin, content) of a plate's last file, as JSON; ``checksums`` are those of the files before it."""
        content = {
            **content,
            "files": files if len(files) < 50 else files[-1:],
            **({"checksums": checksums} if checksums else {}),
        }
        return json.dumps(self.blocks.origin(plan), sort_keys=True), json.dumps(content)

    @contextmanager
    def sealing(self, plan: PlatePlan) -> Iterator[Path]:
        """Yield a local path that becomes the plate's last file; its record is there before it is."""
        name = self.last_file(plan)
        with self.out.writing(name) as path:
            yield path
            with open(path, "rb") as handle:
                record = {"checksums": {name: checksum(handle)}, "origin": self.blocks.origin(plan)}
            self.out.write_bytes(self._record_file(plan), json.dumps(record).encode())

    def _record_file(self, plan: PlatePlan) -> str:
        return f"{RECORDS}/{plan.file_stem}.{self.kind}.json"

    def _record(self, plan: PlatePlan) -> Record | None:
        name = self.last_file(plan)
        try:
            record = json.loads(self.out.read_bytes(self._record_file(plan)))
            return Record(dict(record["checksums"][name]), dict(record["origin"]))
        except FileNotFoundError:
            return self.records.get(name)
        except (ValueError, KeyError, TypeError):
            return Record({}, self.blocks.origin(plan))  # a damaged record: no file fits it

    def finished(self, plan: PlatePlan, *, just_made: bool = False) -> Finished | None:
        """What an earlier run finished of this plate, or None; files that are not as they were written are noted in ``damaged``.

        Args:
            just_made: this run wrote the files: they are not read again.

        Raises:
            CellfastError: the file is damaged and nothing is known of it, is not ours, or was made from something else.
        """
        name = self.last_file(plan)
        if not self.out.exists(name):
            return None
        record = self._record(plan)
        if record is not None and not just_made and self.out.checksum(name) != record.checksum:
            self._check_origin(plan, record.origin, None)  # a damaged file is not parsed
            self.damaged.append(name)
            return None
        try:
            before, content, rows = self.read_seal(name)
        except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, RuntimeError, MemoryError) as error:
            raise CellfastError(
                f"{self.out.path(name)}: damaged or of another format ({error}); delete it, or use {option('force', True)} to "
                "make it again"
            ) from error
        if before is None:
            raise CellfastError(
                f"{self.out.path(name)}: not written by cellfast embed; choose another folder, or use {option('force', True)} to "
                "replace it"
            )
        if not self._check_origin(plan, before, content) or content is None:
            return None
        if not just_made and (changed := self._changed_files(content)):
            self.damaged += changed
            return None
        ledger = PlateLedger.from_json(content["ledger"])
        if not self.of_wells and rows != ledger.cells_written:
            return None
        if record is None:  # by an earlier version
            record = Record(self.out.checksum(name), self.blocks.origin(plan))
        return Finished(ledger, content["quarantined"], content["files"], name, record)

    def _changed_files(self, content: dict[str, Any]) -> list[str]:
        """Files of the plate beside the last one that are not as they were written."""
        known = content.get("checksums", {})
        return [name for name, one in known.items() if not self.out.exists(name) or self.out.checksum(name) != one]

    def _check_origin(self, plan: PlatePlan, before: dict[str, Any], content: dict[str, Any] | None) -> bool:
        """True: made from the same. False: its fields were mended since, and it is to be made again.

        Raises:
            CellfastError: made from something else.
        """
        origin = json.loads(json.dumps(self.blocks.origin(plan)))
        before = {"tta": 1, "dtype": "float32", "aggregate": "none", **before}
        inputs, changed = changed_options(before, origin)
        if changed and content is not None and not content["ledger"].get("cells_written"):
            return False  # nothing is lost: there is no cell in it
        if changed:
            changed.sort(key=lambda k: (k != "model", k))
            different = "; ".join(f"{k} was {_short(before.get(k))}, is {_short(origin.get(k))}" for k in changed)
            raise CellfastError(
                f"{self.out.path(self.last_file(plan))}: embedded before from something else ({different}); choose another "
                f"folder, or use {option('force', True)} to replace it"
            )
        recorded = content.get("inputs") if content is not None else None
        files = changed_files(recorded, plan.inputs) if recorded is not None and not inputs else None
        if inputs or files:
            self.remade[plan.plate] = "; ".join([*inputs, *([files] if files else [])])
            return False
        if content is not None and recorded is None and plan.inputs:
            self.unrecorded.add(plan.plate)
        return True

    def clear(self, plan: PlatePlan) -> None:
        """Remove what a killed run left of a plate that is about to be made."""
        return  # most formats have nothing of the kind

    def collate(self, plans: list[PlatePlan]) -> dict[str, Checksum]:
        """Write what is made of all plates together; returns the checksums of those files."""
        return {}


def seal_content(ledger: PlateLedger, quarantined: list[dict[str, str]], inputs: dict[str, str]) -> dict[str, Any]:
    """What a plate's last file says of its cells and of the files it is made from."""
    return masked_values({"ledger": asdict(ledger), "quarantined": quarantined, "inputs": inputs})


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) > 24 else text
