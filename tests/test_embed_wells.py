"""The one mean per well, the ledgers it goes with, and the options of an embedding as they are declared."""

from __future__ import annotations

from dataclasses import asdict, fields

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from cellfast.embedding.options import EmbedOptions
from cellfast.embedding.wells import CELL_SCHEMA, WELL_SCHEMA, WellSums, as_stored, runs
from cellfast.errors import CellfastError
from cellfast.metadata.counts import CELL_COUNT
from cellfast.screens.ledger import PlateLedger


def cells(wells: list[str]) -> pa.Table:
    columns = [
        pa.array(
            wells if f.name == "Metadata_Well" else [""] * len(wells) if f.type == pa.string() else range(len(wells)), f.type
        )
        for f in CELL_SCHEMA
    ]
    return pa.table(columns, schema=CELL_SCHEMA)


def test_means_of_wells_are_the_same_from_cells_and_from_sums_of_blocks():
    rng = np.random.default_rng(0)
    wells = [["B02"] * 5 + ["A01"] * 3, ["A01"] * 4 + ["B02"] * 2 + ["C03"], []]
    values = [rng.normal(size=(len(w), 4)).astype(np.float32) for w in wells]
    of_cells, of_sums = WellSums(), WellSums()
    for names, features in zip(wells, values):
        of_cells.add(cells(names), features)
        block = WellSums()
        block.add(cells(names), features)
        of_sums.add(block.metadata(), block.sums())
    frame = pd.DataFrame(np.concatenate(values).astype(np.float64)).groupby([w for some in wells for w in some], sort=False)
    for sums in (of_cells, of_sums):
        table = sums.metadata()
        assert table.schema.equals(WELL_SCHEMA)
        assert table.column("Metadata_Well").to_pylist() == ["B02", "A01", "C03"]
        assert table.column(CELL_COUNT).to_pylist() == [7, 7, 1]
        assert table.column("Metadata_Concentration").to_pylist() == [0.0, 5.0, 6.0]  # of each well's first cell
        np.testing.assert_allclose(sums.means(), frame.mean().loc[["B02", "A01", "C03"]], rtol=1e-6)
    nothing = WellSums()
    assert (len(nothing.metadata()), nothing.means().shape) == (0, (0, 0))


def test_runs_of_rows_that_are_alike():
    assert runs(np.array([])) == []
    assert runs(np.array([1, 1, 2, 2, 2, 1])) == [(0, 2), (2, 5), (5, 6)]
    assert runs(np.array(["a", "a", "b"], object), np.array([1, 2, 2])) == [(0, 1), (1, 2), (2, 3)]


def test_features_that_do_not_fit_are_refused():
    assert as_stored(np.ones((1, 2), np.float32), "float16", "P1").dtype == np.float16
    with pytest.raises(CellfastError, match="plate P1: features up to 70000 do not fit float16"):
        as_stored(np.full((1, 2), 7e4, np.float32), "float16", "P1")


def test_ledgers_add_up_and_come_back_from_json():
    one = PlateLedger("P1", fields_listed=2, fields_written=1, cells_found=5, cells_written=4, warnings=["w"])
    one.refuse_field("file missing", "A01 site 1", "gone")
    one.drop_cells("at the border", 1)
    total = PlateLedger("P1")
    for _ in range(2):
        total.add(PlateLedger.from_json({**asdict(one), "of a later version": 1}))
    total.check()
    assert (total.fields_listed, total.cells_found, total.cells_dropped) == (4, 10, {"at the border": 2})
    assert (total.fields_refused, total.warnings, len(total.refusals)) == ({"file missing": 2}, ["w", "w"], 2)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected a whole number, at least 1, got 0"),
        ({"tta": 3}, "tta: expected one of 1, 4, 8, got 3"),
        ({"formats": ("parquet", "zarr")}, "formats: expected some of parquet, anndata, cpg, got"),
        ({"formats": ()}, "formats: expected some of parquet, anndata, cpg, got"),
        ({"aggregate": "plate"}, "aggregate: expected one of well, got 'plate'"),
        ({"amp": "yes"}, "amp: expected true or false, got 'yes'"),
    ],
)
def test_options_outside_their_limits_are_refused_by_name(value, message):
    with pytest.raises(CellfastError, match=message):
        EmbedOptions(**value)


def test_every_declared_value_is_an_option():
    from cellfast.cli.embed import embed

    options = {one.name: one for one in embed.params}
    assert {entry.name for entry in fields(EmbedOptions)} <= options.keys()
    assert "--to" in options["formats"].opts
    assert EmbedOptions(tta="4", formats=["cpg"]) == EmbedOptions(tta=4, formats=("cpg",))
