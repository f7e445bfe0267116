"""The rules of docs/tables.md, each with values written out by hand."""

from __future__ import annotations

import gzip

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from cellfast.errors import CellfastError
from cellfast.metadata.batches import fill_batches
from cellfast.metadata.canonical import canonical_metadata
from cellfast.metadata.columns import find_columns, infer_features, is_bookkeeping
from cellfast.metadata.doses import concentrations_um, unify_doses
from cellfast.metadata.joins import join_moa, join_plate_map
from cellfast.metadata.tables import open_table, partition_values, read_table
from cellfast.metadata.treatments import treatment_key
from cellfast.metadata.values import unify_spellings
from cellfast.metadata.wells import well_name
from cellfast.profiles.build import ProfileOptions, build_profiles
from cellfast.profiles.feature_files import open_source

EXPECTED = [["000123", "NA", "0.5"], ["22E1", "Ünü", ""]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("separator", [",", "\t", ";"])
@pytest.mark.parametrize("ends", ["", "\n\n", ",,,\n"])
def test_text_tables_of_every_kind_are_one_table(tmp_path, encoding, separator, ends):
    text = 'Plate,"Compound",f0\n000123, NA ,0.5\n22E1,Ünü,\n'.replace(",", separator) + ends.replace(",", separator)
    for name in ("t.csv", "t.txt.gz"):
        content = text.encode(encoding)
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        notes: list[str] = []
        table = read_table(tmp_path / name, "a table", notes)
        assert list(table.columns) == ["Plate", "Compound", "f0"]
        assert table.to_numpy().tolist() == EXPECTED
        assert bool(notes) == (encoding in ("utf-16", "cp1252"))


def test_separators_at_the_end_of_rows_are_nothing(tmp_path):
    (tmp_path / "t.csv").write_text("a,b,\n1,2,,\n3,4,\n,,\n")
    assert read_table(tmp_path / "t.csv", "a table").to_numpy().tolist() == [["1", "2"], ["3", "4"]]
    (tmp_path / "t.csv").write_text("a,b\n1,2\n3,4,5\n")
    with pytest.raises(CellfastError, match="line 3: the row has 3 values, the header 2 names"):
        read_table(tmp_path / "t.csv", "a table")


def test_binary_tables_say_the_same_as_text(tmp_path):
    table = pa.table(
        {
            "Metadata_Plate": pa.array([22123, None], pa.int64()),
            "Metadata_Well": pa.array(["a1", "B02"]).dictionary_encode(),
            "Metadata_Compound": pa.array([None, "nan"], pa.large_string()),
            "Metadata_Concentration": pa.array([0.25, None], pa.float64()),
            "f0": pa.array(np.array([0.5, 1.5], np.float16)),
            "f1": pa.array([1, None]).cast(pa.decimal128(21, 2)),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    feather.write_feather(table, tmp_path / "t.feather")
    with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("t.parquet", "t.feather", "t.arrow"):
        text = read_table(tmp_path / name, "a table")
        assert text.iloc[:, :4].to_numpy().tolist() == [["22123", "a1", "", "0.25"], ["", "B02", "nan", ""]]
        opened = open_table(tmp_path / name)
        assert opened.numeric_columns == ["Metadata_Plate", "Metadata_Concentration", "f0", "f1"]
        np.testing.assert_array_equal(np.concatenate(list(opened.blocks(["f1", "f0"]))), [[1, 0.5], [np.nan, 1.5]])
        notes: list[str] = []
        known = canonical_metadata(opened.frame(list(text.columns)), find_columns(list(text.columns)), name, notes)
        assert known["Metadata_Plate"].tolist() == ["22123", ""]
        assert known["Metadata_Well"].tolist() == ["A01", "B02"]
        assert known["Metadata_Compound"].tolist() == ["", "nan"]
        assert "hold the word 'nan'" in notes[0]


def test_an_index_that_pandas_stored_and_partitions_are_columns(tmp_path):
    frame = pd.DataFrame({"Metadata_Well": ["A01", "A02"], "h000": [1.0, 2.0], "h001": [3.0, 4.0]})
    for plate in ("000123", "123"):
        (tmp_path / "t" / f"Metadata_Plate={plate}").mkdir(parents=True)
        frame.set_index("Metadata_Well").to_parquet(tmp_path / "t" / f"Metadata_Plate={plate}" / "part-0.parquet")
    assert partition_values(tmp_path / "t" / "a=1%2F2" / "b=__HIVE_DEFAULT_PARTITION__" / "x.parquet", tmp_path / "t") == {
        "a": "1/2",
        "b": "",
    }
    source = open_source([tmp_path / "t"])
    metadata, values = source.read_all()
    assert metadata["Metadata_Plate"].tolist() == ["000123", "000123", "123", "123"]
    assert metadata["Metadata_Well"].tolist() == ["A01", "A02", "A01", "A02"]
    assert values.tolist() == [[1, 3], [2, 4], [1, 3], [2, 4]]
    assert read_table(tmp_path / "t", "a table")["Metadata_Plate"].tolist() == ["000123", "000123", "123", "123"]


def test_a_first_line_that_is_no_header_is_one_sentence(tmp_path):
    (tmp_path / "t.csv").write_text('a"b,c\nd"e,f\n')
    with pytest.raises(CellfastError, match=r"t\.csv: not a readable table: its first line is no header"):
        read_table(tmp_path / "t.csv", "a table")


@pytest.mark.parametrize("bad", [b"\xb0\xb0", b"a\0b"])
def test_text_of_binary_tables_that_is_none_is_one_sentence(tmp_path, bad):
    values = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(np.array([0, len(bad)], np.int32)), pa.py_buffer(bad)])
    pq.write_table(pa.table({"Metadata_Compound": values, "h000": [1.0]}), tmp_path / "t.parquet")
    with pytest.raises(CellfastError, match=r"t\.parquet: "):
        read_table(tmp_path / "t.parquet", "a table")
    (tmp_path / "t.csv").write_bytes("a,b\n1,2".encode("utf-16")[:-1])
    with pytest.raises(CellfastError, match=r"t\.csv: "):
        read_table(tmp_path / "t.csv", "a table")


@pytest.mark.parametrize(
    ("header", "said"),
    [("a,b,a", "two columns are named 'a'"), ("Metadata_Well_x,Metadata_Well_y,f", "'Metadata_Well_x' and 'Metadata_Well_y'")],
)
def test_doubled_columns_are_errors(tmp_path, header, said):
    (tmp_path / "t.csv").write_text(f"{header}\n1,2,3\n")
    with pytest.raises(CellfastError, match=said):
        read_table(tmp_path / "t.csv", "a table")


@pytest.mark.parametrize("rows", [3, 2500, 40_000])
def test_text_in_a_feature_is_an_error_at_any_length(tmp_path, rows):
    lines = [f"P,A01,{i}.5,1" for i in range(rows)]
    lines[-1] = "P,A01,#DIV/0!,1"
    (tmp_path / "t.csv").write_text("\n".join(["Metadata_Plate,Metadata_Well,f0,f1", *lines]))
    with pytest.raises(CellfastError, match=rf"t\.csv, row {rows + 1}: column 'f0' is a feature and holds '#DIV/0!'"):
        build_profiles([tmp_path / "t.csv"], ProfileOptions(level="well", steps=[]))
    source = open_source([tmp_path / "t.csv"], features=["f1"])
    assert sum(len(block) for block in source.blocks(0)) == rows


def test_wells_from_names_rows_and_columns():
    assert [well_name(w) for w in ("A1", "a01", "A-01", "A_01", "AA1", "r01c02")] == ["A01", "A01", "A01", "A01", "AA01", "A02"]
    assert well_name("27.0", "1.0") == "AA01"
    assert well_name("a", 3) == "A03"
    for wrong in ("AG01", "A49", "A0", "7", ""):
        with pytest.raises(CellfastError, match="such as A01"):
            well_name(wrong)
    frame = pd.DataFrame({"Plate": ["p"], "Row": [27.0], "Column": [1.0]})
    assert canonical_metadata(frame, find_columns(list(frame.columns)))["Metadata_Well"].tolist() == ["AA01"]


def test_doses():
    assert concentrations_um(["0.1 uM", "100 nM", "1 mM", "0", ""], "t")[:4].tolist() == [0.1, 0.1, 1000, 0]
    assert concentrations_um(["0,3", "1", "1e-3"], "t").tolist() == [0.3, 1, 0.001]
    assert concentrations_um(["300"], "t", "nm").tolist() == [0.3]
    for values in (["0.1", "0,2"], ["1 uM", "2"], ["1 mg/ml"], ["1,000"], ["-1"], ["0.5."], ["1.000.0"], ["high", "low"]):
        with pytest.raises(CellfastError, match="t, column dose: '"):
            concentrations_um(values, "t, column dose")
    assert unify_doses(np.array([0.3, 0.30000001, 0.2999, 3.0, 0.3])).tolist() == [0.3, 0.3, 0.3, 3.0, 0.3]
    frame = pd.DataFrame({"compound": ["a", "b"], "conc_nM": [100, 300]})
    assert canonical_metadata(frame, find_columns(list(frame.columns)))["Metadata_Concentration"].tolist() == [0.1, 0.3]


def test_spellings_are_one_name():
    frame = pd.DataFrame({"Metadata_Compound": ["cpd 1", "CPD1", "cpd 1", "1 1", "11"]})
    unified, merged = unify_spellings(frame, ("Metadata_Compound",))
    assert unified["Metadata_Compound"].tolist() == ["cpd 1", "cpd 1", "cpd 1", "1 1", "11"]
    assert merged == {"Metadata_Compound": {"cpd 1": ["CPD1"]}}


def test_biology_within_a_treatment_is_an_error():
    wells = pd.DataFrame({"Metadata_Compound": ["x", "x"], "Metadata_cell_line": ["A549", "U2OS"]})
    with pytest.raises(CellfastError, match=r"group_by='Metadata_cell_line'.*pool='Metadata_cell_line'"):
        treatment_key(wells)
    assert treatment_key(wells, ["cell_line"]) == ["Metadata_Compound", "Metadata_cell_line"]
    assert treatment_key(wells, pool=["Metadata_cell_line"]) == ["Metadata_Compound"]


def test_bookkeeping_is_no_feature():
    for name in (
        "Nuclei_Location_Center_X", "Location_Center_Y", "Cells_Number_Object_Number", "Nuclei_Children_Cells_Count", "Cells_Parent_Nuclei",
        "Nuclei_AreaShape_BoundingBoxArea", "ImageNumber", "TableNumber", "centroid-0", "Cells_AreaShape_EulerNumber", "FileName_DNA",
        "PathName_DNA", "Image_Count_Cells", "Unnamed: 0",
    ):  # fmt: skip
        assert is_bookkeeping(name), name
    names = ["Image_Texture_Contrast_DNA", "Cells_AreaShape_Area", "Nuclei_Location_Center_X", "Metadata_Count"]
    assert infer_features(names, []) == ["Image_Texture_Contrast_DNA", "Cells_AreaShape_Area"]


def wells() -> pd.DataFrame:
    return pd.DataFrame(
        {"Metadata_Plate": ["P1", "P1", "P2"], "Metadata_Well": ["A01", "A02", "A01"], "Metadata_Compound": ["a", "b", "c"]}
    )


def test_plate_maps_leave_what_they_do_not_name(tmp_path):
    (tmp_path / "m.tsv").write_text("plate\twell\tgenotype\tMetadata_Batch\np1\ta1\tKO\tb1\nP1\tA3\tWT\tb1\n")
    joined, report = join_plate_map(wells(), tmp_path / "m.tsv", {"Metadata_Compound": "genotype"})
    assert joined["Metadata_Compound"].tolist() == ["KO", "b", "c"]
    assert joined["Metadata_Batch"].tolist() == ["b1", "", ""]
    assert (report["rows_joined"], report["not_joined"], report["empty"]) == (1, ["P1 A02", "P2 A01"], ["P1 A03"])
    assert report["values_replaced"] == {"Metadata_Compound": 1}
    (tmp_path / "m.tsv").write_text("well\tcompound\nA01\tx\nA01\ty\n")
    with pytest.raises(CellfastError, match=r"more than one Compound.*Add a column with the plate"):
        join_plate_map(wells(), tmp_path / "m.tsv")


def test_moas_by_the_column_that_fits(tmp_path):
    (tmp_path / "moa.csv").write_text("broad_sample,pert_iname,moa\nBRD-1,zzz,M1\nBRD-2,yyy,M2\n")
    frame = wells().assign(Metadata_Compound=["brd-1", "BRD-2", "DMSO"])
    joined, report = join_moa(frame, tmp_path / "moa.csv")
    assert joined["Metadata_MoA"].tolist() == ["M1", "M2", "DMSO"]
    assert "joined by its column broad_sample" in report["notes"][0]


def test_batches_of_tables_count_and_a_regex_must_match():
    frame = wells().assign(Metadata_Batch=["b", "b", ""])
    assert fill_batches(frame)[0]["Metadata_Batch"].tolist() == ["b", "b", "P2"]
    assert fill_batches(frame, r"(\d)")[0]["Metadata_Batch"].tolist() == ["1", "1", "2"]
    with pytest.raises(CellfastError, match="matches none of the plates, such as 'P1'"):
        fill_batches(frame, "^Week")


def test_wells_of_two_files_without_plates_are_not_one(tmp_path):
    for name in "ab":
        pd.DataFrame({"Metadata_Well": ["A01"], "h000": [1.0]}).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(CellfastError, match="neither names its plate"):
        build_profiles([tmp_path], ProfileOptions(level="well", steps=[]))


def test_a_site_of_thousands_of_digits_is_text(tmp_path):
    frame = pd.DataFrame({"Metadata_Site": ["1", "9" * 5000]})
    known = canonical_metadata(frame, find_columns(list(frame.columns)))
    assert known["Metadata_Site"].tolist() == ["1", "9" * 5000]
