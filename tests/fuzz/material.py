"""A screen of a few cells with everything that is made from it: fields, tables, stores, models, embeddings, profiles."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .runs import command

CHANNELS = ("DNA", "Actin")
WELLS = ("A01", "A02", "A03", "B01", "B02", "C01", "C02")
SIZE, CROP = 48, 24
TRAIN = (
    "--encoder cnn4 --batch-size 8 --output-size 16 --projection-dim 8 --validation none --checkpoint-every 1 --log-every 1 "
    "--no-amp --threads 1 --epochs"
).split()
# Every cell of a table is written out: a treatment of two wells, three wells of controls, two plates of two weeks.
COMPOUNDS = dict(zip(WELLS, ("DMSO", "DMSO", "DMSO", "c1", "c1", "c2", "c2")))


def draw_fields(folder: Path, plates: Sequence[str], sites: int, seed: int = 0) -> None:
    """Fields as TIFF and PNG, label masks, centroids, illumination functions, ready-made crops, and the tables that list them."""
    import pandas as pd
    import tifffile
    from PIL import Image

    rng = np.random.default_rng(seed)
    rows, places, crops = [], [], []
    for name in ("images", "pngs", "masks", "locations", "illumination", "crops", "deepprofiler"):
        (folder / name).mkdir(parents=True)
    for channel in CHANNELS:
        np.save(folder / "illumination" / f"{channel}.npy", rng.uniform(0.8, 1.2, (SIZE, SIZE)).astype(np.float32))
    for plate in plates:
        for name in ("images", "pngs", "masks", "locations"):
            (folder / name / plate).mkdir()
        for number, well in enumerate(WELLS):
            for site in range(1, sites + 1):
                image = len(rows) + 1
                row = {"ImageNumber": image, "Metadata_Plate": plate, "Metadata_Well": well, "Metadata_Site": site}
                row |= {"Metadata_Compound": COMPOUNDS[well], "Metadata_Concentration": 0.5 * (number > 2)}
                centers = rng.uniform(6, SIZE - 6, (6, 2))
                labels = np.zeros((SIZE, SIZE), np.uint16)
                for cell, (y, x) in enumerate(centers, 1):
                    labels[int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2] = cell
                for channel in CHANNELS:
                    pixels = rng.integers(0, 30_000 + 4_000 * number, (SIZE, SIZE)).astype(np.uint16)
                    file = f"{well}_s{site}_{channel}"
                    deflated = {"compression": "deflate", "predictor": True} if channel == "Actin" else {}
                    tifffile.imwrite(folder / "images" / plate / f"{file}.tif", pixels, rowsperstrip=16, **deflated)
                    Image.fromarray(pixels).save(folder / "pngs" / plate / f"{file}.png")
                    row |= {f"FileName_{channel}": f"{file}.tif", f"PathName_{channel}": plate}
                tifffile.imwrite(folder / "masks" / plate / f"{well}_s{site}_DNA_cp_masks.tif", labels)
                rows.append(row)
                table = pd.DataFrame(
                    {"ObjectNumber": range(1, 7), "Location_Center_X": centers[:, 1], "Location_Center_Y": centers[:, 0]}
                )
                table.to_csv(folder / "locations" / plate / f"{well}-{site}-Nuclei.csv", index=False)
                places.append(table.assign(ImageNumber=image))
                crop = rng.integers(0, 60_000, (CROP, CROP, 2)).astype(np.uint16)
                np.save(folder / "crops" / f"{plate}_{well}_{site}.npy", crop)
                crops.append((f"{plate}_{well}_{site}.npy", plate, well, site, 1, COMPOUNDS[well], 0.5, ""))
                (folder / "deepprofiler" / plate / well).mkdir(parents=True, exist_ok=True)
                features = rng.standard_normal((6, 8)).astype(np.float32)
                np.savez(folder / "deepprofiler" / plate / well / f"{site}.npz", features=features, locations=centers)
    table = pd.DataFrame(rows)
    table.to_csv(folder / "all.csv", index=False)
    few = table[(table["Metadata_Plate"] == plates[0]) & (table["Metadata_Site"] == 1)].iloc[[0, 1, 3]]
    few.to_csv(folder / "few.csv", index=False)
    few.to_csv(folder / "few.csv.gz", index=False)
    few.to_parquet(folder / "few.parquet")
    few.replace(r"\.tif$", ".png", regex=True).to_csv(folder / "few_png.csv", index=False)
    pd.concat(places).to_csv(folder / "locations.csv", index=False)
    (folder / "moa.csv").write_text("compound,concentration,moa\nc1,0.5,Actin disruptors\nc2,0.5,Aurora kinase inhibitors\n")
    names = ["file", "plate", "well", "site", "cell", "compound", "concentration", "moa"]
    pd.DataFrame(crops, columns=names).to_csv(folder / "crops" / "index.csv", index=False)
    wide = pd.DataFrame(rng.standard_normal((len(rows), 6)), columns=[f"f{i}" for i in range(6)])
    wells = table[[c for c in table.columns if c.startswith("Metadata_")]].assign(Metadata_MoA="")
    pd.concat([wells, wide], axis=1).to_parquet(folder / "features.parquet")
    pd.concat([wells, wide], axis=1).to_csv(folder / "features.csv.gz", index=False)


def fields_of(folder: Path, table: str = "all.csv", root: str = "images", locations: str = "locations") -> list[str]:
    """The arguments that name fields."""
    return [str(folder / table), "--image-root", str(folder / root), "--locations", str(folder / locations)]


def make(folder: Path, plates: Sequence[str] = ("Week1_P1", "Week2_P2"), sites: int = 2) -> None:
    """Fill ``folder``: `draw_fields`, and what the commands make of it (in this process)."""

    def run(*arguments: object) -> None:
        ended = command([str(a) for a in arguments])
        assert ended.status == 0, ended.output

    draw_fields(folder, plates, sites)
    store, model = folder / "store", folder / "run" / "model.pt"
    cut = ["--crop-size", CROP, "--workers", 1]
    run("ingest", "fields", *fields_of(folder), *cut, "--moa", folder / "moa.csv", "-o", store)
    run("ingest", "fields", *fields_of(folder, "few.csv"), *cut, "-o", folder / "few", "--keep-fields", folder / "FIELDS.h5")
    run("train", folder / "few", "-o", folder / "run", *TRAIN, 3)
    run("embed", store, "--model", model, "-o", folder / "embeddings", "--threads", 1)
    run("profile", folder / "embeddings", "-o", folder / "profiles.parquet")
    run("evaluate", folder / "profiles.parquet", "-o", folder / "result.json", "--no-pictures", "--permutations", 20)  # fmt: skip
    run("export", model, "-o", folder / "model.pt2", "--check-cells", 2)
    content = (folder / "few.csv.gz").read_bytes()
    (folder / "few.csv.gz").write_bytes(gzip.compress(gzip.decompress(content), mtime=0))


def table_digest(path: Path) -> str:
    """Of a parquet file's columns and values, bit for bit."""
    import pyarrow.parquet as pq

    table, content = pq.read_table(path), hashlib.sha256()
    for name in table.column_names:
        column = table.column(name)
        try:
            raw = column.to_numpy().tobytes() if str(column.type) in ("float", "double", "halffloat", "int64") else None
        except ValueError:
            raw = None
        content.update(f"{name}|{column.type}|".encode() + (raw or repr(column.to_pylist()).encode()))
    return content.hexdigest()[:16]


def embeddings_digest(folder: Path) -> str:
    """Of every plate's rows."""
    return " ".join(f"{p.stem}={table_digest(p)}" for p in sorted(folder.glob("*.parquet")) if not p.name.startswith("."))


def store_digest(folder: Path) -> str:
    """Of every plate's cells, pixels and scaling."""
    from cellfast.screens import Screen

    content = hashlib.sha256()
    for store in Screen.open(folder).plates:
        content.update(store.metadata().to_csv().encode() + np.ascontiguousarray(store.crops()).tobytes())
        content.update(repr((store.plate, store.batch, store.channel_names, store.scale_low, store.scale_high)).encode())
    return content.hexdigest()[:16]


def model_digest(run: Path) -> str:
    """Of a model's weights and metadata."""
    from cellfast.model_file import load_model

    return load_model(run).digest[:16]
