"""The evidence for the default order of normalisation: ``python benchmarks/bench_normalisation.py --data DIR [--embeddings NAME=EMB] [--out FILE.json]``.

Candidate orders on Ljosa's wells, a JUMP-MOA plate, embeddings of real cells and screens simulated as features, of which the truth is known.
DIR holds ``bbbc021`` (the official tables and Ljosa's) and ``jump_moa``; what is not there is left out and named.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd

from cellfast.atomic import write_json
from cellfast.benchmark import environment
from cellfast.profiles.batch_metrics import batch_metrics
from cellfast.profiles.build import ProfileOptions, build_profiles, treatments
from cellfast.profiles.evaluate import EvaluationOptions, evaluate_profiles
from cellfast.profiles.mean_average_precision import moa_precision, replicate_precision
from cellfast.profiles.normalize import normalize_profiles
from cellfast.profiles.steps import RECIPES, parse_steps
from cellfast.profiles.table import ProfileTable

_ALL = "standardize:by=all,controls=all"
_OWN, _SHRUNK = "center:by=plate", "center:towards=batch"
ORDERS: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "perakis2021: tvn, lambda 1": RECIPES["perakis2021"],
    "z all, tvn": (_ALL, "tvn"),
    "z all, centre batch, tvn": (_ALL, "center:by=batch", "tvn"),
    "z all, centre plate, tvn": (_ALL, _OWN, "tvn"),
    "z all, centre shrunk, tvn": (_ALL, _SHRUNK, "tvn"),
    "z all, tvn, centre plate": (_ALL, "tvn", _OWN),
    "z all, sphering": (_ALL, "sphering"),
    "z all, centre shrunk, sphering": (_ALL, _SHRUNK, "sphering"),
    "rank, tvn": ("rank", "tvn"),
    "rank, centre batch, tvn": ("rank", "center:by=batch", "tvn"),
    "rank, centre plate, tvn": ("rank", _OWN, "tvn"),
    "rank, centre shrunk, tvn": ("rank", _SHRUNK, "tvn"),
    "rank, centre shrunk, sphering": ("rank", _SHRUNK, "sphering"),
    "z plate, sphering": ("standardize:by=plate", "sphering"),
    "mad plate": ("mad_robustize:by=plate",),
    "mad plate, sphering": ("mad_robustize:by=plate", "sphering"),
    "z plate, pca 64, mad plate": ("standardize:by=plate", "pca:n=64", "mad_robustize:by=plate"),
    "z all, centre shrunk, pca 64, harmony": (_ALL, _SHRUNK, "pca:n=64", "harmony"),
}

#: Sizes of what moves a simulated well: its treatment (0.6 unless said), week, plate, edge; the log of a week's factor on effects and noise; and
#: how many controls a plate has, and features a well. The noise between wells has size 0.35.
SCREENS: dict[str, dict[str, float]] = {
    "weeks of size 1": {"week": 1.0},
    "weeks of size 3": {"week": 3.0},
    "plates of size 1": {"week": 0.5, "plate": 1.0},
    "no batch effects": {"week": 0.0, "plate": 0.0, "edge": 0.0, "gain": 0.0},
    "two controls a plate": {"week": 1.0, "controls": 2},
    "strong edge effects": {"week": 1.0, "edge": 1.0},
    "weak effects": {"week": 1.0, "effect": 0.35},
    "weeks differ in gain": {"week": 1.0, "gain": 0.5},
    "more controls than features": {"week": 1.0, "controls": 12, "num_features": 48},
}


def simulated_wells(
    seed: int,
    *,
    week: float = 1.0,
    plate: float = 0.4,
    edge: float = 0.2,
    gain: float = 0.1,
    effect: float = 0.6,
    controls: float = 6,
    num_weeks: int = 6,
    num_features: int = 128,
) -> ProfileTable:
    """Wells of a screen in BBBC021's design, features and all: 10 MoAs × 4 compounds × 2 doses × 3 replicates, a compound in one week, a MoA's
    compounds in one to three of the weeks, so that treatments of a MoA share weeks.
    """
    rng = np.random.default_rng(seed)
    d = num_features
    # A spectrum as real features have it: a few directions hold most of the variation of wells.
    basis = np.linalg.qr(rng.standard_normal((d, d)))[0]
    spread = np.arange(1, d + 1) ** -0.5

    def vector(size: float) -> np.ndarray:
        v = basis @ (spread * rng.standard_normal(d))
        return size * v / np.linalg.norm(v)

    weeks = [(vector(week), vector(1.0), np.exp(rng.normal(0, gain, d))) for _ in range(num_weeks)]
    rows, features = [], []
    layout: list[list[tuple[str, float, str, np.ndarray]]] = [[] for _ in range(num_weeks)]
    for m in range(10):
        moa, homes = vector(effect), rng.choice(num_weeks, int(rng.integers(1, 4)), replace=False)
        for c in range(4):
            own, home = moa + vector(0.8 * effect), int(homes[c % len(homes)])
            layout[home] += [(f"moa{m}-{c}", dose, f"moa{m}", share * own) for dose, share in ((3.0, 1.0), (1.0, 0.6))]
    for w, (shift, tilt, factor) in enumerate(weeks):
        for p in range(3):
            of_plate = shift + vector(plate)
            wells = [("DMSO", 0.0, "DMSO", np.zeros(d))] * int(controls) + layout[w]
            places = rng.permutation(60)[: len(wells)]
            for (compound, dose, moa, its), place in zip(wells, places):
                row, column = divmod(int(place), 10)
                outer = float(row in (0, 5) or column in (0, 9))
                noise = basis @ (spread * rng.standard_normal(d)) * 0.35 / np.linalg.norm(spread) + rng.normal(0, 0.02, d)
                features.append(its * factor + of_plate + edge * outer * tilt + noise * factor)
                rows.append(
                    (f"Week{w + 1}_{100 * w + p}", f"{'BCDEFG'[row]}{column + 2:02d}", f"Week{w + 1}", compound, dose, moa)
                )
    names = ("Plate", "Well", "Batch", "Compound", "Concentration", "MoA")
    metadata = pd.DataFrame(rows, columns=[f"Metadata_{n}" for n in names])
    # Features come in units of their own.
    return ProfileTable(
        metadata, np.array(features) * np.exp(rng.normal(0, 1, d)) + rng.normal(0, 3, d), [f"h{i:03d}" for i in range(d)]
    )


def real_wells(data: Path, embeddings: tuple[str, ...]) -> dict[str, ProfileTable]:
    """Wells as they are read, before normalisation."""
    bbbc, jump = data / "bbbc021", data / "jump_moa"
    official = {"metadata": bbbc / "BBBC021_v1_image.csv.gz", "moa": bbbc / "BBBC021_v1_moa.csv"}
    inputs = {
        "Ljosa": (bbbc / "ljosa_jbiomolscreen_2013_per_well_mean.csv.gz", official),
        "JUMP-MOA plate": (jump / "BR00122246_wells.csv.gz", {}),
    } | {name: (Path(path), {}) for name, _, path in (text.partition("=") for text in embeddings)}
    found = {}
    for name, (path, options) in inputs.items():
        if not path.exists():
            click.echo(f"left out  {name}: {path} is not there")
            continue
        found[name] = build_profiles([path], ProfileOptions(level="well", steps=parse_steps(["none"]), **options)).profiles
    return found


def score(wells: ProfileTable, order: tuple[str, ...]) -> dict[str, Any]:
    """NSC, NSCB and mAP of the treatments, and what a probe finds in controls that normalisation was not fitted on."""
    steps = parse_steps(order or ("none",))
    done, _ = normalize_profiles(wells, steps)
    # As published. No bounds and nulls of replicates: they cost minutes, and nothing here is told by them.
    options = EvaluationOptions(num_permutations=1, batch_rule="joined", unanswerable="count", average_precision=False)
    evaluation = evaluate_profiles(treatments(done, "median"), options)
    result = evaluation.result
    treated = (done.metadata["Metadata_MoA"] != "") & (done.metadata["Metadata_Compound"] != "DMSO")
    precision = {"moa": moa_precision(evaluation.profiles), "treatment": replicate_precision(done.rows(treated.to_numpy()))}
    compound = wells.metadata["Metadata_Compound"].to_numpy(dtype=object)
    control = np.array([name == "DMSO" for name in compound])
    held_out = control & (np.cumsum(control) % 3 == 0)
    apart = wells.metadata.assign(Metadata_Compound=np.where(held_out, "DMSO that is held out", compound))
    blind, _ = normalize_profiles(ProfileTable(apart, wells.features, wells.feature_names), steps)
    probe = batch_metrics(blind, held_out)
    return {
        **{key: result[key]["accuracy"] for key in ("nsc", "nscb")},
        "map_moa": precision["moa"]["mean"] if precision["moa"] else None,
        "map_replicates": precision["treatment"]["mean"] if precision["treatment"] else None,
        **{f"{key}_probe": probe[key] and probe[key]["accuracy"] for key in ("plate", "batch")},
        **{f"{key}_chance": probe[key] and probe[key]["chance"] for key in ("plate", "batch")},
    }


@click.command()
@click.option("--data", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option(
    "--embeddings", multiple=True, metavar="NAME=FOLDER", help="Embeddings of `cellfast embed` and what to call them; repeatable."
)
@click.option("--seeds", default=5, show_default=True, help="Simulated screens of each kind.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the result as JSON.")
def main(data: Path, embeddings: tuple[str, ...], seeds: int, out: Path | None) -> None:
    """NSC, NSCB, mAP and the probe's accuracy for every candidate order on every screen."""
    screens = {name: [table] for name, table in real_wells(data, embeddings).items()}
    screens |= {f"simulated: {name}": [simulated_wells(s, **kind) for s in range(seeds)] for name, kind in SCREENS.items()}
    result: dict[str, dict[str, Any]] = {}
    for screen, tables in screens.items():
        click.echo(f"\n{screen}\n{'':<42}{'NSC':>7}{'NSCB':>7}{'mAP':>7}{'replic.':>8}{'plate':>7}{'batch':>7}")
        for name, order in ORDERS.items():
            try:
                scores = [score(table, order) for table in tables]
            except ValueError as error:
                result.setdefault(screen, {})[name] = {"error": str(error)}
                click.echo(f"  {name:<40} {str(error)[:80]}")
                continue
            mean = {k: None if scores[0][k] is None else float(np.mean([s[k] for s in scores])) for k in scores[0]}
            result.setdefault(screen, {})[name] = mean
            keys = ("nsc", "nscb", "map_moa", "map_replicates", "plate_probe", "batch_probe")
            shown = "".join(f"{'–' if mean[k] is None else format(100 * mean[k], '.1f'):>7}" for k in keys)
            click.echo(f"  {name:<40}{shown}")
    if out:
        document = {"subject": "normalisation", "quick": False, "seeds": seeds, "orders": ORDERS, "screens": SCREENS}
        write_json(out, {**document, "environment": environment(), "result": result})
    else:
        click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
