"""Nearest allowed neighbours against a written-out float64 search, and mean average precision against copairs."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd
import pytest

from cellfast.errors import CellfastError
from cellfast.profiles import neighbours
from cellfast.profiles.mean_average_precision import average_precision, grouped_precision
from cellfast.profiles.neighbours import AllowedPairs, batch_codes, nearest_neighbours

BATCHES = [("w1",), ("w2",), ("w1", "w2"), ("w3",), ("w3", "w4")]


def problem(n, d, seed=0, rule="joined"):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)).astype(np.float32) + 0.5
    compound = rng.integers(0, max(2, n // 5), n)
    batches = [BATCHES[i] for i in rng.integers(0, len(BATCHES), n)]
    words, overlap = batch_codes(batches, rule)
    candidate_b = rng.random(n) < 0.9
    return x, batches, AllowedPairs(compound, words, overlap, np.ones(n, bool), candidate_b)


def brute_force(x, batches, pairs, rule, metric, k):
    """Every pair in plain Python: (index, pool size) of NSC and NSCB."""
    x = x.astype(np.float64)
    results = []
    for not_same_batch in (False, True):
        index, pool = np.full((len(x), k), -1), np.zeros(len(x), int)
        for q in range(len(x)):
            found = []
            for c in range(len(x)):
                if pairs.compound[q] == pairs.compound[c]:
                    continue
                if not_same_batch:
                    same = bool(set(batches[q]) & set(batches[c])) if rule == "overlap" else set(batches[q]) == set(batches[c])
                    if same or not pairs.candidate_b[c]:
                        continue
                a, b = x[q], x[c]
                if metric == "correlation":
                    a, b = a - a.mean(), b - b.mean()
                found.append(
                    (np.linalg.norm(a - b) if metric == "euclidean" else 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b), c)
                )
            pool[q] = len(found)
            found.sort()
            index[q, : min(k, len(found))] = [c for _, c in found[:k]]
        results.append((index, pool))
    return results


@cache
def four_nearest(rule, metric):
    x, batches, pairs = problem(150, 24, rule=rule)
    return brute_force(x, batches, pairs, rule, metric, 4)


@pytest.mark.parametrize("path", ["float64", "float32 blocks"])
@pytest.mark.parametrize("metric", ["cosine", "correlation", "euclidean"])
@pytest.mark.parametrize("rule", ["joined", "overlap"])
@pytest.mark.parametrize("k", [1, 4])
def test_neighbours_are_those_of_a_brute_force_search(monkeypatch, path, metric, rule, k):
    monkeypatch.setattr(neighbours, "_SMALL", 0 if path == "float32 blocks" else 1 << 31)
    monkeypatch.setattr(neighbours, "_BLOCK", 32)
    x, _, pairs = problem(150, 24, rule=rule)
    for found, (index, pool) in zip(nearest_neighbours(x, pairs, metric, k), four_nearest(rule, metric)):
        np.testing.assert_array_equal(found.index, index[:, :k])
        np.testing.assert_array_equal(found.pool_size, pool)
        rows = np.arange(len(x))
        if metric == "euclidean":
            np.testing.assert_allclose(
                found.distance[:, 0], np.linalg.norm(x[rows].astype(float) - x[index[:, 0]], axis=1), rtol=1e-6
            )


def test_near_ties_are_decided_in_float64(monkeypatch):
    """Candidates that differ by less than float32 can tell: the blocks must hand these rows to the exact search."""
    monkeypatch.setattr(neighbours, "_SMALL", 0)
    monkeypatch.setattr(neighbours, "_BLOCK", 16)
    rng = np.random.default_rng(0)
    base = rng.normal(size=40)
    x = np.array([base + 3e-5 * rng.normal(size=40) for _ in range(60)])
    pairs = AllowedPairs(np.arange(60), np.arange(60)[:, None], False, np.ones(60, bool), np.ones(60, bool))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    (found, _) = nearest_neighbours(x, pairs)
    np.testing.assert_array_equal(found.index[:, 0], similarity.argmax(axis=1))


def test_equal_distances_take_the_first_row_and_lone_profiles_have_none(monkeypatch):
    for small in (0, 1 << 31):
        monkeypatch.setattr(neighbours, "_SMALL", small)
        x = np.ones((5, 3))
        pairs = AllowedPairs(
            np.array([0, 1, 2, 2, 2]), np.array([[0], [0], [1], [1], [1]]), False, np.ones(5, bool), np.ones(5, bool)
        )
        nsc, nscb = nearest_neighbours(x, pairs)
        assert list(nsc.index[:, 0]) == [1, 0, 0, 0, 0]
        assert list(nscb.index[:, 0]) == [2, 2, 0, 0, 0]
        alone = AllowedPairs(np.zeros(5, int), np.zeros((5, 1), int), False, np.ones(5, bool), np.ones(5, bool))
        nsc, _ = nearest_neighbours(x, alone, k=2)
        assert (nsc.index == -1).all()
        assert np.isnan(nsc.distance).all()
        assert (nsc.pool_size == 0).all()


def test_more_batches_than_bits_of_a_word():
    batches = [(f"b{i}", f"b{i + 1}") for i in range(200)]
    words, overlap = batch_codes(batches, "overlap")
    pairs = AllowedPairs(np.arange(200), words, overlap, np.ones(200, bool), np.ones(200, bool))
    same = pairs.same_batch(np.arange(200))
    expected = np.abs(np.subtract.outer(np.arange(200), np.arange(200))) <= 1
    np.testing.assert_array_equal(same, expected)
    np.testing.assert_array_equal(pairs.pool_sizes(True), 200 - expected.sum(axis=1))


def test_profiles_without_direction_are_refused():
    pairs = AllowedPairs(np.arange(3), np.arange(3)[:, None], False, np.ones(3, bool), np.ones(3, bool))
    x = np.eye(3)
    x[1] = 0
    with pytest.raises(CellfastError, match=r"row 1.*euclidean"):
        nearest_neighbours(x, pairs, "cosine")
    x[1] = 7
    with pytest.raises(CellfastError, match="constant"):
        nearest_neighbours(x, pairs, "correlation")
    x[1, 0] = np.nan
    with pytest.raises(CellfastError, match="NaN"):
        nearest_neighbours(x, pairs, "euclidean")


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_precision_equals_copairs(metric):
    copairs_map = pytest.importorskip("copairs.map")
    rng = np.random.default_rng(0)
    metadata = pd.DataFrame(
        {
            "moa": rng.choice(["a", "b", "c"], 60),
            "compound": rng.choice([f"c{i}" for i in range(20)], 60),
            "plate": rng.choice(["p", "q"], 60),
        }
    )
    x = rng.normal(size=(60, 16)) + 1.5 * pd.get_dummies(metadata["moa"]).to_numpy(float) @ rng.normal(size=(3, 16))
    for spec in (
        {"pos_sameby": ["moa"], "pos_diffby": ["compound"], "neg_sameby": [], "neg_diffby": ["moa", "compound"]},
        {"pos_sameby": ["compound"], "pos_diffby": [], "neg_sameby": ["plate"], "neg_diffby": ["compound"]},
    ):
        theirs = copairs_map.average_precision(metadata, x, **spec, distance=metric, progress_bar=False)
        ours = average_precision(metadata, x, **spec, metric=metric)
        np.testing.assert_allclose(ours.values, theirs["average_precision"].to_numpy(float), atol=1e-6)
        np.testing.assert_array_equal(ours.num_positive, theirs["n_pos_pairs"])
        has_positive = ours.num_positive > 0
        np.testing.assert_array_equal(ours.num_total[has_positive], theirs["n_total_pairs"][has_positive])
        group = spec["pos_sameby"]
        expected = copairs_map.mean_average_precision(
            theirs, sameby=group, null_size=20, threshold=0.05, seed=0, progress_bar=False
        )
        grouped = grouped_precision(metadata, ours, group)
        assert list(grouped[group[0]]) == list(expected[group[0]])
        np.testing.assert_allclose(grouped["mean_average_precision"], expected["mean_average_precision"], atol=1e-6)


@pytest.mark.parametrize("metric", ["cosine", "correlation", "euclidean"])
@pytest.mark.parametrize("groups", [2, 60])
def test_precision_of_many_and_of_few_positives_is_that_of_a_float64_sort(metric, groups):
    """120 profiles in 2 groups (59 positives each) or 60 (one each); some all but equal, which float32 cannot tell apart."""
    rng = np.random.default_rng(groups)
    x = rng.normal(size=(120, 7))
    x[60:] = x[:60] + 1e-7 * rng.normal(size=(60, 7))
    metadata = pd.DataFrame({"g": rng.permutation(np.arange(120) % groups)})
    found = average_precision(metadata, x, ["g"], [], [], ["g"], metric)
    y = x - x.mean(axis=1, keepdims=True) if metric == "correlation" else x
    unit = y / np.linalg.norm(y, axis=1, keepdims=True)
    similarity = -np.linalg.norm(x[:, None] - x[None], axis=2) if metric == "euclidean" else unit @ unit.T
    group = metadata["g"].to_numpy()
    for i in range(120):
        order = np.argsort(-similarity[i])
        order = order[order != i]
        hits = group[order] == group[i]
        if not found.tied[i]:
            assert found.values[i] == pytest.approx((np.cumsum(hits) / np.arange(1, 120))[hits].mean())
    assert found.tied.sum() <= 12
