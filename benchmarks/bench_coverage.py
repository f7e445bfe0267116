"""How often intervals hold the truth and tests reject without an effect, on simulated screens: ``python benchmarks/bench_coverage.py``.

Prints the tables of docs/profiles.md and writes ``results/coverage.json``. Truth is the mean over all screens of a design, which draw their
MoAs, compounds, doses and weeks anew. Minutes; ``--screens 100`` for a quick look (± 4 points).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from cellfast.atomic import write_json
from cellfast.benchmark import environment
from cellfast.profiles.activity import ActivityOptions, score_activity
from cellfast.profiles.evaluate import EvaluationOptions, evaluate_profiles
from cellfast.profiles.intervals import paired_interval
from cellfast.profiles.mean_average_precision import moa_precision
from cellfast.profiles.replicates import replicate_reproducibility
from cellfast.profiles.table import ProfileTable

QUICK = {"num_permutations": 0, "average_precision": False}


def table(rows: list[tuple], features: list[np.ndarray], columns: str = "Compound Concentration MoA Batch Plate") -> ProfileTable:
    metadata = pd.DataFrame(rows, columns=[f"Metadata_{c}" for c in columns.split()])
    return ProfileTable(metadata, np.array(features), [f"f{i}" for i in range(len(features[0]))])


def screen(
    rng: np.random.Generator, num_moas: int, signal: float, week: float = 0.6, weeks: int = 6, dims: int = 24
) -> ProfileTable:
    """Treatments: MoAs of different strength in three weeks each, 2 to 5 compounds, 1 to 4 doses."""
    rows, features = [], []
    shift = week * rng.normal(size=(weeks, dims))
    for m in range(num_moas):
        centre, own = signal * rng.gamma(2, 0.5) * rng.normal(size=dims), rng.choice(weeks, 3, replace=False)
        for c in range(rng.integers(2, 6)):
            w, at = rng.choice(own), centre + 0.7 * rng.normal(size=dims)
            for d in range(rng.integers(1, 5)):
                rows.append((f"c{m}_{c}", float(d), f"m{m}", f"w{w}", f"w{w}"))
                features.append(at + 0.5 * rng.normal(size=dims) + shift[w])
    return table(rows, features)


def wells(rng: np.random.Generator, effect: float, num_moas: int = 12, plates: int = 3, dims: int = 12) -> ProfileTable:
    """Wells: 2 to 4 compounds of each MoA once on each plate of one of four batches, plates that differ, effects that do too."""
    shift = 2 * rng.normal(size=(4, 1, dims)) + rng.normal(size=(4, plates, dims))
    rows, features = [], []
    for m in range(num_moas):
        strength = effect * rng.gamma(2, 0.5)
        for c in range(rng.integers(2, 5)):
            b, own = rng.integers(4), strength * rng.normal(size=dims)
            for p in range(plates):
                rows.append((f"c{m}_{c}", 1.0, f"m{m}", f"b{b}", f"b{b}_p{p}"))
                features.append(shift[b, p] + own + rng.normal(size=dims))
    return table(rows, features)


def weeks_only(rng: np.random.Generator, weeks: int = 6, per_week: int = 8, dims: int = 12) -> ProfileTable:
    """Week effects and nothing else; the MoAs of a week are mostly two."""
    rows, features = [], []
    for w in range(weeks):
        shift = 2 * rng.normal(size=dims)
        for c in range(per_week):
            moa = rng.choice([f"m{w % 4}", f"m{(w + 1) % 4}", f"m{rng.integers(4)}"])
            rows.append((f"c{w}_{c}", 1.0, moa, f"w{w}", f"w{w}"))
            features.append(shift + rng.normal(size=dims))
    return table(rows, features)


def inert(rng: np.random.Generator, treatments: int, plates: int, controls: int, dims: int = 10) -> ProfileTable:
    """Plates with controls and treatments that do nothing."""
    rows, features = [], []
    for p in range(plates):
        shift = 2 * rng.normal(size=dims)
        for i in range(controls + treatments):
            name = ("DMSO", 0.0, "") if i < controls else (f"c{i}", 1.0, f"m{i % 5}")
            rows.append((*name, f"b{p // 2}", f"p{p}"))
            features.append(shift + rng.normal(size=dims))
    return table(rows, features)


def coverage(found: list[tuple[float, list[float]]]) -> dict[str, float]:
    truth = float(np.mean([value for value, _ in found]))
    intervals = np.array([interval for _, interval in found])
    held = (intervals[:, 0] <= truth) & (truth <= intervals[:, 1])
    return {"truth": round(truth, 4), "coverage": round(float(held.mean()), 4),
            "width": round(float(np.diff(intervals, axis=1).mean()), 4)}  # fmt: skip


def scores(rng: np.random.Generator, num_moas: int, signal: float, screens: int) -> dict[str, dict[str, float]]:
    found: dict[str, list] = {k: [] for k in ("nsc", "nscb", "drop", "mAP per MoA", "compare nsc")}
    for _ in range(screens):
        profiles = screen(rng, num_moas, signal)
        noisier = profiles.with_features(profiles.features + 0.5 * rng.normal(size=profiles.features.shape))
        a, b = (evaluate_profiles(one, EvaluationOptions(**QUICK)) for one in (profiles, noisier))
        for rule in ("nsc", "nscb"):
            found[rule].append((a.result[rule]["accuracy"], a.result[rule]["interval_95"]))
        found["drop"].append((a.result["drop"], a.result["drop_interval_95"]))
        precision = moa_precision(profiles)
        found["mAP per MoA"].append((precision["mean"], precision["interval_95"]))
        counted = [(e.table["nsc_correct"].to_numpy(float), e.table["nsc_evaluated"].to_numpy(float)) for e in (a, b)]
        cluster = pd.factorize(profiles.metadata["Metadata_MoA"])[0]
        difference = b.result["nsc"]["accuracy"] - a.result["nsc"]["accuracy"]
        found["compare nsc"].append((difference, paired_interval(*counted, cluster)))
    return {name: coverage(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--screens", type=int, default=400)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "coverage.json")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    result: dict[str, dict] = {"screens": options.screens, "coverage": {}, "size": {}}
    for num_moas in (6, 12, 25):
        for signal in (0.3, 1.0, 2.5):
            name = f"{num_moas} MoAs, signal {signal}"
            result["coverage"][name] = scores(rng, num_moas, signal, options.screens)
            print(name, result["coverage"][name], flush=True)
    for effect in (0.7, 1.5, 2.5):
        found = [replicate_reproducibility(wells(rng, effect), num_null=200) for _ in range(options.screens)]
        values = [(f["percent_replicating"], f["interval_95"]) for f in found if f["percent_replicating"] is not None]
        result["coverage"][f"percent replicating, effect {effect}"] = coverage(values)
        print(effect, result["coverage"][f"percent replicating, effect {effect}"], flush=True)
    below: dict[str, list] = {"nsc": [], "nscb": []}
    for _ in range(options.screens):
        found = evaluate_profiles(weeks_only(rng), EvaluationOptions(num_permutations=99, average_precision=False)).result
        for rule in below:
            below[rule].append(found[rule]["p_value"] <= 0.05)
    result["size"] = {f"{rule}, weeks only": round(float(np.mean(values)), 4) for rule, values in below.items()}
    found = [replicate_reproducibility(wells(rng, 0.0), num_null=200)["percent_replicating"] for _ in range(options.screens // 4)]
    result["size"]["percent replicating, plates only"] = round(float(np.mean(found)) / 100, 4)
    for plates in (1, 3):
        tables = []
        for _ in range(max(1, options.screens // 20)):
            profiles = inert(rng, 40, 3 if plates == 3 else 1, 16)
            if plates == 1:
                profiles = profiles.rows(np.r_[0:16, np.repeat(np.arange(16, 56), 1)])
                profiles.metadata["Metadata_Compound"] = ["DMSO"] * 16 + [f"c{i // 4}" for i in range(40)]
            tables.append(score_activity(profiles, ActivityOptions(num_permutations=499, null_size=1000)).treatments)
        found = pd.concat(tables)
        for name in ("map_p", "mahalanobis_p", "e_distance_p", "map_control_p", "map_all_p"):
            result["size"][f"{name}, inert treatments on {plates} plates"] = round(float((found[name] <= 0.05).mean()), 4)
    print(result["size"])
    write_json(options.output, {"subject": "coverage", "quick": False, "environment": environment(), "result": result})


if __name__ == "__main__":
    main()
