"""The tables of a simulated screen: images, MoA, cells and the truth behind them, in BBBC021's columns."""

from __future__ import annotations

import csv
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cellfast import __version__
from cellfast.atomic import write_json
from cellfast.screens.simulate.cells import STATES
from cellfast.screens.simulate.design import (
    CONTROL,
    STREAM_NAMES,
    STREAM_PLATE,
    STREAM_POSITION,
    STREAM_WEEK,
    Plate,
    SimulationConfig,
    well_position,
)
from cellfast.screens.simulate.fields import FieldTruth, Optics, PlaceEffect, draw_optics, draw_place_effects
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


def file_names(config: SimulationConfig, plate_position: int, well: str, site: int) -> list[str]:
    """The file names of a field, one per channel: ``B02_s1_w1<UUID>.tif``, w2 and w4."""
    rng = np.random.default_rng(config.stream(STREAM_NAMES, plate_position, well_position(well), site))
    return [f"{well}_s{site}_{w}{str(uuid.UUID(bytes=rng.bytes(16), version=4)).upper()}.tif" for w in WAVELENGTHS]


def plate_optics(config: SimulationConfig, week: int, plate_position: int) -> Optics:
    """The optics of a plate, from its own and its week's random stream."""
    return draw_optics(config.stream(STREAM_WEEK, week), config.stream(STREAM_PLATE, plate_position))


def place_effects(config: SimulationConfig, week: int) -> dict[str, PlaceEffect]:
    """The effects of a well's place on the plates of a week."""
    return draw_place_effects(config.stream(STREAM_POSITION, week), config.position)


def write_table(path: Path, columns: tuple[str, ...], rows: Iterator[tuple[object, ...]]) -> None:
    """Write a CSV with a header, UTF-8, lines ended by LF."""
    with open(path, "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def write_tables(
    plates: list[Plate],
    config: SimulationConfig,
    work: Path,
    out: Path,
    truths: dict[tuple[str, str], list[tuple[FieldTruth, int]]],
) -> SimulationSummary:
    """Write image.csv, cells.csv, moa.csv and simulation.json to ``work``; ``truths`` holds (truth, bytes) of each site by plate and well."""
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
    write_table(work / "image.csv", IMAGE_COLUMNS, iter(image_rows))
    write_table(work / "cells.csv", CELL_COLUMNS, iter(cell_rows))
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
            "places": [
                {"week": week + 1} | {name: _rounded(vars(its)) for name, its in place_effects(config, week).items()}
                for week in range(config.weeks)
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
    optics = plate_optics(config, plate.week, plate.position)
    return _rounded({name: getattr(optics, name) for name in ("gain", "background", "blur_px", "haze", "falloff", "centre")})


def _rounded(values: dict[str, np.ndarray | float]) -> dict[str, object]:
    """Numbers and arrays of numbers to four decimals, as JSON values."""
    return {name: np.round(value, 4).tolist() for name, value in values.items()}


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
