"""How cost grows: with the number of cells, with the minibatch (until memory ends), with the threads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cellfast.benchmark.reference.cells import Cells, simulated_features, store_of_strips
from cellfast.benchmark.reference.sides import Side
from cellfast.benchmark.reference.table import Settings

# Of the memory that is free when a job starts, what it may take: the rest is the operating system's and other people's.
_SHARE_OF_FREE_MEMORY = 0.75


def measure_scaling(
    sides: Sequence[Side],
    cells: Cells,
    settings: Settings,
    *,
    loaded: Sequence[int] = (1_000, 10_000),
    scored: Sequence[int] = (1_000, 10_000, 100_000),
    extrapolated: Sequence[int] = (1_000, 10_000, 100_000, 1_000_000, 10_000_000),
    minibatches: Sequence[int] = (64, 128, 256, 512, 1024, 2048),
    step_minibatches: Sequence[int] = (64, 128, 256),
    cores: Sequence[int] = (1, 2),
    seconds_limit: float = 100.0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure both sides at a few sizes, and extrapolate, labelled, to those that would not fit.

    Args:
        loaded, scored: cells at which loading and scoring are measured. A size is left out for a side whose smaller size says that it
            would take more than ``seconds_limit``.
        extrapolated: sizes of the tables of cost; where nothing was measured a straight line through the two largest sizes measured.
        minibatches: sizes of the loss; step_minibatches: of the training step. A side stops at the first that does not fit.
        cores: threads.
    """
    from cellfast.benchmark.reference.measure import describe, summary, write_table
    from cellfast.data.warm import available_memory

    def run(side: Side, part: str, where: str, job: dict[str, Any], **limits: Any) -> dict[str, Any]:
        entry = summary(side.run(part, **job, **limits))
        say(f"{part} {where} {side.label}: {describe(entry)}")
        return entry

    common = {**cells.job(), **settings.job(), "repeats": 1, "agreed_features": 1}
    by_cells: dict[str, Any] = {}
    for part, sizes in (("load", loaded), ("score", scored)):
        measured: dict[Side, dict[int, dict[str, Any]]] = {side: {} for side in sides}
        for n in sizes:
            folder = cells.folder / f"{part}-{n}"
            folder.mkdir()
            if part == "load":
                job = {**common, **repeated_cells(cells, n, folder).job()}
            else:
                table = write_table(folder, "features", *simulated_features(n, settings.score_features))
                job = {**common, **table, "warm_up": int(n <= 1000)}
            for side in sides:
                points = _points(measured[side], "median_seconds")
                if points and line_through(points, n) > seconds_limit:
                    say(f"{part} {n:,} cells {side.label}: left out, it would take about {line_through(points, n):.0f} s")
                else:
                    measured[side][n] = run(side, part, f"{n:,} cells", job)
            shutil.rmtree(folder)
        by_cells[part] = {side.label: _costs(entries, extrapolated) for side, entries in measured.items()}

    by_minibatch: dict[str, Any] = {}
    for part, sizes in (("loss", minibatches), ("step", step_minibatches)):
        by_minibatch[part] = {side.label: [] for side in sides}
        for side in sides:
            for n in sizes:
                allowed = int(_SHARE_OF_FREE_MEMORY * available_memory())
                job = {**common, "batch_size": n}
                entry = run(side, part, f"minibatch {n}", job, allowed_bytes=allowed, timeout=seconds_limit)
                kept = {k: entry[k] for k in ("out_of_memory", "timed_out", "growth_bytes", "median_seconds") if k in entry}
                by_minibatch[part][side.label].append({"minibatch": n, "allowed_bytes": allowed, **kept})
                if "median_seconds" not in entry:
                    break

    by_cores: dict[str, Any] = {}
    table = (
        write_table(cells.folder, "features", *simulated_features(settings.score_cells, settings.score_features)) if cores else {}
    )
    for part in ("augment", "step", "score"):
        by_cores[part] = {side.label: [] for side in sides}
        job = {**common, "batch_size": min(64, settings.batch_size), "warm_up": 1, "repeats": 2, "minibatches": 4}
        job |= table if part == "score" else {}
        for side in sides:
            for threads in cores:
                entry = run(side, part, f"{threads} threads", {**job, "workers": threads, "threads": threads})
                row = {"threads": threads, "seconds": entry["median_seconds"], "cells_per_second": entry["cells_per_second"]}
                by_cores[part][side.label].append(row)
    return {"cells": by_cells, "minibatch": by_minibatch, "cores": by_cores}


def line_through(points: Sequence[tuple[float, float]], at: float) -> float:
    """The straight line through the last two (size, cost) points, or through the origin and the only one; never below the last cost."""
    (x1, y1) = points[-1]
    (x0, y0) = points[-2] if len(points) > 1 else (0.0, 0.0)
    return max(y1, y1 + (y1 - y0) / (x1 - x0) * (at - x1)) if at >= x1 else y0 + (y1 - y0) / (x1 - x0) * (at - x0)


def _points(measured: dict[int, dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return sorted((n, entry[key]) for n, entry in measured.items() if key in entry)


def _costs(measured: dict[int, dict[str, Any]], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Seconds and growth of memory by size: measured, or on the line through what was."""
    seconds, growth = _points(measured, "median_seconds"), _points(measured, "growth_bytes")
    rows: list[dict[str, Any]] = []
    for n in sorted({*sizes, *measured}):
        entry = measured.get(n)
        if entry is not None and "median_seconds" not in entry:
            rows.append({"cells": n, **entry})
        elif entry is not None:
            rows.append(
                {"cells": n, "seconds": entry["median_seconds"], "growth_bytes": entry["growth_bytes"], "extrapolated": False}
            )
        elif seconds:
            costs = {"seconds": line_through(seconds, n), "growth_bytes": line_through(growth, n)}
            rows.append({"cells": n, **costs, "extrapolated": True})
    return rows


def repeated_cells(cells: Cells, count: int, folder: Path) -> Cells:
    """``count`` cells made of hard links to the strips, again and again, and the crop store made from them."""
    table = pd.read_csv(cells.index)
    strips, index = folder / "strips", folder / "index.csv"
    strips.mkdir()
    take = np.arange(count) % len(table)
    names = []
    for number, name in enumerate(table["Image_Name"].iloc[take]):
        names.append(f"{name.rpartition('_')[0]}_{number}.png")
        os.link(cells.strips / name, strips / names[-1])
    table.iloc[take].assign(Image_Name=names).to_csv(index, index=False)
    made = store_of_strips(index, strips, folder / "screen")
    assert made.num_cells == count, (made.num_cells, count)
    return replace(cells, folder=folder, strips=strips, index=index, screen=folder / "screen", num_cells=count)
