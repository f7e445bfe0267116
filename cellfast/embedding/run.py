"""One embedding run: what is left to do, the doing of it, and the account at the end."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cellfast.data.malloc import tune_malloc
from cellfast.embedding.account import Account, write_account
from cellfast.embedding.encoder import CropEncoder, feature_names
from cellfast.embedding.field_source import FieldSource
from cellfast.embedding.options import EmbedOptions
from cellfast.embedding.outputs import Finished, PlateOutput, Seal, open_output, plate_note
from cellfast.embedding.parts import PartFiles, PartWork
from cellfast.embedding.pipeline import Pipeline
from cellfast.embedding.sources import CellSource, Part, PlatePlan
from cellfast.embedding.stages import STAGES, EmbedProgress, StageClock
from cellfast.embedding.work import LocalWork, SharedWork, Watch, join_processes
from cellfast.embeddings_folder import (
    ACCOUNT_FILE,
    GALLERY,
    PARTS,
    RECORDS,
    RUN_FILE,
    account_checksums,
    is_account,
)
from cellfast.errors import CellfastError
from cellfast.model_file import LoadedModel
from cellfast.screens.ingest import default_workers
from cellfast.screens.unfinished import command_line
from cellfast.storage.folder import Folder, folder_at
from cellfast.storage.locks import OutputLock

if TYPE_CHECKING:
    from cellfast.embedding.decoding import Decoding

# Other hosts may see a file on a shared disk late.
SHOW_UP_S = 60.0


@dataclass(frozen=True)
class EmbedSummary:
    """What an embedding run wrote.

    Attributes:
        cells: cells embedded, by this run and those before it; rows: rows written for them (wells with ``aggregate_wells``).
        plates, plates_kept: all plates, and those an earlier run had finished.
        num_features: feature columns.
        fields_quarantined: fields that could not be used, listed in ``quarantine.csv``.
        batch_size: cells per minibatch at the end; smaller than asked for where memory ran out.
        seconds, stages: time this process took, and the seconds its stages were busy.
        account: the whole account, as in ``embeddings.json``; None on processes other than the first.
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
    account: Account | None = None


def embed_source(
    source: CellSource,
    model: LoadedModel,
    out: str | Path,
    options: EmbedOptions,
    *,
    device: torch.device | str = "cpu",
    show_progress: bool = True,
    notes: Sequence[str] = (),
    unmatched: Sequence[str] = (),
    unused: Sequence[str] = (),
) -> EmbedSummary:
    """Embed every cell of ``source`` and write the files of its plates, ``embeddings.json`` and ``quarantine.csv``.

    Finished plates are kept; of the others the parts that an earlier run finished are. Under torchrun every process calls this with the
    same arguments.

    Args:
        out: folder or fsspec URL.
        notes, unmatched, unused: for the account.

    Raises:
        CellfastError: source and model do not fit, another run holds the output, files of something else are in the way, no space left,
            or no cell at all.
    """
    bits = 8 * np.dtype(source.dtype).itemsize
    model.check_screen(source.name, source.channel_names, source.crop_size, bits)
    device = torch.device(device)
    place = folder_at(out)
    tune_malloc()
    encoder = CropEncoder(
        model,
        features=options.features,
        device=device,
        amp=options.amp,
        tta=options.tta,
        compile=options.compile,
        batch_size=options.batch_size,
    )
    store, rank, world_size = join_processes(device)
    if store is not None and options.engine == "ray":
        raise CellfastError("--engine ray spreads the work itself: start it without torchrun")
    run = _Run(source, encoder, place, options, show_progress and rank == 0)
    with ExitStack() as stack:
        watch = Watch(store, rank, world_size).start() if store is not None else None
        if watch is not None:
            stack.callback(watch.close)
        if rank == 0:
            run.lock = stack.enter_context(OutputLock(place, tell=run.tell))
        todo, kept = run.look_around() if rank == 0 else ([], {})
        if store is None:
            run.work = LocalWork([(plan, parts) for plan, parts in todo if parts])
        else:
            left = [(p, parts) for p, parts in todo if parts] if rank == 0 else None
            run.work = SharedWork(store, rank, world_size, left, watch)
        run.go(todo)
        run.work.wait_for_all()
        account = None
        if rank == 0:
            account = run.close_account(kept, notes, unmatched, unused)
        run.work.leave()
        return run.summary(account, kept)


class _Run:
    """The parts of `embed_source`."""

    work: LocalWork | SharedWork

    def __init__(self, source: CellSource, encoder: CropEncoder, place: Folder, options: EmbedOptions, show: bool) -> None:
        self.source, self.encoder, self.place, self.options, self.show = source, encoder, place, options, show
        self.lock: OutputLock | None = None  # of the first process
        self.decoding: Decoding | None = None
        self._counted: dict[str, int] = {}
        model = encoder.loaded
        self.names = feature_names(options.features, encoder.num_features)
        self.parts = PartFiles(place, options, model.digest, encoder.num_features)
        gallery_name = f"cellfast_{model.model.config.encoder}_{model.digest[:7]}"
        self.outputs: list[PlateOutput] = [
            open_output(name, place, self.parts, self.names, gallery_name) for name in dict.fromkeys(options.formats)
        ]
        self.plan_of = {plan.plate: plan for plan in source.plans}
        cores = default_workers()
        # On a CPU the encoder has the cores; a GPU waits for whoever reads.
        self.workers = options.workers or (max(1, min(2, cores)) if encoder.device.type == "cpu" else max(2, cores - 2))
        self.clock = StageClock({"read": self.workers})
        self.cells = 0
        self.notes: list[str] = []
        self._scaling: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._scaling_lock = threading.Lock()

    def look_around(self) -> tuple[list[tuple[PlatePlan, list[Part]]], dict[str, list[Finished]]]:
        """What is left to do, plate by plate, and what is finished."""
        todo, kept = [], {}
        stems = {"embeddings", "quarantine", *(plan.file_stem for plan in self.source.plans)}
        self.place.remove_partial_files("", deep=False, stems=stems)
        for folder in (".embed", f"{GALLERY}/profiles", f"{GALLERY}/collated"):
            self.place.remove_partial_files(folder, deep=True)
        self._take_over_seals()
        for plan in self.source.plans:
            finished = [] if self.options.force else [output.finished(plan) for output in self.outputs]
            if finished and all(self._is_enough(one) for one in finished):
                kept[plan.plate] = finished
                continue
            for output in self.outputs:
                output.clear(plan)
            there = set()
            if self.options.force:
                self.parts.discard(plan)
            else:
                there = self.parts.finished(plan)
                if not there and self.parts.others(plan):
                    self.notes.append(f"plate {plan.plate} was begun with other files or options and is begun anew")
            todo.append((plan, [part for part in plan.parts if part.name not in there]))
        remade = {plate: why for output in self.outputs for plate, why in output.remade.items()}
        self.notes += [f"plate {plate} is embedded again: {why}" for plate, why in remade.items()]
        if unrecorded := set().union(*(output.unrecorded for output in self.outputs)) & set(kept):
            self.notes.append(
                f"{len(unrecorded)} plates were embedded before the sizes and times of files were recorded; they are kept, whatever became "
                "of their files: --force embeds them again"
            )
        if changed := [name for output in self.outputs for name in output.damaged]:
            self.tell(
                f"{len(changed)} files of finished plates were changed or damaged since ({changed[0]}); their plates are made again"
            )
        if self.parts.damaged:
            self.tell(f"{self.parts.damaged} part files were damaged; those parts are computed again")
        if todo:
            self.place.write_bytes(RUN_FILE, self._describe_run())
        return todo, kept

    def tell(self, text: str) -> None:
        """A line for the user before there is a progress line."""
        if self.show:
            print(f"embed: {text}", file=sys.stderr)

    def _take_over_seals(self) -> None:
        """Tell the outputs what the account of an earlier run knows of its files."""
        try:
            account = json.loads(self.place.read_bytes(ACCOUNT_FILE))
        except FileNotFoundError:
            return
        except (ValueError, RecursionError):
            account = None
        if not is_account(account):
            self.tell(f"{ACCOUNT_FILE} was damaged and is written again; finished plates are looked at for their structure only")
            return
        origins = {name: plate.get("origin") for plate in account["plates"] for name in plate["files"] if isinstance(name, str)}
        for name, one in account_checksums(account).items():
            if isinstance(origins.get(name), dict):
                for output in self.outputs:
                    output.seals[name] = Seal(one, origins[name])

    def _describe_run(self) -> bytes:
        """What is under way, and the command that finishes it: for those who find it unfinished."""
        plates = [
            {"plate": plan.plate, "files": [output.sealing_file(plan) for output in self.outputs]} for plan in self.source.plans
        ]
        return json.dumps({"command": command_line(), "folder": os.getcwd(), "plates": plates}).encode()

    def _is_enough(self, one: Finished | None) -> bool:
        if one is None:
            return False
        # A plate without a cell was a mistake that may be mended by now.
        return one.ledger.cells_written > 0 and not (one.quarantined and self.options.retry_quarantined)

    def go(self, todo: list[tuple[PlatePlan, list[Part]]]) -> None:
        """Do what is left."""
        options = self.options
        parts = [part for _, left in todo for part in left]
        whole = sum(len(left) == len(plan.parts) for plan, left in todo)
        known = all(plan.num_cells is not None for plan in self.source.plans)
        total_cells = sum(part.stop - part.start for part in parts) if known else 0
        total_fields = sum(part.stop - part.start for part in parts) if not known else self.source.num_fields
        self._assembly = ThreadPoolExecutor(1, "cellfast-assemble")
        self._assembled: list[Future[None]] = []
        shown = self.show and bool(parts)
        self.decoding = self._choose_decoding(parts)
        with EmbedProgress(total_fields, total_cells, self.clock, enabled=shown, share=self.work.share) as progress:
            for note in self.notes[:12]:
                progress.message(f"embed: {note}")
            kept = len(self.source.plans) - len(todo)
            if self.work.rank == 0 and kept:
                progress.message(f"embed: {kept} of {len(self.source.plans)} plates were embedded before and are kept")
            if self.work.rank == 0 and len(todo) > whole:
                progress.message(f"embed: {len(todo) - whole} plates were begun before and are gone on with")
            self.encoder.on_shrink = lambda old, new: progress.message(
                f"embed: out of memory with {old} cells at a time; going on with {new}"
            )
            if self.decoding is not None and self.work.rank == 0:
                progress.message(f"embed: {self.decoding.note}")
            for plan, left in todo:
                if not left:
                    self._assembled.append(self._assembly.submit(self.assemble, plan))
            try:
                if options.engine == "ray":
                    from cellfast.embedding.ray_engine import embed_with_ray

                    embed_with_ray(self.source, self.encoder, self.parts, parts, self.plan_of, options, self._written, progress)
                else:
                    Pipeline(
                        self.source,
                        self.encoder,
                        batch_size=options.batch_size,
                        scaling=self.scaling,
                        write=self._write,
                        workers=self.workers,
                        readers=options.readers,
                        clock=self.clock,
                        progress=progress,
                        open_reader=self._dali_reader if self.decoding and self.decoding.used == "dali" else None,
                    ).run(self.work.claims())
            finally:
                self._assembly.shutdown(wait=True)
            for future in self._assembled:
                future.result()
            self.cells = progress.cells

    def _choose_decoding(self, parts: list[Part]) -> Decoding | None:
        """How fields are decoded; None where there are none to decode."""
        if not isinstance(self.source, FieldSource):
            return None
        if self.work.rank > 0:  # the first process alone knows what is left
            parts = [part for plan in self.source.plans for part in plan.parts]
        if not parts:
            return None
        from cellfast.embedding.decoding import choose_decoding

        units = [unit for part in parts for unit in self.source.units(part)]
        return choose_decoding(self.source, units, len(units), self.options, self.encoder.device, self.workers)

    def _count_decoded(self) -> dict[str, int]:
        """Share the counts of fields decoded; returns those of all processes."""
        totals = {}
        for name in ("fields_dali", "fields_host"):
            now = getattr(self.decoding, name, 0)
            totals[name] = self.work.count(name, now - self._counted.get(name, 0))
            self._counted[name] = now
        return totals

    def _dali_reader(self, stream: Any) -> Any:
        from cellfast.embedding.dali_reading import DaliReader

        return DaliReader(self.source, self.workers, self.decoding, self.encoder.device, stream)

    def scaling(self, plate: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(low, high), float32 [C], that the plate's pixels are scaled by."""
        if self.encoder.loaded.scaling != "plate":
            plate = ""
        with self._scaling_lock:
            if plate not in self._scaling:
                if plate:
                    bounds = [torch.tensor(v, dtype=torch.float32) for v in self.source.plate_scaling(plate)]
                else:
                    bounds = [self.encoder.loaded.low, self.encoder.loaded.high]
                self._scaling[plate] = (bounds[0], bounds[1])
            return self._scaling[plate]

    def _check_held(self) -> None:
        """Before anything is written: this run must still have the output, and the other processes must be there."""
        if self.lock is not None:
            self.lock.check()
        self.work.check()

    def _write(self, work: PartWork) -> None:
        self._check_held()
        self.parts.write(self.plan_of[work.part.plate], work)
        self._written(work.part)

    def _written(self, part: Part) -> None:
        for future in self._assembled:
            if future.done():
                future.result()  # no space left, most often: stop now
        self._count_decoded()
        if self.work.is_last(part.plate):
            self._assembled.append(self._assembly.submit(self.assemble, self.plan_of[part.plate], by_work=True))

    def assemble(self, plan: PlatePlan, *, by_work: bool = False) -> None:
        """Make a plate's files from its parts and remove the parts."""
        wait_s = SHOW_UP_S if self.work.world_size > 1 or self.options.engine == "ray" else 0.0
        ledger, quarantined = self.parts.notes(plan, wait_s=wait_s)
        note = plate_note(self.source.finish(plan, ledger), quarantined, plan.inputs)
        for output in self.outputs:
            self._check_held()
            output.write(plan, note)
        self._check_held()
        self.parts.discard(plan)
        if by_work:
            self.work.plate_done()

    def close_account(
        self, kept: dict[str, list[Finished]], notes: Sequence[str], unmatched: Sequence[str], unused: Sequence[str]
    ) -> Account:
        """Check every plate's files, write the account, and remove what was only needed on the way."""
        plates = []
        for plan in self.source.plans:
            finished = kept.get(plan.plate) or [output.finished(plan, just_made=True) for output in self.outputs]
            missing = [output.sealing_file(plan) for output, one in zip(self.outputs, finished) if one is None]
            if missing:
                raise CellfastError(f"{self.place.path(missing[0])} is not there or lacks rows; run the same command again")
            plates.append((plan, [one for one in finished if one is not None]))
        decoding = replace(self.decoding, **self._count_decoded()) if self.decoding else None
        account = write_account(
            self.place,
            self.source,
            self.encoder,
            self.options,
            self.names,
            plates,
            self.outputs,
            [*notes, *self.notes, *(decoding.closing_notes() if decoding else [])],
            unmatched,
            unused,
            decoding.record() if decoding else None,
        )
        for name in (PARTS, RECORDS, RUN_FILE):
            self.place.remove(name)
        return account

    def summary(self, account: Account | None, kept: dict[str, Any]) -> EmbedSummary:
        """What the caller is told."""
        totals = account.totals if account else {}
        return EmbedSummary(
            cells=totals.get("cells", self.cells),
            plates=len(self.source.plans),
            plates_kept=len(kept),
            num_features=len(self.names),
            rows=totals.get("rows", 0),
            fields_quarantined=totals.get("fields_quarantined", 0),
            batch_size=self.encoder.most or self.options.batch_size,
            seconds=self.clock.elapsed(),
            stages={stage: self.clock.seconds()[stage] for stage in STAGES},
            account=account,
        )
