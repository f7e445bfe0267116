"""One embedding run: what is left to do, the doing of it, and the ledger at the end."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cellfast.data.malloc import tune_malloc
from cellfast.embedding.blocks import BlockFiles, BlockWork
from cellfast.embedding.cells import Block, CellSource, PlatePlan
from cellfast.embedding.encoder import CropEncoder, feature_names
from cellfast.embedding.field_source import FieldSource
from cellfast.embedding.ledger import EmbedLedger, make_ledger, write_ledger
from cellfast.embedding.options import EmbedOptions
from cellfast.embedding.pipeline import Pipeline
from cellfast.embedding.plate_files import Finished, Record, seal_content
from cellfast.embedding.plate_formats import PLATE_FORMATS
from cellfast.embedding.processes import BlockQueue, Watch, join_processes
from cellfast.embedding.progress import STAGES, EmbedProgress, StageClock
from cellfast.embedding.reading import ReaderPool
from cellfast.embeddings_folder import (
    EMBEDDINGS_FILE,
    GALLERY,
    RUN_FILE,
    WORK_FOLDER,
    is_ledger,
    ledger_checksums,
)
from cellfast.errors import CellfastError, option
from cellfast.model_file import LoadedModel
from cellfast.screens.ingest import default_workers
from cellfast.screens.unfinished import command_line
from cellfast.storage.folder import Folder, folder_at
from cellfast.storage.locks import LOCK_NAME, OutputLock

if TYPE_CHECKING:
    from cellfast.embedding.decoding import Decoding

# Other hosts may see a file on a shared disk late.
SHOW_UP_S = 60.0


@dataclass(frozen=True)
class EmbedSummary:
    """What an embedding run wrote.

    Attributes:
        cells: cells embedded, by this run and those before it; rows: rows written for them (wells with ``aggregate``).
        plates, plates_kept: all plates, and those an earlier run had finished.
        num_features: feature columns.
        fields_quarantined: fields that could not be used, listed in ``quarantine.csv``.
        batch_size: cells per minibatch at the end; smaller than asked for where memory ran out.
        seconds, stages: time this process took, and the seconds its stages were busy.
        ledger: the whole ledger, as in ``embeddings.json``; None on processes other than the first.
    """

    cells: int
    plates: int
    plates_kept: int
    num_features: int
    rows: int = 0
    fields_quarantined: int = 0
    batch_size: int = 0
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    ledger: EmbedLedger | None = None


def embed_source(
    source: CellSource,
    model: LoadedModel,
    out: str | Path,
    options: EmbedOptions,
    *,
    device: torch.device | str = "cpu",
    show_progress: bool = True,
) -> EmbedSummary:
    """Embed every cell of ``source`` and write the files of its plates, ``embeddings.json`` and ``quarantine.csv``.

    Finished plates are kept; of the others the blocks that an earlier run finished are. Under torchrun every process calls this
    with the same arguments.

    Args:
        out: folder or fsspec URL.

    Raises:
        CellfastError: source and model do not fit, another run holds the output, files of something else are in the way, no space
            left, or no cell at all.
    """
    bits = 8 * np.dtype(source.dtype).itemsize
    model.check_screen(source.name, source.channel_names, source.crop_size, bits)
    device = torch.device(device)
    folder = folder_at(out)
    tune_malloc()
    encoder = CropEncoder(model, device=device, **options.for_encoder())
    store, rank, world_size = join_processes(device)
    if world_size > 1 and options.engine == "ray":
        raise CellfastError(f"{option('engine', 'ray')} spreads the work itself: start it without torchrun")
    run = EmbedRun(source, encoder, folder, options, show_progress and rank == 0)
    with ExitStack() as stack:
        watch = Watch(store, rank, world_size).start() if world_size > 1 else None
        if watch is not None:
            stack.callback(watch.close)
        if rank == 0:
            run.lock = stack.enter_context(OutputLock(folder, tell=run.tell))
        todo, kept = run.plan() if rank == 0 else ([], {})
        run.queue = BlockQueue(store, rank, world_size, todo, watch)
        run.embed_blocks(todo)
        run.queue.wait_for_all()
        ledger = run.close_ledger(kept) if rank == 0 else None
        run.queue.leave()
        return run.summary(ledger, kept)


class EmbedRun:
    """The steps of `embed_source`."""

    queue: BlockQueue

    def __init__(self, source: CellSource, encoder: CropEncoder, out: Folder, options: EmbedOptions, show: bool) -> None:
        self.source, self.encoder, self.out, self.options, self.show = source, encoder, out, options, show
        self.lock: OutputLock | None = None  # of the first process
        self.decoding: Decoding | None = None
        self._counted: dict[str, int] = {}
        model = encoder.loaded
        self.blocks = BlockFiles(out, options, model.digest, feature_names(options.features, encoder.num_features))
        model_name = f"cellfast_{model.model.config.encoder}_{model.digest[:7]}"
        self.formats = [PLATE_FORMATS[name](self.blocks, model_name) for name in dict.fromkeys(options.formats)]
        self.plan_of = {plan.plate: plan for plan in source.plans}
        cores = default_workers()
        # On a CPU the encoder has the cores; a GPU waits for whoever reads.
        self.workers = options.workers or (max(1, min(2, cores)) if encoder.device.type == "cpu" else max(2, cores - 2))
        self.clock = StageClock({"read": self.workers})
        self.cells = 0
        self.notes: list[str] = []

    def plan(self) -> tuple[list[tuple[PlatePlan, list[Block]]], dict[str, list[Finished]]]:
        """What is left to do, plate by plate, and what is finished."""
        todo, kept = [], {}
        stems = {"embeddings", "quarantine", *(plan.file_stem for plan in self.source.plans)}
        self.out.remove_partial_files("", deep=False, stems=stems)
        for folder in (WORK_FOLDER, f"{GALLERY}/profiles", f"{GALLERY}/collated"):
            self.out.remove_partial_files(folder, deep=True)
        self._take_over_records()
        for plan in self.source.plans:
            finished = [] if self.options.force else [one.finished(plan) for one in self.formats]
            if finished and all(self._is_enough(one) for one in finished):
                kept[plan.plate] = finished
                continue
            for one in self.formats:
                one.clear(plan)
            there = set()
            if self.options.force:
                self.blocks.discard(plan)
            else:
                there = self.blocks.finished(plan)
                if not there and self.blocks.others(plan):
                    self.notes.append(f"plate {plan.plate} was begun with other files or options and is begun anew")
            todo.append((plan, [block for block in plan.blocks if block.name not in there]))
        remade = {plate: why for one in self.formats for plate, why in one.remade.items()}
        self.notes += [f"plate {plate} is embedded again: {why}" for plate, why in remade.items()]
        if unrecorded := set().union(*(one.unrecorded for one in self.formats)) & set(kept):
            self.notes.append(
                f"{len(unrecorded)} plates were embedded before the sizes and times of files were recorded; they are kept, "
                f"whatever became of their files: {option('force', True)} embeds them again"
            )
        if changed := [name for one in self.formats for name in one.damaged]:
            self.tell(
                f"{len(changed)} files of finished plates were changed or damaged since ({changed[0]}); their plates are made "
                "again"
            )
        if self.blocks.damaged:
            self.tell(f"{self.blocks.damaged} block files were damaged; those blocks are computed again")
        if todo:
            self.out.write_bytes(RUN_FILE, self._describe_run())
        return todo, kept

    def tell(self, text: str) -> None:
        """A line for the user before there is a progress line."""
        if self.show:
            print(f"embed: {text}", file=sys.stderr)

    def _take_over_records(self) -> None:
        """Tell the formats what the ledger of an earlier run knows of its files."""
        try:
            ledger = json.loads(self.out.read_bytes(EMBEDDINGS_FILE))
        except FileNotFoundError:
            return
        except (ValueError, RecursionError):
            ledger = None
        if not is_ledger(ledger):
            self.tell(
                f"{EMBEDDINGS_FILE} was damaged and is written again; finished plates are looked at for their structure only"
            )
            return
        origins = {name: plate.get("origin") for plate in ledger["plates"] for name in plate["files"] if isinstance(name, str)}
        for name, one in ledger_checksums(ledger).items():
            if isinstance(origins.get(name), dict):
                for plate_format in self.formats:
                    plate_format.records[name] = Record(one, origins[name])

    def _describe_run(self) -> bytes:
        """What is under way, and the command that finishes it: for those who find it unfinished."""
        plates = [{"plate": plan.plate, "files": [one.last_file(plan) for one in self.formats]} for plan in self.source.plans]
        return json.dumps({"command": command_line(), "folder": os.getcwd(), "plates": plates}).encode()

    def _is_enough(self, one: Finished | None) -> bool:
        # A plate without a cell was a mistake that may be mended by now.
        return one is not None and one.ledger.cells_written > 0 and not (one.quarantined and self.options.retry_quarantined)

    def embed_blocks(self, todo: list[tuple[PlatePlan, list[Block]]]) -> None:
        """Do what is left."""
        blocks = [block for _, left in todo for block in left]
        rows = sum(block.stop - block.start for block in blocks)
        known = all(plan.num_cells is not None for plan in self.source.plans)
        total_fields, total_cells = (self.source.num_fields, rows) if known else (rows, 0)
        self._assembly = ThreadPoolExecutor(1, "cellfast-assemble")
        self._assembled: list[Future[None]] = []
        self.decoding = self._choose_decoding(blocks)
        shown = self.show and bool(blocks)
        with EmbedProgress(total_fields, total_cells, self.clock, enabled=shown, count=self.queue.count) as progress:
            if self.queue.rank == 0:
                for line in self._opening_lines(todo):
                    progress.message(f"embed: {line}")
            self.encoder.on_shrink = lambda old, new: progress.message(
                f"embed: out of memory with {old} cells at a time; going on with {new}"
            )
            for plan, left in todo:
                if not left:
                    self._assembled.append(self._assembly.submit(self.assemble, plan))
            try:
                if self.options.engine == "ray":
                    from cellfast.embedding.ray_engine import embed_with_ray

                    embed_with_ray(self.source, self.encoder, self.blocks, blocks, self.plan_of, self._written, progress)
                else:
                    pipeline = Pipeline(
                        self.source,
                        self.encoder,
                        self._open_reader,
                        batch_size=self.options.batch_size,
                        write=self._write,
                        progress=progress,
                    )
                    pipeline.run(self.queue.claims())
            finally:
                self._assembly.shutdown(wait=True)
            for future in self._assembled:
                future.result()
            self.cells = progress.cells

    def _opening_lines(self, todo: list[tuple[PlatePlan, list[Block]]]) -> Iterator[str]:
        yield from self.notes[:12]
        plates = len(self.source.plans)
        if kept := plates - len(todo):
            yield f"{kept} of {plates} plates were embedded before and are kept"
        if begun := sum(len(left) < len(plan.blocks) for plan, left in todo):
            yield f"{begun} plates were begun before and are gone on with"
        if self.decoding is not None:
            yield self.decoding.note

    def _choose_decoding(self, blocks: list[Block]) -> Decoding | None:
        """How fields are decoded; None where there are none to decode."""
        if not isinstance(self.source, FieldSource):
            return None
        if self.queue.rank > 0:  # the first process alone knows what is left
            blocks = [block for plan in self.source.plans for block in plan.blocks]
        if not blocks:
            return None
        from cellfast.embedding.decoding import choose_decoding

        units = [unit for block in blocks for unit in self.source.units(block)]
        return choose_decoding(self.source, units, len(units), self.options, self.encoder.device, self.workers)

    def _count_decoded(self) -> dict[str, int]:
        """Share the counts of fields decoded; returns those of all processes."""
        totals = {}
        for name in ("fields_dali", "fields_host"):
            now = getattr(self.decoding, name, 0)
            totals[name] = self.queue.count(name, now - self._counted.get(name, 0))
            self._counted[name] = now
        return totals

    def _open_reader(self, stream: Any) -> Any:
        if self.decoding is None or self.decoding.used == "host":
            return ReaderPool(self.source, self.workers, self.options.readers)
        from cellfast.embedding.dali_reading import DaliReader

        return DaliReader(self.source, self.workers, self.decoding, self.encoder.device, stream)

    def _check_held(self) -> None:
        """Before anything is written: this run must still have the output, and the other processes must be there."""
        if self.lock is not None:
            self.lock.check()
        self.queue.check()

    def _write(self, work: BlockWork) -> None:
        self._check_held()
        self.blocks.write(self.plan_of[work.block.plate], work)
        self._written(work.block)

    def _written(self, block: Block) -> None:
        for future in self._assembled:
            if future.done():
                future.result()  # no space left, most often: stop now
        self._count_decoded()
        if self.queue.is_last(block.plate):
            self._assembled.append(self._assembly.submit(self.assemble, self.plan_of[block.plate], by_work=True))

    def assemble(self, plan: PlatePlan, *, by_work: bool = False) -> None:
        """Make a plate's files from its blocks and remove the blocks."""
        wait_s = SHOW_UP_S if self.queue.world_size > 1 or self.options.engine == "ray" else 0.0
        ledger, quarantined = self.blocks.notes(plan, wait_s=wait_s)
        content = seal_content(self.source.finish(plan, ledger), quarantined, plan.inputs)
        for one in self.formats:
            self._check_held()
            one.write(plan, content)
        self._check_held()
        self.blocks.discard(plan)
        if by_work:
            self.queue.plate_done()

    def close_ledger(self, kept: dict[str, list[Finished]]) -> EmbedLedger:
        """Check every plate's files, write the ledger, and remove what was only needed on the way."""
        plates = []
        for plan in self.source.plans:
            finished = kept.get(plan.plate) or [one.finished(plan, just_made=True) for one in self.formats]
            missing = [one.last_file(plan) for one, found in zip(self.formats, finished) if found is None]
            if missing:
                raise CellfastError(f"{self.out.path(missing[0])} is not there or lacks rows; run the same command again")
            plates.append((plan, finished))
        decoding = replace(self.decoding, **self._count_decoded()) if self.decoding else None
        model = self.encoder.loaded
        about = {
            "screen": self.source.name,
            "source": self.source.kind,
            "model": str(model.path),
            "model_digest": model.digest,
            **self.options.origin(),
            "num_features": len(self.blocks.names),
            "formats": list(self.options.formats),
            "checksums": {name: one for each in self.formats for name, one in each.collate(self.source.plans).items()},
            # What this run did: the pixels, and so the rows, are the same either way.
            "decode": decoding.record() if decoding else None,
            "notes": [*self.source.notes, *self.notes, *(decoding.closing_notes() if decoding else [])],
            "unmatched_metadata": list(self.source.unmatched),
            "unused_metadata": list(self.source.unused),
        }
        ledger = make_ledger(plates, about)
        write_ledger(self.out, ledger)
        for name in self.out.names(WORK_FOLDER):
            if name != LOCK_NAME.rsplit("/", 1)[-1]:
                self.out.remove(f"{WORK_FOLDER}/{name}")
        return ledger

    def summary(self, ledger: EmbedLedger | None, kept: dict[str, Any]) -> EmbedSummary:
        """What the caller is told."""
        totals = ledger.totals if ledger else {}
        return EmbedSummary(
            cells=totals.get("cells", self.cells),
            plates=len(self.source.plans),
            plates_kept=len(kept),
            num_features=len(self.blocks.names),
            rows=totals.get("rows", 0),
            fields_quarantined=totals.get("fields_quarantined", 0),
            batch_size=self.encoder.most or self.options.batch_size,
            seconds=self.clock.elapsed(),
            stages={stage: self.clock.seconds()[stage] for stage in STAGES},
            ledger=ledger,
        )
