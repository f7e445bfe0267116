"""The parts of the way from crops to accuracy, each measured on both sides in processes of their own, one side after the other."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cellfast.benchmark.reference.cells import Cells, simulated_features, simulated_treatments
from cellfast.benchmark.reference.sides import Side
from cellfast.errors import CellfastError

LOSS_TOLERANCE, SCORE_TOLERANCE = 1e-5, 1e-9
# Features on which the scores of the sides must agree: fewer than the 330 control wells, so that sphering is determined.
AGREED_FEATURES = 256


@dataclass(frozen=True)
class Settings:
    """Sizes and repeats of a comparison.

    Attributes:
        encoder, batch_size, size, dim: a ResNet's name, cells per minibatch, side in px, columns of the projection.
        threads: CPU threads of each side; the reference's loader gets as many worker processes.
        repeats: timings of each part, in one process.
        slow_repeats: rounds of a slow part: in each, every side is timed once, so that a drift of the machine meets all of them. One
            fewer for what takes longest: an epoch, the whole way, pictures.
        score_cells, score_features: the table of features that is scored.
        epochs: passes over the cells in the part from crops to accuracy.
        one_process: all that is measured of a side in one process, which is quicker and less exact about memory.
    """

    encoder: str = "resnet18"
    batch_size: int = 256
    size: int = 96
    dim: int = 256
    threads: int = 2
    repeats: int = 5
    slow_repeats: int = 3
    score_cells: int = 10_000
    score_features: int = 512
    epochs: int = 1
    one_process: bool = False

    def job(self) -> dict[str, Any]:
        """What a job of `worker` must know about them."""
        return {"encoder": self.encoder, "batch_size": self.batch_size, "dim": self.dim, "workers": self.threads}


# Part → (what is measured, is it a slow one).
PARTS: dict[str, tuple[str, bool]] = {
    "load": ("crops on disk until every cell was read once", False),
    "augment": ("two views of every cell, minibatch by minibatch, from loaded crops", True),
    "loss": ("NT-Xent, forward and backward, rows normalised inside", False),
    "step": ("forward, NT-Xent, backward, Adam on ready views", True),
    "epoch": ("one pass: minibatches, views, training steps", True),
    "embed": ("features of every cell", True),
    "score": ("cells' features to NSC and NSCB: well means, TVN, treatment medians, neighbours", False),
    "score with pictures": ("the same and a t-SNE, its pictures by MoA and the confusion between MoAs", True),
    "evaluate": ("treatments' profiles to NSC and NSCB: neighbours of another compound, and batch", False),
    "end to end": ("crops on disk to NSC and NSCB: load, train, embed, score", True),
}


def measure_parts(
    sides: Sequence[Side],
    cells: Cells,
    settings: Settings,
    *,
    parts: Sequence[str] = tuple(PARTS),
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure ``parts`` on the sides; the first is cellfast, the last what it is compared with.

    Losses (to 1e-5) and scores must agree between the sides, otherwise their times are not of the same work.

    Returns:
        part → ``{"what", <side>: summary, "times_faster", "memory_ratio"}``; see `summary` and `ratios`.

    Raises:
        CellfastError: the sides disagree, or a side failed.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise CellfastError(f"unknown part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    # The baseline draws nothing.
    parts = [part for part in parts if part != "score with pictures" or sides[-1].name == "reference"]
    jobs = _jobs(cells, settings, parts)
    found: dict[str, Any] = {}
    for part, job in jobs.items():
        entry: dict[str, Any] = {"what": PARTS[part][0]}
        present = [side for side in sides if _takes_part(side, part)]
        names = [label(side) for side in present]
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for _ in range(job.get("rounds", 1)):
            for side, name in zip(present, names):
                rounds[name] += side.run_several([job], threads=settings.threads)
        for name in names:
            entry[name] = summary(merged(rounds[name]))
            say(f"{part:<11} {name:<26} {describe(entry[name])}")
        _check(part, entry, names)
        for name in names[:-1]:
            entry[name] |= ratios(entry[name], entry[names[-1]])
        entry |= ratios(entry[names[0]], entry[names[-1]])
        if "times_faster" in entry:
            say(f"{part:<11} {entry['times_faster']:.1f} × as fast")
        found[part] = entry
    return found


def _jobs(cells: Cells, settings: Settings, parts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Part → what both sides are asked to do."""
    features, metadata = write_scored_table(cells.folder, settings)
    treatments = _write_table(cells.folder, "treatments", *simulated_treatments(settings.score_features))
    jobs = {}
    for part in parts:
        slow = PARTS[part][1]
        job = {"part": part, **cells.job(), **settings.job(), "repeats": 1 if slow else settings.repeats}
        if slow:
            job["rounds"] = settings.slow_repeats
        if part == "augment":
            job["minibatches"] = -1  # all of them
        if part == "evaluate":
            job |= {"features_file": str(treatments[0]), "metadata_file": str(treatments[1])}
        if part.startswith("score"):
            job |= {"features_file": str(features), "metadata_file": str(metadata)}
            job["agreed_features"] = min(AGREED_FEATURES, settings.score_features)
        if part == "score with pictures":
            job |= {"pictures": True, "warm_up": 0, "rounds": max(1, settings.slow_repeats - 1)}
        if part == "epoch":
            job["rounds"] = max(1, settings.slow_repeats - 1)
        if part == "end to end":
            job |= {"epochs": settings.epochs, "rounds": max(1, settings.slow_repeats - 1)}
        jobs[part] = job
    return jobs


def _takes_part(side: Side, part: str) -> bool:
    return side.parts is None or part in side.parts


def label(side: Side) -> str:
    """The side's name in results: cellfast's recipes are told apart."""
    recipe = side.values.get("recipe")
    name = side.name if recipe in (None, "perakis2021") else f"{side.name}, {recipe} recipe"
    if pieces := side.values.get("chunk_size"):
        name += f", in pieces of {pieces}"
    return name + (", bf16" if side.values.get("amp") else "")


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """A worker's result with median and spread.

    ``growth_bytes``: peak memory above what the process held after its imports (about 0.8 GB of libraries on both sides).
    """
    if "seconds" not in result:
        return {key: result[key] for key in ("out_of_memory", "timed_out", "peak_bytes", "growth_bytes") if key in result}
    seconds = result["seconds"]
    median = statistics.median(seconds)
    out = {key: value for key, value in result.items() if key not in ("imported_bytes",)}
    out |= {
        "median_seconds": median,
        "spread": (max(seconds) - min(seconds)) / median if median else 0.0,
        "cells_per_second": result["cells"] / median if median else None,
    }
    out.setdefault("growth_bytes", result["peak_bytes"] - result["imported_bytes"])
    return out


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
    if len(here) == len(there):
        out = {"times_faster": statistics.median(theirs / mine for mine, theirs in zip(here, there))}
    else:
        out = {"times_faster": statistics.median(there) / statistics.median(here)}
    out["memory_ratio"] = ours["peak_bytes"] / other["peak_bytes"]
    out["growth_ratio"] = ours["growth_bytes"] / max(1, other["growth_bytes"])
    return out


def describe(entry: dict[str, Any]) -> str:
    """One side's summary as a line."""
    if "median_seconds" not in entry:
        return f"out of memory ({entry['out_of_memory'][:80]})" if "out_of_memory" in entry else "took too long"
    return (
        f"{entry['median_seconds']:9.4f} s ± {50 * entry['spread']:.0f} %  {entry['cells_per_second']:10,.0f} cells/s  "
        f"{entry['peak_bytes'] / 2**30:.2f} GiB"
    )


def write_scored_table(folder: Path, settings: Settings) -> tuple[Path, Path]:
    """Write the table of simulated features that is scored; returns its two files."""
    return _write_table(folder, "features", *simulated_features(settings.score_cells, settings.score_features))


def _write_table(folder: Path, name: str, values: np.ndarray, frame: pd.DataFrame) -> tuple[Path, Path]:
    features, metadata = folder / f"{name}.npy", folder / f"{name}.csv"
    np.save(features, values, allow_pickle=False)
    frame.to_csv(metadata, index=False)
    return features, metadata


def _check(part: str, entry: dict[str, Any], labels: Sequence[str]) -> None:
    done = [entry[name] for name in labels if "seconds" in entry[name]]
    keys = {"loss": ("loss", "gradient_norm")}.get(part, ("nsc", "nscb") if part.startswith(("score", "evaluate")) else ())
    for key in keys:
        tolerance = LOSS_TOLERANCE if part == "loss" else SCORE_TOLERANCE
        values = [d[key] for d in done]
        if values and max(values) - min(values) > tolerance * max(1.0, abs(values[0])):
            raise CellfastError(
                f"{part}: the sides disagree on {key} ({', '.join(map(str, values))}): their times are not comparable"
            )


def measure_agreement(
    ours: Side, other: Side, cells: Cells, settings: Settings, *, batch_size: int = 16, steps: int = 3
) -> dict[str, Any]:
    """Losses of training steps from the same weights, crops and views, number by number.

    In float32 the first loss is compared, from the crops on. In float64, from the very same inputs, every loss of ``steps`` steps and the
    features after them are: encoder, per-view BatchNorm, head, NT-Xent, Adam and weight decay.
    """
    found: dict[str, Any] = {"cells": batch_size, "steps": steps}
    precisions = ("float32", "float64")
    jobs = [
        {
            "part": "agree", **cells.job(), **settings.job(), "batch_size": batch_size, "steps": steps, "double": name == "float64",
            "workers": 0, "weights": str(cells.folder / f"weights-{name}.pt"), "inputs": str(cells.folder / f"inputs-{name}.npy"),
        }
        for name in precisions
    ]  # fmt: skip
    theirs = other.run_several(jobs, threads=settings.threads)
    here = ours.run_several(jobs, threads=settings.threads)
    for name, a, b in zip(precisions, here, theirs):
        found[name] = {
            "losses": a["losses"],
            f"losses of the {other.name}": b["losses"],
            "first_loss_difference": abs(a["losses"][0] - b["losses"][0]),
            "largest_loss_difference": max(abs(x - y) for x, y in zip(a["losses"], b["losses"])),
            "largest_feature_difference": max(abs(x - y) for x, y in zip(a["features"], b["features"])),
            "largest_input_difference": a["largest_input_difference"],
        }
    return found
