"""Writing a simulated screen: TIFFs, image table, MoA table, centroids, truth; whole or not at all."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cellfast import __version__
from cellfast.atomic import write_json
from cellfast.errors import CellfastError
from cellfast.progress import Progress
from cellfast.screens.simulate.cells import STATES, NoiseBank
from cellfast.screens.simulate.design import (
    CONTROL,
    STREAM_FIELD,
    STREAM_NAMES,
    STREAM_NOISE,
    STREAM_PLATE,
    STREAM_WEEK,
    STREAM_WELL,
    Plate,
    SimulationConfig,
    design_screen,
    well_position,
)
from cellfast.screens.simulate.fields import FieldTruth, Optics, draw_field, draw_optics
from cellfast.screens.simulate.phenotypes import NAMES

IMAGE_COLUMNS = (
    "TableNumber", "ImageNumber", "Image_FileName_DAPI", "Image_PathName_DAPI", "Image_FileName_Tubulin",
    "Image_PathName_Tubulin", "Image_FileName_Actin", "Image_PathName_Actin", "Image_Metadata_Plate_DAPI",
    "Image_Metadata_Well_DAPI", "Replicate", "Image_Metadata_Compound", "Image_Metadata_Concentration",
)  # fmt: skip
CELL_COLUMNS = ("Plate", "Well", "Site", "ObjectNumber", "Center_X", "Center_Y", "State", "Responds", "Response")
LOCATION_COLUMNS = ("ObjectNumber", "Nuclei_Location_Center_X", "Nuclei_Location_Center_Y")
WAVELENGTHS = ("w1", "w2", "w4")  # DAPI, tubulin, actin, as in BBBC021's file names
FORMAT = "cellfast simulation 1"
# image.csv is put in place last: where it stands the screen is complete. simulation.json is first: it marks the rest as ours.
_PRODUCTS = ("simulation.json", "images", "locations", "cells.csv", "moa.csv", "image.csv")


@dataclass(frozen=True)
class SimulationSummary:
    """What was written: folder, counts, and the cells that responded among those in treated wells."""

    out: Path
    num_plates: int
    num_weeks: int
    num_wells: int
    num_fields: int
    num_cells: int
    num_treatments: int
    num_compounds: int
    num_moas: int
    num_treated_cells: int
    num_responding_cells: int
    num_bytes: int


@dataclass(frozen=True)
class _WellTask:
    config: SimulationConfig
    plate: str
    plate_position: int
    week: int
    well: str
    effect: object
    folder: str


def file_names(config: SimulationConfig, plate_position: int, well: str, site: int) -> list[str]:
    """The file names of a field, one per channel: ``B02_s1_w1<UUID>.tif``, w2 and w4."""
    rng = np.random.default_rng(config.stream(STREAM_NAMES, plate_position, well_position(well), site))
    return [f"{well}_s{site}_{w}{str(uuid.UUID(bytes=rng.bytes(16), version=4)).upper()}.tif" for w in WAVELENGTHS]


_noise: dict[tuple[float, int], NoiseBank] = {}


def _noise_bank(config: SimulationConfig) -> NoiseBank:
    key = (config.scale, config.seed)
    if key not in _noise:
        _noise.clear()
        _noise[key] = NoiseBank(config.scale, config.stream(STREAM_NOISE))
    return _noise[key]


def _plate_optics(config: SimulationConfig, week: int, plate_position: int) -> Optics:
    return draw_optics(config.stream(STREAM_WEEK, week), config.stream(STREAM_PLATE, plate_position))


def _write_well(task: _WellTask) -> list[tuple[FieldTruth, int]]:
    """Draw and write all fields of a well; returns the truth and the bytes written of each (runs in a worker process)."""
    import tifffile

    config, folder = task.config, Path(task.folder)
    images = folder / "images" / task.plate.split("_")[0] / task.plate
    locations = folder / "locations" / task.plate
    position = well_position(task.well)
    optics = _plate_optics(config, task.week, task.plate_position)
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
        _write_table(
            locations / f"{task.well}-{site}-Nuclei.csv",
            LOCATION_COLUMNS,
            ((number, f"{x:.3f}", f"{y:.3f}") for number, (x, y) in enumerate(zip(truth.x, truth.y), 1)),
        )
        written.append((truth, size))
    return written


def _write_table(path: Path, columns: tuple[str, ...], rows: Iterator[tuple[object, ...]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def _prepare(out: Path, force: bool) -> Path:
    """Check that ``out`` can take the screen, changing nothing in it; returns a new empty folder inside it for the work."""
    if out.exists() and not out.is_dir():
        raise CellfastError(f"{out} is a file: give a folder for the simulated screen")
    # Hidden partial folders of a killed run hold nothing of the user's.
    present = sorted(p.name for p in out.iterdir() if not _is_partial(p)) if out.exists() else []
    if present and not force:
        shown = ", ".join(present[:5]) + (", …" if len(present) > 5 else "")
        raise CellfastError(
            f"{out} is not empty (it holds {shown}): give another folder, or --force to replace a simulated screen there"
        )
    taken = [name for name in present if name in _PRODUCTS]
    if taken and not _is_simulation(out):
        raise CellfastError(
            f"{out} holds {', '.join(taken)} but no simulation.json of cellfast: --force replaces only what cellfast simulated; "
            "give another folder"
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
        workers: processes; None means one per available core. More than one starts fresh interpreters: a script that calls this must
            guard its main part with ``if __name__ == "__main__":``.
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
        summary = _write_tables(plates, config, work, out, truths)
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
    # Never fork: the parent may hold threads (BLAS, a caller's) whose locks a forked child would inherit.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
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
                "a worker process of the simulation ended abruptly (out of memory, or a script without "
                "`if __name__ == '__main__':`): "
                "try fewer workers, or workers=1"
            ) from None
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _write_tables(
    plates: list[Plate],
    config: SimulationConfig,
    work: Path,
    out: Path,
    truths: dict[tuple[str, str], list[tuple[FieldTruth, int]]],
) -> SimulationSummary:
    image_rows, cell_rows = [], []
    counts: dict[tuple[str, float], dict[str, int]] = {}
    treatments, numbers = {}, dict.fromkeys(range(config.weeks), 0)
    num_bytes = 0
    for plate in plates:
        path = f"{plate.name.split('_')[0]}/{plate.name}"
        for well, treatment in plate.wells.items():
            key = (treatment.compound, treatment.concentration_um)
            treatments.setdefault(key, treatment)
            count = counts.setdefault(
                key, {"num_wells": 0, "num_fields": 0, "num_cells": 0, "num_responding": 0} | dict.fromkeys(STATES, 0)
            )
            count["num_wells"] += 1
            for site, (truth, size) in enumerate(truths[plate.name, well], 1):
                numbers[plate.week] += 1
                num_bytes += size
                dapi, tubulin, actin = file_names(config, plate.position, well, site)
                concentration = f"{treatment.concentration_um:g}"
                image_rows.append(
                    (
                        plate.week,
                        numbers[plate.week],
                        dapi,
                        path,
                        tubulin,
                        path,
                        actin,
                        path,
                        plate.name,
                        well,
                        plate.replicate[well],
                    )
                    + (treatment.compound, concentration)
                )
                count["num_fields"] += 1
                count["num_cells"] += len(truth.x)
                count["num_responding"] += int(truth.responds.sum())
                for state, number in enumerate(np.bincount(truth.state, minlength=len(STATES))):
                    count[STATES[state]] += int(number)
                cell_rows += [
                    (plate.name, well, site, i + 1, f"{truth.x[i]:.3f}", f"{truth.y[i]:.3f}", STATES[truth.state[i]])
                    + (int(truth.responds[i]), f"{truth.response[i]:.4f}")
                    for i in range(len(truth.x))
                ]
    _write_table(work / "image.csv", IMAGE_COLUMNS, iter(image_rows))
    _write_table(work / "cells.csv", CELL_COLUMNS, iter(cell_rows))
    # The official MoA table quotes text, prints six decimals and has a row for the control.
    with open(work / "moa.csv", "w", encoding="utf-8", newline="") as handle:
        handle.write('"compound",concentration,"moa"\n')
        for treatment in treatments.values():
            handle.write(f'"{treatment.compound}",{treatment.concentration_um:.6f},"{treatment.moa}"\n')
    write_json(
        work / "simulation.json",
        {
            "format": FORMAT,
            "cellfast_version": __version__,
            "options": config.as_dict(),
            "channels": ["DAPI", "Tubulin", "Actin"],
            "plates": [
                {"plate": p.name, "week": p.week + 1, "wells": len(p.wells), "optics": _optics_truth(config, p)} for p in plates
            ],
            "treatments": [_treatment_truth(t) | counts[key] for key, t in treatments.items()],
        },
    )
    active = [t for t in treatments.values() if t.compound != CONTROL]
    treated = [count for (compound, _), count in counts.items() if compound != CONTROL]
    return SimulationSummary(
        out=out,
        num_plates=len(plates),
        num_weeks=config.weeks,
        num_wells=sum(len(p.wells) for p in plates),
        num_fields=len(image_rows),
        num_cells=len(cell_rows),
        num_treatments=len(active),
        num_compounds=len({t.compound for t in active}),
        num_moas=len({t.moa for t in active}),
        num_treated_cells=sum(c["num_cells"] for c in treated),
        num_responding_cells=sum(c["num_responding"] for c in treated),
        num_bytes=num_bytes,
    )


def _optics_truth(config: SimulationConfig, plate: Plate) -> dict[str, object]:
    optics = _plate_optics(config, plate.week, plate.position)
    return {
        name: np.round(getattr(optics, name), 4).tolist()
        for name in ("gain", "background", "blur_px", "haze", "falloff", "centre")
    }


def _treatment_truth(treatment) -> dict[str, object]:
    effect = treatment.effect
    return {
        "compound": treatment.compound,
        "concentration": treatment.concentration_um,
        "moa": treatment.moa,
        "week": treatment.week + 1 if treatment.week >= 0 else None,
        "strength": round(effect.strength, 4),
        "responder_fraction": round(effect.responder_fraction, 4),
        "density_effect": round(effect.density, 4),
        "effects": {name: round(float(value), 4) for name, value in zip(NAMES, effect.effects) if value != 0},
    }
