"""Column names of the field, joins of plate maps and MoAs, file kinds, feature selection, reading and writing."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cellfast.errors import CellfastError
from cellfast.metadata.columns import find_columns, infer_features
from cellfast.metadata.joins import join_moa, join_plate_map
from cellfast.metadata.treatments import find_controls
from cellfast.metadata.wells import well_name
from cellfast.profiles.build import ProfileOptions, build_profiles
from cellfast.profiles.feature_files import read_profiles
from cellfast.profiles.select import drop_missing, select_features
from cellfast.profiles.steps import parse_steps
from cellfast.profiles.table import ProfileTable, write_profiles


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["Image_Metadata_Plate_DAPI", "Image_Metadata_Well_DAPI", "Image_Metadata_Compound"],
         {"Metadata_Plate": "Image_Metadata_Plate_DAPI", "Metadata_Well": "Image_Metadata_Well_DAPI", "Metadata_Compound": "Image_Metadata_Compound"}),
        (["plate", "well", "Compound", "dose"], {"Metadata_Plate": "plate", "Metadata_Well": "well", "Metadata_Compound": "Compound", "Metadata_Concentration": "dose"}),
        (["Metadata_Plate", "plate", "Metadata_Well"], {"Metadata_Plate": "Metadata_Plate", "Metadata_Well": "Metadata_Well"}),
        (["Metadata_Assay_Plate_Barcode", "Metadata_well_position", "Metadata_broad_sample", "Metadata_moa"],
         {"Metadata_Plate": "Metadata_Assay_Plate_Barcode", "Metadata_Well": "Metadata_well_position", "Metadata_Compound": "Metadata_broad_sample", "Metadata_MoA": "Metadata_moa"}),
    ],
)  # fmt: skip
def test_metadata_columns_of_several_tools_are_found(columns, expected):
    assert find_columns(columns) == expected


def test_feature_inference():
    assert infer_features(["h000", "h001", "Cells_Area"], []) == ["h000", "h001"]
    assert infer_features(["Cells_Area", "Image_Count_Cells", "ImageNumber"], []) == ["Cells_Area"]
    assert infer_features(["ImageNumber", "f1", "Metadata_Site", "x"], ["x"]) == ["f1"]
    assert infer_features(["Cells_Area", "Nuclei_Area"], [], ["Nuclei_"]) == ["Nuclei_Area"]
    assert infer_features(["Cells_Area", "Nuclei_Area"], [], [".*_Area$"]) == ["Cells_Area", "Nuclei_Area"]
    with pytest.raises(CellfastError, match="matches no numeric column"):
        infer_features(["Cells_Area"], [], ["Cytoplasm_"])
    with pytest.raises(CellfastError, match="with features"):
        infer_features(["ImageNumber"], [])


def test_wells_have_one_spelling():
    assert [well_name(w) for w in ("a1", "A1", "A01", " b12 ", "AF48", "AA3")] == ["A01", "A01", "A01", "B12", "AF48", "AA03"]


def wells(n=6):
    return pd.DataFrame({"Metadata_Plate": "p1", "Metadata_Well": [f"A{i + 1:02d}" for i in range(n)]})


def test_plate_map_joins_and_lists_what_does_not(tmp_path):
    path = tmp_path / "map.csv"
    path.write_text("Plate,well,compound,concentration\n" + "".join(f"p1,a{i},c{i},0.{i}\n" for i in range(1, 5)))
    joined, report = join_plate_map(wells(), path)
    assert list(joined["Metadata_Compound"]) == ["c1", "c2", "c3", "c4", "", ""]
    assert report["rows_joined"] == 4
    assert report["not_joined"] == ["p1 A05", "p1 A06"]
    assert report["empty_wells"] == 0
    _, report = join_plate_map(wells(2), path)
    assert report["empty"] == ["p1 A03", "p1 A04"]
    path.write_text("plate,well,compound\np1,A01,x\np1,A01,y\n")
    with pytest.raises(CellfastError, match="p1 A01: 'x' and 'y'"):
        join_plate_map(wells(), path)
    path.write_text("plate,well,compound\nother,A01,x\n")
    with pytest.raises(CellfastError, match="nothing of the input is in it"):
        join_plate_map(wells(), path)


def test_moa_joins_by_concentration_within_tolerance(tmp_path):
    path = tmp_path / "moa.csv"
    path.write_text('"compound",concentration,"moa"\n"Taxol",0.3,"a"\n"taxol",1,"a"\n"x",0.1,"b"\n"unused",5,"c"\n')
    metadata = wells(5).assign(
        Metadata_Compound=["taxol", "taxol", "x", "x", "z"], Metadata_Concentration=[0.299999, 1.0, 0.1, 0.2, 1.0]
    )
    joined, report = join_moa(metadata, path)
    assert list(joined["Metadata_MoA"]) == ["a", "a", "b", "", ""]
    assert report["not_joined"] == ["x @ 0.2 µM", "z @ 1 µM"]
    assert report["unused_rows_of_file"] == 1
    path.write_text("compound,concentration,moa\ntaxol,1,a\ntaxol,1,b\n")
    with pytest.raises(CellfastError, match="two MoAs"):
        join_moa(metadata, path)


def test_controls_by_default_and_by_query():
    metadata = wells(3).assign(Metadata_Compound=["dmso ", "x", "y"])
    assert list(find_controls(metadata)[0]) == [True, False, False]
    assert list(find_controls(metadata, "compound == 'x'")[0]) == [False, True, False]
    assert find_controls(metadata, "all")[0].all()
    jump = wells(2).assign(Metadata_pert_type=["negcon", "trt"])
    assert list(find_controls(jump)[0]) == [True, False]
    with pytest.raises(CellfastError, match="controls='all'"):
        find_controls(wells(2).assign(Metadata_Compound=["x", "y"]))
    for query, message in (
        ("compound == 'q'", "matches none"),
        ("nonsense ==", "not a query"),
        ("Metadata_Compound", "not a query"),
    ):
        with pytest.raises(CellfastError, match=message):
            find_controls(metadata, query)


def test_missing_values_are_dropped_counted_and_named():
    x = np.ones((40, 3))
    x[:4, 0] = np.nan
    x[7, 1] = np.inf
    table = ProfileTable(wells(40), x, ["a", "b", "c"])
    kept, report = drop_missing(table, 0.05)
    assert kept.feature_names == ["b", "c"]
    assert list(report["dropped_features"]) == ["a"]
    assert report["dropped_rows"] == ["p1 A08"]
    with pytest.raises(CellfastError, match="nothing is left"):
        drop_missing(ProfileTable(wells(2), np.full((2, 1), np.nan), ["a"]))


def test_feature_selection_equals_pycytominer():
    pycytominer = pytest.importorskip("pycytominer")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 12))
    x[:, 3] = x[:, 1] + 0.01 * rng.normal(size=120)
    x[:, 8] = x[:, 5] + x[:, 1] * 0.1
    x[:, 6] = np.where(np.arange(120) < 118, 0.0, 1.0)
    x[:, 7] = 5.0
    labels = [f"Cells_{i}" for i in range(12)]
    table = ProfileTable(wells(120), x, labels)
    frame = pd.concat([table.metadata, pd.DataFrame(x, columns=labels)], axis=1)
    expected = pycytominer.feature_select(frame, features="infer", operation=["variance_threshold", "frequency_threshold"])
    varying, reasons = select_features(table, ["variance", "frequency"])
    assert varying.feature_names == [c for c in expected.columns if c.startswith("Cells_")]
    assert set(reasons) == {"Cells_6", "Cells_7"}
    # As pycytominer 1.7 has them apart: the variance's is the constant feature alone, or one that hardly varies.
    tiny = table.with_features(np.where(np.arange(12) == 2, 1e-4, 1.0) * x)
    frame_tiny = pd.concat([table.metadata, pd.DataFrame(tiny.features, columns=labels)], axis=1)
    expected_tiny = pycytominer.feature_select(frame_tiny, features="infer", operation="variance_threshold")
    varying_tiny, reasons = select_features(tiny, ["variance"])
    assert varying_tiny.feature_names == [c for c in expected_tiny.columns if c.startswith("Cells_")]
    assert set(reasons) == {"Cells_2", "Cells_7"}
    expected = pycytominer.feature_select(expected, features="infer", operation="correlation_threshold")
    selected, reasons = select_features(varying, ["correlation"])
    assert selected.feature_names == [c for c in expected.columns if c.startswith("Cells_")]
    assert len(reasons) == 2
    # Unlike pycytominer's, a strong negative correlation is redundancy too.
    x[:, 8] *= -1
    assert len(select_features(varying.with_features(np.delete(x, [6, 7], 1)), ["correlation"])[1]) == 2


def test_written_profiles_are_read_back(tmp_path):
    rng = np.random.default_rng(0)
    metadata = wells(4).assign(Metadata_Compound=["DMSO", "x", "y", ""], Metadata_Concentration=[0.0, 0.3, np.nan, 1.0])
    table = ProfileTable(metadata, rng.normal(size=(4, 3)).astype(np.float32), ["PC1", "PC2", "PC3"], {"level": "well"})
    for name in ("p.parquet", "p.csv", "p.csv.gz"):
        write_profiles(table, tmp_path / name)
        again = read_profiles(tmp_path / name)
        assert again.feature_names == table.feature_names
        np.testing.assert_allclose(again.features, table.features, rtol=1e-6)
        pd.testing.assert_frame_equal(again.metadata, metadata, check_dtype=False)
    assert read_profiles(tmp_path / "p.parquet").provenance == {"level": "well"}
    assert read_profiles(tmp_path / "p.parquet").features.dtype == np.float32
    with pytest.raises(CellfastError, match=r"\.parquet, \.csv"):
        write_profiles(table, tmp_path / "p.xlsx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.csv", "p.csv.gz", "p.parquet"]


def test_deepprofiler_npz_folder(tmp_path):
    rng = np.random.default_rng(0)
    for plate, well, site in (("p1", "A01", "1"), ("p1", "A01", "2"), ("p1", "B02", "1")):
        folder = tmp_path / plate / well
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / f"{site}.npz", features=rng.normal(size=(5, 4)).astype(np.float32), locations=np.zeros((5, 2)))
    built = build_profiles([tmp_path], ProfileOptions(level="well", steps=parse_steps(["none"])))
    assert list(built.profiles.metadata["Metadata_Well"]) == ["A01", "B02"]
    assert list(built.profiles.metadata["Metadata_Cell_Count"]) == [10, 5]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: (p / "e.parquet").write_bytes(b"PAR1 not really"), "not a readable table"),
        (lambda p: (p / "notes.md").write_text("x"), r"no table"),
        (lambda p: pd.DataFrame({"Metadata_Well": ["A01"], "Metadata_Plate": ["p"]}).to_parquet(p / "e.parquet"), "No feature columns"),
        (lambda p: pd.DataFrame({"h000": [1.0]}).to_parquet(p / "e.parquet"), "--metadata CSV"),
        (lambda p: pd.DataFrame({"h000": np.zeros(0)}).to_parquet(p / "e.parquet"), "no rows"),
        (lambda p: [pd.DataFrame({"Metadata_Well": ["A01"], f"h00{i}": [1.0]}).to_parquet(p / f"{i}.parquet") for i in (0, 1)], "lacks 1 of the 1"),
        (lambda p: np.savez(p / "p_A01_1.npz", other=np.zeros(3)), "'features'"),
    ],
)  # fmt: skip
def test_bad_inputs_are_told(tmp_path, write, message):
    write(tmp_path)
    with pytest.raises(CellfastError, match=message):
        build_profiles([tmp_path], ProfileOptions(steps=parse_steps(["none"])))
