"""Which cells train the model and which are held out."""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cellfast.errors import CellfastError, option

if TYPE_CHECKING:
    from cellfast.screens import Screen


@dataclass(frozen=True)
class Split:
    """Global rows of the screen, ascending int64: for training, held out for validation; and what was left out why."""

    training: np.ndarray
    validation: np.ndarray
    description: str


def check_plates(names: list[str], known: list[str], option: str) -> None:
    """Raise `CellfastError` with the nearest names for plates the screen does not have."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            some = ", ".join(known[:5]) + (f" and {len(known) - 5} more" if len(known) > 5 else "")
            hint = f"did you mean {' or '.join(near)}?" if near else f"its plates are {some}"
            raise CellfastError(f"{option}: the screen has no plate {name!r}; {hint}")


def split_cells(
    metadata: pd.DataFrame,
    *,
    method: str,
    fraction: float,
    seed: int,
    plates: list[str] | None = None,
    hold_out_plates: list[str] | None = None,
) -> Split:
    """Divide a screen's cells into training and validation; the same seed gives the same cells.

    Args:
        metadata: of all cells, in global row order.
        method: ``well`` holds out whole wells: pairs of wells of one treatment first, drawn over treatments at random, so that
            retrieval between
            wells can be measured; then, where there are no more pairs, single wells. ``random`` holds out cells; ``none``
            nothing.
        fraction: of wells or cells held out (rounded; at least one).
        plates: only these are used; None or empty: all.
        hold_out_plates: used neither for training nor for validation.

    Raises:
        CellfastError: unknown plates, or nothing left to train on.
    """
    plate = metadata["Metadata_Plate"].to_numpy(dtype=str)
    known = sorted(set(plate.tolist()))
    if len(plate) == 0:
        raise CellfastError("the screen has no cells to train on: its ledger.json says what the ingest found and dropped")
    check_plates(plates or [], known, "plates")
    check_plates(hold_out_plates or [], known, "hold_out_plates")
    used = np.ones(len(plate), dtype=bool)
    if plates:
        used &= np.isin(plate, plates)
    if hold_out_plates:
        used &= ~np.isin(plate, hold_out_plates)
    rows = np.flatnonzero(used).astype(np.int64)
    if len(rows) == 0:
        raise CellfastError(f"no cells are left to train on: check {option('plates')} and {option('hold_out_plates')}")
    generator = np.random.Generator(np.random.PCG64([seed, 0x5EED]))
    description = f"{len(plate):,} cells"
    if len(rows) < len(plate):
        description += f", {len(plate) - len(rows):,} on plates left out"
    if method == "none":
        return Split(rows, rows[:0], f"{description}, none held out for validation")
    if method == "random":
        count = min(len(rows) - 1, max(1, round(fraction * len(rows))))
        held = np.zeros(len(rows), dtype=bool)
        held[generator.permutation(len(rows))[:count]] = True
        what = f"{count:,} random cells held out"
    else:
        held, wells, total = _held_out_wells(metadata.iloc[rows], fraction, generator)
        what = f"{int(held.sum()):,} cells held out: {wells} of {total} wells"
    return Split(rows[~held], rows[held], f"{description}, {what} for validation")


def _held_out_wells(metadata: pd.DataFrame, fraction: float, generator: np.random.Generator) -> tuple[np.ndarray, int, int]:
    """Cells of the wells held out (bool, in row order), number of those wells, number of all."""
    names = pd.MultiIndex.from_frame(metadata[["Metadata_Plate", "Metadata_Well"]].astype(str))
    code, _ = pd.factorize(names, sort=True)
    total = int(code.max()) + 1
    if total == 1:
        return np.zeros(len(code), dtype=bool), 0, 1
    first_cell = np.full(total, -1)
    first_cell[code[::-1]] = np.arange(len(code))[::-1]
    of_well = metadata.iloc[first_cell]
    treatment = list(zip(of_well["Metadata_Compound"].astype(str), of_well["Metadata_Concentration"].astype(float).fillna(-1.0)))
    wanted = min(total - 1, max(1, round(fraction * total)))
    groups: dict[tuple[str, float], list[int]] = {}
    for well in generator.permutation(total).tolist():
        groups.setdefault(treatment[well], []).append(well)
    # The order of first appearance is random already; a treatment keeps at least one well in training.
    pairs = [group[:2] for key, group in groups.items() if key[0] and len(group) > 2]
    chosen = [well for pair in pairs for well in pair][: wanted - wanted % 2]
    rest = [well for well in generator.permutation(total).tolist() if well not in set(chosen)]
    chosen += rest[: wanted - len(chosen)]
    return np.isin(code, chosen), len(chosen), total


def data_digest(screen: Screen) -> str:
    """SHA-256 of what identifies a screen's content: plates, cells, channels, crop size, pixel type, intensity scaling and
    pixel checksums."""
    plates = []
    for store in screen.plates:
        low, high = np.asarray(store.scale_low, dtype=float), np.asarray(store.scale_high, dtype=float)
        plates.append(
            {
                "plate": store.plate,
                "cells": int(store.num_cells),
                "channels": list(store.channel_names),
                "crop_size": int(store.crop_size),
                "dtype": np.dtype(store.dtype).name,
                "low": low.tolist(),
                "high": high.tolist(),
                "crc32": getattr(store, "crc32", None),
            }
        )
    return hashlib.sha256(json.dumps(plates, sort_keys=True).encode()).hexdigest()
