"""How cost grows: with the number of cells, with the minibatch (until memory ends), with the threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cellfast.benchmark.reference.cells import Cells, simulated_features, store_of_strips
from cellfast.benchmark.reference.results import describe, summary, write_table
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
        loaded, scored: cells at which loading and scoring are measured. A size is left out for a side whose smaller sizes say that it
            would take more than ``seconds_limit``; one that takes four times as long is stopped.
        extrapolated: sizes of the tables of cost; where nothing was measured a straight line through the two largest sizes measured.
        minibatches: sizes of the loss; step_minibatches: of the training step. A side ends at the first that does not fit.
        cores: threads.
    """
    from cellfast.data.warm import available_memory

    common = {**cells.job(), **settings.job(), "repeats": 1, "agreed_features": 1}

    def sweep(
        part: str, unit: str, sizes: Sequence[int], job_of: Callable[[int], dict[str, Any]]
    ) -> dict[str, list[dict[str, Any]]]:
        """A row for each side and size, until one does not fit into memory or the time."""
        found: dict[str, list[dict[str, Any]]] = {side.label: [] for side in sides}
        for n in sizes:
            job = {**common, **job_of(n)}
            for side in sides:
                rows = found[side.label]
                points = _points(rows, unit, "median_seconds")
                if len(points) < len(rows) or (points and unit == "cells" and line_through(points, n) > seconds_limit):
                    continue
                allowed = int(_SHARE_OF_FREE_MEMORY * available_memory())
                entry = summary(side.run(part, **job, allowed_bytes=allowed, timeout=4 * seconds_limit))
                say(f"{part}, {n:,} {unit}, {side.label}: {describe(entry)}")
                kept = ("out_of_memory", "timed_out", "growth_bytes", "median_seconds", "cells_per_second")
                rows.append({unit: n, "allowed_bytes": allowed, **{key: entry[key] for key in kept if key in entry}})
        return found

    def loaded_job(n: int) -> dict[str, Any]:
        folder = cells.folder / f"load-{n}"
        folder.mkdir()
        return {**repeated_cells(cells, n, folder).job(), "warm_up": 0}

    def scored_job(n: int) -> dict[str, Any]:
        table = write_table(cells.folder, f"features-{n}", *simulated_features(n, settings.score_features))
        return {**table, "warm_up": int(n <= 1000)}

    def threads_job(part: str) -> Callable[[int], dict[str, Any]]:
        small = {"batch_size": min(64, settings.batch_size), "minibatches": 4, "warm_up": 1, "repeats": 2}
        table = scored_job(settings.score_cells) if part == "score" and cores else {}
        return lambda n: {**table, **small, "threads": n, "workers": n}

    by_cells = {"load": sweep("load", "cells", loaded, loaded_job), "score": sweep("score", "cells", scored, scored_job)}
    return {
        "cells": {part: {name: _costs(rows, extrapolated) for name, rows in found.items()} for part, found in by_cells.items()},
        "minibatch": {
            part: sweep(part, "minibatch", sizes, lambda n: {"batch_size": n})
            for part, sizes in (("loss", minibatches), ("step", step_minibatches))
        },
        "cores": {part: sweep(part, "threads", cores, threads_job(part)) for part in ("augment", "step", "score")},
    }


def line_through(points: Sequence[tuple[float, float]], at: float) -> float:
    """The straight line through the last two (size, cost) points, or through the origin and the only one; never below the last cost."""
    (x1, y1) = points[-1]
    (x0, y0) = points[-2] if len(points) > 1 else (0.0, 0.0)
    return max(y1, y1 + (y1 - y0) / (x1 - x0) * (at - x1)) if at >= x1 else y0 + (y1 - y0) / (x1 - x0) * (at - x0)


def _points(rows: Sequence[dict[str, Any]], unit: str, key: str) -> list[tuple[float, float]]:
    return [(row[unit], row[key]) for row in rows if "median_seconds" in row]


def _costs(rows: Sequence[dict[str, Any]], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Seconds and growth of memory by number of cells: measured, or on the line through what was."""
    seconds, growth = _points(rows, "cells", "median_seconds"), _points(rows, "cells", "growth_bytes")
    costs = [{"cells": n, "seconds": s, "growth_bytes": g, "extrapolated": False} for (n, s), (_, g) in zip(seconds, growth)]
    costs += [row for row in rows if "median_seconds" not in row]
    if seconds:
        costs += [
            {"cells": n, "seconds": line_through(seconds, n), "growth_bytes": line_through(growth, n), "extrapolated": True}
            for n in sizes
            if n not in {row["cells"] for row in rows}
        ]
    return sorted(costs, key=lambda row: row["cells"])


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
