"""Rates of repeated runs, as the results carry them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any


def cell_rate(run: Callable[[], int], repeats: int, *, warm_up: bool) -> dict[str, Any]:
    """Cells per second of ``run``, which returns the number of cells it handled: best, median and every repeat.

    ``warm_up`` runs it once more before the clock starts, for pages, compiled code and buffers.
    """
    if warm_up:
        run()
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        cells = run()
        rates.append(cells / (time.perf_counter() - start))
    return {"best": max(rates), "median": statistics.median(rates), "repeats": rates}
