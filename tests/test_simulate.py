"""Simulated screens: BBBC021's layout, the same bytes for the same seed, nuclei where the tables say."""

from __future__ import annotations

import gzip
import hashlib

import numpy as np
import pandas as pd
import pytest
import tifffile
from click.testing import CliRunner

from cellfast.cli import cellfast

SMALL = [
    "--preset",
    "demo",
    "--plates",
    "4",
    "--weeks",
    "2",
    "--moas",
    "2",
    "--compounds-per-moa",
    "2",
    "--doses",
    "1",
    "--sites",
    "1",
    "--controls",
    "2",
]


def simulate(out, *more):
    return CliRunner().invoke(cellfast, ["simulate", str(out), *SMALL, "--workers", "1", *map(str, more)])


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    out = tmp_path_factory.mktemp("simulated") / "screen"
    result = simulate(out, "--seed", 3)
    assert result.exit_code == 0, result.output + str(result.exception)
    return out


def content(folder):
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_cells(screen, tmp_path):
    assert simulate(tmp_path / "again", "--seed", 3).exit_code == 0
    assert content(tmp_path / "again") == content(screen)
    assert simulate(tmp_path / "other", "--seed", 4).exit_code == 0
    assert content(tmp_path / "other") != content(screen)


def test_images_and_tables_fit_together(screen):
    table = pd.read_csv(screen / "image.csv")
    assert table["Image_Metadata_Plate_DAPI"].str.match(r"^Week\d+_\d{5}$").all()
    assert table["Image_Metadata_Compound"].eq("DMSO").any()
    inside, background = [], []
    for row in table.head(6).to_dict("records"):
        plate, well = row["Image_Metadata_Plate_DAPI"], row["Image_Metadata_Well_DAPI"]
        planes = [
            tifffile.imread(screen / "images" / row[f"Image_PathName_{c}"] / row[f"Image_FileName_{c}"])
            for c in ("DAPI", "Tubulin", "Actin")
        ]
        for plane in planes:
            assert plane.dtype == np.uint16
            assert plane.ndim == 2
            assert not (plane % 16).any()
        (path,) = (screen / "locations" / plate).glob(f"{well}-1-Nuclei.csv")
        centers = pd.read_csv(path)
        y, x = centers["Nuclei_Location_Center_Y"].round().astype(int), centers["Nuclei_Location_Center_X"].round().astype(int)
        ok = (y >= 0) & (x >= 0) & (y < planes[0].shape[0]) & (x < planes[0].shape[1])
        inside += planes[0][y[ok], x[ok]].tolist()
        background.append(np.percentile(planes[0], 20))
    assert np.median(inside) > 3 * np.median(background)


def test_every_listed_centre_lies_in_its_field(tmp_path):
    # Small fields: many nuclei lie across an edge.
    assert simulate(tmp_path / "s", "--field-size", 64, 64, "--sites", 4, "--cells-per-field", 5).exit_code == 0
    centers = pd.concat([pd.read_csv(file) for file in (tmp_path / "s" / "locations").rglob("*.csv")])
    assert len(centers) > 100
    for axis in "XY":
        assert centers[f"Nuclei_Location_Center_{axis}"].between(0, 63).all()
        assert centers[f"Nuclei_Location_Center_{axis}"].min() < 2
        assert centers[f"Nuclei_Location_Center_{axis}"].max() > 61
    assert len(pd.read_csv(tmp_path / "s" / "cells.csv")) == len(centers)


def test_the_ingest_takes_it_as_it_is(screen, tmp_path):
    result = CliRunner().invoke(
        cellfast,
        [
            *(
                "ingest",
                "fields",
                str(screen / "image.csv"),
                "--image-root",
                str(screen / "images"),
                "--locations",
                str(screen / "locations"),
            ),
            *("--moa", str(screen / "moa.csv"), "--crop-size", "56", "--workers", "1", "-o", str(tmp_path / "s")),
        ],
    )
    assert result.exit_code == 0, result.output + str(result.exception)
    assert "Treatments without" not in result.output
    assert "dropped" not in result.output


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    result = simulate(tmp_path)
    assert result.exit_code != 0
    assert (tmp_path / "precious.txt").read_text() == "x"
    simulate(tmp_path, "--force")
    assert (tmp_path / "precious.txt").read_text() == "x"


@pytest.mark.data
def test_columns_are_the_official_ones(screen, real_data):
    with gzip.open(real_data / "bbbc021" / "BBBC021_v1_image.csv.gz", "rt") as handle:
        official = handle.readline().strip().split(",")
    assert (screen / "image.csv").read_text().splitlines()[0].split(",") == official
    moa = (real_data / "bbbc021" / "BBBC021_v1_moa.csv").read_text().splitlines()[0].replace('"', "")
    assert (screen / "moa.csv").read_text().splitlines()[0].replace('"', "") == moa


@pytest.mark.parametrize("preset", ["demo", "bbbc021"])
def test_a_part_of_the_pairs_of_a_moa_share_a_week_and_no_moa_is_in_one(preset):
    from itertools import combinations

    from cellfast.screens.simulate import PRESETS, design_screen

    treatments = {
        (t.compound, t.concentration_um): t
        for plate in design_screen(PRESETS[preset])
        for t in plate.wells.values()
        if t.moa != "DMSO"
    }
    pairs = [(a, b) for a, b in combinations(treatments.values(), 2) if a.moa == b.moa and a.compound != b.compound]
    share = np.mean([a.week == b.week for a, b in pairs])
    assert 0.2 < share < 0.4  # BBBC021: 156 of 598
    for moa in PRESETS[preset].moas:
        assert len({t.week for t in treatments.values() if t.moa == moa}) > 1


def test_a_wells_place_changes_it_and_nothing_else_does_without_place_effects():
    from cellfast.screens.simulate.design import SimulationConfig, well_position
    from cellfast.screens.simulate.fields import at_place
    from cellfast.screens.simulate.tables import place_effects, plate_optics

    found = {}
    for strength in (0.0, 1.0):
        config = SimulationConfig(position=strength)
        optics, effects = plate_optics(config, 0, 0), place_effects(config, 0)
        found[strength] = {w: at_place(optics, effects, well_position(w)) for w in ("B02", "D06", "E06", "D07")}
        found[strength]["plate"] = optics
    for name in ("shift", "gain", "density"):
        plain = getattr(found[0.0]["plate"], name)
        assert all(np.array_equal(getattr(its, name), plain) for its in found[0.0].values())
        value = {well: np.ravel(getattr(its, name)) for well, its in found[1.0].items()}
        edge, inner = np.abs(value["B02"] - value["plate"]).mean(), np.abs(value["D06"] - value["plate"]).mean()
        assert edge > 1.5 * inner > 0
