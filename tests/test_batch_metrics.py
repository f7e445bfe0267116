"""How much of plate and batch profiles hold: hand-made cases, a published implementation, known truths."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cellfast.profiles.batch_metrics import batch_lines, batch_metrics, lisi, probe_accuracy
from cellfast.profiles.build import ProfileOptions, build_profiles
from cellfast.profiles.evaluate import EvaluationOptions, evaluate_profiles
from cellfast.profiles.table import ProfileTable, write_profiles


def wells(week=0.0, seed=0, controls=8, num_features=20):
    """Three weeks of two plates; a MoA's compounds in every week; ``week`` is what a week adds to all its wells."""
    rng = np.random.default_rng(seed)
    shifts, moas = week * rng.standard_normal((3, num_features)), 2 * rng.standard_normal((4, num_features))
    rows, x = [], []
    for p in range(6):
        for w in range(controls + 8):
            moa = "DMSO" if w < controls else f"m{w % 4}"
            compound = "DMSO" if w < controls else f"{moa}-w{p // 2}-{w // 4}"
            rows.append(
                (
                    f"Week{p // 2 + 1}_{p}",
                    f"{'BCDE'[w // 10]}{w % 10 + 2:02d}",
                    f"Week{p // 2 + 1}",
                    compound,
                    0.0 if w < controls else 1.0,
                    moa,
                )
            )
            x.append(shifts[p // 2] + (0 if w < controls else moas[w % 4]) + rng.standard_normal(num_features))
    names = ("Plate", "Well", "Batch", "Compound", "Concentration", "MoA")
    return ProfileTable(
        pd.DataFrame(rows, columns=[f"Metadata_{n}" for n in names]), np.array(x), [f"h{i:03d}" for i in range(num_features)]
    )


def is_control(table):
    return (table.metadata["Metadata_Compound"] == "DMSO").to_numpy()


def test_lisi_of_hand_made_cases():
    # Two clusters far apart, each of one group: one group among the neighbours.
    far = np.concatenate([np.zeros((40, 2)), np.full((40, 2), 100.0)]) + 1e-3 * np.random.default_rng(0).standard_normal((80, 2))
    np.testing.assert_allclose(lisi(far, np.repeat([0, 1], 40), 10), 1.0)
    # All neighbours at one distance: equal weights, so the shares are counts. Of 4 rows the 3 others: (2/3)² + (1/3)² for rows of group 0 …
    simplex = np.eye(4)
    np.testing.assert_allclose(lisi(simplex, np.array([0, 0, 1, 1])), 1 / ((1 / 3) ** 2 + (2 / 3) ** 2))
    np.testing.assert_allclose(lisi(simplex, np.array([0, 1, 2, 3])), 3.0)
    assert np.isfinite(lisi(np.zeros((5, 2)), np.array([0, 0, 1, 1, 1]))).all()
    assert lisi(np.array([[0.0], [1.0]]), np.array([0, 1])).tolist() == [1.0, 1.0]


def test_lisi_equals_the_published_implementation():
    harmonypy = pytest.importorskip("harmonypy")
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((300, 5)), rng.integers(0, 3, 300)
    x[labels == 1] += 0.8
    theirs = harmonypy.compute_lisi(x, pd.DataFrame({"b": labels.astype(str)}), ["b"], perplexity=30)[:, 0]
    np.testing.assert_allclose(lisi(x, labels, 30), theirs, rtol=1e-3)


def test_the_probe_names_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 30)
    x = rng.standard_normal((120, 50))
    assert probe_accuracy(x, labels) < 0.4
    x[:, :4] += 5 * np.eye(4)[labels]
    assert probe_accuracy(x, labels) > 0.8
    # A batch is named on plates that were not seen: plates' own shifts do not count as the batch's.
    plates = np.repeat(np.arange(12), 10)
    x = rng.standard_normal((120, 50)) + 5 * rng.standard_normal((12, 50))[plates]
    assert probe_accuracy(x, labels) > 0.95
    assert probe_accuracy(x, labels, plates) < 0.6


def test_metrics_tell_week_effects_from_none():
    strong, none = (batch_metrics(t, is_control(t)) for t in (wells(week=3.0), wells()))
    assert strong["batch"]["accuracy"] > 0.95
    assert none["batch"]["accuracy"] < 0.55
    assert none["batch"]["chance"] == pytest.approx(1 / 3)
    assert strong["batch"]["silhouette"] > 0.2 > 0.05 > none["batch"]["silhouette"]
    assert strong["batch"]["lisi"] < 1.3 < 2.3 < none["batch"]["lisi"]
    assert none["batch"]["lisi_mixed"] == pytest.approx(3.0)
    assert none["moa"]["lisi"] < 1.5
    assert "accuracy" not in none["moa"]
    # What the units of the features are does not matter; and one batch has no metrics.
    table = wells(week=1.0)
    scaled = table.with_features(table.features * np.logspace(-3, 3, 20))
    assert batch_metrics(scaled, is_control(scaled))["batch"] == pytest.approx(batch_metrics(table, is_control(table))["batch"])
    one = table.rows((table.metadata["Metadata_Batch"] == "Week1").to_numpy())
    assert batch_metrics(one, is_control(one))["batch"] is None
    assert batch_lines({"before": batch_metrics(one, is_control(one)), "after": batch_metrics(one, is_control(one))})


def test_the_default_removes_the_week_and_reports_say_so(tmp_path):
    write_profiles(wells(week=3.0), tmp_path / "w.parquet")
    built = build_profiles([tmp_path / "w.parquet"], ProfileOptions())
    stages = built.report["batch_metrics"]
    assert stages["before"]["batch"]["accuracy"] > 0.95
    assert stages["after"]["batch"]["accuracy"] < 0.5
    assert stages["after"]["moa"]["silhouette"] > stages["before"]["moa"]["silhouette"]
    lines = batch_lines(stages)
    assert "chance 33 %" in lines[1]
    assert len(lines) == 3
    # The evaluation of the profiles carries them on.
    write_profiles(built.profiles, tmp_path / "p.parquet")
    from cellfast.profiles.feature_files import read_profiles

    options = EvaluationOptions(num_permutations=10, average_precision=False)
    assert evaluate_profiles(read_profiles(tmp_path / "p.parquet"), options).result["batch_metrics"] == stages
