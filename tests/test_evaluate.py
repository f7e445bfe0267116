"""NSC, NSCB and what is said about them: counts, exclusions, intervals, comparison; BBBC021's published numbers from the official files."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from cellfast.cli.evaluate import evaluate as evaluate_command
from cellfast.cli.profile import profile as profile_command
from cellfast.errors import CellfastError
from cellfast.profiles.compare import compare_results, mcnemar
from cellfast.profiles.evaluate import EvaluationOptions, evaluate_profiles
from cellfast.profiles.feature_files import read_profiles
from cellfast.profiles.moas import moa_labels
from cellfast.profiles.permutations import permutation_test
from cellfast.profiles.table import ProfileTable, write_profiles
from cellfast.profiles.votes import majority_vote

FAST = {"num_permutations": 50}


def treatments(rows, angles):
    """Profiles on a circle: the nearest by cosine is the nearest by angle."""
    metadata = pd.DataFrame(rows, columns=["Metadata_Compound", "Metadata_Concentration", "Metadata_MoA", "Metadata_Batch"])
    angles = np.asarray(angles, float)
    return ProfileTable(metadata, np.stack([np.cos(angles), np.sin(angles)], axis=1), ["f1", "f2"])


SMALL = treatments(
    [
        ("a", 1.0, "X", "w1"),
        ("a", 2.0, "X", "w1"),
        ("b", 1.0, "X", "w2"),
        ("c", 1.0, "Y", "w1"),
        ("d", 1.0, "Y", "w1"),
        ("e", 1.0, "Z", "w3"),
        ("f", 1.0, "Z", "w3"),
    ],
    [0.0, 0.1, 0.3, 1.0, 1.1, 2.0, 2.2],
)


def test_scores_worked_out_by_hand():
    """NSC: a1, a2 → b and b → a2 right (X); c ↔ d right (Y); e ↔ f right (Z). NSCB: Y and Z are in one batch; a → b, b → a2."""
    result = evaluate_profiles(SMALL, EvaluationOptions(**FAST)).result
    assert (result["nsc"]["num_correct"], result["nsc"]["num_evaluated"]) == (7, 7)
    assert result["one_batch_moas"] == ["Y", "Z"]
    assert (result["nscb"]["num_correct"], result["nscb"]["num_evaluated"]) == (3, 3)
    assert result["nscb"]["excluded"]["one_batch_moa"] == ["c 1", "d 1", "e 1", "f 1"]
    counted = {"one_batch_moas": "keep", "unanswerable": "count"}
    kept = evaluate_profiles(SMALL, EvaluationOptions(**counted, **FAST)).result["nscb"]
    assert (kept["num_correct"], kept["num_evaluated"]) == (3, 7)
    # Without a candidate of its MoA nothing can be right: not counted, unless the published convention is asked for.
    kept = evaluate_profiles(SMALL, EvaluationOptions(one_batch_moas="keep", **FAST)).result["nscb"]
    assert (kept["num_correct"], kept["num_evaluated"]) == (3, 3)
    assert kept["excluded"]["no_candidate_of_its_moa"] == ["c 1", "d 1", "e 1", "f 1"]
    # Only queries are left out: b's nearest other-batch profile is a2 all the same.
    queries = evaluate_profiles(SMALL, EvaluationOptions(one_batch_moas="queries", **FAST))
    assert (queries.result["nscb"]["num_correct"], queries.result["nscb"]["num_evaluated"]) == (3, 3)
    assert list(queries.table["nscb_pool_size"]) == [3, 3, 6, 3, 3, 5, 5]
    assert list(queries.table["nsc_neighbour"][:3]) == ["b 1", "b 1", "a 2"]
    assert queries.table["nsc_distance"][0] == pytest.approx(1 - np.cos(0.3))


def test_confusion_macro_and_baseline():
    profiles = treatments(
        [("a", 1.0, "X", "w1"), ("b", 1.0, "X", "w2"), ("c", 1.0, "Y", "w1"), ("c", 2.0, "Y", "w1"), ("d", 1.0, "Y", "w2")],
        [0.0, 0.4, 0.5, 3.0, 3.1],
    )
    # a → b right, b → c1 wrong, c1 → b wrong, c2 → d right, d → c2 right.
    nsc = evaluate_profiles(profiles, EvaluationOptions(**FAST)).result["nsc"]
    assert nsc["num_correct"] == 3
    assert nsc["confusion"] == {"moas": ["X", "Y"], "counts": [[1, 1], [1, 2]]}
    assert nsc["compound_macro_accuracy"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert nsc["majority_baseline"] == {"moa": "Y", "accuracy": 0.6}
    assert nsc["per_moa"]["X"] == {"num_correct": 1, "num_evaluated": 2}


def test_profiles_without_candidates_are_excluded_and_named():
    rows = [("a", 1.0, "X", "w1;w2"), ("b", 1.0, "X", "w1"), ("c", 1.0, "Y", "w2"), ("d", 1.0, "Y", "w1")]
    profiles = treatments(rows, [0, 0.1, 1.0, 1.1])
    counted = {"unanswerable": "count", **FAST}
    result = evaluate_profiles(profiles, EvaluationOptions(**counted)).result["nscb"]
    assert result["excluded"]["no_candidates"] == ["a 1"]
    assert result["num_evaluated"] == 3
    # b's only fellow, a, shares its batch: it cannot be right.
    left = evaluate_profiles(profiles, EvaluationOptions(**FAST)).result["nscb"]
    assert (left["num_evaluated"], left["excluded"]["no_candidate_of_its_moa"]) == (2, ["b 1"])
    assert result["num_pairs_sharing_a_batch"] == 0
    # The joined rule compares whole strings: "w1;w2" is a batch of its own, and the pairs that share a batch are counted.
    joined = evaluate_profiles(profiles, EvaluationOptions(batch_rule="joined", **FAST)).result["nscb"]
    assert joined["num_evaluated"] == 4
    assert joined["num_pairs_sharing_a_batch"] == 6


@pytest.mark.parametrize("rule", ["joined", "overlap"])
def test_without_batches_there_is_nsc_and_no_nscb(rule):
    unbatched = ProfileTable(SMALL.metadata.drop(columns="Metadata_Batch"), SMALL.features, SMALL.feature_names)
    result = evaluate_profiles(unbatched, EvaluationOptions(batch_rule=rule, **FAST)).result
    assert result["nsc"]["num_correct"] == 7
    assert result["nscb"]["accuracy"] is None
    assert result["nscb"]["num_evaluated"] == 0
    assert result["drop"] is None
    assert len(result["nscb"]["excluded"]["no_candidates"]) == 7


def test_controls_and_unannotated_rows_are_left_out_and_counted():
    rows = [
        *SMALL.metadata.itertuples(index=False, name=None),
        ("DMSO", 0.0, "DMSO", "w1"),
        ("q", 1.0, "", "w1"),
        ("", 1.0, "", "w1"),
    ]
    profiles = treatments(rows, [0.0, 0.1, 0.3, 1.0, 1.1, 2.0, 2.2, 0.05, 0.05, 0.05])
    counts = evaluate_profiles(profiles, EvaluationOptions(**FAST)).result["counts"]
    assert (counts["controls"], counts["without_moa"], counts["without_compound"], counts["profiles"]) == (1, 1, 1, 7)
    assert counts["without_moa_compounds"] == ["q"]
    unlabelled = ProfileTable(SMALL.metadata.assign(Metadata_MoA=""), SMALL.features, SMALL.feature_names)
    with pytest.raises(CellfastError, match="--moa CSV"):
        evaluate_profiles(unlabelled)


def test_well_level_and_wells_made_treatments():
    twice = SMALL.rows(np.repeat(np.arange(7), 2))
    twice.metadata["Metadata_Plate"] = [f"{b}_{i % 2}" for i, b in enumerate(twice.metadata["Metadata_Batch"])]
    twice.metadata["Metadata_Well"] = [f"A{i + 1:02d}" for i in range(14)]
    wells = evaluate_profiles(twice, EvaluationOptions(level="well", **FAST)).result
    assert wells["nsc"]["num_evaluated"] == 14
    merged = evaluate_profiles(twice, EvaluationOptions(**FAST)).result
    assert merged["nsc"]["num_evaluated"] == 7
    assert merged["counts"]["rows_per_treatment_aggregated"]
    # b is alone on its plates: there are no wells to draw a null from.
    assert merged["replicate_reproducibility"]["num_treatments"] == 6
    assert merged["replicate_reproducibility"]["num_without_null"] == 1
    assert merged["replicate_reproducibility"]["median_replicate_similarity"] == pytest.approx(1.0)
    assert merged["mean_average_precision"]["treatment"]["mean"] == pytest.approx(1.0)


def test_votes_of_k_neighbours():
    labels = np.array([0, 1, 1, 2])
    votes = majority_vote(labels, np.array([[0, 1, 2], [0, 1, -1], [3, 0, 1], [-1, -1, -1]]))
    assert list(votes) == [1, 0, 2, -1]


def test_permutations_keep_the_doses_of_a_compound_together():
    """Two compounds, all right: with the MoAs swapped both stay wrong, so half of the permutations are as good."""
    labels = moa_labels(["x", "x", "y", "y", "x", "y"])
    compound = np.array([0, 0, 1, 1, 2, 3])
    neighbours = np.array([4, 4, 5, 5, 0, 2])
    found = permutation_test(
        lambda code: code[neighbours] == code, labels, compound, np.zeros(6, int), lambda code: np.ones(6, bool), 3000, 0
    )
    # Of the 6 ways to give two compounds MoA x, those that pair {0, 2} and {1, 3} are right everywhere: 2 of 6.
    assert found["p_value"] == pytest.approx(1 / 3, abs=0.03)
    assert found["num_exchangeable"] == 4


def test_interval_contains_the_score_and_is_seeded():
    a = evaluate_profiles(SMALL, EvaluationOptions(seed=3, **FAST)).result
    assert a == evaluate_profiles(SMALL, EvaluationOptions(seed=3, **FAST)).result
    low, high = a["nsc"]["interval_95"]
    assert low <= a["nsc"]["accuracy"] <= high
    assert a["drop"] == pytest.approx(a["nsc"]["accuracy"] - a["nscb"]["accuracy"])


def cli(command, *arguments):
    result = CliRunner().invoke(command, [str(a) for a in arguments])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.output


def test_command_writes_result_table_and_pictures_and_compares(tmp_path):
    write_profiles(SMALL, tmp_path / "a.parquet")
    moved = SMALL.with_features(SMALL.features[[0, 1, 2, 3, 6, 5, 4]])
    write_profiles(moved, tmp_path / "b.parquet")
    for name in "ab":
        output = cli(
            evaluate_command,
            tmp_path / f"{name}.parquet",
            "-o",
            tmp_path / f"{name}.json",
            "--permutations",
            20,
        )
    assert "NSC" in output
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["nsc"]["num_correct"] == 7
    assert {p.name for p in tmp_path.glob("a_*")} == {
        "a_map_moa.png", "a_map_batch.png", "a_map_correct.png", "a_confusion_nsc.png", "a_confusion_nscb.png", "a_treatments.csv",
    }  # fmt: skip
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in tmp_path.glob("a_*.png"))
    assert list(pd.read_csv(tmp_path / "a_treatments.csv")["nsc_neighbour_moa"]) == ["X", "X", "X", "Y", "Y", "Z", "Z"]
    b = json.loads((tmp_path / "b.json").read_text())
    output = cli(evaluate_command, "--compare", tmp_path / "a.json", tmp_path / "b.json", "-o", tmp_path / "c.json")
    c = json.loads((tmp_path / "c.json").read_text())
    assert c["nsc"]["difference"] == pytest.approx((b["nsc"]["num_correct"] - 7) / 7)
    assert c["nsc"]["difference"] < 0
    assert c["nsc"]["interval_95"][0] <= c["nsc"]["difference"] <= c["nsc"]["interval_95"][1]
    same = compare_results(result, result)
    assert same["nsc"]["difference"] == 0
    low, high = same["nsc"]["interval_95"]
    assert low < 0 < high
    with pytest.raises(CellfastError, match="in common"):
        compare_results(result, {"treatments": [{**r, "id": "other"} for r in result["treatments"]]})


def test_mcnemar_is_the_exact_binomial_test():
    from scipy.stats import binomtest

    for a, b in ((0, 5), (3, 3), (2, 9)):
        assert mcnemar(a, b) == pytest.approx(binomtest(a, a + b, 0.5).pvalue)
    assert mcnemar(0, 0) == 1.0


# BBBC021, from the official files ---------------------------------------------------------------------------------------------------


def ljosa(real_data, tmp_path, *options):
    folder = real_data / "bbbc021"
    cli(
        profile_command, folder / "ljosa_jbiomolscreen_2013_per_well_mean.csv.gz", "--metadata", folder / "BBBC021_v1_image.csv.gz",
        "--moa", folder / "BBBC021_v1_moa.csv", "-o", tmp_path / "p.parquet",
        # The published scores count positions and numbers of objects as features.
        "--features", "(Cells|Cytoplasm|Nuclei)_", *options,
    )  # fmt: skip
    return read_profiles(tmp_path / "p.parquet")


def score(profiles, **options):
    published = {"unanswerable": "count", "average_precision": False, "num_permutations": 0, **options}
    result = evaluate_profiles(profiles, EvaluationOptions(**published)).result
    return [(result[r]["num_correct"], result[r]["num_evaluated"]) for r in ("nsc", "nscb")]


@pytest.mark.data
def test_ljosa_table_is_reproduced(real_data, tmp_path):
    mean = ljosa(real_data, tmp_path, "--normalize", "standardize", "--by", "plate", "--aggregate", "mean")
    assert len(mean.feature_names) == 513
    report = json.loads((tmp_path / "p.report.json").read_text())
    dropped = ["Cells_Children_Cytoplasm_Count", "Nuclei_Children_Cells_Count", "Nuclei_Children_Cytoplasm_Count"]
    assert list(report["normalization"][0]["dropped_features"]) == dropped
    assert score(mean, one_batch_moas="queries") == [(84, 103), (67, 92)]
    assert score(mean, one_batch_moas="queries", metric="correlation")[0] == (85, 103)
    median = ljosa(real_data, tmp_path, "--normalize", "standardize", "--by", "plate")
    assert score(median, one_batch_moas="queries") == [(79, 103), (63, 92)]
    assert score(median, metric="correlation")[0] == (80, 103)
    # The reference's subset: taxol from Week1 only, so a Week1 query sees 73 candidates.
    table = evaluate_profiles(median, EvaluationOptions(average_precision=False, **FAST)).table
    assert set(table["nscb_pool_size"][table["Metadata_Batch"] == "Week1"]) == {73}


@pytest.mark.data
@pytest.mark.parametrize(("lam", "nsc", "nscb"), [("1e-6", 86, 65), ("0.1", 94, 70), ("1", 97, 69), ("100", 88, 61)])
def test_ljosa_sensitivity_to_lambda(real_data, tmp_path, lam, nsc, nscb):
    profiles = ljosa(
        real_data, tmp_path, "--normalize", "standardize:by=all,controls=all", "--normalize", f"sphering:by=all,lambda={lam}"
    )
    (found, _), (found_b, evaluated_b) = score(profiles)
    assert abs(found - nsc) <= 1
    assert abs(found_b - nscb) <= 1
    assert evaluated_b == 92


@pytest.mark.data
def test_candidate_pools_of_the_official_metadata(real_data, tmp_path):
    """All wells of the official image table, features of no importance: pools follow from the metadata alone."""
    images = pd.read_csv(real_data / "bbbc021" / "BBBC021_v1_image.csv.gz")
    wells = images[
        ["Image_Metadata_Plate_DAPI", "Image_Metadata_Well_DAPI", "Image_Metadata_Compound", "Image_Metadata_Concentration"]
    ]
    wells = wells.drop_duplicates().reset_index(drop=True)
    wells[["Cells_a", "Cells_b", "Cells_c"]] = np.random.default_rng(0).normal(size=(len(wells), 3))
    wells.to_csv(tmp_path / "wells.csv", index=False)
    cli(
        profile_command,
        tmp_path / "wells.csv",
        "--moa",
        real_data / "bbbc021" / "BBBC021_v1_moa.csv",
        "--normalize",
        "none",
        "-o",
        tmp_path / "p.parquet",
    )
    profiles = read_profiles(tmp_path / "p.parquet")
    joined = evaluate_profiles(profiles, EvaluationOptions(batch_rule="joined", average_precision=False, **FAST))
    assert joined.result["nscb"]["num_evaluated"] == 92
    week1 = joined.table[joined.table["Metadata_Batch"] == "Week1"]
    taxol = week1["Metadata_Compound"] == "taxol"
    assert set(week1["nscb_pool_size"][~taxol]) == {74}
    # Taxol 0.3, in all ten weeks and so in no other treatment's batch, is no candidate for taxol itself.
    assert set(week1["nscb_pool_size"][taxol]) == {73}
    assert joined.result["one_batch_moas"] == ["Cholesterol-lowering", "Kinase inhibitors"]
    overlap = evaluate_profiles(profiles, EvaluationOptions(batch_rule="overlap", average_precision=False, **FAST)).result["nscb"]
    assert overlap["num_evaluated"] == 91
    assert overlap["excluded"]["no_candidates"] == ["taxol 0.3"]
