"""Writing a simulated screen: TIFFs, image table, MoA table, centroids, truth; whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from cellfast import __version__
from cellfast.errors import CellfastError, option
from cellfast.fresh_processes import FreshProcesses
from cellfast.progress import Progress
from cellfast.screens.simulate.cells import NoiseBank
from cellfast.screens.simulate.design import (
    STREAM_FIELD,
    STREAM_NOISE,
    STREAM_WELL,
    Plate,
    SimulationConfig,
    design_screen,
    well_position,
)
from cellfast.screens.simulate.fields import FieldTruth, at_place, draw_field
from cellfast.screens.simulate.tables import (
    LOCATION_COLUMNS,
    SimulationSummary,
    file_names,
    place_effects,
    plate_optics,
    write_table,
    write_tables,
)

# image.csv is put in place last: where it stands the screen is complete. simulation.json is first: it marks the rest as ours.
_PRODUCTS = ("simulation.json", "images", "locations", "cells.csv", "moa.csv", "image.csv")


@dataclass(frozen=True)
class _WellTask:
    config: SimulationConfig
    plate: str
    plate_position: int
    week: int
    well: str
    effect: object
    folder: str


_noise: dict[tuple[float, int], NoiseBank] = {}


def _noise_bank(config: SimulationConfig) -> NoiseBank:
    key = (config.scale, config.seed)
    if key not in _noise:
        _noise.clear()
        _noise[key] = NoiseBank(config.scale, config.stream(STREAM_NOISE))
    return _noise[key]


def _write_well(task: _WellTask) -> list[tuple[FieldTruth, int]]:
    """Draw and write all fields of a well; returns the truth and the bytes written of each (runs in a worker process)."""
    import tifffile

    config, folder = task.config, Path(task.folder)
    images = folder / "images" / task.plate.split("_")[0] / task.plate
    locations = folder / "locations" / task.plate
    position = well_position(task.well)
    optics = at_place(plate_optics(config, task.week, task.plate_position), place_effects(config, task.week), position)
    written = []
    for site in range(1, config.sites + 1):
        image, truth = draw_field(
            task.effect,
            optics,
            config.stream(STREAM_WELL, task.plate_position, position),
            config.stream(STREAM_FIELD, task.plate_position, position, site),
            cells_per_field=config.cells_per_field,
            field_size=config.field_size,
            scale=config.scale,
            noise=_noise_bank(config),
        )
        size = 0
        for plane, name in zip(image, file_names(config, task.plate_position, task.well, site)):
            tifffile.imwrite(
                images / name,
                plane,
                photometric="minisblack",
                compression=None if config.compression == "none" else config.compression,
                metadata=None,
                software=f"cellfast {__version__}",
            )
            size += (images / name).stat().st_size
        write_table(
            locations / f"{task.well}-{site}-Nuclei.csv",
            LOCATION_COLUMNS,
            ((number, f"{x:.3f}", f"{y:.3f}") for number, (x, y) in enumerate(zip(truth.x, truth.y), 1)),
        )
        written.append((truth, size))
    return written


def _prepare(out: Path, force: bool) -> Path:
    """Check that ``out`` can take the screen, changing nothing in it; returns a new empty folder inside it for the work."""
    if out.exists() and not out.is_dir():
        raise CellfastError(f"{out} is a file: give a folder for the simulated screen")
    # Hidden partial folders of a killed run hold nothing of the user's.
    present = sorted(p.name for p in out.iterdir() if not _is_partial(p)) if out.exists() else []
    if present and not force:
        shown = ", ".join(present[:5]) + (", …" if len(present) > 5 else "")
        raise CellfastError(
            f"{out} is not empty (it holds {shown}): give another folder, or {option('force', True)} to replace a simulated screen there"
        )
    taken = [name for name in present if name in _PRODUCTS]
    if taken and not _is_simulation(out):
        raise CellfastError(
            f"{out} holds {', '.join(taken)} but no simulation.json of cellfast: {option('force', True)} replaces only what cellfast "
            "simulated; give another folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    for stale in out.iterdir():
        if _is_partial(stale):
            shutil.rmtree(stale)
    work = out / f".simulation-{os.getpid()}.partial"
    work.mkdir()
    return work


def _is_partial(path: Path) -> bool:
    return path.name.startswith(".simulation-") and path.name.endswith(".partial")


def _is_simulation(out: Path) -> bool:
    try:
        found = json.loads((out / "simulation.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and str(found.get("format", "")).startswith("cellfast simulation")


def _publish(work: Path, out: Path) -> None:
    for name in reversed(_PRODUCTS):
        old = out / name
        if name != "simulation.json" and old.exists():
            if old.is_dir():
                shutil.rmtree(old)
            else:
                old.unlink()
    for name in _PRODUCTS:
        os.replace(work / name, out / name)
    work.rmdir()


def simulate_screen(
    out: str | os.PathLike[str],
    config: SimulationConfig,
    *,
    workers: int | None = None,
    force: bool = False,
    progress: bool = False,
) -> SimulationSummary:
    """Simulate a screen and write it to the folder ``out`` in BBBC021's layout; same config, same bytes, whatever ``workers`` is.

    Writes ``images/WeekN/WeekN_PPPPP/*.tif``, ``image.csv``, ``moa.csv``, ``locations/<Plate>/<Well>-<Site>-Nuclei.csv`` (centres in
    px, 0 is the middle of the first pixel), ``cells.csv`` (state and response of each cell) and ``simulation.json`` (options, version,
    truth per treatment).
    Everything is written to a hidden folder inside ``out`` and moved into place at the end, ``image.csv`` last.

    Args:
        workers: processes; None means one per available core.
        force: replace an earlier simulated screen in ``out`` (nothing else is ever replaced).

    Raises:
        CellfastError: ``out`` is in use, or the options do not fit each other.
    """
    out = Path(out)
    if workers is not None and workers < 1:
        raise CellfastError(f"workers must be at least 1, got {workers}")
    plates = design_screen(config)
    work = _prepare(out, force)
    try:
        truths = _write_fields(plates, config, work, workers, progress)
        summary = write_tables(plates, config, work, out, truths)
        _publish(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return summary


def _write_fields(
    plates: list[Plate], config: SimulationConfig, work: Path, workers: int | None, progress: bool
) -> dict[tuple[str, str], list[tuple[FieldTruth, int]]]:
    tasks = []
    for plate in plates:
        (work / "images" / plate.name.split("_")[0] / plate.name).mkdir(parents=True)
        (work / "locations" / plate.name).mkdir(parents=True)
        for well, treatment in plate.wells.items():
            tasks.append(_WellTask(config, plate.name, plate.position, plate.week, well, treatment.effect, str(work)))
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers, len(tasks))
    truths = {}
    with Progress("simulate", len(tasks) * config.sites, "fields", enabled=progress) as bar:
        for task, written in _run(tasks, workers):
            truths[task.plate, task.well] = written
            bar.advance(len(written))
    return truths


def _run(tasks: list[_WellTask], workers: int) -> Iterator[tuple[_WellTask, list[tuple[FieldTruth, int]]]]:
    """Run the tasks in this process (one worker) or in fresh ones, yielding results as they come."""
    if workers == 1:
        for task in tasks:
            yield task, _write_well(task)
        return
    with ProcessPoolExecutor(workers, mp_context=FreshProcesses()) as pool:
        try:
            waiting = iter(tasks)
            running: dict[Future, _WellTask] = {}
            while True:
                # A short queue: an interrupt or an error does not wait for thousands of wells.
                for task in waiting:
                    running[pool.submit(_write_well, task)] = task
                    if len(running) >= 3 * workers:
                        break
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool:
            raise CellfastError(
                f"a worker process of the simulation ended abruptly, most likely for want of memory: try fewer {option('workers')}"
            ) from None
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
