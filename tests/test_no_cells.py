"""A run that writes no cell is an error that says why, with the counts by reason; centroids beyond their fields are told at once."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from screens import HEIGHT, WIDTH, make_fields, make_model, run

from cellfast.errors import CellfastError
from cellfast.screens.ledger import Ledger, PlateLedger


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = make_fields(tmp_path_factory.mktemp("no cells"), plates=("P1",), wells=("A01", "A02"), sites=1)
    make_model(folder / "model.pt")
    return folder


def locations(folder, name, y, x, wells=("A01", "A02")):
    place = folder / name / "P1"
    place.mkdir(parents=True)
    for well in wells:
        table = pd.DataFrame(
            {"ObjectNumber": np.arange(len(y)) + 1, "Nuclei_Location_Center_X": x, "Nuclei_Location_Center_Y": y}
        )
        table.to_csv(place / f"{well}-1-Nuclei.csv", index=False)
    return folder / name


def both(work, where, tmp_path, *options):
    """The errors of ingest and of embed."""
    common = [work / "load_data.csv", "--image-root", work / "images", "--locations", where, *options]
    ingested = run("ingest", "fields", *common, "--crop-size", 24, "--workers", 1, "-o", tmp_path / "screen")
    embedded = run("embed", *common, "--model", work / "model.pt", "-o", tmp_path / "e")
    for result in (ingested, embedded):
        assert isinstance(result.exception, CellfastError), result.output
    return str(ingested.exception), str(embedded.exception)


def test_centroids_beyond_the_field_name_its_size_and_their_range(work, tmp_path):
    """Two by two binned images, centroids of the full ones: three of four lie outside."""
    where = locations(tmp_path, "binned", [100.0, 110.5, 70.0, 20.0], [150.0, 30.0, 101.5, 10.0])
    for message in both(work, where, tmp_path):
        assert (
            f"3 of 4 centroids lie outside the {HEIGHT} × {WIDTH} px field: y from 20.0 to 110.5, x from 10.0 to 150.0 px"
            in message
        )
        assert "binning" in message
        assert (
            "Fields refused: centroids outside the field 2; cells dropped: field refused: centroids outside the field 8"
            in message
        )
    ledger = json.loads((tmp_path / "screen" / "ledger.json").read_text())["totals"]
    assert (ledger["cells_found"], ledger["cells_written"]) == (8, 0)


def test_the_command_ends_with_status_1_and_goes_on_when_the_locations_are_mended(work, tmp_path):
    where = locations(tmp_path, "none", [], [])
    for message in both(work, where, tmp_path):
        assert "no cell was written: none is located in the 2 fields that could be used" in message
    common = [work / "load_data.csv", "--image-root", work / "images", "--locations", locations(tmp_path, "some", [30.0], [40.0])]
    # What was written without a cell is nothing to lose: the same output is used, without --force.
    mended = run("ingest", "fields", *common, "--crop-size", 24, "--workers", 1, "-o", tmp_path / "screen")
    assert mended.exit_code == 0, mended.output
    mended = run("embed", *common, "--model", work / "model.pt", "-o", tmp_path / "e")
    assert mended.exit_code == 0, mended.output
    assert json.loads((tmp_path / "e" / "embeddings.json").read_text())["cells"] == 2


def test_cells_dropped_at_the_border_are_counted(work, tmp_path):
    where = locations(tmp_path, "edge", [1.0, 2.0], [1.0, 40.0])
    for message in both(work, where, tmp_path, "--border", "drop"):
        assert (
            "no cell was written: of 4 located all were dropped; cells dropped: crop reaches over the field's edge 4" in message
        )


def test_some_centroids_beyond_the_field_are_dropped_and_counted(work, tmp_path):
    where = locations(tmp_path, "few", [30.0, 20.0, 200.0], [40.0, 20.0, 10.0])
    common = [work / "load_data.csv", "--image-root", work / "images", "--locations", where]
    result = run("ingest", "fields", *common, "--crop-size", 24, "--workers", 1, "-o", tmp_path / "screen")
    assert result.exit_code == 0, result.output
    totals = json.loads((tmp_path / "screen" / "ledger.json").read_text())["totals"]
    assert totals["cells_dropped"] == {"centroid outside the field": 2}


def test_crops_that_are_all_refused_are_counted_by_reason(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((8, 8, 3), np.float64))
    np.save(tmp_path / "b.npy", np.zeros((8, 8, 3), np.uint8))
    index = "file,plate,well,site,cell,compound,concentration,moa\n"
    (tmp_path / "index.csv").write_text(index + "a.npy,P,A01,1,1,x,1,m\nb.npy,P,A01,1,2,x,1,m\n")
    result = run("ingest", "crops", tmp_path / "index.csv", "-o", tmp_path / "s")
    assert result.exit_code == 0, result.output
    crops = Ledger("", "", {}, [PlateLedger("P", 1, 0, {"no usable crop": 1}, 2, cells_dropped={"not readable": 2})])
    with pytest.raises(CellfastError, match=r"no field could be used.*cells dropped: not readable 2"):
        crops.check_written(tmp_path)
