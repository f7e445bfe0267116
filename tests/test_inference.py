"""Intervals cover, tests keep their size, chance is what batches give: shown on simulated screens with a known truth."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cellfast.profiles.compare import compare_results
from cellfast.profiles.evaluate import EvaluationOptions, evaluate_profiles
from cellfast.profiles.intervals import difference_interval, mean_interval, paired_interval, ratio_interval
from cellfast.profiles.mean_average_precision import moa_precision
from cellfast.profiles.replicates import replicate_reproducibility
from cellfast.profiles.report import comparison_lines, evaluation_lines
from cellfast.profiles.results import read_annotated
from cellfast.profiles.table import ProfileTable

QUICK = {"num_permutations": 0, "average_precision": False}


def table(rows, features):
    metadata = pd.DataFrame(rows, columns=["Metadata_Compound", "Metadata_Concentration", "Metadata_MoA", "Metadata_Batch"])
    features = np.asarray(features, float)
    return ProfileTable(metadata, features, [f"f{i}" for i in range(features.shape[1])])


def screen(rng, num_moas, signal, week=0.6, num_weeks=6, dims=16):
    """MoAs of different strength, compounds around them, doses around those; weeks shift all. Each screen draws its MoAs anew."""
    rows, features = [], []
    shift = week * rng.normal(size=(num_weeks, dims))
    for m in range(num_moas):
        centre = signal * rng.gamma(2, 0.5) * rng.normal(size=dims)
        weeks = rng.choice(num_weeks, 3, replace=False)
        for c in range(rng.integers(2, 6)):
            w, at = rng.choice(weeks), centre + 0.7 * rng.normal(size=dims)
            for d in range(rng.integers(1, 5)):
                rows.append((f"c{m}_{c}", float(d), f"m{m}", f"w{w}"))
                features.append(at + 0.5 * rng.normal(size=dims) + shift[w])
    return table(rows, features)


# What cannot be right, several MoAs, batches shared ----------------------------------------------------------------------------------


def test_what_cannot_be_right_is_not_wrong_and_drop_is_also_of_the_common_set():
    rows = [("a", 1.0, "X", "w1"), ("b", 1.0, "X", "w2"), ("c", 1.0, "Y", "w1"), ("d", 1.0, "Y", "w1"), ("d", 2.0, "Y", "w2"),
            ("e", 1.0, "Z", "w3")]  # fmt: skip
    angles = np.array([0.0, 0.1, 1.0, 1.1, 1.2, 2.0])
    profiles = table(rows, np.stack([np.cos(angles), np.sin(angles)], axis=1))
    options = EvaluationOptions(one_batch_moas="keep", num_permutations=20)
    result = evaluate_profiles(profiles, options).result
    # e is the only compound of Z; under NSCB d 1 has no Y of another compound and week, c has d 2.
    assert result["nsc"]["excluded"]["no_candidate_of_its_moa"] == ["e 1"]
    assert (result["nsc"]["num_correct"], result["nsc"]["num_evaluated"]) == (5, 5)
    assert result["nscb"]["excluded"]["no_candidate_of_its_moa"] == ["d 1", "e 1"]
    assert (result["nscb"]["num_correct"], result["nscb"]["num_evaluated"]) == (4, 4)
    assert result["drop_common"] == {**result["drop_common"], "drop": 0.0, "num_evaluated": 4}
    counted = evaluate_profiles(profiles, EvaluationOptions(one_batch_moas="keep", unanswerable="count", **QUICK)).result
    assert (counted["nsc"]["num_evaluated"], counted["nscb"]["num_evaluated"]) == (6, 6)
    text = "\n".join(evaluation_lines(result))
    assert "2 not evaluated (no candidate of its moa): d 1, e 1" in text
    assert "on the 4 profiles that both evaluate" in text


@pytest.mark.parametrize("rule", ["overlap", "joined"])
@pytest.mark.parametrize("seed", range(4))
def test_what_can_be_right_is_what_an_n_by_n_table_says(rule, seed):
    rng = np.random.default_rng(seed)
    n = 40
    rows = []
    for _ in range(n):
        moa = "|".join(rng.choice(list("UVWXYZ"), rng.integers(1, 3), replace=False))
        weeks = ";".join(sorted(rng.choice(["w1", "w2", "w3", "w4"], rng.integers(1, 3), replace=False)))
        rows.append((f"c{rng.integers(15)}", float(len(rows)), moa, weeks))
    profiles = table(rows, rng.normal(size=(n, 5)))
    options = EvaluationOptions(batch_rule=rule, one_batch_moas="keep", **QUICK)
    found = evaluate_profiles(profiles, options).table
    parts = [set(r[2].split("|")) for r in rows]
    weeks = [set(r[3].split(";")) for r in rows]
    for i in range(n):
        others = [j for j in range(n) if rows[j][0] != rows[i][0]]
        apart = [j for j in others if (not weeks[i] & weeks[j] if rule == "overlap" else weeks[i] != weeks[j])]
        for name, pool in (("nsc", others), ("nscb", apart)):
            assert found[f"{name}_evaluated"][i] == any(parts[i] & parts[j] for j in pool)
            if found[f"{name}_evaluated"][i]:
                nearest = max(pool, key=lambda j: _cosine(profiles.features, i, j))
                assert found[f"{name}_correct"][i] == bool(parts[i] & parts[nearest])


def _cosine(x, i, j):
    return x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j])


def test_several_moas_match_if_any_does_also_by_vote_precision_and_from_list_columns(tmp_path):
    rows = [
        ("a", 1.0, "X|Y", "w1"),
        ("b", 1.0, "Y", "w2"),
        ("c", 1.0, "X", "w3"),
        ("d", 1.0, "Z", "w1"),
        ("e", 1.0, "Z | Y", "w2"),
    ]
    angles = np.array([0.0, 0.1, 0.25, 1.0, 1.1])
    profiles = table(rows, np.stack([np.cos(angles), np.sin(angles)], axis=1))
    nsc = evaluate_profiles(profiles, EvaluationOptions(num_permutations=20)).result["nsc"]
    # a → b by Y, b → a by Y, c → b is wrong, d ↔ e by Z.
    assert (nsc["num_correct"], nsc["num_evaluated"]) == (4, 5)
    # a: Y, X, Z of b, c, d, so the nearest, Y; b: X twice of a, c; c: Y twice of b, a; d: Y twice of e, b; e: Z, X, Y, so Z.
    voted = evaluate_profiles(profiles, EvaluationOptions(k=3, **QUICK)).table
    assert list(voted["nsc_correct"]) == [True, False, False, False, True]
    precision = moa_precision(profiles)
    # a finds b, c and e (0.1, 0.25, 1.1) before and after d (1.0); b finds a, then e before d? e at 1.0, c 0.15, d 0.9.
    assert precision["per_group"]["X"] == pytest.approx(np.mean([(1 + 1 + 3 / 4) / 3, 1 / 2]))
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"Metadata_Compound": [r[0] for r in rows], "Metadata_Batch": [r[3] for r in rows]}
    columns |= {"Metadata_MoA": [[p.strip() for p in r[2].split("|")] for r in rows]}
    columns |= {f"h00{i}": profiles.features[:, i] for i in range(2)}
    pq.write_table(pa.table(columns), tmp_path / "lists.parquet")
    assert list(read_annotated(tmp_path / "lists.parquet").metadata["Metadata_MoA"])[:2] == ["X|Y", "Y"]


def test_ties_name_no_first_one_and_compare_names_the_options_that_differ():
    rows = [("a", 1.0, "X", "w1"), ("b", 1.0, "X", "w2"), ("c", 1.0, "Y", "w2"), ("d", 1.0, "Y", "w1")]
    evaluation = evaluate_profiles(table(rows, np.eye(4)), EvaluationOptions(num_permutations=10))
    assert evaluation.table["nsc_neighbour"][0] == "b 1 or c 1 or d 1"
    assert evaluation.table["nsc_called_moa"][0] == "X or Y"
    assert evaluation.result["nsc"]["majority_baseline"]["moa"] == "X or Y"
    treatments = [
        {"id": i, "moa": m, "nsc_evaluated": True, "nsc_correct": True, "nscb_evaluated": False, "nscb_correct": False}
        for i, m in enumerate("XXYY")
    ]
    a = {"treatments": treatments, "options": {"metric": "cosine", "pool": [], "seed": 1}}
    b = {"treatments": treatments, "options": {"metric": "euclidean", "pool": (), "seed": 2}}
    report = compare_results(a, b)
    assert report["differing_options"] == {"metric": ["cosine", "euclidean"]}
    assert "options   metric differs: A cosine, B euclidean" in "\n".join(comparison_lines(report))


# Coverage ------------------------------------------------------------------------------------------------------------------------------


def covered(intervals, values):
    """Share of screens whose interval holds the mean over all screens."""
    intervals, truth = np.array(intervals), np.mean(values)
    return float(((intervals[:, 0] <= truth) & (truth <= intervals[:, 1])).mean())


def test_intervals_of_scores_cover_in_95_percent_of_screens():
    """150 screens of 12 MoAs; resampling compounds covered 81 to 87 %. ± 2 standard errors of 150 are 3.6 points."""
    rng = np.random.default_rng(0)
    values, intervals = {k: [] for k in ("nsc", "nscb", "drop", "mAP")}, {k: [] for k in ("nsc", "nscb", "drop", "mAP")}
    for _ in range(150):
        profiles = screen(rng, 12, 0.8)
        result = evaluate_profiles(profiles, EvaluationOptions(**QUICK)).result
        precision = moa_precision(profiles)
        for name, value, interval in (
            *((rule, result[rule]["accuracy"], result[rule]["interval_95"]) for rule in ("nsc", "nscb")),
            ("drop", result["drop"], result["drop_interval_95"]),
            ("mAP", precision["mean"], precision["interval_95"]),
        ):
            values[name].append(value)
            intervals[name].append(interval)
    for name in values:
        assert 0.90 <= covered(intervals[name], values[name]) <= 0.99, name


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_intervals_of_clustered_shares_and_differences_cover(share):
    """2,000 draws of 15 clusters that differ in how right they are, from the intervals themselves."""
    rng = np.random.default_rng(1)
    cluster = np.repeat(np.arange(15), rng.integers(2, 14, 15))
    ones = np.ones(len(cluster))
    right, apart, paired, values = [], [], [], []
    for _ in range(2000):
        of_cluster = rng.beta(3 * share, 3 * (1 - share), 15)[cluster]
        a, b = (rng.random(len(cluster)) < of_cluster).astype(float), (rng.random(len(cluster)) < of_cluster).astype(float)
        right.append(ratio_interval(a, ones, cluster))
        paired.append(paired_interval((a, ones), (b, ones), cluster))
        apart.append(difference_interval((a, ones), (b, ones), cluster))
        values.append(a.mean())
    assert 0.92 <= covered(right, values) <= 0.985
    # Where hardly any profile is right in one alone, a bound on what is left cannot be exact.
    most = 0.98 if share < 0.9 else 1.0
    assert 0.92 <= covered(paired, [0.0]) <= most
    assert 0.92 <= covered(apart, [0.0]) <= most


def test_intervals_have_a_width_where_all_is_right():
    ones, cluster = np.ones(40), np.arange(40) // 4
    low, high = ratio_interval(ones, ones, cluster)
    assert 0.5 < low < 0.9
    assert high == 1
    assert ratio_interval(0 * ones, ones, cluster) == pytest.approx([1 - high, 1 - low])
    assert mean_interval(np.ones(3), np.zeros(3, int)) == [0, 1]
    low, high = paired_interval((ones, ones), (ones, ones), cluster)
    assert -0.2 < low < 0 < high < 0.2
    assert ratio_interval(ones, 0 * ones, cluster) is None


# Size ----------------------------------------------------------------------------------------------------------------------------------


def week_screen(rng, num_weeks=6, per_week=8, dims=12, wells=1):
    """Weeks differ, compounds do not; the MoAs of a week are mostly two, as in BBBC021, where batches and MoAs go together."""
    rows, features = [], []
    shift = 2 * rng.normal(size=(num_weeks, dims))
    for w in range(num_weeks):
        for c in range(per_week):
            moa = rng.choice([f"m{w % 4}", f"m{(w + 1) % 4}", f"m{rng.integers(4)}"])
            for _ in range(wells):
                rows.append((f"c{w}_{c}", 1.0, moa, f"w{w}"))
                features.append(shift[w] + rng.normal(size=dims))
    return table(rows, features)


def test_batch_effects_alone_are_no_evidence():
    """NSC and NSCB on pure week effects: 5 % of screens below 0.05, where exchange among all compounds called 27 to 34 %."""
    rng = np.random.default_rng(2)
    below, chance, scores = {"nsc": [], "nscb": []}, [], []
    for _ in range(120):
        result = evaluate_profiles(week_screen(rng), EvaluationOptions(num_permutations=59, average_precision=False)).result
        for rule in below:
            below[rule].append(result[rule]["p_value"] <= 0.05)
        scores.append(result["nsc"]["accuracy"])
        chance.append(result["nsc"]["chance"])
    assert np.mean(below["nsc"]) <= 0.1
    assert np.mean(below["nscb"]) <= 0.1
    # Chance is what the weeks give, far above one in four.
    assert np.mean(chance) == pytest.approx(np.mean(scores), abs=0.02)
    assert np.mean(chance) > 0.35


def test_a_mechanism_is_evidence_within_its_batches():
    rng = np.random.default_rng(3)
    profiles = week_screen(rng)
    effect = rng.normal(size=(4, 12))
    moved = profiles.features + 1.5 * effect[[int(m[1]) for m in profiles.metadata["Metadata_MoA"]]]
    result = evaluate_profiles(profiles.with_features(moved), EvaluationOptions(num_permutations=99)).result
    assert result["nsc"]["p_value"] <= 0.05
    assert f"chance {100 * result['nsc']['chance']:.1f} %" in "\n".join(evaluation_lines(result))


def test_where_no_two_moas_share_a_batch_chance_is_the_score():
    rows = [(f"c{i}", 1.0, f"m{i % 3}", f"w{i % 3}") for i in range(12)]
    result = evaluate_profiles(
        table(rows, np.random.default_rng(0).normal(size=(12, 4))), EvaluationOptions(num_permutations=20)
    ).result
    assert result["nsc"]["p_value"] == 1.0
    assert result["nsc"]["num_exchangeable"] == 0
    assert "no two MoAs share a batch" in "\n".join(evaluation_lines(result))


def replicate_screen(rng, effect=0.0, plate_effect=2.0, num_batches=4, plates=2, treatments=15, dims=12):
    """Each batch has its own treatments, once on each of its plates."""
    rows, features, plate_names = [], [], []
    for b in range(num_batches):
        shifts = plate_effect * (rng.normal(size=dims) + 0.5 * rng.normal(size=(plates, dims)))
        for t in range(treatments):
            own = effect * rng.normal(size=dims)
            for p in range(plates):
                rows.append((f"c{b}_{t}", 1.0, f"m{t % 5}", f"b{b}"))
                plate_names.append(f"b{b}_p{p}")
                features.append(shifts[p] + own + rng.normal(size=dims))
    profiles = table(rows, features)
    profiles.metadata["Metadata_Plate"] = plate_names
    return profiles


def test_percent_replicating_of_plate_effects_alone_is_5():
    """The unmatched null called 95 % of the treatments reproducible."""
    rng = np.random.default_rng(4)
    found = [replicate_reproducibility(replicate_screen(rng), seed=i, num_null=200) for i in range(12)]
    assert np.mean([f["percent_replicating"] for f in found]) == pytest.approx(5, abs=2.5)
    assert found[0]["across_batches"] is None
    assert found[0]["across_plates"]["num_treatments"] == 60
    real = replicate_reproducibility(replicate_screen(rng, effect=3.0))
    assert real["across_plates"]["percent_replicating"] > 80


def test_the_interval_of_percent_replicating_covers():
    """Effects of MoAs differ and so do the plates of the batches: treatments are dependent by both. 100 screens, ± 4.4 points."""
    rng = np.random.default_rng(9)
    values, intervals = [], []
    for _ in range(100):
        strength = 1.5 * rng.gamma(2, 0.5, 12)
        rows, features, plates = [], [], []
        shifts = 2 * rng.normal(size=(4, 1, 12)) + rng.normal(size=(4, 3, 12))
        for m in range(12):
            for c in range(rng.integers(2, 5)):
                b, own = rng.integers(4), strength[m] * rng.normal(size=12)
                for p in range(3):
                    rows.append((f"c{m}_{c}", 1.0, f"m{m}", f"b{b}"))
                    plates.append(f"b{b}_p{p}")
                    features.append(shifts[b, p] + own + rng.normal(size=12))
        profiles = table(rows, features)
        profiles.metadata["Metadata_Plate"] = plates
        found = replicate_reproducibility(profiles, num_null=200)
        values.append(found["percent_replicating"])
        intervals.append(found["interval_95"])
    assert 0.88 <= covered(intervals, values) <= 0.99


def test_replicates_across_plates_and_across_batches_are_told_apart():
    """Four batches share their treatments: wells on the same plate resemble each other by the plate, others by the treatment."""
    rng = np.random.default_rng(5)
    rows, features, plates = [], [], []
    own = 2 * rng.normal(size=(20, 10))
    for b in range(3):
        for p in range(2):
            shift = 3 * rng.normal(size=10)
            for t in range(20):
                rows.append((f"c{t}", 1.0, f"m{t % 5}", f"b{b}"))
                plates.append(f"b{b}_p{p}")
                features.append(shift + own[t] * (p == 0) + rng.normal(size=10))
    profiles = table(rows, features)
    profiles.metadata["Metadata_Plate"] = plates
    found = replicate_reproducibility(profiles)
    assert found["num_layouts"] == 1
    assert {found[k]["num_treatments"] for k in ("across_plates", "across_batches")} == {20}
    text = "\n".join(evaluation_lines(evaluate_profiles(profiles, EvaluationOptions(num_permutations=10)).result))
    assert "replicate across batches" in text
    assert "chance 5 %" in text


def test_mean_average_precision_is_printed_with_its_chance():
    rng = np.random.default_rng(6)
    found = [
        moa_precision(table([(f"c{i}", 1.0, f"m{i % 5}", "w") for i in range(25)], rng.normal(size=(25, 6)))) for _ in range(60)
    ]
    assert np.mean([f["mean"] for f in found]) == pytest.approx(found[0]["chance"], abs=0.01)


def test_the_count_of_cells_alone_stands_beside_every_score():
    """Counts tell X from Y here, and nothing else: the baseline is right wherever the nearest count is of the MoA."""
    rng = np.random.default_rng(8)
    profiles = table([(f"c{i}", 1.0, "XY"[i % 2], f"w{i % 3}") for i in range(24)], rng.normal(size=(24, 5)))
    assert evaluate_profiles(profiles, EvaluationOptions(**QUICK)).result["cell_count_baseline"] is None
    profiles.metadata["Metadata_Cell_Count"] = [100 + i + 900 * (i % 2) for i in range(24)]
    profiles.metadata["Metadata_NumWells"] = 1
    result = evaluate_profiles(profiles, EvaluationOptions(num_permutations=9)).result
    assert result["cell_count_baseline"] == {"nsc": 1.0, "nscb": 1.0, "mean_average_precision": pytest.approx(1.0)}
    assert "the number of cells alone gets NSC 100.0 %, NSCB 100.0 %" in "\n".join(evaluation_lines(result))
