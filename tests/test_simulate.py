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
