"""Embedding: fields and crop stores give the same rows; formats; what is refused."""

from __future__ import annotations

import json
import os

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from screens import CROP, VIEW, assert_same, draw_nuclei, embed, field_arguments, make_fields, make_model, run, tables

from cellfast.augment import center_crop
from cellfast.embedding.encoder import CropEncoder
from cellfast.errors import CellfastError
from cellfast.model_file import load_model
from cellfast.screens import Screen


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Fields, their crop store, and a model."""
    folder = tmp_path_factory.mktemp("embed")
    make_fields(folder)
    make_model(folder / "model.pt")
    make_model(folder / "plate.pt", scaling="plate", encoder="resnet18")
    for border in ("pad", "drop", "reflect"):
        result = run("ingest", "fields", *field_arguments(folder), "--crop-size", CROP, "--border", border, "-o", folder / border, "--workers", 1)  # fmt: skip
        assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize(
    ("border", "model"), [("pad", "model.pt"), ("reflect", "model.pt"), ("pad", "plate.pt"), ("drop", "plate.pt")]
)
def test_fields_give_the_rows_of_the_crop_store(work, tmp_path, border, model):
    embed(work / border, work, tmp_path / "store", "--batch-size", 64, model=model)
    embed("fields", work, tmp_path / "fields", "--border", border, "--batch-size", 5, "--workers", 3, model=model)
    store, fields = tables(tmp_path / "store"), tables(tmp_path / "fields")
    assert_same(store, fields)
    screen, loaded = Screen.open(work / border), load_model(work / model)
    for one in screen.plates:
        metadata = one.metadata()
        pd.testing.assert_frame_equal(
            fields[one.plate][list(metadata.columns)].astype(metadata.dtypes.to_dict()), metadata, check_dtype=False
        )
        low, high = (
            (loaded.low, loaded.high) if model == "model.pt" else (torch.tensor(one.scale_low), torch.tensor(one.scale_high))
        )
        x = center_crop(torch.from_numpy(np.array(one.crops())), low.float(), high.float(), VIEW)
        with torch.no_grad():
            expected = loaded.model.encode(x).numpy()
        np.testing.assert_allclose(fields[one.plate].filter(regex="^h").to_numpy(), expected, rtol=1e-3, atol=1e-4)


def test_rows_do_not_depend_on_field_order_minibatch_or_readers(work, tmp_path):
    embed("fields", work, tmp_path / "a", "--batch-size", 1, "--workers", 1)
    shuffled = pd.read_csv(work / "load_data.csv").sample(frac=1, random_state=3)
    shuffled.to_csv(work / "shuffled.csv", index=False)
    for out, more in (("b", ["--workers", 4]), ("c", ["--workers", 2, "--readers", "processes", "--batch-size", 17])):
        result = run("embed", *field_arguments(work, "shuffled.csv"), "--model", work / "model.pt", "-o", tmp_path / out, *more)
        assert result.exit_code == 0, f"{result.output} {result.exception!r}"
        assert_same(tables(tmp_path / "a"), tables(tmp_path / out))
    assert [*dict.fromkeys(tables(tmp_path / "a")["P1"]["Metadata_Well"])] == ["A02", "A10", "B03"]


def test_results_that_are_collected_later_are_the_same(work, tmp_path, monkeypatch):
    from cellfast.embedding.pipeline import Pipeline

    embed("fields", work, tmp_path / "now", "--batch-size", 6)
    real = Pipeline.run
    monkeypatch.setattr(Pipeline, "run", lambda self, blocks: (setattr(self, "defer", True), real(self, blocks)))
    embed("fields", work, tmp_path / "later", "--batch-size", 6)
    assert_same(tables(tmp_path / "now"), tables(tmp_path / "later"), rtol=0, atol=0)


def test_each_file_is_read_once(work, tmp_path, monkeypatch):
    from cellfast.screens import field_cells

    draw_nuclei(make_fields(tmp_path))
    seen = []
    real = field_cells.read_plane
    monkeypatch.setattr(field_cells, "read_plane", lambda path, **k: (seen.append(str(path)), real(path, **k))[1])
    arguments = [tmp_path / "load_data.csv", "--image-root", tmp_path / "images", "--locations", "detect"]
    result = run("embed", *arguments, "--model", work / "model.pt", "-o", tmp_path / "e", "--diameter", 8)
    assert result.exit_code == 0, result.output
    assert len(seen) == len(set(seen)) == 2 * 3 * 2 * 2


def test_the_sums_of_the_ledger_agree(work, tmp_path):
    embed("fields", work, tmp_path / "e", "--border", "drop")
    ledger = json.loads((tmp_path / "e" / "embeddings.json").read_text())
    ingest = json.loads((work / "drop" / "ledger.json").read_text())
    for plate, other in zip(ledger["plates"], ingest["plates"]):
        rows = pq.read_metadata(tmp_path / "e" / plate["file"]).num_rows
        assert plate["rows"] == plate["cells"] == rows == other["cells_written"]
        assert plate["locations"] == rows + sum(plate["dropped"].values()) == other["cells_found"]
        assert plate["dropped"] == other["cells_dropped"]
        assert plate["wells_without_cells"] == other["wells_without_cells"]
    assert ledger["totals"]["fields_listed"] == 12
    assert not (tmp_path / "e" / ".embed" / "blocks").exists()
    embed(work / "drop", work, tmp_path / "s")
    store = json.loads((tmp_path / "s" / "embeddings.json").read_text())
    assert store["totals"] == ledger["totals"]


def test_row_groups_hold_whole_wells(work, tmp_path, monkeypatch):
    monkeypatch.setattr("cellfast.embedding.plate_formats.ROWS_PER_GROUP", 10)
    embed("fields", work, tmp_path / "e")
    file = pq.ParquetFile(tmp_path / "e" / "P1.parquet")
    wells = [set(file.read_row_group(i).column("Metadata_Well").to_pylist()) for i in range(file.num_row_groups)]
    assert len(wells) > 1
    assert all(not (a & b) for i, a in enumerate(wells) for b in wells[i + 1 :])
    monkeypatch.setattr("cellfast.embedding.plate_formats.MOST_ROWS_PER_GROUP", 4)
    embed("fields", work, tmp_path / "f")
    assert_same(tables(tmp_path / "e"), tables(tmp_path / "f"))
    assert max(g for i in range(3) for g in [pq.ParquetFile(tmp_path / "f" / "P1.parquet").metadata.row_group(i).num_rows]) <= 4


def test_well_profiles_are_the_means_of_the_cells(work, tmp_path):
    embed("fields", work, tmp_path / "cells")
    embed("fields", work, tmp_path / "wells", "--aggregate", "well", "--batch-size", 3)
    for plate, cells in tables(tmp_path / "cells").items():
        wells = tables(tmp_path / "wells")[plate].set_index("Metadata_Well")
        grouped = cells.groupby("Metadata_Well")
        expected = grouped[[c for c in cells if c.startswith("h")]].mean()
        np.testing.assert_allclose(wells.loc[expected.index, expected.columns], expected, rtol=1e-4, atol=1e-5)
        assert wells["Metadata_Cell_Count"].to_dict() == grouped.size().to_dict()
        assert wells["Metadata_Compound"].to_dict() == grouped["Metadata_Compound"].first().to_dict()
    ledger = json.loads((tmp_path / "wells" / "embeddings.json").read_text())
    assert (ledger["rows"], ledger["cells"]) == (6, sum(len(t) for t in tables(tmp_path / "cells").values()))
    again = embed("fields", work, tmp_path / "wells", "--aggregate", "well")
    assert "6 wells" in again.output
    refused = embed("fields", work, tmp_path / "wells", exit_code=None)
    assert "aggregate was well, is none" in str(refused.exception)


def test_float16(work, tmp_path):
    embed("fields", work, tmp_path / "full")
    embed("fields", work, tmp_path / "half", "--dtype", "float16")
    half = tables(tmp_path / "half")["P1"].filter(regex="^h")
    assert (half.dtypes == np.float16).all()
    full = tables(tmp_path / "full")["P1"].filter(regex="^h")
    np.testing.assert_allclose(half.astype(np.float32), full, rtol=1e-3, atol=1e-4)


def test_rotations(work, tmp_path):
    loaded = load_model(work / "model.pt")
    crops = torch.randint(0, 60000, (3, 2, VIEW, VIEW), dtype=torch.int32).to(torch.uint16)
    one = CropEncoder(loaded, device=torch.device("cpu"))
    four = CropEncoder(loaded, device=torch.device("cpu"), tta=4)
    turned = [torch.from_numpy(np.ascontiguousarray(np.rot90(crops.numpy(), k, (2, 3)))) for k in range(4)]
    expected = torch.stack([one(c, loaded.low, loaded.high) for c in turned]).mean(0)
    found = four(crops, loaded.low, loaded.high)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(four(turned[1], loaded.low, loaded.high), found, rtol=1e-4, atol=1e-5)
    eight = CropEncoder(loaded, device=torch.device("cpu"), tta=8)
    mirrored = torch.from_numpy(np.ascontiguousarray(crops.numpy()[..., ::-1]))
    torch.testing.assert_close(
        eight(mirrored, loaded.low, loaded.high), eight(crops, loaded.low, loaded.high), rtol=1e-4, atol=1e-5
    )
    embed("fields", work, tmp_path / "e", "--tta", 4)
    plain = embed("fields", work, tmp_path / "e", exit_code=None)
    assert "tta was 4, is 1" in str(plain.exception)


def test_gallery_layout(work, tmp_path):
    embed("fields", work, tmp_path / "plain")
    embed("fields", work, tmp_path / "e", "--to", "cpg")
    (model,) = (tmp_path / "e" / "workspace_dl" / "embeddings").iterdir()
    digest = load_model(work / "model.pt").digest
    assert model.name == f"cellfast_cnn4_{digest[:7]}"
    for plate, expected in tables(tmp_path / "plain").items():
        folder = model / plate / plate
        sites = expected.groupby(["Metadata_Well", "Metadata_Site"], sort=False)
        assert {p.name for p in folder.iterdir()} == {f"{w}-{s}" for w, s in sites.groups}
        found = pd.concat(
            [pd.read_parquet(folder / f"{w}-{s}" / "embedding.parquet") for w, s in sites.groups], ignore_index=True
        )
        pd.testing.assert_frame_equal(found, expected, rtol=1e-4, atol=1e-5)
        profile = pd.read_parquet(tmp_path / "e" / "workspace_dl" / "profiles" / model.name / plate / plate / f"{plate}.parquet")
        names = [c for c in expected if c.startswith("h")]
        means = expected.groupby("Metadata_Well", sort=False)[names].mean()
        np.testing.assert_allclose(profile[names], means, rtol=1e-4, atol=1e-5)
    collated = pd.read_parquet(tmp_path / "e" / "workspace_dl" / "collated" / model.name / "collated.parquet")
    assert len(collated) == 6
    before = {p: p.stat().st_mtime_ns for p in model.rglob("*.parquet")}
    embed("fields", work, tmp_path / "e", "--to", "cpg")
    assert {p: p.stat().st_mtime_ns for p in model.rglob("*.parquet")} == before


def test_anndata(work, tmp_path):
    anndata = pytest.importorskip("anndata", reason="needs cellfast[anndata]")
    embed("fields", work, tmp_path / "e", "--to", "anndata", "--to", "parquet")
    for plate, expected in tables(tmp_path / "e").items():
        read = anndata.read_h5ad(tmp_path / "e" / f"{plate}.h5ad")
        np.testing.assert_array_equal(read.X, expected.filter(regex="^h").to_numpy())
        assert read.obs["Metadata_Well"].astype(str).tolist() == expected["Metadata_Well"].tolist()
        assert list(read.var_names[:2]) == ["h000", "h001"]
        assert json.loads(read.uns["cellfast"]["origin"])["features"] == "h"
    embed("fields", work, tmp_path / "e", "--to", "anndata")


def test_anndata_that_is_not_installed_is_told(work, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "anndata", None)
    result = embed("fields", work, tmp_path / "e", "--to", "anndata", exit_code=None)
    assert isinstance(result.exception, CellfastError)
    assert "cellfast[anndata]" in str(result.exception)


def test_what_does_not_fit_is_refused_with_both_sides(work, tmp_path):
    make_model(tmp_path / "three.pt", channels=("DNA", "Actin", "Tubulin"))
    result = run("embed", *field_arguments(work), "--model", tmp_path / "three.pt", "-o", tmp_path / "e")
    assert "the model has DNA, Actin, Tubulin, the screen has DNA, Actin" in str(result.exception)
    make_model(tmp_path / "eight.pt", bits=8)
    result = run("embed", *field_arguments(work), "--model", tmp_path / "eight.pt", "-o", tmp_path / "e")
    assert "the model has 8-bit, the screen has 16-bit" in str(result.exception)
    assert run("embed", work / "pad", "--model", work / "model.pt", "-o", tmp_path / "e", "--locations", "detect").exit_code == 2
    assert run("embed", work / "load_data.csv", "--model", work / "model.pt", "-o", tmp_path / "e").exit_code == 2
    assert run("embed", "--model", work / "model.pt", "-o", tmp_path / "e").exit_code == 2
    result = run("embed", *field_arguments(work), "--model", work / "model.pt", "-o", tmp_path / "e", "--crop-size", 99)
    assert "trained on crops of 24 px" in str(result.exception)
    assert not (tmp_path / "e").exists()
    channels = run("embed", *field_arguments(work), "--model", work / "model.pt", "-o", tmp_path / "e", "--channels", "Actin,DNA")
    assert "the model has DNA, Actin, the screen has Actin, DNA" in str(channels.exception)


@pytest.mark.parametrize(("count", "dtype"), [(1, np.uint8), (6, np.uint16)])
def test_odd_channel_counts_and_sizes(tmp_path, count, dtype):
    channels = tuple(f"c{i}" for i in range(count))
    make_fields(tmp_path, plates=("p",), wells=("A01",), sites=3, channels=channels, dtype=dtype)
    # crops larger than the field, an odd view
    make_model(tmp_path / "model.pt", channels=channels, crop=97, view=33, bits=8 * np.dtype(dtype).itemsize)
    assert run("ingest", "fields", *field_arguments(tmp_path), "--crop-size", 97, "-o", tmp_path / "s").exit_code == 0
    embed("fields", tmp_path, tmp_path / "f")
    embed(tmp_path / "s", tmp_path, tmp_path / "e")
    assert_same(tables(tmp_path / "f"), tables(tmp_path / "e"))


@pytest.mark.data
def test_real_crops_and_plate(real_data, tmp_path):
    crops = real_data / "bbbc021" / "crops"
    assert run("ingest", "crops", crops / "index.csv", "-o", tmp_path / "s").exit_code == 0
    screen = Screen.open(tmp_path / "s")
    make_model(tmp_path / "model.pt", channels=tuple(screen.channel_names), crop=screen.crop_size, view=56)
    embed(tmp_path / "s", tmp_path, tmp_path / "e")
    found = tables(tmp_path / "e")
    assert len(found) == 55
    assert sum(map(len, found.values())) == 1000
    assert all(np.isfinite(t.filter(regex="^h").to_numpy()).all() for t in found.values())
    assert os.path.getsize(tmp_path / "e" / "embeddings.json") > 0
