"""How cost grows: with the number of cells, with the minibatch (until memory ends), with the cores."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cellfast.benchmark.reference.cells import Cells, simulated_features
from cellfast.benchmark.reference.parts import Settings, label, summary
from cellfast.benchmark.reference.sides import Side

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
        minibatches: sizes of the loss; step_minibatches: of the training step.
        cores: threads.
    """
    return {
        "cells": _by_cells(sides, cells, settings, loaded, scored, extrapolated, seconds_limit, say),
        "minibatch": _by_minibatch(sides, cells, settings, minibatches, step_minibatches, seconds_limit, say),
        "cores": _by_cores(sides, cells, settings, cores, say),
    }


def free_memory() -> int:
    """Bytes the operating system could hand out now."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def line_through(points: Sequence[tuple[float, float]], at: float) -> float:
    """The straight line through the last two (size, cost) points, or through the origin and the only one; never below the last cost."""
    (x1, y1) = points[-1]
    (x0, y0) = points[-2] if len(points) > 1 else (0.0, 0.0)
    return max(y1, y1 + (y1 - y0) / (x1 - x0) * (at - x1)) if at >= x1 else y0 + (y1 - y0) / (x1 - x0) * (at - x0)


def _table(measured: dict[int, dict[str, Any]], sizes: Sequence[int]) -> list[dict[str, Any]]:
    points = sorted((n, e) for n, e in measured.items() if "median_seconds" in e)
    rows: list[dict[str, Any]] = []
    for n in sorted({*sizes, *measured}):
        if n in measured and "median_seconds" not in measured[n]:
            rows.append({"cells": n, **measured[n]})
        elif n in measured:
            e = measured[n]
            rows.append({"cells": n, "seconds": e["median_seconds"], "growth_bytes": e["growth_bytes"], "extrapolated": False})
        elif points:
            rows.append({
                "cells": n,
                "seconds": line_through([(m, e["median_seconds"]) for m, e in points], n),
                "growth_bytes": line_through([(m, e["growth_bytes"]) for m, e in points], n),
                "extrapolated": True,
            })  # fmt: skip
    return rows


def _by_cells(
    sides: Sequence[Side], cells: Cells, settings: Settings, loaded: Sequence[int], scored: Sequence[int],
    extrapolated: Sequence[int], seconds_limit: float, say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    found: dict[str, Any] = {"load": {}, "score": {}}
    for part, sizes in (("load", loaded), ("score", scored)):
        measured: dict[str, dict[int, dict[str, Any]]] = {label(side): {} for side in sides}
        for n in sizes:
            folder = cells.folder / f"{part}-{n}"
            folder.mkdir(exist_ok=True)
            job: dict[str, Any] = {**settings.job(), "repeats": 1, "warm_up": 0}
            if part == "load":
                job |= repeated_cells(cells, n, folder).job()
            else:
                values, frame = simulated_features(n, settings.score_features)
                np.save(folder / "f.npy", values, allow_pickle=False)
                frame.to_csv(folder / "m.csv", index=False)
                job |= {
                    **cells.job(),
                    "features_file": str(folder / "f.npy"),
                    "metadata_file": str(folder / "m.csv"),
                    "warm_up": int(n <= 1000),
                }
            for side in sides:
                points = [(m, e["median_seconds"]) for m, e in measured[label(side)].items() if "median_seconds" in e]
                if points and line_through(points, n) > seconds_limit:
                    say(f"{part} {n:,} cells {label(side)}: left out, it would take about {line_through(points, n):.0f} s")
                    continue
                entry = summary(side.run(part, threads=settings.threads, **job))
                measured[label(side)][n] = entry
                if "median_seconds" in entry:
                    say(
                        f"{part} {n:,} cells {label(side)}: {entry['median_seconds']:.2f} s, {entry['growth_bytes'] / 2**20:.0f} MiB"
                    )
            shutil.rmtree(folder)
        found[part] = {name: _table(entries, extrapolated) for name, entries in measured.items()}
    return found


def repeated_cells(cells: Cells, count: int, folder: Path) -> Cells:
    """``count`` cells made of hard links to the strips, again and again, and the crop store made from them."""
    from cellfast.screens import Screen
    from cellfast.screens.crop_index import read_crop_index
    from cellfast.screens.ingest_crops import ingest_crops

    table = pd.read_csv(cells.index)
    strips = folder / "strips"
    strips.mkdir()
    take = np.arange(count) % len(table)
    names = []
    for number, name in enumerate(table["Image_Name"].iloc[take]):
        names.append(f"{name.rpartition('_')[0]}_{number}.png")
        os.link(cells.strips / name, strips / names[-1])
    index = folder / "index.csv"
    table.iloc[take].assign(Image_Name=names).to_csv(index, index=False)
    ingest_crops(read_crop_index(index, root=strips), folder / "screen", show_progress=False)
    made = Screen.open(folder / "screen").num_cells
    assert made == count, (made, count)
    return replace(cells, folder=folder, strips=strips, index=index, screen=folder / "screen", num_cells=count)


def _by_minibatch(
    sides: Sequence[Side], cells: Cells, settings: Settings, minibatches: Sequence[int], step_minibatches: Sequence[int],
    seconds_limit: float, say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    found: dict[str, Any] = {}
    for part, sizes in (("loss", minibatches), ("step", step_minibatches)):
        found[part] = {label(side): [] for side in sides}
        for side in sides:
            for n in sizes:
                job = {**cells.job(), **settings.job(), "batch_size": n, "repeats": 1, "warm_up": 0}
                allowed = int(_SHARE_OF_FREE_MEMORY * free_memory())
                entry = summary(side.run(part, threads=settings.threads, allowed_bytes=allowed, timeout=seconds_limit, **job))
                row = {"minibatch": n, "allowed_bytes": allowed}
                row |= {k: entry[k] for k in ("out_of_memory", "timed_out", "growth_bytes", "median_seconds") if k in entry}
                found[part][label(side)].append(row)
                text = (
                    f"{entry['median_seconds']:.3f} s, {entry['growth_bytes'] / 2**30:.2f} GiB"
                    if "median_seconds" in entry
                    else "stops here"
                )
                say(f"{part} minibatch {n} {label(side)}: {text}")
                if "median_seconds" not in entry:
                    break
    return found


def _by_cores(
    sides: Sequence[Side], cells: Cells, settings: Settings, cores: Sequence[int], say: Callable[[str], None]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    small = replace(settings, batch_size=min(64, settings.batch_size))
    for part in ("augment", "step", "score"):
        found[part] = {label(side): [] for side in sides}
        job: dict[str, Any] = {**cells.job(), **small.job(), "repeats": 2, "minibatches": 4}
        if part == "score":
            job |= {
                "features_file": str(cells.folder / "features.npy"),
                "metadata_file": str(cells.folder / "features.csv"),
                "repeats": 1,
            }
        for side in sides:
            for threads in cores:
                job["workers"] = threads
                entry = summary(side.run(part, threads=threads, **job))
                found[part][label(side)].append(
                    {"threads": threads, "seconds": entry["median_seconds"], "cells_per_second": entry["cells_per_second"]}
                )
                say(f"{part} {threads} threads {label(side)}: {entry['cells_per_second']:,.1f} cells/s")
    return found
