"""Peak memory of training from a store larger than memory: ``python benchmarks/bench_memory.py FOLDER [--gigabytes 28] [--out FILE.json]``.

FOLDER needs that much disk; the store stays there (made once, of repeated noise) until it is deleted.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import click
import numpy as np

from cellfast.atomic import write_json
from cellfast.benchmark import environment
from cellfast.progress import Progress
from cellfast.screens.crop_writer import PlateWriter

CELLS_PER_FIELD = 250


def write_plate(path: Path, num_cells: int, crop_size: int, progress: Progress) -> None:
    """One plate of noise, 96 wells."""
    rng = np.random.default_rng(len(path.name))
    noise = rng.integers(100, 4000, (CELLS_PER_FIELD, 3, crop_size, crop_size), np.uint16)
    centres = rng.uniform(60, 900, (2, CELLS_PER_FIELD)).astype(np.float32)
    with PlateWriter(
        path, plate=path.stem, batch=path.stem.split("_")[0], channel_names=("DNA", "tubulin", "actin"), crop_size=crop_size,
        dtype=np.uint16, capacity=num_cells, border="pad",
    ) as writer:  # fmt: skip
        for field in range(num_cells // CELLS_PER_FIELD):
            well = field % 96
            writer.append_field(
                noise,
                well=f"{'ABCDEFGH'[well // 12]}{well % 12 + 1:02d}",
                site=field // 96 + 1,
                compound="DMSO" if well % 12 == 0 else f"compound {well}",
                concentration=1.0,
                object_number=np.arange(1, CELLS_PER_FIELD + 1),
                center_y=centres[0],
                center_x=centres[1],
                padded=np.zeros(CELLS_PER_FIELD, bool),
            )
            progress.advance(CELLS_PER_FIELD)


def status(pid: int) -> dict[str, int]:
    """Resident bytes of a process by kind: its own memory, pages of files, both."""
    fields = {"RssAnon": 0, "RssFile": 0, "VmRSS": 0}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name = line.split(":")[0]
        if name in fields:
            fields[name] = int(line.split()[1]) * 1024
    return fields


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--gigabytes", default=28.0, show_default=True, help="Size of the store.")
@click.option("--crop-size", default=96, show_default=True)
@click.option("--minutes", default=4.0, show_default=True, help="How long to train.")
@click.option("--batch-size", default=256, show_default=True)
@click.option("--out", type=click.Path(), help="Write the result as JSON.")
def main(folder: Path, gigabytes: float, crop_size: int, minutes: float, batch_size: int, out: str | None) -> None:
    """Make the store, train for some minutes, and print the highest memory by kind."""
    screen = folder / "screen"
    bytes_per_cell = 3 * crop_size * crop_size * 2
    per_plate = int(gigabytes * 1e9 / bytes_per_cell / 6) // CELLS_PER_FIELD * CELLS_PER_FIELD
    missing = [p for p in range(6) if not (screen / "plates" / f"Week{p}_{p}.h5").exists()]
    if (
        shutil.disk_usage(folder.parent if not folder.exists() else folder).free
        < len(missing) * per_plate * bytes_per_cell * 1.05
    ):
        raise click.UsageError(f"{folder} has too little room for a store of {gigabytes} GB")
    with Progress("store", len(missing) * per_plate, unit="cells") as progress:
        for p in missing:
            write_plate(screen / "plates" / f"Week{p}_{p}.h5", per_plate, crop_size, progress)
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "cellfast",
        "train",
        str(screen),
        "-o",
        str(run),
        "--epochs",
        "1",
        "--batch-size",
        str(batch_size),
    ]
    process = subprocess.Popen(command)
    peak = {"RssAnon": 0, "RssFile": 0, "VmRSS": 0}
    stop = threading.Timer(minutes * 60, process.send_signal, [2])
    stop.start()
    while process.poll() is None:
        try:
            for name, value in status(process.pid).items():
                peak[name] = max(peak[name], value)
        except (FileNotFoundError, ProcessLookupError):
            break
        time.sleep(0.2)
    stop.cancel()
    total = next(
        int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")
    )
    result = {
        "store_bytes": sum(p.stat().st_size for p in (screen / "plates").iterdir()),
        "cells": 6 * per_plate,
        "machine_bytes": total,
        "batch_size": batch_size,
        "minutes": minutes,
        "peak_own_bytes": peak["RssAnon"],
        "peak_file_pages_bytes": peak["RssFile"],
        "peak_resident_bytes": peak["VmRSS"],
    }
    for name, value in result.items():
        click.echo(f"{name:24s} {value / 1e9:8.2f} GB" if name.endswith("bytes") else f"{name:24s} {value}")
    if out:
        write_json(out, {"subject": "memory", "quick": False, "environment": environment(), "result": result})


if __name__ == "__main__":
    main()
