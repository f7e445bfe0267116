"""The crop store: what is written is read back, and a file that is not right is refused by name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from screens import write_plate

from cellfast.errors import CellfastError
from cellfast.screens import PlateStore, PlateWriter, Screen, crop_store, sealed, unfinished
from cellfast.screens.crop_writer import plate_file_name, scale_from_histogram
from cellfast.screens.ledger import Ledger, PlateLedger
from cellfast.screens.schema import METADATA_COLUMNS
from cellfast.screens.summary import format_summary, summarize, write_montage

SIZE = 16


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("capacity", [8, 100])
def test_what_is_written_is_read_back(tmp_path, dtype, capacity):
    path, pixels = write_plate(tmp_path, dtype=dtype, capacity=capacity)
    store = PlateStore(path)
    crops = store.crops()
    assert isinstance(crops, np.memmap)
    assert not crops.flags.writeable
    assert crops.dtype == dtype
    np.testing.assert_array_equal(crops, pixels)
    assert crops.offset % 4096 == 0
    store.verify()
    meta = store.metadata()
    assert list(meta.columns) == list(METADATA_COLUMNS)
    assert meta["Metadata_Well"].tolist() == ["B02"] * 5 + ["C03"] * 3
    assert meta["Metadata_ImageNumber"].tolist() == [11] * 5 + [12] * 3
    assert meta["Metadata_ObjectNumber"].tolist() == [1, 2, 3, 4, 5, 1, 2, 3]
    assert meta["Metadata_Center_X"].iloc[1] == 101.25
    assert meta["Metadata_Concentration"].tolist() == [0.0] * 5 + [0.3] * 3
    assert set(meta["Metadata_Batch"]) == {"Week1"}
    assert store.pixel_size_um == 0.65
    assert list(path.parent.iterdir()) == [path]


def test_the_layout_is_what_the_schema_says(tmp_path):
    path, pixels = write_plate(tmp_path)
    with h5py.File(path) as handle:
        crops = handle["crops"]
        assert crops.chunks is None
        assert crops.id.get_offset() % 4096 == 0
        np.testing.assert_array_equal(crops[...], pixels)
        assert handle.attrs["format"] == "cellfast-crop-store"
        assert handle.attrs["schema_version"] == 1
        assert handle["fields/source_files"].asstr()[...].tolist() == [["DNA.tif", "Actin.tif"]] * 2


def test_rows_of_a_screen_run_through_its_plates_in_order_of_name(tmp_path):
    _, second = write_plate(tmp_path, "Week2_ÄÖ", seed=2)
    _, first = write_plate(tmp_path, "Week1_1", seed=1)
    screen = Screen.open(tmp_path)
    assert [p.plate for p in screen.plates] == ["Week1_1", "Week2_ÄÖ"]
    assert screen.offsets.tolist() == [0, 8, 16]
    both = np.concatenate([p.crops() for p in screen.plates])
    np.testing.assert_array_equal(both, np.concatenate([first, second]))
    assert screen.metadata()["Metadata_Plate"].tolist() == ["Week1_1"] * 8 + ["Week2_ÄÖ"] * 8


def test_scaling_is_the_percentiles_of_the_pixels():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 3000, (2, 9_973))
    histogram = np.stack([np.bincount(row, minlength=65536) for row in pixels])
    low, high = scale_from_histogram(histogram)
    np.testing.assert_array_equal(low, np.percentile(pixels, 0.1, axis=1, method="inverted_cdf"))
    np.testing.assert_array_equal(high, np.percentile(pixels, 99.9, axis=1, method="inverted_cdf"))
    constant = np.zeros((1, 65536), np.int64)
    constant[0, 7] = 5
    assert [float(v[0]) for v in scale_from_histogram(constant)] == [7.0, 8.0]


def test_a_plate_without_cells_is_a_plate(tmp_path):
    write_plate(tmp_path, fields=(("B02", 1, 0),))
    screen = Screen.open(tmp_path)
    assert screen.num_cells == 0
    assert screen.plates[0].crops().shape == (0, 2, SIZE, SIZE)
    assert len(screen.metadata()) == 0
    with pytest.raises(CellfastError, match="no cells to show"):
        write_montage(screen, tmp_path / "m.png")


def test_a_failed_write_leaves_nothing(tmp_path):
    path = tmp_path / "plates" / "P.h5"
    with (
        pytest.raises(RuntimeError, match="disk"),
        PlateWriter(path, plate="P", batch="P", channel_names=["a"], crop_size=8, dtype=np.uint8, capacity=4, border="pad"),
    ):
        raise RuntimeError("disk full")
    assert list(path.parent.iterdir()) == []


def test_two_treatments_in_one_well_are_refused(tmp_path):
    one = {"object_number": [1], "center_y": [0], "center_x": [0], "padded": [False]}
    crop = np.zeros((1, 1, 8, 8), np.uint8)
    path = tmp_path / "P.h5"
    with PlateWriter(
        path, plate="P", batch="P", channel_names=["a"], crop_size=8, dtype=np.uint8, capacity=4, border="pad"
    ) as writer:
        writer.append_field(crop, well="A01", site=1, compound="x", concentration=1.0, **one)
        with pytest.raises(CellfastError, match="two treatments in one well"):
            writer.append_field(crop, well="A01", site=2, compound="y", concentration=1.0, **one)
    assert PlateStore(path).num_cells == 1


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "x" * 300])
def test_plate_names_that_cannot_be_files_are_refused(name):
    with pytest.raises(CellfastError, match="plate name"):
        plate_file_name(name)


def damage_truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def damage_garbage(path):
    path.write_bytes(b"not hdf5 at all")


def damage_newer(path):
    with h5py.File(path, "r+") as handle:
        handle.attrs["schema_version"] = 2


def damage_unfinished(path):
    with h5py.File(path, "r+") as handle:
        del handle.attrs["format"]


def damage_foreign(path):
    with h5py.File(path, "w") as handle:
        handle["x"] = 1


def damage_external_link(path):
    with h5py.File(path, "r+") as handle:
        del handle["wells/name"]
        handle["wells/name"] = h5py.ExternalLink("/etc/passwd", "/x")


def damage_soft_link(path):
    with h5py.File(path, "r+") as handle:
        handle["more"] = h5py.SoftLink("/crops")


def damage_external_storage(path):
    with h5py.File(path, "r+") as handle:
        del handle["cells/padded"]
        handle["cells"].create_dataset("padded", shape=(8,), dtype=bool, external=[("/etc/passwd", 0, 8)])


def damage_short_table(path):
    with h5py.File(path, "r+") as handle:
        del handle["cells/object_number"]
        handle["cells/object_number"] = np.arange(3)


def damage_index(path):
    with h5py.File(path, "r+") as handle:
        handle["cells/field"][0] = 99


def remove_seal(path):
    """The store as earlier versions wrote it."""
    path.write_bytes(path.read_bytes()[sealed.USER_BLOCK :])
    with h5py.File(path, "r") as handle:
        assert handle.userblock_size == 0


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_truncate, "damaged|truncated"),
        (damage_garbage, "cannot be read as HDF5: .* begins with b'not hdf5'"),
        (damage_newer, "schema 2.*update cellfast"),
        (damage_unfinished, "never finished"),
        (damage_foreign, "expected format"),
        (damage_external_link, "ExternalLink"),
        (damage_soft_link, "SoftLink"),
        (damage_external_storage, "other files"),
        (damage_short_table, "3 values of cells/object_number"),
        (damage_index, "cells/field must lie in 0..1"),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_a_damaged_store_is_refused_by_name(tmp_path, damage, says, old, monkeypatch):
    monkeypatch.setattr(sealed, "try_unsealed", lambda paths, opener: None)
    path, _ = write_plate(tmp_path)
    if old:
        remove_seal(path)
    damage(path)
    if not old and damage not in (damage_truncate, damage_garbage, damage_foreign):
        with pytest.raises(CellfastError, match=r"damaged: its tables or structure|truncated or added to"):
            Screen.open(tmp_path)
        sealed.seal(path, "crops")
    with pytest.raises(CellfastError, match=says) as caught:
        Screen.open(tmp_path)
    assert path.name in str(caught.value)


def flip(path, place, bit=1):
    with open(path, "r+b") as handle:
        handle.seek(place)
        byte = handle.read(1)[0]
        handle.seek(place)
        handle.write(bytes([byte ^ bit]))


def test_every_damaged_byte_outside_the_pixels_is_an_error(tmp_path):
    path, _ = write_plate(tmp_path)
    store = PlateStore(path)
    end = store.offset + 8 * 2 * SIZE * SIZE * 2
    size = path.stat().st_size
    places = [
        *range(0, 300, 7),
        sealed.USER_BLOCK - 1,
        *range(sealed.USER_BLOCK, store.offset, 97),
        *range(end, size, 97),
        size - 1,
    ]
    for place in places:
        flip(path, place)
        with pytest.raises(CellfastError, match=r"Week1_22123\.h5.* damaged"):
            PlateStore(path)
        flip(path, place)
    PlateStore(path)
    with open(path, "ab") as handle:
        handle.write(b"x")
    with pytest.raises(CellfastError, match="truncated or added to"):
        PlateStore(path)


def test_a_store_without_a_seal_is_read_as_before(tmp_path):
    path, pixels = write_plate(tmp_path)
    remove_seal(path)
    sealed._tried.clear()
    screen = Screen.open(tmp_path)
    np.testing.assert_array_equal(screen.plates[0].read(0, 8), pixels)
    assert len(sealed._tried) == 1


class Hanging:
    def __init__(self, path):
        time.sleep(60)


class Crashing:
    def __init__(self, path):
        os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize(("opener", "says"), [(Hanging, "did not open it in 3 s"), (Crashing, "ended the process .*signal 11")])
def test_a_file_that_hangs_or_crashes_hdf5_is_an_error(tmp_path, monkeypatch, opener, says):
    path, _ = write_plate(tmp_path)
    remove_seal(path)
    monkeypatch.setattr(sealed, "OPENING_S", 3 if opener is Hanging else 60)
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__), prepend=os.pathsep)
    with pytest.raises(CellfastError, match=says):
        sealed.open_hdf5(path, opener)


def test_claims_larger_than_the_file_are_refused_before_anything_is_allocated(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as handle:
        handle.create_dataset("huge", shape=(1 << 40,), dtype=np.int64, chunks=(1 << 10,))
        handle.create_dataset("packed", data=np.zeros(1 << 20), chunks=(1 << 18,), compression="gzip")
        with pytest.raises(CellfastError, match=r"a\.h5: damaged: /huge claims shape"):
            sealed.check_sizes(handle["huge"], path)
        sealed.check_sizes(handle["packed"], path)


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("too deep")])
def test_what_a_damaged_file_makes_of_memory_is_an_error(tmp_path, monkeypatch, error):
    path, _ = write_plate(tmp_path)

    def failing(*_):
        raise error

    monkeypatch.setattr(crop_store, "datasets_of", failing)
    with pytest.raises(CellfastError, match=r"22123\.h5: damaged or not a crop store"):
        PlateStore(path)


def test_pixels_are_compared_with_their_checksums_where_they_are_read(tmp_path):
    path, pixels = write_plate(tmp_path)
    store = PlateStore(path)
    np.testing.assert_array_equal(store.read(2, 5), pixels[2:5])
    flip(path, store.offset + 6 * 2 * SIZE * SIZE * 2 + 9)
    store.read(0, 6)
    found = r"Week1_22123: the pixels of 1 of 8 cells are damaged: row 6 \(well C03, site 2, object 2\)"
    with pytest.raises(CellfastError, match=found):
        store.read(4, 8)
    with pytest.raises(CellfastError, match=found):
        PlateStore(path).verify()


def test_a_store_cut_short_while_it_is_read_is_an_error_not_a_signal(tmp_path):
    """In a process of its own: of a mapped file the system says it by SIGBUS."""
    write_plate(tmp_path, fields=(("B02", 1, 40),))
    code = f"""
import os
from cellfast.data import Loader
from cellfast.screens import Screen
screen = Screen.open({str(tmp_path)!r})
store = screen.plates[0]
batches = iter(Loader(screen, 4, prefetch=1, shuffle=False, warm=False))
next(batches)
os.truncate(store.path, store.offset + 100)
for work in (lambda: list(batches), lambda: store.read(30, 40), store.verify):
    try:
        work()
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Week1_22123.h5: the file was cut short after it was opened") == 3


def test_an_unfinished_ingest_is_refused_with_what_finishes_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/bin/cellfast", "ingest", "fields", "a table.csv", "--image-root", "s3://me:secret@host/x"])
    unfinished.begin(tmp_path, ["A", "B", "C"])
    command = r"run again: cellfast ingest fields 'a table\.csv' --image-root 's3://me:\*\*\*@host/x'"
    monkeypatch.setattr(Ledger, "write", lambda self, screen: None)
    write_plate(tmp_path, "A")
    with pytest.raises(
        CellfastError, match=rf"no ledger\.json; of 3 plates .*B, C are not there\); to finish it, {command}.*allow_unf"
    ):
        Screen.open(tmp_path)
    assert "B, C are not there" in Screen.open(tmp_path, allow_unfinished=True).unfinished
    monkeypatch.undo()
    # Another ingest into the same folder ends well: the first is still unfinished.
    unfinished.begin(tmp_path, ["D"])
    write_plate(tmp_path, "D")
    Ledger("test", "", {}, [PlateLedger("D")]).write(tmp_path)
    with pytest.raises(CellfastError, match=rf"\(of 3 plates that were to be written B, C are not there\).*{command}"):
        Screen.open(tmp_path)
    write_plate(tmp_path, "B")
    write_plate(tmp_path, "C")
    assert Screen.open(tmp_path).unfinished == ""
    (tmp_path / "plates" / "D.h5").unlink()
    Ledger("test", "", {}, [PlateLedger("D")]).write(tmp_path)
    with pytest.raises(CellfastError, match=r"ledger\.json D is not there"):
        Screen.open(tmp_path)
    (tmp_path / "ledger.json").write_text("[" * 5000)
    with pytest.raises(CellfastError, match=r"ledger\.json: damaged"):
        Screen.open(tmp_path)


def test_plates_that_do_not_fit_together_are_refused(tmp_path):
    write_plate(tmp_path, "A")
    write_plate(tmp_path, "B", channels=("DNA", "ER"))
    with pytest.raises(CellfastError, match=r"disagree in channel_names: A has .*Actin.*B has .*ER"):
        Screen.open(tmp_path)


def test_missing_screens_say_what_was_expected(tmp_path):
    with pytest.raises(CellfastError, match="no such screen folder"):
        Screen.open(tmp_path / "nothing")
    (tmp_path / "something.txt").write_text("x")
    with pytest.raises(CellfastError, match=r"found in the folder: something\.txt"):
        Screen.open(tmp_path)


def test_summary_counts(tmp_path):
    write_plate(tmp_path, "Week1_1")
    write_plate(tmp_path, "Week2_1")
    screen = Screen.open(tmp_path)
    summary = summarize(screen)
    expected = {
        "plates": 2,
        "batches": 2,
        "wells": 4,
        "fields": 4,
        "cells": 16,
        "cells_padded": 4,
        "treatments": 1,
        "compounds": 1,
        "moas": 1,
        "control_wells": 2,
        "control_cells": 10,
    }
    assert {key: summary[key] for key in expected} == expected
    assert "16 (4 padded" in format_summary(summary)
    write_montage(screen, tmp_path / "m.png", rows=2, columns=3)
    from PIL import Image

    with Image.open(tmp_path / "m.png") as image:
        assert image.size == (3 * (2 * 17 + 3), 2 * 18)
