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


def median_seconds(run: Callable[[], object], repeats: int, device: Any) -> float:
    """Median of ``repeats`` runs after one that is not timed; what a GPU ``device`` (`torch.device`) was given is waited for."""

    def wait() -> None:
        if device.type == "cuda":
            import torch

            torch.cuda.synchronize(device)

    times = []
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def or_reason(run: Callable[[], Any]) -> Any:
    """What ``run`` returns; ``{"failed": reason}`` where it cannot be done, so that the other measurements go on."""
    try:
        return run()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:400]}"}


def device_name(device: Any) -> str:
    """The GPU's name, or ``cpu``."""
    if device.type != "cuda":
        return "cpu"
    import torch

    return torch.cuda.get_device_name(device)
