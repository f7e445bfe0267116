"""What one side's runs come to, and how two sides compare."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd


def write_table(folder: Path, name: str, values: np.ndarray, frame: pd.DataFrame) -> dict[str, str]:
    """Write a table of features and its metadata; returns what a job must know of it."""
    features, metadata = folder / f"{name}.npy", folder / f"{name}.csv"
    np.save(features, values, allow_pickle=False)
    frame.to_csv(metadata, index=False)
    return {"features_file": str(features), "metadata_file": str(metadata)}


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """A worker's result with median and spread.

    ``growth_bytes``: peak memory above what the process held after its imports (about 0.8 GB of libraries on both sides).
    """
    if "seconds" not in result:
        return {key: result[key] for key in ("out_of_memory", "timed_out") if key in result}
    seconds = result["seconds"]
    median = statistics.median(seconds)
    return {
        "growth_bytes": result["peak_bytes"] - result["imported_bytes"],
        **{key: value for key, value in result.items() if key != "imported_bytes"},
        "median_seconds": median,
        "spread": (max(seconds) - min(seconds)) / median if median else 0.0,
        "cells_per_second": result["cells"] / median if median else None,
    }


def merged(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The results of a side's rounds as one: all timings, the largest peak; a round that was stopped stands for all."""
    stopped = next((result for result in results if "seconds" not in result), None)
    if stopped is not None:
        return stopped
    worst = max(results, key=lambda result: result["peak_bytes"])
    return {**worst, "seconds": [value for result in results for value in result["seconds"]]}


def ratios(ours: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """How many times as fast cellfast is, and its memory (whole process; growth) as a share of the other's.

    Timings of as many rounds are compared round by round, and the median of these ratios is given.
    """
    if "median_seconds" not in ours or "median_seconds" not in other:
        return {}
    # Per cell, so that dropped last minibatches do not count for either.
    here, there = ([value / side["cells"] for value in side["seconds"]] for side in (ours, other))
    by_round = [theirs / mine for mine, theirs in zip(here, there)]
    times = statistics.median(by_round) if len(here) == len(there) else statistics.median(there) / statistics.median(here)
    return {
        "times_faster": times,
        "memory_ratio": ours["peak_bytes"] / other["peak_bytes"],
        # Less than 1 MiB is less than what is measured.
        "growth_ratio": max(2**20, ours["growth_bytes"]) / max(2**20, other["growth_bytes"]),
    }


def describe(entry: dict[str, Any]) -> str:
    """One side's summary as a line."""
    if "median_seconds" not in entry:
        return f"out of memory ({entry['out_of_memory'][:80]})" if "out_of_memory" in entry else "took too long"
    return (
        f"{entry['median_seconds']:9.4f} s ± {50 * entry['spread']:.0f} %  {entry['cells_per_second']:10,.0f} cells/s  "
        f"{entry['peak_bytes'] / 2**30:.2f} GiB"
    )
