"""How busy each stage of the pipeline is, and the progress line that tells which one holds up the rest."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from cellfast.progress import Progress

STAGES = ("read", "cut", "encode", "write")


class StageClock:
    """Busy seconds by stage, each stage with its number of workers; thread-safe."""

    def __init__(self, workers: dict[str, int]) -> None:
        self.workers = workers
        self._lock = threading.Lock()
        self._busy = dict.fromkeys(STAGES, 0.0)
        self._began = time.perf_counter()

    def add(self, stage: str, seconds: float) -> None:
        """Count time that a worker of ``stage`` was at work."""
        with self._lock:
            self._busy[stage] += seconds

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._began

    def shares(self) -> dict[str, float]:
        """Busy share of each stage: seconds at work / (seconds elapsed × workers)."""
        total = max(self.elapsed(), 1e-9)
        with self._lock:
            return {stage: self._busy[stage] / (total * self.workers.get(stage, 1)) for stage in STAGES}

    def seconds(self) -> dict[str, float]:
        """Busy seconds of each stage."""
        with self._lock:
            return dict(self._busy)

    def bottleneck(self) -> tuple[str, float]:
        """The busiest stage and its share."""
        shares = self.shares()
        stage = max(shares, key=lambda name: shares[name])
        return stage, shares[stage]


class EmbedProgress:
    """The progress line: what is done and left over the whole screen, cells/s, fields/s, and the bottleneck.

    Args:
        total_fields, total_cells: expected; cells 0 where their number is not known beforehand.
        clock: tells the bottleneck, of this process.
        enabled: False prints nothing.
        count: (name, more) → what all processes have counted of it.
    """

    def __init__(
        self,
        total_fields: int,
        total_cells: int,
        clock: StageClock,
        *,
        enabled: bool,
        count: Callable[[str, int], int],
    ) -> None:
        self._count = count
        # Cells are counted where their number is known beforehand (crop stores), fields where it is not.
        self.by_cells = total_cells > 0
        self.clock, self.cells, self.fields = clock, 0, 0
        self.progress = Progress(
            "embed", total_cells if self.by_cells else total_fields, "cells" if self.by_cells else "fields", enabled=enabled
        )

    def __enter__(self) -> EmbedProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.close()

    def advance(self, cells: int, fields: int) -> None:
        """Count cells and fields that are embedded."""
        self.cells, self.fields = self._count("cells", cells), self._count("fields", fields)
        self.progress.advance((self.cells if self.by_cells else self.fields) - self.progress.done, self.note())

    def note(self) -> str:
        """The rate of the other unit, and the bottleneck."""
        seconds = max(self.clock.elapsed(), 1e-9)
        stage, share = self.clock.bottleneck()
        rate = f"{self.fields / seconds:,.1f} fields/s" if self.by_cells else f"{self.cells / seconds:,.0f} cells/s"
        return f"{rate} · bottleneck: {stage} ({100 * min(share, 1):.0f} % busy)"

    def message(self, text: str) -> None:
        """A line of its own."""
        self.progress.message(text)
