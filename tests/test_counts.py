"""One count of cells: from embeddings of wells to treatments and their evaluation, under whatever name a table has it."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from screens import make_fields, make_model, run

from cellfast.metadata.counts import CELL_COUNT, rows_are_cells, take_counts
from cellfast.profiles.build import ProfileOptions, build_profiles
from cellfast.profiles.evaluate import EvaluationOptions, evaluate_profiles
from cellfast.profiles.report import evaluation_lines, profile_lines
from cellfast.profiles.results import read_annotated
from cellfast.profiles.steps import parse_steps

NONE = parse_steps(["none"])


def build(path, **options):
    return build_profiles([path], ProfileOptions(steps=NONE, **options))


def write(tmp_path, name="t.csv", **columns):
    frame = pd.DataFrame(columns)
    frame.to_csv(tmp_path / name, index=False)
    return tmp_path / name


def test_embeddings_of_wells_say_how_many_cells_they_are(tmp_path):
    make_fields(tmp_path, plates=("P1", "P2"))
    make_model(tmp_path / "model.pt")
    common = [tmp_path / "load_data.csv", "--image-root", tmp_path / "images", "--locations", tmp_path / "locations"]
    model = ["--model", tmp_path / "model.pt"]
    for out, more in (("cells", []), ("wells", ["--aggregate", "well"])):
        result = run("embed", *common, *model, "-o", tmp_path / out, *more)
        assert result.exit_code == 0, result.output
    total = json.loads((tmp_path / "wells" / "embeddings.json").read_text())["cells"]
    for level in ("site", "well", "treatment"):
        of_cells = build(tmp_path / "cells", level=level)
        assert of_cells.report["rows"]["cells"] == of_cells.profiles.metadata[CELL_COUNT].sum() == total
    of_wells = build(tmp_path / "wells", level="treatment")
    assert of_wells.report["rows"]["cells"] == total
    pd.testing.assert_series_equal(of_wells.profiles.metadata[CELL_COUNT], of_cells.profiles.metadata[CELL_COUNT])
    np.testing.assert_allclose(of_wells.profiles.features, of_cells.profiles.features, rtol=1e-5, atol=1e-6)
    text = "\n".join(profile_lines(of_wells.report))
    assert f"read      6 rows of {total} cells" in text
    assert f"wells     6 of {total} cells; cells per well:" in text


@pytest.mark.parametrize("name", ["Metadata_Cell_Count", "Metadata_NumCells", "Metadata_Object_Count", "Metadata_Count_Cells"])
def test_sites_are_summed_and_weighed_into_their_well(tmp_path, name):
    """A01: sites of 1 and 3 cells; the mean over the cells is (1·2 + 3·6) / 4 = 5; B01's missing value leaves its site out."""
    columns = {
        "Metadata_Plate": ["P"] * 4, "Metadata_Well": ["A01", "A01", "B01", "B01"], "Metadata_Site": [1, 2, 1, 2],
        "Metadata_Compound": ["x", "x", "y", "y"], name: [1, 3, 2, 5], "Cells_f": [2.0, 6.0, 1.0, np.nan],
        "Cells_g": [1.0, 1.0, 0.0, 7.0],
    }  # fmt: skip
    path = write(tmp_path, **columns)
    well = build(path, level="well", missing_cutoff=1.0)
    assert list(well.profiles.metadata[CELL_COUNT]) == [4, 7]
    np.testing.assert_allclose(well.profiles.features, [[5.0, 1.0], [1.0, 5.0]])
    assert well.report["rows"]["nan_values_left_out"] == 1
    np.testing.assert_allclose(build(path, level="well", cell_aggregate="median").profiles.features[0], [4.0, 1.0])
    complete = write(tmp_path, "c.csv", **{**columns, "Cells_f": [2.0, 6.0, 1.0, 8.0]})
    through_sites = build(complete, level="well", normalize_at="site")
    np.testing.assert_allclose(through_sites.profiles.features, [[5.0, 1.0], [6.0, 5.0]])
    assert list(through_sites.profiles.metadata[CELL_COUNT]) == [4, 7]
    at_cells = build(complete, level="well", normalize_at="cell")
    np.testing.assert_allclose(at_cells.profiles.features, through_sites.profiles.features)
    assert list(at_cells.profiles.metadata[CELL_COUNT]) == [4, 7]
    assert build(complete, level="treatment").profiles.metadata[CELL_COUNT].sum() == 11


def test_a_count_that_cells_repeat_is_not_added_up(tmp_path):
    """Five cells of two images, each row with the number of cells of its image."""
    place = {"Metadata_Plate": ["P"] * 5, "Metadata_Well": ["A01"] * 5, "Metadata_ImageNumber": [1, 1, 1, 2, 2]}
    path = write(tmp_path, **place, Metadata_Count_Cells=[3, 3, 3, 2, 2], Cells_f=np.arange(5.0))
    built = build(path, level="well")
    assert list(built.profiles.metadata[CELL_COUNT]) == [5]
    assert built.profiles.features[0, 0] == 2.0
    assert "repeat it" in built.report["rows"]["count_column"]
    assert any("repeat it" in line for line in profile_lines(built.report))
    numbered = pd.DataFrame({**place, "Metadata_ObjectNumber": range(5), "Metadata_Cell_Count": range(5)})
    assert take_counts(numbered)[1] is None
    assert "object numbers" in take_counts(numbered)[2]
    assert "'x' is not a whole number" in take_counts(pd.DataFrame({"Metadata_Cell_Count": ["3", "x"]}))[2]
    assert "'nan' is not a whole number" in take_counts(pd.DataFrame({"Metadata_Cell_Count": [3.0, np.nan]}))[2]


def test_wells_whose_cells_nobody_counted_get_no_count(tmp_path):
    path = write(tmp_path, Metadata_Plate=["P", "P"], Metadata_Well=["A01", "A02"], Cells_f=[1.0, 2.0])
    built = build(path, level="well")
    assert CELL_COUNT not in built.profiles.metadata
    assert "cells" not in built.report["rows"]
    assert any(line == "wells     2; one row per well" for line in profile_lines(built.report))
    assert not rows_are_cells(pd.DataFrame({"Metadata_Plate": ["P", "P"], "Metadata_Well": ["A01", "A02"]}))
    assert rows_are_cells(pd.DataFrame({"Metadata_Plate": ["P", "P"], "Metadata_Well": ["A01", "A01"]}))


def test_evaluation_adds_up_the_cells_under_the_older_name_too(tmp_path):
    path = write(
        tmp_path, Metadata_Compound=["a", "a", "b", "c"], Metadata_Concentration=[1.0, 1.0, 1.0, 1.0], Metadata_MoA=["X", "X", "X", "Y"],
        Metadata_NumCells=[10, 20, 30, 40], Cells_f=[1.0, 2.0, 3.0, 1.0], Cells_g=[0.0, 1.0, 1.0, 3.0],
    )  # fmt: skip
    evaluation = evaluate_profiles(read_annotated(path), EvaluationOptions(num_permutations=5))
    assert list(evaluation.profiles.metadata[CELL_COUNT]) == [30, 30, 40]
    assert evaluation.result["counts"]["cells"] == 100
    assert "100 cells" in evaluation_lines(evaluation.result)[0]
