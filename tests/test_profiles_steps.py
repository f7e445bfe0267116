"""Steps beyond scaling and sphering: centring, ranks, PCA, Harmony, selection before mixing, MODZ; what is asked for runs or says why not."""

from __future__ import annotations

import statistics

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from test_profiles_normalize import pycytominer_frame, screen

from cellfast.cli import cellfast
from cellfast.errors import CellfastError
from cellfast.profiles.aggregate import group_modz
from cellfast.profiles.build import ProfileOptions, build_profiles
from cellfast.profiles.centering import shrunk_offsets
from cellfast.profiles.normalize import normalize_profiles
from cellfast.profiles.steps import METHODS, RECIPES, Step, parse_steps
from cellfast.profiles.table import ProfileTable, write_profiles


def controls_of(table):
    return (table.metadata["Metadata_Compound"] == "DMSO").to_numpy()


@pytest.mark.parametrize(("by", "column"), [("plate", "Metadata_Plate"), ("batch", "Metadata_Batch")])
def test_center_takes_the_controls_mean_off_each_group(by, column):
    table = screen()
    ours, (entry,) = normalize_profiles(table, [Step("center", by=by)])
    frame = pd.DataFrame(table.features)
    means = frame[controls_of(table)].groupby(table.metadata[column]).mean().loc[table.metadata[column]]
    np.testing.assert_allclose(ours.features, frame.to_numpy() - means.to_numpy(), atol=1e-12)
    assert entry["fewest_controls"] == 6
    assert table.features is not ours.features


def plates(tau, sigma, per_plate=4, seed=0, num=60):
    """Plates of ten batches, of controls only: features of a plate vary by tau, of a well by sigma."""
    rng = np.random.default_rng(seed)
    plate = np.repeat(np.arange(num), per_plate)
    x = (
        5 * rng.standard_normal((10, 3))[plate % 10]
        + tau * rng.standard_normal((num, 3))[plate]
        + sigma * rng.standard_normal((len(plate), 3))
    )
    metadata = pd.DataFrame({"Metadata_Plate": [f"P{p:02d}" for p in plate], "Metadata_Batch": [f"B{p % 10}" for p in plate]})
    return ProfileTable(metadata.assign(Metadata_Well="A01", Metadata_Compound="DMSO"), x, list("abc"))


def test_center_towards_the_batch_weighs_a_plate_by_how_far_it_is_more_than_noise():
    for tau, sigma, low, high in ((0.0, 1.0, 0.0, 0.25), (1.0, 1.0, 0.7, 0.9), (3.0, 0.1, 0.99, 1.0)):
        _, (entry,) = normalize_profiles(plates(tau, sigma), [Step("center", towards="batch")])
        assert low <= entry["median_weight"] <= high  # τ² / (τ² + σ² / 4): 0, 0.8, 1
    # Wells that were not fitted on: closer to their plate's true place than with either mean.
    table = plates(0.5, 1.0)
    compound = np.where(np.arange(len(table)) % 4 == 3, "x", "DMSO")
    table = ProfileTable(table.metadata.assign(Metadata_Compound=compound), table.features, table.feature_names)
    error = {}
    for step in (Step("center"), Step("center", by="batch"), Step("center", towards="batch")):
        done, _ = normalize_profiles(table, [step])
        error[step.by, step.towards] = (done.features[compound == "x"] ** 2).mean()
    assert error[None, "batch"] == min(error.values())


def test_center_towards_the_batch_needs_no_controls_on_every_plate():
    table = screen(plates=("Week1_a", "Week1_b", "Week2_c"))
    keep = ~((table.metadata["Metadata_Plate"] == "Week1_b") & controls_of(table)).to_numpy()
    table = table.rows(keep)
    with pytest.raises(CellfastError, match=r"Week1_b \(0\)"):
        normalize_profiles(table, [Step("center")])
    done, _ = normalize_profiles(table, [Step("center", towards="batch")])
    offsets = table.features - done.features
    of = {plate: offsets[(table.metadata["Metadata_Plate"] == plate).to_numpy()] for plate in ("Week1_a", "Week1_b", "Week2_c")}
    for found in of.values():
        np.testing.assert_allclose(found, found[:1].repeat(len(found), axis=0), atol=1e-12)
    # One plate with controls in each batch: nothing is known of plates, and the batch's offset is taken.
    np.testing.assert_allclose(of["Week1_b"][0], of["Week1_a"][0], atol=1e-12)
    assert np.abs(of["Week2_c"][0] - of["Week1_a"][0]).max() > 0.1


def test_what_cannot_be_told_from_noise_is_not_taken_off():
    rng = np.random.default_rng(0)
    group, outer = np.repeat(np.arange(24), 4), np.arange(24) // 4
    x = rng.standard_normal((96, 400))
    none = shrunk_offsets(x, group, outer)
    strong = shrunk_offsets(x + 5 * rng.standard_normal((6, 400))[outer[group]], group, outer)
    assert none.weight < 0.2
    assert none.outer_weight < 0.3
    assert (none.values**2).mean() < 0.5 / 16  # half of the noise of a batch's mean
    assert strong.outer_weight > 0.95
    # One control on each plate, each plate its own batch: nothing is repeated, and all that is known is the mean of all.
    alone = shrunk_offsets(x[:5], np.arange(5), np.arange(5))
    np.testing.assert_allclose(alone.values, x[:5].mean(axis=0)[None].repeat(5, axis=0))
    # One control on each plate of two batches: what plates differ by is noise, batches are told from it.
    pairs = shrunk_offsets(x[:20] + 50 * (np.arange(20) >= 10)[:, None], np.arange(20), np.arange(20) // 10)
    assert pairs.weight == 0
    assert pairs.outer_weight > 0.95


def test_robustize_equals_pycytominer():
    pycytominer = pytest.importorskip("pycytominer")
    table = screen()
    ours, _ = normalize_profiles(table, [Step("robustize", by="all")])
    theirs = pycytominer.normalize(
        pycytominer_frame(table), features=table.feature_names, meta_features=list(table.metadata),
        samples="Metadata_Compound == 'DMSO'", method="robustize",
    )  # fmt: skip
    np.testing.assert_allclose(ours.features, theirs[table.feature_names].to_numpy(), rtol=1e-9)


def test_ranks_are_normal_whatever_the_scale():
    table = screen()
    table.features[3, 1] = table.features[4, 1]
    a, _ = normalize_profiles(table, [Step("rank")])
    b, _ = normalize_profiles(table.with_features(np.exp(0.1 * table.features)), [Step("rank")])
    np.testing.assert_array_equal(a.features, b.features)
    assert a.features[3, 1] == a.features[4, 1]
    expected = statistics.NormalDist().inv_cdf((33 - 3 / 8) / 33.25)
    assert a.features[:, 0].max() == pytest.approx(expected)
    assert a.features[:, 0].min() == pytest.approx(-expected)
    per_plate, _ = normalize_profiles(table, [Step("rank", by="plate")])
    np.testing.assert_allclose(per_plate.features[:11, 0].mean(), 0, atol=1e-12)


def test_pca_equals_scikit_learn():
    from sklearn.decomposition import PCA

    table = screen()
    ours, (entry,) = normalize_profiles(table, parse_steps(["pca:n=3"]))
    theirs = PCA(3).fit(table.features)
    np.testing.assert_allclose(np.abs(ours.features), np.abs(theirs.transform(table.features)), atol=1e-9)
    assert ours.feature_names == ["PC001", "PC002", "PC003"]
    assert entry["variance"] == pytest.approx(theirs.explained_variance_ratio_.sum())
    by_share, _ = normalize_profiles(table, parse_steps(["pca:variance=0.9"]))
    assert by_share.features.shape[1] == PCA(0.9).fit(table.features).n_components_
    on_controls, _ = normalize_profiles(table, [Step("pca", n=2, controls="compound == 'DMSO'")])
    theirs = PCA(2).fit(table.features[controls_of(table)])
    np.testing.assert_allclose(np.abs(on_controls.features), np.abs(theirs.transform(table.features)), atol=1e-9)
    with pytest.raises(CellfastError, match="have 8 components"):
        normalize_profiles(table, [Step("pca", n=9)])


def test_harmony_mixes_batches(monkeypatch):
    pytest.importorskip("harmonypy")
    rng = np.random.default_rng(0)
    table = screen(controls_per_plate=30, plates=[f"Week{w}_{p}" for w in (1, 2) for p in "abcd"])
    second = (table.metadata["Metadata_Batch"] == "Week2").to_numpy()
    table.features[:] = rng.standard_normal(table.features.shape)
    table.features[second] += 2.0
    done, (entry,) = normalize_profiles(table, [Step("harmony")])
    again, _ = normalize_profiles(table, [Step("harmony")])
    np.testing.assert_array_equal(done.features, again.features)
    apart = [np.linalg.norm(t.features[second].mean(axis=0) - t.features[~second].mean(axis=0)) for t in (table, done)]
    assert apart[1] < 0.8 * apart[0]
    assert entry["groups"] == 2
    with pytest.raises(CellfastError, match="nothing to align"):
        normalize_profiles(table.rows(second), [Step("harmony")])
    monkeypatch.setitem(__import__("sys").modules, "harmonypy", None)
    with pytest.raises(CellfastError, match=r"cellfast\[harmony\]"):
        normalize_profiles(table, [Step("harmony")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sphereing"}, rf"one of {', '.join(METHODS)}.*Did you mean sphering"),
        ({"method": "center", "by": "week"}, "by must be one of plate"),
        ({"method": "center", "lam": "1"}, "does not take lambda="),
        ({"method": "standardize", "rotation": "pca"}, "does not take rotation=.*by=, controls="),
        ({"method": "pca"}, "pca:n=64"),
        ({"method": "pca", "n": 0}, "at least 1"),
        ({"method": "pca", "variance": 1.5}, "at most 1"),
        ({"method": "center", "by": "batch", "towards": "batch"}, "wider"),
        ({"method": "tvn", "lam": "1", "epsilon": 0.1}, "give one"),
    ],
)
def test_a_step_that_cannot_be_says_so_when_it_is_made(options, message):
    with pytest.raises(CellfastError, match=message):
        Step(**options)


def test_options_that_change_nothing_are_refused():
    assert parse_steps(RECIPES["default"], {"by": "all", "controls": "x == 1"})[-1] == Step("tvn", by="all", controls="x == 1")
    for by in ("batch", "all"):
        assert parse_steps(RECIPES["default"], {"by": by})[1] == Step("center", by=by)
    assert parse_steps(["pca:n=4"], {"controls": "x == 1"}) == [Step("pca", n=4)]
    for texts, given in ((["standardize"], {"lam": "1"}), (["none"], {"by": "all"}), (["standardize:by=all"], {"by": "plate"})):
        with pytest.raises(CellfastError, match="changes nothing"):
            parse_steps(texts, given)


def test_selection_comes_before_features_are_mixed(tmp_path):
    table = screen(num_features=8)
    table.features[:, 7] = table.features[:, 0] * 3 + 1e-6 * np.arange(len(table))
    write_profiles(table, tmp_path / "wells.parquet")
    result = {}
    for steps in (["standardize:by=all", "tvn"], ["standardize:by=all"]):
        options = ProfileOptions(level="well", steps=parse_steps(steps), select=["correlation"])
        result[steps[-1]] = build_profiles([tmp_path / "wells.parquet"], options)
    mixed = result["tvn"]
    assert list(mixed.report["selection"]) == list(result["standardize:by=all"].report["selection"])
    assert len(mixed.report["selection"]) == 1
    assert mixed.profiles.features.shape[1] == 7


def test_modz_equals_pycytominer():
    pycytominer = pytest.importorskip("pycytominer")
    rng = np.random.default_rng(0)
    codes = np.array([0] * 5 + [1] * 3 + [2] * 2 + [3])
    x = rng.standard_normal((4, 20))[codes] + rng.standard_normal((11, 20))
    x[0] *= -1
    frame = pd.DataFrame(x, columns=[f"Cells_{i}" for i in range(20)]).assign(Metadata_g=codes)
    theirs = pycytominer.consensus(
        frame, replicate_columns=["Metadata_g"], operation="modz", modz_args={"method": "spearman", "precision": 12}
    )
    ours = group_modz(x, codes, 4)
    np.testing.assert_allclose(ours.values, theirs[[f"Cells_{i}" for i in range(20)]].to_numpy(), atol=1e-9)
    np.testing.assert_array_equal(ours.counts, [5, 3, 2, 1])


def test_the_command_takes_recipes_and_one_name_for_the_batch(tmp_path):
    write_profiles(screen(plates=("Week1_a", "Week1_b", "Week2_c")), tmp_path / "w.parquet")

    def run(*more):
        command = ["profile", str(tmp_path / "w.parquet"), "-o", str(tmp_path / "p.parquet"), "--level", "well", *more]
        return CliRunner().invoke(cellfast, command)

    result = run("--recipe", "perakis2021")
    assert result.exit_code == 0, result.output
    assert "lambda 1" in result.output
    result = run()
    assert "center on 18 rows" in result.output
    assert "shrunk towards" in result.output
    assert "linear probe" in result.output
    assert run("--batch-pattern", "(Week.)").exit_code == 2
    assert "both say the steps" in str(run("--recipe", "default", "--normalize", "tvn").exception)
    assert "changes nothing" in str(run("--normalize", "standardize", "--lambda", "1").exception)


@pytest.mark.parametrize("lam", ["auto", "0.1x"])
def test_coral_takes_a_number_alone(lam):
    with pytest.raises(CellfastError, match="coral: lambda must be a number"):
        parse_steps([f"coral:lambda={lam}"])
    assert parse_steps(["coral:lambda=2"])[0].lam == "2"
