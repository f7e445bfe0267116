"""Tables as laboratories write them, and what an ingest says when they do not agree with each other."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import tifffile
from screens import run

from cellfast.errors import CellfastError
from cellfast.metadata.doses import concentration_um
from cellfast.metadata.joins import MoaTable
from cellfast.metadata.tables import read_table
from cellfast.screens import Screen
from cellfast.screens.image_table import read_image_table
from cellfast.screens.label_masks import MaskLocations
from cellfast.screens.locations import open_locations
from cellfast.screens.moa import join_metadata


@pytest.mark.parametrize(
    "content",
    [
        "Plate,Well,Dose\nP,A01,3\nP,A02,\n",
        "\ufeffPlate,Well,Dose\r\nP,A01,3\r\nP,A02\r\n",
        "Plate\tWell\tDose\nP\tA01\t3\nP\tA02\t\n",
        'Plate;Well;Dose\r\n"P";A01;3\r\nP;A02;\r\n',
        " Plate , Well, Dose\nP, A01, 3\nP, A02, \n\n",
    ],
)
def test_separators_line_ends_and_short_rows(tmp_path, content):
    (tmp_path / "t.csv").write_bytes(content.encode())
    table = read_table(tmp_path / "t.csv", "a table")
    assert list(table.columns) == ["Plate", "Well", "Dose"]
    assert [row.strip() for row in table["Well"]] == ["A01", "A02"]
    assert table["Dose"].tolist() == ["3", ""]


@pytest.mark.parametrize(
    ("content", "said"), [(b"a,b\n1,2,3\n4,5,6\n", "has 3 values"), (b"", "empty"), (b"a,a\n1,2\n", "two columns are named")]
)
def test_tables_that_would_be_read_wrongly_are_refused(tmp_path, content, said):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(CellfastError, match=said):
        read_table(tmp_path / "t.csv", "a table")


def test_concentrations():
    assert concentration_um(" 0.30 ", "t") == 0.3
    assert np.isnan(concentration_um("NA", "t"))
    assert [concentration_um(text, "t") for text in ("10 nM", "0,3", "1e-3", "0.1 uM")] == [0.01, 0.3, 1e-3, 0.1]
    for text in ("10 mg/ml", "-1", "inf", "1,000"):
        with pytest.raises(CellfastError, match=rf"t: '{text}'"):
            concentration_um(text, "t")


def test_moa_tables(tmp_path):
    (tmp_path / "moa.csv").write_text("compound,concentration,moa\nTaxol,0.3,A\nempty,1,\ntaxol,0.3000001,A\n")
    table = MoaTable.read(tmp_path / "moa.csv")
    assert table.find("taxol ", 0.3) == "A"
    assert table.find("empty", 1.0) == ""
    assert table.find("taxol", 3.0) is None
    assert table.unused() == []
    (tmp_path / "moa.csv").write_text("compound,concentration,moa\nTaxol,0.3,A\ntaxol,0.3,B\n")
    with pytest.raises(CellfastError, match=r"taxol @ 0\.3 µM has two MoAs"):
        MoaTable.read(tmp_path / "moa.csv")


def make_fields(folder, plates=("P",), wells=("A01", "A02"), **columns):
    rng = np.random.default_rng(0)
    rows = []
    for plate in plates:
        for number, well in enumerate(wells):
            path = folder / "my images" / plate / f"{well}.TIF"
            path.parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(path, rng.integers(100, 60000, (40, 50)).astype(np.uint16))
            rows.append(
                {
                    "ImageNumber": number + 1,
                    "Metadata_Plate": plate,
                    "Metadata_Well": well,
                    "FileName_DNA": path.name,
                    "PathName_DNA": plate,
                }
            )
    table = pd.DataFrame(rows).assign(**columns)
    table.to_csv(folder / "load data.csv", index=False)
    return table


def draw_nuclei(folder):
    """One bright square on a dark background in place of every image: a cell that detection finds."""
    for number, path in enumerate(sorted((folder / "my images").rglob("*.TIF"))):
        plane = np.random.default_rng(number).integers(100, 200, (40, 50))
        plane[16:24, 20:28] += 20_000
        tifffile.imwrite(path, plane.astype(np.uint16))


def ingest(folder, locations, *more):
    return run(
        *("ingest", "fields", folder / "load data.csv", "--image-root", folder / "my images", "--locations", locations),
        *("--crop-size", 8, "--workers", 1, "-o", folder / "s", *more),
    )


def test_locations_of_fields_that_are_not_listed_are_told(tmp_path):
    make_fields(tmp_path)
    (tmp_path / "n.csv").write_text(
        "ImageNumber,ObjectNumber,Location_Center_X,Location_Center_Y\n1,1,9,9\n2,1,9,9\n7,1,9,9\n7,2,8,8\n"
    )
    result = ingest(tmp_path, tmp_path / "n.csv")
    assert result.exit_code == 0, result.output
    assert (
        "2 rows of the table of locations are of 1 fields the image table does not list, such as ImageNumber 7" in result.output
    )
    notes = json.loads((tmp_path / "s" / "ledger.json").read_text())["notes"]
    assert any("2 rows" in note for note in notes)
    (tmp_path / "n.csv").write_text("ImageNumber,ObjectNumber,Location_Center_X,Location_Center_Y\n1,1,9,9\n,1,9,9\n")
    assert "row 3: expected a number in column ImageNumber, got ''" in str(ingest(tmp_path, tmp_path / "n.csv").exception)


def test_one_channel_upper_case_tif_spaces_and_one_cell(tmp_path):
    make_fields(tmp_path, wells=("a1",))
    (tmp_path / "n.csv").write_text("ImageNumber,ObjectNumber,Location_Center_X,Location_Center_Y\n1,1,9,9\n")
    result = ingest(tmp_path, tmp_path / "n.csv")
    assert result.exit_code == 0, result.output
    screen = Screen.open(tmp_path / "s")
    assert screen.num_cells == 1
    assert screen.metadata()["Metadata_Well"].tolist() == ["A01"]


def test_an_image_is_never_its_own_mask(tmp_path, monkeypatch):
    make_fields(tmp_path, wells=("A01",))
    monkeypatch.chdir(tmp_path)
    result = ingest(tmp_path, "my images")
    assert "no mask named A01_cp_masks" in str(result.exception)
    # A copy of the images in another folder is no folder of masks either.
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "A01.tif").write_bytes((tmp_path / "my images" / "P" / "A01.TIF").read_bytes())
    assert "an image, not a label mask" in str(ingest(tmp_path, tmp_path / "copy").exception)


def test_plates_whose_masks_have_the_same_names(tmp_path):
    make_fields(tmp_path, plates=("P", "Q"), wells=("A01",))
    for plate, label in (("P", 3), ("Q", 4)):
        mask = np.zeros((40, 50), np.uint16)
        mask[10:14, 10:14] = label
        (tmp_path / "masks" / plate).mkdir(parents=True)
        tifffile.imwrite(tmp_path / "masks" / plate / "A01_cp_masks.tif", mask)
    assert ingest(tmp_path, tmp_path / "masks").exit_code == 0
    assert Screen.open(tmp_path / "s").metadata()["Metadata_ObjectNumber"].tolist() == [3, 4]
    # Other masks in a folder of that name: their plates are made again.
    for path in (tmp_path / "masks").rglob("*.tif"):
        tifffile.imwrite(path, np.pad(mask[:-1], ((1, 0), (0, 0))), compression="zlib")
    again = ingest(tmp_path, tmp_path / "masks")
    assert again.exit_code == 0
    assert Screen.open(tmp_path / "s").metadata()["Metadata_Center_Y"].tolist() == [12.5, 12.5]
    for name in ("P", "Q"):
        (tmp_path / "masks" / name).rename(tmp_path / "masks" / f"x{name}")
    table = read_image_table(tmp_path / "load data.csv", tmp_path / "my images")
    source = open_locations(str(tmp_path / "masks"), table)
    assert isinstance(source, MaskLocations)
    with pytest.raises(CellfastError, match="two masks of one name"):
        source.locate(table.fields[0], lambda channel: np.zeros((40, 50)))


def test_treatments_that_contradict_each_other(tmp_path):
    make_fields(tmp_path)
    table = read_image_table(tmp_path / "load data.csv", tmp_path / "my images")
    (tmp_path / "m.csv").write_text("Well,compound\nA01,x\nA02,y\na1,z\n")
    with pytest.raises(CellfastError, match="more than one Compound; first: A01: 'x' and 'z'"):
        join_metadata(table, tmp_path / "m.csv")
    (tmp_path / "m.csv").write_text("Well,compound,concentration\nA01,x,1 mg/ml\n")
    with pytest.raises(CellfastError, match=r"column concentration: '1 mg/ml' has a unit"):
        join_metadata(table, tmp_path / "m.csv")
    make_fields(tmp_path, Metadata_Compound="x", Metadata_Concentration="high")
    with pytest.raises(CellfastError, match=r"column Metadata_Concentration: 'high' is not a number"):
        read_image_table(tmp_path / "load data.csv", tmp_path / "my images")


def test_crops_of_two_treatments_in_one_well_are_refused(tmp_path):
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).integers(0, 99, (8, 8)).astype(np.uint8))
    (tmp_path / "i.csv").write_text(
        "File\tPlate\tWell\tsite\tcompound\tconcentration\na.npy\tP\ta1\t1\tx\t1\nb.npy\tP\tA01\t1\ty\t1\n"
    )
    result = run("ingest", "crops", tmp_path / "i.csv", "-o", tmp_path / "s")
    assert "plate P, well A01 has 2 treatments, x @ 1 µM (no MoA) and y @ 1 µM (no MoA)" in str(result.exception)
    (tmp_path / "i.csv").write_text("file,plate,well,site,compound,concentration\na.npy,P,a1,1,x,1\nb.npy,P,A001,1,x,1\n")
    (tmp_path / "moa.csv").write_text("compound,concentration,moa\nx,1,\nz,2,Z\n")
    result = run("ingest", "crops", tmp_path / "i.csv", "--moa", tmp_path / "moa.csv", "-o", tmp_path / "s")
    assert result.exit_code == 0, result.output
    assert "no MoA for x @ 1 µM" in result.output
    assert "no crop of z @ 2 µM" in result.output
    assert Screen.open(tmp_path / "s").metadata()["Metadata_MoA"].tolist() == ["", ""]


def test_detection_counts_as_progress(tmp_path, monkeypatch):
    from cellfast.screens import ingest as room

    make_fields(tmp_path)
    draw_nuclei(tmp_path)
    seen = []
    monkeypatch.setattr(room._Shown, "update", lambda self, searched, done: seen.append((searched, done)))
    assert ingest(tmp_path, "detect", "--diameter", 8).exit_code == 0
    assert seen == [(1, 0), (2, 0), (2, 1), (2, 2)]


def test_plates_of_an_earlier_ingest_are_named(tmp_path):
    make_fields(tmp_path, plates=("P", "Q"))
    draw_nuclei(tmp_path)
    assert ingest(tmp_path, "detect", "--diameter", 8).exit_code == 0
    make_fields(tmp_path, plates=("P",))
    draw_nuclei(tmp_path)
    result = ingest(tmp_path, "detect", "--diameter", 8)
    assert "plates of earlier ingests in the folder, part of the screen but not of this ledger: Q" in result.output


def test_columns_named_by_hand_and_spellings_in_an_ingest(tmp_path):
    make_fields(tmp_path, Metadata_Stock="x")
    draw_nuclei(tmp_path)
    detect = ("detect", "--diameter", 8)
    result = ingest(tmp_path, *detect, "--column", "compound=Stock", "--column", "batch=Nowhere")
    assert "--column batch=Nowhere: neither the image table nor a joined table has a column 'Nowhere'" in str(result.exception)
    (tmp_path / "map.csv").write_text("Well,genotype,cell_line,mode\nA01,TP53,U2OS,P53 \nA02,tp53,HeLa,p53\n")
    named = ("--metadata", tmp_path / "map.csv", "--column", "compound=genotype", "--column", "moa=mode")
    result = ingest(tmp_path, *detect, *named)
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    cells = Screen.open(tmp_path / "s").metadata()
    assert sorted(set(cells["Metadata_Well"])) == ["A01", "A02"]
    assert set(cells["Metadata_Compound"]) == {"TP53"}
    assert set(cells["Metadata_MoA"]) == {"P53"}
    assert "Compound: spellings taken as one: TP53 (also 'tp53')" in result.output
    assert "cell_line is not kept with the cells" in result.output


def test_an_index_of_crops_with_names_of_the_field(tmp_path):
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).integers(0, 99, (8, 8)).astype(np.uint8))
    (tmp_path / "i.csv").write_text(
        "File Name,Metadata_Plate,Row,Column,Metadata_Site,ObjectNumber,Gene,Batch\n"
        "a.npy,0012,1,3.0,s1,7,KRAS,B7\nb.npy,0012,A,04,2,9,kras,B7\n"
    )
    result = run("ingest", "crops", tmp_path / "i.csv", "-o", tmp_path / "s", "--column", "compound=Gene")
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    screen = Screen.open(tmp_path / "s")
    cells = screen.metadata()
    assert cells[["Metadata_Plate", "Metadata_Well", "Metadata_Compound", "Metadata_Batch"]].to_numpy().tolist() == [
        ["0012", "A03", "KRAS", "B7"],
        ["0012", "A04", "KRAS", "B7"],
    ]
    assert cells[["Metadata_Site", "Metadata_ObjectNumber"]].to_numpy().tolist() == [[1, 7], [2, 9]]
    (tmp_path / "map.csv").write_text("Plate,Well,Compound,Dose\n0012,A3,x,100 nM\n0012,A4,y,\n0012,A5,z,1 uM\n")
    result = run("ingest", "crops", tmp_path / "i.csv", "-o", tmp_path / "t", "--metadata", tmp_path / "map.csv")
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    assert Screen.open(tmp_path / "t").metadata()["Metadata_Concentration"].tolist()[:1] == [0.1]
    assert "no crop of 0012 A05, which map.csv lists" in result.output
