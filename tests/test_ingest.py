"""Ingest: every located cell is written or dropped with a reason, pixels are the field's, and bad input is told by name."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image
from screens import run

from cellfast.errors import CellfastError
from cellfast.metadata.wells import well_name
from cellfast.screens import Screen
from cellfast.screens.cutting import crop_origins, cut_crops
from cellfast.screens.detect import centroids_of_labels, detect_nuclei
from cellfast.screens.image_table import image_table_from_pattern, read_image_table
from cellfast.screens.images import ImageError, read_plane
from cellfast.screens.ingest_crops import read_crop
from cellfast.screens.locations import open_locations
from cellfast.screens.moa import join_moa

HEIGHT, WIDTH, SIZE = 40, 60, 16
CHANNELS = ("DNA", "Actin")


def make_images(folder, *, plates=("Week1_1", "Week2_1"), wells=("B02", "C03"), seed=0):
    """Images, a load_data table, DeepProfiler locations and a MoA table; returns the planes by (plate, well, channel)."""
    rng = np.random.default_rng(seed)
    rows, planes = [], {}
    for plate in plates:
        for number, well in enumerate(wells):
            row = {"Metadata_Plate": plate, "Metadata_Well": well.lower(), "Metadata_Site": 1}
            row |= {
                "Metadata_Compound": "DMSO" if number == 0 else "taxol",
                "Metadata_Concentration": 0 if number == 0 else 0.3000001,
            }
            for channel in CHANNELS:
                plane = rng.integers(100, 60000, (HEIGHT, WIDTH)).astype(np.uint16)
                path = folder / "images" / plate / f"{well}_{channel}.tif"
                path.parent.mkdir(parents=True, exist_ok=True)
                tifffile.imwrite(path, plane)
                planes[plate, well, channel] = plane
                row |= {f"FileName_{channel}": path.name, f"PathName_{channel}": f"C:\\data\\{plate}"}
            rows.append(row)
            locations = folder / "locations" / plate / f"{well}-1-Nuclei.csv"
            locations.parent.mkdir(parents=True, exist_ok=True)
            centers = pd.DataFrame(
                {
                    "ObjectNumber": [1, 2, 3],
                    "Nuclei_Location_Center_X": [30.4, 1.0, 20.5],
                    "Nuclei_Location_Center_Y": [20.0, 2.0, 21.6],
                }
            )
            centers.to_csv(locations, index=False)
    pd.DataFrame(rows).to_csv(folder / "load_data.csv", index=False)
    (folder / "moa.csv").write_text("compound,concentration,moa\ntaxol,0.3,Microtubule stabilizers\nnever,1,Nothing\n")
    return planes


def ingest(folder, *more, out="screen"):
    return run(
        *("ingest", "fields", folder / "load_data.csv", "--image-root", folder / "images", "--locations", folder / "locations"),
        *("--moa", folder / "moa.csv", "--crop-size", SIZE, "--workers", 1, "-o", folder / out, *more),
    )


def expected_crop(plane, y, x, mode):
    padded = np.pad(plane, SIZE, mode=mode)
    top, left = round(y) - SIZE // 2 + SIZE, round(x) - SIZE // 2 + SIZE
    return padded[top : top + SIZE, left : left + SIZE]


@pytest.mark.parametrize(("border", "mode"), [("pad", "constant"), ("reflect", "reflect")])
def test_crops_are_the_fields_pixels(tmp_path, border, mode):
    planes = make_images(tmp_path)
    result = ingest(tmp_path, "--border", border)
    assert result.exit_code == 0, result.output
    screen = Screen.open(tmp_path / "screen")
    meta = screen.metadata()
    assert len(meta) == 12
    crops = np.concatenate([p.crops() for p in screen.plates])
    for row, m in enumerate(meta.itertuples()):
        for channel, name in enumerate(CHANNELS):
            plane = planes[m.Metadata_Plate, m.Metadata_Well, name]
            np.testing.assert_array_equal(
                crops[row, channel], expected_crop(plane, m.Metadata_Center_Y, m.Metadata_Center_X, mode)
            )
    assert meta["Metadata_MoA"].tolist() == (["DMSO"] * 3 + ["Microtubule stabilizers"] * 3) * 2
    assert set(meta["Metadata_Batch"]) == {"Week1", "Week2"}
    ledger = json.loads((tmp_path / "screen" / "ledger.json").read_text())
    assert ledger["totals"]["cells_found"] == ledger["totals"]["cells_written"] == 12
    assert ledger["totals"]["cells_padded"] == 4
    assert ledger["unused_metadata"] == ["never @ 1 µM"]


def test_dropped_border_cells_are_counted(tmp_path):
    make_images(tmp_path)
    assert ingest(tmp_path, "--border", "drop").exit_code == 0
    totals = json.loads((tmp_path / "screen" / "ledger.json").read_text())["totals"]
    assert totals["cells_found"] == 12
    assert totals["cells_written"] == 8
    assert totals["cells_dropped"] == {"crop reaches over the field's edge": 4}


def test_a_second_run_keeps_finished_plates_and_refuses_other_options(tmp_path):
    make_images(tmp_path)
    ingest(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "screen" / "plates").iterdir()}
    again = ingest(tmp_path)
    assert again.exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "screen" / "plates").iterdir()} == before
    other = ingest(tmp_path, "--border", "reflect")
    assert isinstance(other.exception, CellfastError)
    assert "border = 'pad'" in str(other.exception)
    assert ingest(tmp_path, "--border", "reflect", "--force").exit_code == 0


def break_missing(path, plane):
    path.unlink()


def break_truncated(path, plane):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def break_multipage(path, plane):
    tifffile.imwrite(path, np.stack([plane, plane]), photometric="minisblack")


def break_planar(path, plane):
    tifffile.imwrite(path, np.stack([plane] * 3), photometric="rgb", planarconfig="separate")


def break_float(path, plane):
    tifffile.imwrite(path, plane.astype(np.float32))


def break_bits(path, plane):
    tifffile.imwrite(path, (plane >> 8).astype(np.uint8))


def break_size(path, plane):
    tifffile.imwrite(path, plane[:-1])


def break_constant(path, plane):
    tifffile.imwrite(path, np.full_like(plane, 7))


def break_twice(path, plane):
    tifffile.imwrite(path, tifffile.imread(path.with_name(path.name.replace("Actin", "DNA"))))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (break_missing, "file missing"),
        (break_truncated, "not a readable image"),
        (break_multipage, "planar or multi-page"),
        (break_planar, "colour image"),
        (break_float, "wrong bit depth"),
        (break_bits, "wrong bit depth"),
        (break_size, "wrong size"),
        (break_constant, "constant image"),
        (break_twice, "same image in two channels"),
    ],
)
def test_a_bad_field_is_refused_and_the_rest_goes_on(tmp_path, damage, reason):
    planes = make_images(tmp_path)
    damage(tmp_path / "images" / "Week1_1" / "C03_Actin.tif", planes["Week1_1", "C03", "Actin"])
    result = ingest(tmp_path)
    assert result.exit_code == 0, result.output
    ledger = json.loads((tmp_path / "screen" / "ledger.json").read_text())
    assert ledger["totals"]["fields_refused"] == {reason: 1}
    assert ledger["totals"]["cells_dropped"] == {f"field refused: {reason}": 3}
    assert ledger["totals"]["cells_written"] == 9
    assert (
        "C03_Actin.tif" in ledger["plates"][0]["refusals"][0]["message"]
        or "Actin" in ledger["plates"][0]["refusals"][0]["message"]
    )
    assert ledger["plates"][0]["wells_without_cells"] == ["C03"]
    strict = ingest(tmp_path, "--strict", out="other")
    assert isinstance(strict.exception, CellfastError)
    assert "--strict" in str(strict.exception)


def test_missing_locations_are_refusals(tmp_path):
    make_images(tmp_path)
    (tmp_path / "locations" / "Week1_1" / "B02-1-Nuclei.csv").unlink()
    assert ingest(tmp_path).exit_code == 0
    totals = json.loads((tmp_path / "screen" / "ledger.json").read_text())["totals"]
    assert totals["fields_refused"] == {"no locations": 1}
    assert totals["cells_written"] == 9


def test_one_file_for_two_channels_is_an_error(tmp_path):
    make_images(tmp_path)
    table = pd.read_csv(tmp_path / "load_data.csv")
    table["FileName_Actin"] = table["FileName_DNA"]
    table.to_csv(tmp_path / "load_data.csv", index=False)
    result = ingest(tmp_path)
    assert isinstance(result.exception, CellfastError)
    assert "DNA and Actin name the same file" in str(result.exception)


@pytest.mark.slow
def test_processes_write_what_one_process_writes(tmp_path):
    make_images(tmp_path)
    ingest(tmp_path)
    assert ingest(tmp_path, "--workers", 2, out="parallel").exit_code == 0
    one, two = Screen.open(tmp_path / "screen"), Screen.open(tmp_path / "parallel")
    assert [p.crc32 for p in one.plates] == [p.crc32 for p in two.plates]


def test_label_masks_and_cellprofiler_tables(tmp_path):
    make_images(tmp_path, plates=("P",), wells=("A01",))
    labels = np.zeros((HEIGHT, WIDTH), np.uint32)
    labels[10:13, 20:25], labels[30, 40] = 70_001, 5
    (tmp_path / "masks").mkdir()
    tifffile.imwrite(tmp_path / "masks" / "A01_DNA_cp_masks.tif", labels)
    table = read_image_table(tmp_path / "load_data.csv", tmp_path / "images")
    found = open_locations(str(tmp_path / "masks"), table).locate(table.fields[0], lambda c: read_plane(table.fields[0].files[c]))
    assert found.object_number.tolist() == [5, 70_001]
    assert found.y.tolist() == [30, 11]
    assert found.x.tolist() == [40, 22]
    (tmp_path / "Nuclei.csv").write_text(
        "ImageNumber,ObjectNumber,Location_Center_X,Location_Center_Y\n1,4,3.5,nan\n1,5,7.25,8\n1,5,9,9\n"
    )
    numbered = table.fields[0].__class__(**{**vars(table.fields[0]), "image_number": 1})
    found = open_locations(str(tmp_path / "Nuclei.csv"), table).locate(numbered, lambda c: None)
    assert found.object_number.tolist() == [5]
    assert found.dropped == {"centroid is not a number": 1, "object number listed twice": 1}


def test_cellpose_pickles_are_refused(tmp_path):
    make_images(tmp_path, plates=("P",), wells=("A01",))
    (tmp_path / "seg").mkdir()
    (tmp_path / "seg" / "A01_seg.npy").write_bytes(b"")
    table = read_image_table(tmp_path / "load_data.csv", tmp_path / "images")
    with pytest.raises(CellfastError, match="_cp_masks"):
        open_locations(str(tmp_path / "seg"), table)


def test_detector_finds_touching_nuclei_and_nothing_in_noise():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:200, :200]
    plane = rng.normal(500, 20, (200, 200))
    centers = [(40, 40), (40, 62), (120, 50), (150, 150), (5, 180)]
    for cy, cx in centers:
        plane += 3000 * ((y - cy) ** 2 + (x - cx) ** 2 < 12**2)
    plane = plane.clip(0, 65535).astype(np.uint16)
    found_y, found_x, _ = detect_nuclei(plane, diameter_px=24)
    assert len(found_y) == len(centers)
    for cy, cx in centers[:4]:
        assert np.hypot(found_y - cy, found_x - cx).min() < 2.5
    empty = rng.normal(500, 20, (200, 200)).astype(np.uint16)
    assert len(detect_nuclei(empty, diameter_px=24)[0]) == 0


def test_centroids_of_labels_are_means():
    labels = np.random.default_rng(0).integers(0, 6, (30, 40))
    number, y, x, area = centroids_of_labels(labels)
    for n, cy, cx, a in zip(number, y, x, area):
        rows, columns = np.nonzero(labels == n)
        assert a == len(rows)
        np.testing.assert_allclose([cy, cx], [rows.mean(), columns.mean()], rtol=1e-6)


@pytest.mark.parametrize("size", [8, 15])
@pytest.mark.parametrize(("border", "mode"), [("pad", "constant"), ("reflect", "reflect")])
def test_cutting_equals_numpy_pad(size, border, mode):
    rng = np.random.default_rng(1)
    planes = [rng.integers(0, 255, (20, 25)).astype(np.uint8) for _ in range(3)]
    y, x = rng.uniform(0, 19, 50), rng.uniform(0, 24, 50)
    crops = cut_crops(planes, crop_origins(y, x, size), size, border=border)
    for i in range(50):
        top, left = int(np.rint(y[i])) - size // 2 + 18, int(np.rint(x[i])) - size // 2 + 18
        for c, plane in enumerate(planes):
            np.testing.assert_array_equal(crops[i, c], np.pad(plane, 18, mode=mode)[top : top + size, left : left + size])


@pytest.mark.parametrize(
    ("text", "well"), [("a1", "A01"), ("A1", "A01"), ("a01", "A01"), ("P24", "P24"), ("AF48", "AF48"), ("h012", "H12")]
)
def test_wells(text, well):
    assert well_name(text) == well


@pytest.mark.parametrize("text", ["", "A", "A0", "A49", "AG01", "1A", "AAA1"])
def test_wells_that_are_none(text):
    with pytest.raises(CellfastError, match="expected a row A–Z"):
        well_name(text)


def test_patterns(tmp_path):
    for well in ("A-01", "B-12"):
        for channel in (1, 2):
            tifffile.imwrite(tmp_path / f"Channel{channel}-{well}.tif", np.zeros((4, 4), np.uint8))
    (tmp_path / "notes.txt").write_text("x")
    table = image_table_from_pattern(r"Channel(?P<channel>\d)-(?P<row>[A-H])-(?P<column>\d+)", tmp_path, plate="P")
    assert [f.well for f in table.fields] == ["A01", "B12"]
    assert table.channel_names == ("1", "2")
    assert "notes.txt" in table.notes[0]
    with pytest.raises(CellfastError, match="groups"):
        image_table_from_pattern("x", tmp_path, plate="P")
    with pytest.raises(CellfastError, match="plate with plate"):
        image_table_from_pattern(r"(?P<channel>\d)(?P<well>A01)", tmp_path)


def test_tables_with_the_same_field_twice_or_without_files_are_refused(tmp_path):
    make_images(tmp_path, plates=("P",))
    table = pd.read_csv(tmp_path / "load_data.csv")
    pd.concat([table, table]).to_csv(tmp_path / "twice.csv", index=False)
    with pytest.raises(CellfastError, match="listed more than once"):
        read_image_table(tmp_path / "twice.csv", tmp_path / "images")
    table[["Metadata_Plate", "Metadata_Well"]].to_csv(tmp_path / "none.csv", index=False)
    with pytest.raises(CellfastError, match=r"no columns FileName_.*found Metadata_Plate"):
        read_image_table(tmp_path / "none.csv", tmp_path / "images")
    with pytest.raises(CellfastError, match="unknown channels ER"):
        read_image_table(tmp_path / "load_data.csv", tmp_path / "images", channels=["DNA", "ER"])


@pytest.mark.parametrize(("suffix", "layout"), [(".npy", "HWC"), (".npy", "CHW"), (".tif", "HWC"), (".png", "strip")])
def test_ready_made_crops(tmp_path, suffix, layout):
    rng = np.random.default_rng(0)
    dtype = np.uint8 if suffix == ".png" else np.uint16
    rows, pixels = [], []
    for cell in range(5):
        crop = rng.integers(0, 250, (3, 12, 12)).astype(dtype)
        pixels.append(crop)
        path = tmp_path / f"cell{cell}{suffix}"
        if layout == "strip":
            Image.fromarray(np.concatenate(list(crop), axis=1)).save(path)
        elif suffix == ".npy":
            np.save(path, crop if layout == "CHW" else crop.transpose(1, 2, 0))
        else:
            tifffile.imwrite(path, crop.transpose(1, 2, 0), photometric="rgb")
        rows.append(
            {
                "file": path.name,
                "plate": "Week3_9",
                "well": "b2",
                "site": 1,
                "cell": cell,
                "compound": "X",
                "concentration": 1.5,
                "moa": "M",
            }
        )
    rows.append({**rows[0], "file": "absent.npy", "cell": 9})
    pd.DataFrame(rows).to_csv(tmp_path / "index.csv", index=False)
    result = run(
        "ingest",
        "crops",
        tmp_path / "index.csv",
        "-o",
        tmp_path / "screen",
        *(["--layout", "strip"] if layout == "strip" else []),
    )
    assert result.exit_code == 0, result.output
    screen = Screen.open(tmp_path / "screen")
    np.testing.assert_array_equal(screen.plates[0].crops(), np.stack(pixels))
    assert screen.metadata()["Metadata_ObjectNumber"].tolist() == [0, 1, 2, 3, 4]
    totals = json.loads((tmp_path / "screen" / "ledger.json").read_text())["totals"]
    assert (totals["cells_found"], totals["cells_written"], totals["cells_dropped"]) == (6, 5, {"file missing": 1})


def test_the_reference_implementations_index(tmp_path):
    crop = np.arange(3 * 8 * 8, dtype=np.uint8).reshape(3, 8, 8)
    name = "Week1_22123-B02-s3-17.png"
    Image.fromarray(np.concatenate(list(crop), axis=1)).save(tmp_path / name)
    (tmp_path / "index.csv").write_text(f"Image_Name,Class_Name,Target\n{name},PP-2_3.0,4\n")
    (tmp_path / "moa.csv").write_text('"compound",concentration,"moa"\n"PP-2",3.000000,"Epithelial"\n')
    result = run("ingest", "crops", tmp_path / "index.csv", "--moa", tmp_path / "moa.csv", "-o", tmp_path / "screen")
    assert result.exit_code == 0, result.output
    screen = Screen.open(tmp_path / "screen")
    np.testing.assert_array_equal(screen.plates[0].crops()[0], crop)
    row = screen.metadata().iloc[0]
    assert (row.Metadata_Well, row.Metadata_Site, row.Metadata_Compound, row.Metadata_Concentration) == ("B02", 3, "PP-2", 3.0)
    assert row.Metadata_MoA == "Epithelial"


def test_pickled_arrays_are_refused(tmp_path):
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(CellfastError, match="expected an array of numbers, got object"):
        read_crop(tmp_path / "evil.npy")


def test_errors_cross_process_borders_whole():
    import pickle

    error = pickle.loads(pickle.dumps(ImageError("what", "why")))
    assert (str(error), error.reason) == ("what", "why")


@pytest.mark.data
def test_bbbc021_tables(real_data):
    table = read_image_table(real_data / "bbbc021" / "BBBC021_v1_image.csv.gz", real_data)
    assert len(table.fields) == 13_200
    assert len({f.plate for f in table.fields}) == 55
    joined, report = join_moa(table, real_data / "bbbc021" / "BBBC021_v1_moa.csv")
    treated = [f for f in joined.fields if f.moa not in ("", "DMSO")]
    assert len(treated) == 2_528
    assert sum(f.moa == "DMSO" for f in joined.fields) == 1_320
    assert report.unused == ()


@pytest.mark.data
def test_example_human(real_data, tmp_path):
    folder = real_data / "cellprofiler" / "ExampleHuman"
    result = run(
        *(
            "ingest",
            "fields",
            folder / "Image.csv",
            "--image-root",
            folder,
            "--plate",
            "Human",
            "--locations",
            folder / "Nuclei.csv",
        ),
        *("--crop-size", 48, "-o", tmp_path / "s"),
    )
    assert result.exit_code == 0, result.output
    assert Screen.open(tmp_path / "s").num_cells == 289
    plane = read_plane(folder / "AS_09125_050116030001_D03f00d0.tif")
    y, _, _ = detect_nuclei(plane, diameter_px=12)
    assert abs(len(y) - 289) < 35


@pytest.mark.data
def test_thousand_real_crops(real_data, tmp_path):
    result = run(
        "ingest", "crops", real_data / "bbbc021" / "crops" / "index.csv", "-o", tmp_path / "s", "--channels", "DNA,Actin,Tubulin"
    )
    assert result.exit_code == 0, result.output
    screen = Screen.open(tmp_path / "s")
    assert (screen.num_cells, len(screen.plates)) == (1000, 55)
    info = run("info", tmp_path / "s", "--verify", "--json")
    assert '"treatments": 103' in info.output
