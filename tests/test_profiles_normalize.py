"""Normalisation against pycytominer and against formulas written out in NumPy."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.linalg

from cellfast.errors import CellfastError
from cellfast.profiles import whitening
from cellfast.profiles.normalize import normalize_profiles
from cellfast.profiles.steps import Step, parse_steps
from cellfast.profiles.table import ProfileTable
from cellfast.profiles.whitening import fit_whitening, ledoit_wolf_shrinkage


def screen(num_features=8, controls_per_plate=6, treated_per_plate=5, plates=("Week1_a", "Week1_b", "Week2_c"), seed=0):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(num_features, num_features))
    rows, features = [], []
    for p, plate in enumerate(plates):
        for w in range(controls_per_plate + treated_per_plate):
            treated = w >= controls_per_plate
            rows.append((plate, f"B{w + 1:02d}", plate.split("_")[0], f"c{w}" if treated else "DMSO"))
            features.append(rng.normal(size=num_features) @ mixing + p + 2.0 * treated * rng.normal(size=num_features))
    metadata = pd.DataFrame(rows, columns=["Metadata_Plate", "Metadata_Well", "Metadata_Batch", "Metadata_Compound"])
    return ProfileTable(metadata, np.array(features), [f"Cells_f{i}" for i in range(num_features)])


def pycytominer_frame(table):
    return pd.concat([table.metadata, pd.DataFrame(table.features, columns=table.feature_names)], axis=1)


@pytest.mark.parametrize("method", ["standardize", "mad_robustize"])
@pytest.mark.parametrize("by", ["plate", "all"])
def test_scaling_equals_pycytominer(method, by):
    pycytominer = pytest.importorskip("pycytominer")
    table = screen()
    ours, report = normalize_profiles(table, [Step(method, by=by)])
    frame = pycytominer_frame(table)
    parts = [g for _, g in frame.groupby("Metadata_Plate")] if by == "plate" else [frame]
    theirs = pd.concat(
        [pycytominer.normalize(p, features=table.feature_names, meta_features=list(table.metadata), samples="Metadata_Compound == 'DMSO'", method=method) for p in parts]
    )  # fmt: skip
    np.testing.assert_allclose(ours.features, theirs[table.feature_names].to_numpy(), rtol=1e-5, atol=1e-8)
    assert report[0]["num_controls"] == 18
    assert report[0]["groups"] == (3 if by == "plate" else 1)


@pytest.mark.parametrize("rotation", ["PCA", "ZCA", "PCA-cor", "ZCA-cor"])
@pytest.mark.parametrize("num_features", [8, 30])
@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_sphering_with_epsilon_equals_pycytominer(rotation, num_features, epsilon):
    """30 features on 18 controls: singular, with the smallest singular value standing in for those that are zero."""
    pycytominer = pytest.importorskip("pycytominer")
    table = screen(num_features)
    ours, _ = normalize_profiles(table, [Step("sphering", rotation=rotation.lower(), epsilon=epsilon)])
    theirs = pycytominer.normalize(
        pycytominer_frame(table),
        features=table.feature_names,
        meta_features=list(table.metadata),
        samples="Metadata_Compound == 'DMSO'",
        method="spherize",
        spherize_method=rotation,
        spherize_epsilon=epsilon,
    )
    theirs = theirs[[c for c in theirs.columns if not c.startswith("Metadata_")]].to_numpy()
    if rotation.startswith("ZCA"):
        np.testing.assert_allclose(ours.features, theirs, rtol=1e-5, atol=1e-5)
        return
    # Principal axes have no sign, and where the controls do not vary no direction: those are compared by what they agree on, all products.
    rank = min(17, num_features)
    signs = np.sign((ours.features[:, :rank] * theirs[:, :rank]).sum(axis=0))
    np.testing.assert_allclose(ours.features[:, :rank] * signs, theirs[:, :rank], rtol=1e-5, atol=1e-5)
    rest = (ours.features[:, rank:], theirs[:, rank:])
    np.testing.assert_allclose(rest[0] @ rest[0].T, rest[1] @ rest[1].T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lam", [1.0, 0.01])
@pytest.mark.parametrize("rotation", ["pca", "zca"])
def test_tvn_equals_the_reference_formulas(lam, rotation):
    """Whitening V / sqrt(s + lambda) on centred controls, then per batch X (C_b + I)^(-1/2) (C + lambda I)^(1/2), no centring."""
    table = screen()
    controls = (table.metadata["Metadata_Compound"] == "DMSO").to_numpy()
    x = table.features - table.features[controls].mean(axis=0)
    covariance = x[controls].T @ x[controls] / controls.sum()
    s, v = scipy.linalg.eigh(covariance)
    w = v @ np.diag(1 / np.sqrt(s + lam))
    if rotation == "zca":
        w = w @ v.T
    x = x @ w
    target = scipy.linalg.sqrtm(x[controls].T @ x[controls] / controls.sum() + lam * np.eye(8)).real
    expected = np.empty_like(x)
    for batch in ("Week1", "Week2"):
        rows = (table.metadata["Metadata_Batch"] == batch).to_numpy()
        c = x[rows & controls]
        source = scipy.linalg.inv(scipy.linalg.sqrtm(c.T @ c / len(c) + np.eye(8)).real)
        expected[rows] = x[rows] @ source @ target
    ours, report = normalize_profiles(table, parse_steps(["tvn"], {"lam": str(lam), "rotation": rotation}))
    # Rotations of the axes aside, which no distance sees: all products agree.
    np.testing.assert_allclose(ours.features @ ours.features.T, expected @ expected.T, rtol=1e-8, atol=1e-9)
    if rotation == "zca":
        np.testing.assert_allclose(ours.features, expected, rtol=1e-8, atol=1e-9)
    assert [entry["step"] for entry in report] == ["sphering", "coral"]


def test_ledoit_wolf_equals_scikit_learn():
    from sklearn.covariance import ledoit_wolf_shrinkage as sklearn_shrinkage

    rng = np.random.default_rng(0)
    for n, d in ((5, 40), (40, 5), (2, 3)):
        x = rng.normal(size=(n, d)) * np.linspace(0.1, 3, d)
        x -= x.mean(axis=0)
        assert ledoit_wolf_shrinkage(x) == pytest.approx(sklearn_shrinkage(x, assume_centered=True), rel=1e-9)


def test_lambda_auto_and_relative_do_not_depend_on_units():
    table = screen(30)
    for lam in ("auto", "0.3x"):
        a, _ = normalize_profiles(table, [Step("sphering", lam=lam)])
        b, _ = normalize_profiles(table.with_features(1000 * table.features), [Step("sphering", lam=lam)])
        np.testing.assert_allclose(b.features / np.linalg.norm(b.features), a.features / np.linalg.norm(a.features), atol=1e-9)


def test_whitened_controls_have_unit_covariance():
    x = screen().features[:18]
    fit = fit_whitening(x, "0", "pca")
    y = (x - fit.mean) @ fit.matrix
    np.testing.assert_allclose(y.T @ y / len(y), np.eye(8), atol=1e-9)
    with pytest.raises(CellfastError, match="rank 2"):
        fit_whitening(x[:3], "0", "pca")


def test_features_constant_over_the_controls_of_one_plate_are_dropped_and_named():
    table = screen()
    rows = (table.metadata["Metadata_Plate"] == "Week1_b") & (table.metadata["Metadata_Compound"] == "DMSO")
    table.features[rows.to_numpy(), 2] = 0.1
    ours, report = normalize_profiles(table, [Step("standardize", by="plate")])
    assert ours.feature_names == [f"Cells_f{i}" for i in range(8) if i != 2]
    assert list(report[0]["dropped_features"]) == ["Cells_f2"]
    assert "Week1_b" in report[0]["dropped_features"]["Cells_f2"]
    kept, _ = normalize_profiles(table, [Step("standardize", by="all")])
    assert len(kept.feature_names) == 8


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Step("standardize"), r"Week2_c \(0\).*--by batch, --by all"),
        (Step("coral"), r"Week2 \(0\).*sphering"),
        (Step("sphering", by="batch"), r"Week2 \(0\).*--by all"),
    ],
)
def test_batches_without_controls_are_named_with_the_ways_out(step, message):
    table = screen()
    keep = ~((table.metadata["Metadata_Plate"] == "Week2_c") & (table.metadata["Metadata_Compound"] == "DMSO")).to_numpy()
    with pytest.raises(CellfastError, match=message):
        normalize_profiles(table.rows(keep), [step])


def test_steps_parse_with_commas_in_queries_and_refuse_what_is_unknown():
    (step,) = parse_steps(["sphering:controls=Metadata_Compound in ['DMSO', 'x'],lambda=0.1x,by=all"])
    assert step == Step("sphering", by="all", controls="Metadata_Compound in ['DMSO', 'x']", lam="0.1x")
    for text, message in (
        ("spherize", "must be one of"),
        ("tvn:speed=3", "options are"),
        ("tvn:lambda=-1", "--lambda"),
        ("tvn:by=week", "by must be"),
    ):
        with pytest.raises(CellfastError, match=message):
            parse_steps([text])
    with pytest.raises(CellfastError, match="use zca"):
        normalize_profiles(screen(), [Step("sphering", by="plate", rotation="pca")])


def test_two_controls_cannot_choose_the_regularisation():
    x = np.random.default_rng(0).normal(size=(2, 5))
    with pytest.raises(CellfastError, match=r"from 2 control rows.*--lambda 0\.1x"):
        fit_whitening(x)
    assert np.isfinite(fit_whitening(x, "0.1x").matrix).all()


def test_a_matrix_power_through_few_rows_equals_the_one_by_eigenvalues():
    rng = np.random.default_rng(0)
    for n, scale in ((3, 1.0), (20, 1e-6), (20, 30.0), (40, 1.0), (50, 1.0)):
        rows, x = rng.standard_normal((n, 60)) * scale, rng.standard_normal((7, 60))
        for power, added in ((-0.5, 1.0), (0.5, 1.0), (0.5, 0.0)):
            expected = x @ whitening.symmetric_power(whitening.second_moment(rows), power, added)
            np.testing.assert_allclose(
                whitening.times_power(x, rows, power, added), expected, rtol=0, atol=1e-10 * np.abs(expected).max()
            )


def test_coral_of_many_rows_in_a_batch_equals_that_of_few():
    table = screen(num_features=8)
    few, _ = normalize_profiles(table, [Step("coral")])
    # 40 features no well varies in: fewer rows than features, so that the other way is taken.
    wide = table.with_features(np.hstack([table.features, np.zeros((len(table), 40))]), [f"h{i}" for i in range(48)])
    padded, _ = normalize_profiles(wide, [Step("coral")])
    np.testing.assert_allclose(padded.features[:, :8], few.features, atol=1e-9)
