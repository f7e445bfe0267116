"""Ties: every score counts the expectation over a random order of equally near profiles, and identical treatments are refused."""

from __future__ import annotations

import json
from itertools import pairwise, permutations

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from cellfast.cli.evaluate import evaluate as evaluate_command
from cellfast.errors import CellfastError
from cellfast.profiles import neighbours
from cellfast.profiles.compare import compare_results, load_result
from cellfast.profiles.evaluate import EvaluationOptions, evaluate_profiles
from cellfast.profiles.mean_average_precision import average_precision, moa_precision
from cellfast.profiles.neighbours import AllowedPairs, nearest_neighbours
from cellfast.profiles.replicates import replicate_reproducibility
from cellfast.profiles.report import evaluation_lines
from cellfast.profiles.table import ProfileTable, write_profiles
from cellfast.profiles.votes import majority_vote, vote_share

FAST = {"num_permutations": 30}


def table(rows, features):
    metadata = pd.DataFrame(rows, columns=["Metadata_Compound", "Metadata_Concentration", "Metadata_MoA", "Metadata_Batch"])
    features = np.asarray(features, float)
    return ProfileTable(metadata, features, [f"f{i}" for i in range(features.shape[1])])


# q points along the first axis; b (X) and c, d (Y) are equally far from it, and from each other as stated in the tests.
SQUARE = table(
    [("a", 1.0, "X", "w1"), ("b", 1.0, "X", "w2"), ("c", 1.0, "Y", "w2"), ("d", 1.0, "Y", "w1")],
    [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_equally_near_neighbours_count_by_expectation(metric):
    """All four are at one distance: each sees one of its MoA among three, so a third is right. NSCB: two of the other batch,
    one right of them for a and d … a: b, c; b: a, d; c: a, d; d: b, c, so half."""
    evaluation = evaluate_profiles(SQUARE, EvaluationOptions(metric=metric, **FAST))
    nsc, nscb = evaluation.result["nsc"], evaluation.result["nscb"]
    assert nsc["num_correct"] == pytest.approx(4 / 3)
    assert nsc["accuracy"] == pytest.approx(1 / 3)
    assert (nscb["num_correct"], nscb["num_evaluated"]) == (2, 4)
    assert isinstance(nscb["num_correct"], int)
    assert nsc["ties"] == {"num_profiles": 4, "num_undecided": 4, "most_equally_near": 3}
    assert np.allclose(nsc["confusion"]["counts"], [[2 / 3, 4 / 3], [4 / 3, 2 / 3]])
    assert list(evaluation.table["nsc_equally_near"]) == [3] * 4
    text = "\n".join(evaluation_lines(evaluation.result))
    assert "(1.33333/4)" in text
    assert "4 profiles have equally near neighbours (up to 3)" in text
    # Every assignment of two MoAs to these four is as good: the score is no evidence.
    assert nsc["p_value"] == 1.0


def test_without_ties_numbers_are_integers_and_nothing_is_said():
    features = np.random.default_rng(0).normal(size=(4, 3))
    evaluation = evaluate_profiles(ProfileTable(SQUARE.metadata, features, ["a", "b", "c"]), EvaluationOptions(**FAST))
    assert isinstance(evaluation.result["nsc"]["num_correct"], int)
    assert evaluation.result["nsc"]["ties"] == {"num_profiles": 0, "num_undecided": 0, "most_equally_near": 1}
    assert evaluation.table["nsc_correct"].dtype == bool
    assert "ties" not in "\n".join(evaluation_lines(evaluation.result))


@pytest.mark.parametrize("small", [0, 1 << 31])
@pytest.mark.parametrize("k", [1, 3])
def test_ties_are_found_whatever_way_products_are_made(monkeypatch, small, k):
    """Every candidate is there three times: a tie is a tie in the last block too, whose products round differently."""
    monkeypatch.setattr(neighbours, "_SMALL", small)
    monkeypatch.setattr(neighbours, "_BLOCK", 32)
    rng = np.random.default_rng(1)
    base = rng.normal(size=(37, 70))
    x = np.concatenate([base, 3 * base, 0.1 * base])
    n = len(x)
    pairs = AllowedPairs(np.arange(n) % 37, np.zeros((n, 1), np.int64), False, np.ones(n, bool), np.ones(n, bool))
    nsc, _ = nearest_neighbours(x, pairs, "cosine", k)
    unit = base / np.linalg.norm(base, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    assert list(nsc.ties.rows) == list(range(n))
    for i in range(n):
        members, groups = nsc.ties.of(i)
        nearest = similarity[i % 37].argmax()
        assert list(members) == [nearest, nearest + 37, nearest + 74]
        assert list(groups) == [0, 0, 0]
        assert list(nsc.index[i]) == list(members[:k])


@pytest.mark.parametrize("seed", range(30))
def test_votes_equal_the_mean_over_all_orders_of_ties(seed):
    rng = np.random.default_rng(seed)
    m = int(rng.integers(1, 7))
    labels, groups = rng.integers(0, 3, m), np.sort(rng.integers(0, 3, m))
    k = int(rng.integers(1, m + 1))
    orders = [o for o in permutations(range(m)) if all(groups[a] <= groups[b] for a, b in pairwise(o))]
    won = [majority_vote(labels, np.array([order[:k]]))[0] for order in orders]
    for label in range(3):
        assert vote_share(labels, groups, k, label) == pytest.approx(np.mean([w == label for w in won]))


def test_votes_of_many_equally_near_neighbours_are_quick():
    labels = np.arange(3_000) % 12
    assert vote_share(labels, np.zeros(3_000, int), 15, 0) == pytest.approx(1 / 12)


@pytest.mark.parametrize("seed", range(20))
def test_average_precision_is_the_mean_over_all_orders_of_ties(seed):
    """Positions on a ladder of few rungs: distances to the query tie; brute force over every order that respects them."""
    rng = np.random.default_rng(seed)
    rungs = np.concatenate([[0], rng.integers(1, 4, 6)]).astype(float)
    group = np.concatenate([[0], rng.integers(0, 2, 6)])
    group[1] = 0
    metadata = pd.DataFrame({"g": group})
    ours = average_precision(metadata, rungs[:, None], ["g"], [], [], ["g"], "euclidean").values[0]
    ranked = list(range(1, 7))
    values = []
    for order in permutations(ranked):
        if all(rungs[a] <= rungs[b] for a, b in pairwise(order)):
            hits = np.array([group[i] == 0 for i in order])
            values.append((np.cumsum(hits) / np.arange(1, 7))[hits].mean())
    assert ours == pytest.approx(np.mean(values))


def test_positives_win_no_tie_of_equal_profiles():
    """Six equal profiles of two MoAs: the expected precision of a random order of 2 positives and 3 negatives."""
    rows = [(f"c{i}", 1.0, "XY"[i % 2], "w1") for i in range(6)]
    precision = moa_precision(table(rows, np.ones((6, 4))))
    hits = [np.isin(order, [0, 1]) for order in permutations(range(5))]
    expected = np.mean([(np.cumsum(h) / np.arange(1, 6))[h].mean() for h in hits])
    assert precision["mean"] == pytest.approx(expected)
    assert precision["num_queries_with_ties"] == 6


def test_equal_wells_are_not_reproducible_by_rounding():
    rows = [(f"c{i // 3}", 1.0, "X", "w1") for i in range(12)]
    found = replicate_reproducibility(table(rows, np.tile(np.random.default_rng(0).normal(size=50), (12, 1))))
    assert found["num_reproducible"] == 0


def test_identical_profiles_of_different_treatments_are_refused_with_their_number():
    features = np.random.default_rng(0).normal(size=(6, 3))
    features[4], features[3] = features[0], features[1]
    rows = [(f"c{i}", 1.0, "XY"[i % 2], "w1") for i in range(6)]
    with pytest.raises(CellfastError, match=r"4 of 6 profiles are identical.*c0 1 = c4 1; c1 1 = c3 1"):
        evaluate_profiles(table(rows, features), EvaluationOptions(**FAST))
    features[:] = 0
    with pytest.raises(CellfastError, match=r"6 of 6 .*c0 1 = c1 1 = c2 1 and 3 more \(all features 0\)"):
        evaluate_profiles(table(rows, features), EvaluationOptions(metric="euclidean", **FAST))
    # The same well twice is one treatment: allowed.
    rows = [("c0", 1.0, "X", "w1"), ("c0", 1.0, "X", "w1"), ("c1", 1.0, "X", "w1"), ("c2", 1.0, "Y", "w1")]
    twice = table(rows, [[1, 0.0], [1, 0], [0, 1], [2, 1]])
    assert (
        evaluate_profiles(twice, EvaluationOptions(level="well", unanswerable="count", **FAST)).result["nsc"]["num_evaluated"]
        == 4
    )
    # Told apart by another column, they are two treatments.
    named = ProfileTable(twice.metadata.assign(Metadata_cell_line=["A", "B", "A", "A"]), twice.features, twice.feature_names)
    with pytest.raises(CellfastError, match="c0 1 A = c0 1 B"):
        evaluate_profiles(named, EvaluationOptions(level="well", group_by=("cell_line",), unanswerable="count", **FAST))


def test_command_refuses_identical_profiles_and_writes_and_compares_ties(tmp_path):
    write_profiles(table([(f"c{i}", 1.0, "XY"[i % 2], "w1") for i in range(6)], np.ones((6, 4))), tmp_path / "same.parquet")
    found = CliRunner().invoke(evaluate_command, [str(tmp_path / "same.parquet"), "-o", str(tmp_path / "same.json")])
    assert isinstance(found.exception, CellfastError)
    assert not (tmp_path / "same.json").exists()
    write_profiles(SQUARE, tmp_path / "tied.parquet")
    shown = CliRunner().invoke(evaluate_command, [str(tmp_path / "tied.parquet"), "-o", str(tmp_path / "t.json"), "--map", "pca"])
    assert shown.exit_code == 0, shown.output
    result = load_result(tmp_path / "t.json")
    assert result["nsc"]["num_correct"] == pytest.approx(4 / 3)
    assert json.loads((tmp_path / "t.json").read_text())["treatments"][0]["nsc_correct"] == pytest.approx(1 / 3)
    sure = json.loads(json.dumps(result))
    for row in sure["treatments"]:
        row["nsc_correct"] = True
    report = compare_results(result, sure)["nsc"]
    assert (report["accuracy_a"], report["accuracy_b"]) == (pytest.approx(1 / 3), 1.0)
    assert (report["only_a_right"], report["only_b_right"]) == (0, 4)
