"""What both ingests share: finished plates are recognised, plates run side by side, the ledger adds up."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cellfast.atomic import remove_abandoned, told_when_full
from cellfast.errors import CellfastError, option
from cellfast.fresh_processes import FreshProcesses
from cellfast.printable import masked_values
from cellfast.progress import Progress
from cellfast.screens import unfinished
from cellfast.screens.crop_store import PlateStore
from cellfast.screens.crop_writer import plate_file_name
from cellfast.screens.inputs import changed_files, changed_options
from cellfast.screens.ledger import PlateLedger
from cellfast.storage.locks import FolderLock

# Set in each worker process by `_begin_worker`: how many fields or files are done, over all workers.
_counter: Any = None


@dataclass(frozen=True)
class PlateTask:
    """One plate's share of an ingest; ``payload`` is for the function that does the work.

    ``passes``: how often the work counts each unit, 2 where every image is first searched for nuclei and then cut.
    ``inputs``: the files it is made from, as `cellfast.screens.inputs` records them.
    """

    plate: str
    path: Path
    units: int
    options: dict[str, Any]
    payload: Any
    passes: int = 1
    inputs: dict[str, str] = field(default_factory=dict)


def plate_path(screen: Path, plate: str) -> Path:
    """Where a plate's store lies in a screen folder."""
    return screen / "plates" / plate_file_name(plate)


def finished_ledger(task: PlateTask) -> tuple[PlateLedger | None, str]:
    """The ledger of a plate that an earlier run finished from the same files with the same options; None, and why, where there is
    none to keep.

    Of a plate that was made before files were recorded the ledger comes with a reason.

    Raises:
        CellfastError: the plate is there but was made otherwise (names the option), or it is damaged.
    """
    if not task.path.exists():
        return None, ""
    store = PlateStore(task.path)
    if store.ledger is not None and not store.ledger.get("cells_written"):
        return None, ""  # no cell is in it: that mistake may be mended by now, whatever it was
    wanted = masked_values(json.loads(json.dumps(task.options)))
    inputs, options = changed_options(store.options, wanted)
    for name in options:
        raise CellfastError(
            f"{task.path}: this plate was made with {name} = {store.options.get(name)!r}, now {name} = {wanted.get(name)!r} "
            f"is asked for; ingest into another folder, or use {option('force', True)} to make it again"
        )
    if store.ledger is None:
        raise CellfastError(f"{task.path}: the plate carries no ledger; use {option('force', True)} to make it again")
    recorded = store.ledger.get("inputs")
    changed = changed_files(recorded, task.inputs) if recorded is not None and not inputs else None
    if inputs or changed:
        return None, "; ".join([*inputs, *([changed] if changed else [])])
    return PlateLedger.from_json(store.ledger), "" if recorded is not None else "made before files were recorded"


def stored_ledger(ledger: PlateLedger, task: PlateTask) -> dict[str, Any]:
    """The ledger as it is kept in the plate's store, with the files that the plate is made from."""
    return {**asdict(ledger), "inputs": task.inputs}


def _begin_worker(counter: Any) -> None:
    global _counter
    _counter = counter


def count_unit(units: int = 1, *, searched: bool = False) -> None:
    """Tell the progress bar that ``units`` more are done, or only searched for nuclei; called where the work is done."""
    if _counter is not None:
        with _counter.get_lock():
            _counter[0 if searched else 1] += units


class _Shown:
    """The progress bar of an ingest: units done, or where they are searched first, both passes."""

    def __init__(self, progress: Progress, todo: Sequence[PlateTask]) -> None:
        self._progress, self._shown = progress, 0
        self._twice = sum(task.units for task in todo if task.passes > 1)
        self._once = sum(task.units for task in todo)

    def update(self, searched: int, done: int) -> None:
        note = f"searched for nuclei {searched:,}, cut {done:,} of {self._once:,}" if self._twice else None
        self._progress.advance(searched + done - self._shown, note)
        self._shown = searched + done


def run_plates(
    tasks: Sequence[PlateTask],
    work: Callable[[PlateTask], PlateLedger],
    *,
    workers: int,
    force: bool,
    unit: str,
    show_progress: bool = True,
) -> tuple[list[PlateLedger], list[str]]:
    """Do every plate that is not finished, ``workers`` at a time in processes of their own.

    The first error stops the plates that have not begun; those under way end, those finished stay.

    Returns:
        (ledgers, notes): all ledgers in order of ``tasks``; which plates were made again, and why.
    """
    ledgers: dict[str, PlateLedger] = {}
    todo: list[PlateTask] = []
    notes: list[str] = []
    unrecorded = 0
    for task in tasks:
        ledger, why = (None, "") if force else finished_ledger(task)
        if ledger is None:
            todo.append(task)
            if why:
                notes.append(f"plate {task.plate} is made again: {why}")
        else:
            ledgers[task.plate] = ledger
            unrecorded += bool(why)
    if unrecorded:
        notes.append(
            f"{unrecorded} plates were made before the sizes and times of files were recorded; they are kept, whatever became of "
            f"their files: {option('force', True)} makes them again"
        )
    if todo:
        unfinished.begin(todo[0].path.parent.parent, [task.plate for task in tasks])
    total = sum(task.units * task.passes for task in todo)
    unit = unit if total == sum(task.units for task in todo) else "steps"
    with Progress("ingest", total, unit, enabled=show_progress) as progress:
        shown = _Shown(progress, todo)
        for note in notes[:12]:
            progress.message(f"ingest: {note}")
        if ledgers:
            refused = sum(sum(ledger.fields_refused.values()) for ledger in ledgers.values())
            again = (
                f"; {refused:,} of their fields were refused then: {option('force', True)} tries them again" if refused else ""
            )
            progress.message(f"ingest: {len(ledgers)} of {len(tasks)} plates were finished before and are kept{again}")
        progress.enabled &= bool(todo)
        if workers <= 1 or len(todo) <= 1:
            global _counter
            _counter = _Inline(shown)
            try:
                for task in todo:
                    ledgers[task.plate] = _do(work, task)
            finally:
                _counter = None
        elif todo:
            _run_parallel(todo, work, ledgers, workers, shown)
    return [ledgers[task.plate] for task in tasks], notes


def _do(work: Callable[[PlateTask], PlateLedger], task: PlateTask) -> PlateLedger:
    with told_when_full(task.path):
        return work(task)


class _Inline:
    """Stands in for the shared counters where the work runs in this process."""

    def __init__(self, shown: _Shown) -> None:
        self._shown, self._counts = shown, [0, 0]

    def get_lock(self) -> _Inline:
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None

    def __getitem__(self, which: int) -> int:
        return self._counts[which]

    def __setitem__(self, which: int, count: int) -> None:
        self._counts[which] = count
        self._shown.update(*self._counts)


def _run_parallel(
    todo: list[PlateTask],
    work: Callable[[PlateTask], PlateLedger],
    ledgers: dict[str, PlateLedger],
    workers: int,
    shown: _Shown,
) -> None:
    context = FreshProcesses()
    counter = context.Array("q", 2)
    with ProcessPoolExecutor(min(workers, len(todo)), mp_context=context, initializer=_begin_worker, initargs=(counter,)) as pool:
        plate_of = {pool.submit(_do, work, task): task.plate for task in todo}
        pending = set(plate_of)
        try:
            while pending:
                finished, pending = wait(pending, timeout=0.3, return_when=FIRST_COMPLETED)
                shown.update(*counter[:])
                for future in finished:
                    ledgers[plate_of[future]] = future.result()
        except BrokenProcessPool as error:
            raise CellfastError(
                f"a process of the ingest ended without a word, most likely for want of memory; use fewer {option('workers')} "
                f"(now {workers}). The same command goes on with the plates that are not finished"
            ) from error
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def default_workers() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


@contextmanager
def ingesting(screen: Path) -> Iterator[None]:
    """Keep other ingests out of the screen folder inside the block, and remove what killed ones left half written.

    Raises:
        CellfastError: another ingest is writing there (names its process and host).
    """
    with FolderLock(screen, "cellfast ingest"):
        remove_abandoned(screen)
        remove_abandoned(screen / "plates")
        yield


def other_plates(screen: Path, tasks: Sequence[PlateTask]) -> list[str]:
    """A note naming the plates in the screen folder that are not of this ingest: they stay part of the screen, this ledger leaves
    them out."""
    ours = {task.path.name for task in tasks}
    others = sorted(p.stem for p in (screen / "plates").glob("*.h5") if not p.name.startswith(".") and p.name not in ours)
    if not others:
        return []
    shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
    return [f"plates of earlier ingests in the folder, part of the screen but not of this ledger: {shown}"]
