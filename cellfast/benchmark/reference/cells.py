"""The same cells for both sides: 8-bit strips with an index, as the reference reads them, and a crop store made from these strips."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellfast.errors import CellfastError
from cellfast.metadata.batches import batches_of_plates
from cellfast.metadata.treatments import is_control

if TYPE_CHECKING:
    from cellfast.screens import Screen

# What the reference's evaluation wants of a cell; its index gives the first three only.
EVALUATION_COLUMNS = ("Metadata_Plate", "Metadata_Well", "compound", "concentration", "moa", "Replicate")
NUM_CHANNELS = 3


@dataclass(frozen=True)
class Cells:
    """One set of cells in both forms, in one order.

    Attributes:
        folder: where all of it is.
        strips: folder of the strips. index: CSV ``Image_Name, Class_Name, Target``. metadata: CSV of `EVALUATION_COLUMNS`.
        screen: crop store of the same pixels, uint8 [3, size, size].
        num_cells, size: how many, and their side in px.
        origin: where they come from, in words.
    """

    folder: Path
    strips: Path
    index: Path
    metadata: Path
    screen: Path
    num_cells: int
    size: int
    origin: str

    def job(self) -> dict[str, Any]:
        """What a job of `worker` must know about them."""
        return {
            "strips": str(self.strips), "index": str(self.index), "metadata_file": str(self.metadata), "screen": str(self.screen),
            "size": self.size,
        }  # fmt: skip


def simulated_screen(folder: Path, num_cells: int, size: int, seed: int = 0) -> Path:
    """A simulated screen of at least ``num_cells`` cells with crops of ``size`` px, made by cellfast's own commands."""
    images, screen = folder / "simulated", folder / "simulated-screen"
    # 26 wells in all; a field of 640 px holds 30 cells. Starting worker processes takes longer than a small screen does.
    per_field = 30 if num_cells > 600 else max(6, num_cells // 15)
    side, workers = ("640", []) if num_cells > 200 else ("320", ["--workers", "1"])
    sites = max(1, -(-num_cells // 700))
    commands = [
        ["simulate", str(images), "--preset", "small", "--sites", str(sites), "--cells-per-field", str(per_field),
         "--field-size", side, side, "--seed", str(seed), "--force", *workers],
        ["ingest", "fields", str(images / "image.csv"), "--image-root", str(images / "images"), "--locations",
         str(images / "locations"), "--moa", str(images / "moa.csv"), "--crop-size", str(size), "-o", str(screen), "--force", *workers],
    ]  # fmt: skip
    for command in commands:
        done = subprocess.run([sys.executable, "-m", "cellfast", *command], capture_output=True, text=True)
        if done.returncode != 0:
            raise CellfastError(
                f"making the simulated screen failed: cellfast {' '.join(command[:2])}: {done.stderr.strip()[-500:]}"
            )
    return screen


def prepare_cells(
    screen_path: Path, folder: Path, *, size: int, num_cells: int | None = None, exactly: bool = True, seed: int = 0
) -> Cells:
    """Write a screen's cells as 8-bit strips of ``size`` px and as a crop store of the same pixels.

    Each channel is scaled from the screen's own limits to 0–255; the central ``size`` px are taken, and smaller crops are enlarged
    bilinearly, as the reference does with strips of another size.

    Args:
        num_cells: so many cells, drawn by ``seed`` as `drawn_cells` does; None takes all it may. exactly: fewer are an error.

    Raises:
        CellfastError: fewer cells than asked for, not three channels (all the reference takes), or as `drawn_cells`.
    """
    from PIL import Image

    from cellfast.screens import Screen

    screen = Screen.open(screen_path)
    if len(screen.channel_names) != NUM_CHANNELS:
        raise CellfastError(
            f"{screen_path}: the reference takes crops of {NUM_CHANNELS} channels, found {len(screen.channel_names)} "
            f"({', '.join(screen.channel_names)})"
        )
    if num_cells is not None and exactly and screen.num_cells < num_cells:
        raise CellfastError(f"{screen_path}: {num_cells} cells were asked for, it has {screen.num_cells}: ask for fewer")
    metadata = screen.metadata()
    rows = drawn_cells(metadata, min(num_cells or screen.num_cells, screen.num_cells), seed, str(screen_path))
    metadata = metadata.iloc[rows].reset_index(drop=True)
    low, high = (np.asarray(v, np.float32)[:, None, None] for v in screen.channel_scaling())
    strips, index, evaluation = folder / "strips", folder / "index.csv", folder / "metadata.csv"
    strips.mkdir(parents=True, exist_ok=True)
    place = zip(metadata["Metadata_Plate"], metadata["Metadata_Well"], metadata["Metadata_Site"])
    names = [f"{plate}-{well}-s{max(site, 0)}_{number}.png" for number, (plate, well, site) in enumerate(place)]
    if any(name.count("-") != 2 for name in names):
        raise CellfastError(f"{screen_path}: a plate's name has a '-', which the reference's file names use as separator")
    for row, name in zip(rows, names):
        plate = int(np.searchsorted(screen.offsets, row, side="right")) - 1
        local = int(row - screen.offsets[plate])
        crop = screen.plates[plate].read(local, local + 1)[0].astype(np.float32)
        scaled = np.clip((crop - low) / np.maximum(high - low, 1), 0, 1) * 255
        Image.fromarray(np.concatenate([_sized(c, size) for c in scaled.round().astype(np.uint8)], axis=1)).save(strips / name)
    labels = [f"{c}_{d}" for c, d in zip(metadata["Metadata_Compound"], metadata["Metadata_Concentration"])]
    table = pd.DataFrame({"Image_Name": names, "Class_Name": labels, "Target": pd.factorize(pd.Series(labels))[0]})
    table.to_csv(index, index=False)
    # The store keeps plates and wells together: the index follows its order, and row i is one cell everywhere.
    order = store_of_strips(index, strips, folder / "screen").metadata()["Metadata_ObjectNumber"].to_numpy()
    if sorted(order) != list(range(len(rows))):
        raise CellfastError(f"{screen_path}: {len(rows)} strips became {len(order)} cells of the crop store; please report this")
    table.iloc[order].to_csv(index, index=False)
    columns = metadata[["Metadata_Plate", "Metadata_Well", "Metadata_Compound", "Metadata_Concentration", "Metadata_MoA"]]
    columns = columns.set_axis(EVALUATION_COLUMNS[:5], axis=1).assign(Replicate=1)
    columns.iloc[order].to_csv(evaluation, index=False)
    return Cells(folder, strips, index, evaluation, folder / "screen", len(rows), size, f"screen {Path(screen_path).name}")


def store_of_strips(index: Path, strips: Path, out: Path) -> Screen:
    """The crop store made of the strips in an index."""
    from cellfast.screens import Screen
    from cellfast.screens.crop_index import read_crop_index
    from cellfast.screens.ingest_crops import ingest_crops

    ingest_crops(read_crop_index(index, root=strips), out, force=True, show_progress=False)
    return Screen.open(out)


def drawn_cells(metadata: pd.DataFrame, num_cells: int, seed: int, where: str) -> np.ndarray:
    """Rows of at most ``num_cells`` cells drawn by ``seed``, in ascending order, among them a control of every batch and two at least.

    TVN is fitted on controls, batch by batch: batches without one are left out, and others where there is not room for all.

    Raises:
        CellfastError: the screen has fewer than two control wells.
    """
    order = np.random.default_rng(seed).permutation(len(metadata))
    batch = (
        metadata["Metadata_Plate"]
        .astype(str)
        .map(batches_of_plates([str(p) for p in metadata["Metadata_Plate"].unique()])[0])
        .to_numpy()[order]
    )
    well = (metadata["Metadata_Plate"].astype(str) + "\0" + metadata["Metadata_Well"].astype(str)).to_numpy()[order]
    control = np.flatnonzero(metadata["Metadata_Compound"].map(is_control).to_numpy(dtype=bool)[order])
    # The first control of each batch as drawn, and the first in another well than the very first.
    _, first = np.unique(batch[control], return_index=True)
    other = control[well[control] != well[control[0]]] if len(control) else control
    if len(other) == 0:
        raise CellfastError(
            f"{where}: {len(set(well[control]))} control wells (compound DMSO); the comparison normalises on controls and needs two"
        )
    room = max(1, num_cells // 4)
    needed = [*control[np.sort(first)[:room]], other[0]][: max(2, min(room, len(first)))]
    allowed = np.flatnonzero(np.isin(batch, batch[needed]))
    rest = allowed[~np.isin(allowed, needed)]
    return np.sort(order[[*needed, *rest[: max(0, num_cells - len(needed))]]])


def _sized(channel: np.ndarray, size: int) -> np.ndarray:
    side = channel.shape[0]
    if side < size:
        from PIL import Image

        return np.asarray(Image.fromarray(channel).resize((size, size), Image.Resampling.BILINEAR))
    start = side // 2 - size // 2
    return channel[start : start + size, start : start + size]


def simulated_features(num_cells: int, num_features: int, seed: int = 0) -> tuple[np.ndarray, pd.DataFrame]:
    """Features and metadata of cells in BBBC021's design: 10 weeks, 55 plates, 103 treatments of 38 compounds of 12 MoAs, DMSO.

    Every treatment is in three wells of its week, each plate has 6 DMSO wells. Features are noise about a mean per MoA and per week, the means
    so close that neither all nor no treatments are right: scores of 1 on both sides would agree whatever the neighbours were.
    """
    rng = np.random.default_rng(seed)
    wells = []
    plates_of_week = [[week * 6 + i for i in range(6 if week < 5 else 5)] for week in range(10)]
    for week, plates in enumerate(plates_of_week):
        names = {p: f"Week{week + 1}_{22000 + p}" for p in plates}
        for plate in plates:
            wells += [(names[plate], f"{row}11", "DMSO", 0.0, "DMSO", week) for row in "BCDEFG"]
        for treatment in range(week, 103, 10):
            compound = treatment % 38
            for number, plate in enumerate(plates[:3]):
                well = f"{'BCDEFG'[treatment // 10 % 6]}{2 + number + 3 * (treatment // 60):02d}"
                wells.append((names[plate], well, f"compound{compound}", float(treatment // 38 + 1), f"moa{compound % 12}", week))
    of_well = np.sort(rng.integers(0, len(wells), num_cells))
    frame = pd.DataFrame([wells[w] for w in of_well], columns=[*EVALUATION_COLUMNS[:5], "week"])
    frame = frame.sort_values(["week", "Metadata_Plate"], kind="stable").reset_index(drop=True)
    moa = pd.factorize(frame["moa"])[0]
    centres, weeks = rng.standard_normal((13, num_features)), rng.standard_normal((10, num_features))
    features = rng.standard_normal((num_cells, num_features)) + 0.06 * centres[moa] + 0.1 * weeks[frame["week"]]
    return features.astype(np.float32), frame.drop(columns="week").assign(Replicate=1)


def simulated_treatments(num_features: int, seed: int = 0) -> tuple[np.ndarray, pd.DataFrame]:
    """Profiles and metadata of the treatments of `simulated_features`: medians of 5,000 cells, without controls."""
    features, frame = simulated_features(5_000, num_features, seed)
    frame["batch"] = frame["Metadata_Plate"].str.partition("_")[0]
    key = ["compound", "concentration", "moa", "batch"]
    treated = (frame["compound"] != "DMSO").to_numpy()
    groups = frame[treated].groupby(key)
    profiles = pd.DataFrame(features[treated]).groupby(groups.ngroup().to_numpy()).median().to_numpy()
    return profiles, pd.DataFrame(list(groups.groups), columns=key)
