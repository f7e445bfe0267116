"""Grouped means and medians against NumPy and pycytominer, in memory and streamed."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from cellfast.errors import CellfastError
from cellfast.profiles.aggregate import group_means, group_medians
from cellfast.profiles.feature_files import open_source
from cellfast.profiles.streaming import read_units


def numpy_groups(x, codes, num_groups, function):
    result = np.full((num_groups, x.shape[1]), np.nan)
    for g in range(num_groups):
        for j in range(x.shape[1]):
            column = x[codes == g, j].astype(np.float64)
            column = column[np.isfinite(column)]
            if len(column):
                result[g, j] = function(column)
    return result


def sample(kind, rng, n, d):
    x = rng.normal(size=(n, d))
    if kind == "ties":
        x = np.round(x)
    elif kind == "wide range":
        x = np.exp(18 * x)
    elif kind == "mostly zero":
        x = np.where(rng.random(x.shape) < 0.6, 0.0, x)
    elif kind == "constant":
        x[:] = -2.5
    elif kind == "not finite":
        x[rng.random(x.shape) < 0.1] = np.nan
        x[rng.random(x.shape) < 0.05] = np.inf
        x[rng.random(x.shape) < 0.05] = -np.inf
    return x


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["normal", "ties", "wide range", "mostly zero", "constant", "not finite"])
def test_means_and_medians_are_exact(kind, dtype):
    rng = np.random.default_rng(3)
    for n, d, groups in ((1, 1, 1), (2, 3, 1), (257, 70, 5), (300, 5, 40)):
        x = sample(kind, rng, n, d).astype(dtype)
        codes = rng.integers(-1, groups, n)
        medians, means = group_medians(x, codes, groups), group_means(x, codes, groups)
        np.testing.assert_array_equal(medians.values, numpy_groups(x, codes, groups, np.median))
        np.testing.assert_allclose(means.values, numpy_groups(x, codes, groups, np.mean), rtol=1e-12, atol=1e-14)
        np.testing.assert_array_equal(medians.counts, np.bincount(codes[codes >= 0], minlength=groups))
        kept = x[codes >= 0]
        assert medians.num_nan == means.num_nan == np.isnan(kept).sum()
        assert medians.num_inf == means.num_inf == np.isinf(kept).sum()


def test_median_of_a_long_group_and_of_extreme_values():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(70_001, 3)).astype(np.float32)
    x[:, 1] = np.sort(x[:, 1])
    x[::7, 2] = np.finfo(np.float32).max
    x[1::7, 2] = -np.finfo(np.float32).max
    codes = np.zeros(len(x), np.int64)
    np.testing.assert_array_equal(group_medians(x, codes, 1).values[0], np.median(x.astype(np.float64), axis=0))


def test_result_does_not_depend_on_threads(monkeypatch):
    rng = np.random.default_rng(0)
    x, codes = rng.normal(size=(9000, 64)).astype(np.float32), rng.integers(0, 50, 9000)
    results = []
    for threads in ("1", "2"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        results.append((group_means(x, codes, 50).values, group_medians(x, codes, 50).values))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


def write_embeddings(folder, num_plates=3, num_features=20, seed=0, row_group_size=None):
    rng = np.random.default_rng(seed)
    frames = []
    for p in range(num_plates):
        n = int(rng.integers(40, 90))
        frame = pd.DataFrame(
            {
                "Metadata_Plate": f"Week{p + 1}_{p}",
                "Metadata_Well": rng.choice(["A01", "A02", "B10"], n),
                "Metadata_Site": rng.integers(1, 3, n),
                "Metadata_ImageNumber": -1,
                "Metadata_ObjectNumber": np.arange(n),
            }
        )
        frame["Metadata_Compound"] = frame["Metadata_Well"].map({"A01": "DMSO", "A02": "taxol", "B10": "nocodazole"})
        frame["Metadata_Concentration"] = frame["Metadata_Well"].map({"A01": 0.0, "A02": 0.3, "B10": 1.0})
        frame["Metadata_MoA"] = frame["Metadata_Compound"].map({"DMSO": "DMSO", "taxol": "a", "nocodazole": "b"})
        features = pd.DataFrame(
            rng.normal(size=(n, num_features)).astype(np.float32), columns=[f"h{i:03d}" for i in range(num_features)]
        )
        frame = pd.concat([frame, features], axis=1)
        frame.to_parquet(folder / f"Week{p + 1}_{p}.parquet", index=False, row_group_size=row_group_size)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


@pytest.mark.parametrize("method", ["mean", "median"])
@pytest.mark.parametrize("unit", ["well", "site"])
def test_streamed_units_equal_pandas(tmp_path, method, unit, monkeypatch):
    # Three columns at a time, row groups of 17 rows: every seam of the streaming is crossed.
    monkeypatch.setattr("cellfast.profiles.streaming.MEDIAN_BLOCK_BYTES", 90 * 3 * 4)
    whole = write_embeddings(tmp_path, row_group_size=17)
    table, report = read_units(open_source([tmp_path]), unit, method)
    key = ["Metadata_Plate", "Metadata_Well"] + (["Metadata_Site"] if unit == "site" else [])
    features = [c for c in whole.columns if c.startswith("h")]
    expected = getattr(whole.astype(dict.fromkeys(features, float)).groupby(key)[features], method)()
    np.testing.assert_allclose(table.features, expected.to_numpy(), rtol=1e-12, atol=1e-14)
    assert list(table.metadata["Metadata_Well"]) == list(expected.index.get_level_values("Metadata_Well"))
    assert table.metadata["Metadata_Cell_Count"].sum() == len(whole) == report["cells"]
    assert "Metadata_ObjectNumber" not in table.metadata
    assert all(c.startswith("Metadata_") for c in table.metadata.columns)


def test_a_well_spread_over_two_files_gets_one_exact_median(tmp_path):
    whole = write_embeddings(tmp_path, num_plates=1)
    (tmp_path / "Week1_0.parquet").unlink()
    whole.iloc[::2].to_parquet(tmp_path / "a.parquet")
    whole.iloc[1::2].to_parquet(tmp_path / "b.parquet")
    table, _ = read_units(open_source([tmp_path]), "well", "median")
    features = [c for c in whole.columns if c.startswith("h")]
    expected = whole.astype(dict.fromkeys(features, float)).groupby("Metadata_Well")[features].median().to_numpy()
    np.testing.assert_array_equal(table.features, expected)


def test_a_well_with_two_compounds_is_named(tmp_path):
    whole = write_embeddings(tmp_path, num_plates=1)
    whole.loc[whole.index[whole["Metadata_Well"] == "A02"][0], "Metadata_Compound"] = "DMSO"
    whole.to_parquet(tmp_path / "Week1_0.parquet")
    with pytest.raises(CellfastError, match=r"Week1_0 A02 has two values of Metadata_Compound"):
        read_units(open_source([tmp_path]), "well", "mean")


def test_equal_to_pycytominer(tmp_path):
    pycytominer = pytest.importorskip("pycytominer")
    whole = write_embeddings(tmp_path)
    whole.loc[3, "h001"] = np.nan
    whole[whole["Metadata_Plate"] == "Week1_0"].to_parquet(tmp_path / "Week1_0.parquet")
    features = [c for c in whole.columns if c.startswith("h")]
    for method in ("mean", "median"):
        expected = pycytominer.aggregate(whole, ["Metadata_Plate", "Metadata_Well"], features, operation=method)
        table, report = read_units(open_source([tmp_path]), "well", method)
        np.testing.assert_allclose(table.features, expected[features].to_numpy(), rtol=1e-5, atol=1e-7)
        assert report["nan_values_left_out"] == 1


def test_profiles_import_neither_torch_nor_kornia_nor_dali(tmp_path):
    """The whole path of both commands runs where torch, kornia and DALI cannot be imported."""
    write_embeddings(tmp_path)
    program = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'torchvision', 'kornia', 'nvidia'):
            raise ImportError('refused: ' + name)
sys.meta_path.insert(0, Refuse())
import pkgutil, importlib, cellfast.profiles
for module in pkgutil.iter_modules(cellfast.profiles.__path__):
    importlib.import_module('cellfast.profiles.' + module.name)
for name in cellfast.profiles.__all__:
    getattr(cellfast.profiles, name)
from cellfast.profiles import build_profiles, evaluate_profiles
built = build_profiles([{str(tmp_path)!r}])
assert evaluate_profiles(built.profiles, wells=built.wells).result['nsc']['num_excluded'] == 2
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
