"""Encoded fields kept in one HDF5 file by the command line, and read from it as from the folder they came from."""

from __future__ import annotations

import io
import json

import h5py
import numpy as np
import pytest
import tifffile
from screens import assert_same, embed, make_fields, make_model, run, tables

from cellfast.errors import CellfastError
from cellfast.screens import Screen
from cellfast.screens.field_store import EncodedFields, write_field_store
from cellfast.screens.sealed import USER_BLOCK, seal
from cellfast.storage.urls import file_system


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "odd! name"
    make_fields(folder)
    make_model(folder / "model.pt")
    return folder


def ingest(folder, out, *more, root=None):
    arguments = [folder / "load_data.csv", "--image-root", root or folder / "images", "--locations", folder / "locations"]
    return run("ingest", "fields", *arguments, "--crop-size", 24, "--workers", 1, "-o", out, *more)


@pytest.mark.slow
def test_the_store_stands_in_for_the_folder(work, tmp_path):
    store = work / "fields.h5"
    kept = ingest(work, tmp_path / "a", "--keep-fields", store)
    assert kept.exit_code == 0, kept.output
    assert "12 of 12 fields kept in" in kept.output
    with EncodedFields(store) as fields:
        assert (fields.num_fields, fields.num_channels, fields.shape, fields.dtype) == (12, 2, (60, 80), np.dtype(np.uint16))
        for number, name in enumerate(fields.names()):
            content = (work / "images" / name).read_bytes()
            np.testing.assert_array_equal(fields.encoded(number // 2)[number % 2], np.frombuffer(content, np.uint8))
    again = ingest(work, tmp_path / "b", root=store)
    assert again.exit_code == 0, f"{again.output} {again.exception!r}"
    one, two = Screen.open(tmp_path / "a"), Screen.open(tmp_path / "b")
    for first, second in zip(one.plates, two.plates, strict=True):
        np.testing.assert_array_equal(first.crops(), second.crops())
    embed("fields", work, tmp_path / "folder")
    for decode, more in (("host", []), ("dali", ["--workers", 3]), ("host", ["--readers", "processes"])):
        out = tmp_path / f"{decode}{len(more)}"
        arguments = [
            work / "load_data.csv",
            "--image-root",
            store,
            "--locations",
            work / "locations",
            "--model",
            work / "model.pt",
        ]
        result = run("embed", *arguments, "-o", out, "--decode", decode, *more)
        assert result.exit_code == 0, f"{result.output} {result.exception!r}"
        assert_same(tables(tmp_path / "folder"), tables(out))
    pattern = r"(?P<plate>[^/]+)/(?P<well>[A-P]\d+)_s(?P<site>\d)_(?P<channel>\w+)\.tif"
    listed = run("ingest", "fields", "--pattern", pattern, "--image-root", store, "--locations", work / "locations", "--crop-size", 24, "-o", tmp_path / "c")  # fmt: skip
    assert listed.exit_code == 0, f"{listed.output} {listed.exception!r}"
    assert Screen.open(tmp_path / "c").num_cells == one.num_cells
    # a store of a store
    assert ingest(work, tmp_path / "d", "--keep-fields", tmp_path / "copy.h5", root=store).exit_code == 0
    with EncodedFields(store) as first, EncodedFields(tmp_path / "copy.h5") as second:
        assert first.names() == second.names()


def test_fields_that_cannot_be_kept_are_left_out_and_named(work, tmp_path):
    images = work / "images" / "P1"
    (images / "A02_s1_DNA.tif").unlink()
    (images / "A02_s2_DNA.tif").write_bytes(b"no image")
    tifffile.imwrite(images / "A10_s1_DNA.tif", np.zeros((2, 60, 80), np.uint16), photometric="minisblack")
    kept = ingest(work, tmp_path / "a", "--keep-fields", tmp_path / "f.h5")
    assert kept.exit_code == 0, kept.output
    assert "9 of 12 fields kept" in kept.output
    for name in ("A02_s1_DNA.tif", "A02_s2_DNA.tif", "A10_s1_DNA.tif"):
        assert f"left out: {images / name}" in kept.output
    again = ingest(work, tmp_path / "b", root=tmp_path / "f.h5")
    assert again.exit_code == 0, again.output
    ledgers = [json.loads((tmp_path / n / "ledger.json").read_text())["totals"] for n in "ab"]
    assert ledgers[0]["cells_written"] == ledgers[1]["cells_written"]
    assert ledgers[1]["fields_refused"] == {"file missing": 3}


def test_what_is_in_the_way_or_no_store_is_refused_before_any_work(work, tmp_path):
    (tmp_path / "f.h5").write_bytes(b"precious")
    result = ingest(work, tmp_path / "a", "--keep-fields", tmp_path / "f.h5")
    assert isinstance(result.exception, CellfastError)
    assert "is there already" in str(result.exception)
    assert not (tmp_path / "a").exists()
    assert (tmp_path / "f.h5").read_bytes() == b"precious"
    assert "must end in .h5" in str(ingest(work, tmp_path / "a", "--keep-fields", tmp_path / "f.zip").exception)
    assert "cannot be read as HDF5" in str(ingest(work, tmp_path / "a", root=tmp_path / "f.h5").exception)
    assert ingest(work, tmp_path / "a", "--keep-fields", tmp_path / "f.h5", "--force").exit_code == 0
    with h5py.File(tmp_path / "f.h5", "r+") as file:
        del file["files"]
    seal(tmp_path / "f.h5", "encoded")
    assert "a field store without the names of its files" in str(ingest(work, tmp_path / "b", root=tmp_path / "f.h5").exception)
    files = [[work / "images" / "P1" / f"A02_s1_{c}.tif" for c in ("DNA", "Actin")]]
    with pytest.raises(CellfastError, match=r"two files would be called x\.tif"):
        write_field_store(tmp_path / "g.h5", files, names=[["x.tif", "x.tif"]])
    with pytest.raises(CellfastError, match="none of 1 fields can be kept"):
        write_field_store(tmp_path / "g.h5", [[tmp_path / "nowhere.tif"]], leave_out=True)
    assert not (tmp_path / "g.h5").exists()


def test_a_store_written_anew_is_read_anew(work, tmp_path):
    images, store = work / "images" / "P1", tmp_path / "f.h5"
    for channel in ("DNA", "Actin"):
        write_field_store(store, [[images / f"A02_s1_{channel}.tif"]], names=[["one.tif"]])
        fs, key = file_system(f"fieldstore://{store}!/one.tif")
        assert fs.cat_file(key) == (images / f"A02_s1_{channel}.tif").read_bytes()
        with pytest.raises(FileNotFoundError):
            fs.cat_file("two.tif")


def flip(path, place):
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 4]))


def test_damage_to_a_store_is_told_by_name_where_it_lies(work, tmp_path):
    images, store = work / "images" / "P1", tmp_path / "f.h5"
    files = [[images / f"A02_s{site}_{channel}.tif" for channel in ("DNA", "Actin")] for site in (1, 2)]
    write_field_store(store, files, names=[[file.name for file in field] for field in files])
    with h5py.File(store) as file:
        start = file["encoded"].id.get_chunk_info(0).byte_offset
    size, length = store.stat().st_size, files[0][0].stat().st_size
    for place in (0, 20, 100, USER_BLOCK - 1, USER_BLOCK, start - 1, start + (1 << 22), size - 1, *range(USER_BLOCK, start, 211)):
        flip(store, place)
        with pytest.raises(CellfastError, match=r"f\.h5.*write it again"):
            EncodedFields(store)
        flip(store, place)
    flip(store, start + length + 10)
    with EncodedFields(store) as fields:
        assert fields.file(0, 0).tobytes() == files[0][0].read_bytes()
        for read in (lambda: fields.file(0, 1), lambda: fields.encoded(0)):
            with pytest.raises(CellfastError, match=r"f\.h5: the file of field 0, channel 1 differs from its checksum"):
                read()
    fs, key = file_system(f"fieldstore://{store}!/{files[0][1].name}")
    with pytest.raises(OSError, match="differs from its checksum"):
        fs.cat_file(key)


def test_the_field_of_a_damaged_file_is_refused_and_counted(work, tmp_path):
    assert ingest(work, tmp_path / "a", "--keep-fields", tmp_path / "f.h5").exit_code == 0
    with h5py.File(tmp_path / "f.h5") as file:
        flip(tmp_path / "f.h5", file["encoded"].id.get_chunk_info(0).byte_offset + 10)
    again = ingest(work, tmp_path / "b", root=tmp_path / "f.h5")
    assert again.exit_code == 0, again.output
    totals = json.loads((tmp_path / "b" / "ledger.json").read_text())["totals"]
    assert totals["fields_refused"] == {"not a readable image": 1}
    assert "differs from its checksum" in again.output


def test_a_store_without_a_seal_is_read_as_before(work, tmp_path):
    store, file = tmp_path / "f.h5", work / "images" / "P1" / "A02_s1_DNA.tif"
    write_field_store(store, [[file]])
    store.write_bytes(store.read_bytes()[USER_BLOCK:])
    with h5py.File(store, "r+") as handle:
        del handle["crc32"]
    with EncodedFields(store) as fields:
        assert fields.encoded(0)[0].tobytes() == file.read_bytes()


def test_training_on_a_field_store_says_what_to_do(tmp_path):
    (tmp_path / "f.h5").write_bytes(b"")
    result = run("train", tmp_path / "f.h5", "-o", tmp_path / "run")
    assert isinstance(result.exception, CellfastError)
    assert f"cellfast ingest fields IMAGE_CSV --image-root {tmp_path / 'f.h5'}" in str(result.exception)
    assert not (tmp_path / "run").exists()


def test_files_whose_values_are_not_stored_plainly_are_stored_anew_and_named(tmp_path):
    plane = np.random.default_rng(0).integers(0, 60000, (40, 50)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", plane, photometric="miniswhite")
    notes = write_field_store(tmp_path / "f.h5", [[tmp_path / "a.tif"]])
    assert len(notes) == 1
    assert "a.tif was stored anew" in notes[0]
    with EncodedFields(tmp_path / "f.h5") as fields:
        np.testing.assert_array_equal(tifffile.imread(io.BytesIO(fields.file(0, 0).tobytes())), plane)


def test_a_store_of_others_with_one_dataset_entry_for_each_file_is_read(work, tmp_path):
    """``encoded`` as variable-length bytes [N, C]."""
    assert ingest(work, tmp_path / "a", "--keep-fields", work / "f.h5").exit_code == 0
    with EncodedFields(work / "f.h5") as fields, h5py.File(tmp_path / "g.h5", "w") as file:
        data = file.create_dataset("encoded", (fields.num_fields, fields.num_channels), dtype=h5py.vlen_dtype(np.uint8))
        for index, channel in np.ndindex(*data.shape):
            data[index, channel] = fields.file(index, channel)
        file.create_dataset("files", data=fields.names(), dtype=h5py.string_dtype())
    assert ingest(work, tmp_path / "b", root=tmp_path / "g.h5").exit_code == 0
    for one, other in zip(Screen.open(tmp_path / "a").plates, Screen.open(tmp_path / "b").plates, strict=True):
        np.testing.assert_array_equal(one.crops(), other.crops())


def test_what_cannot_be_kept_or_read_is_refused_by_name(tmp_path):
    path, files = tmp_path / "f.h5", [[tmp_path / f"{f}_{c}.tif" for c in range(3)] for f in range(2)]
    for file in (file for field in files for file in field):
        tifffile.imwrite(file, np.zeros((40, 50), np.uint16))
    tifffile.imwrite(tmp_path / "wide.tif", np.zeros((40, 51), np.uint16))
    with pytest.raises(CellfastError, match=r"wide.tif is uint16 \(40, 51\), the first file is uint16 \(40, 50\)"):
        write_field_store(path, [*files, [*files[0][:2], tmp_path / "wide.tif"]])
    assert not path.exists()
    tifffile.imwrite(tmp_path / "pages.tif", np.zeros((2, 40, 50), np.uint16), photometric="minisblack")
    with pytest.raises(CellfastError, match=r"pages\.tif must be a single-page greyscale TIFF"):
        write_field_store(path, [[tmp_path / "pages.tif"] * 3])
    with pytest.raises(CellfastError, match="3 channels need as many names, got A"):
        write_field_store(path, files, ["A"])
    with pytest.raises(CellfastError, match="same number of channel files"):
        write_field_store(path, [files[0], files[1][:2]])
    write_field_store(path, files)
    with h5py.File(path, "r+") as file:
        file["offsets"][3] = 10**9
    seal(path, "encoded")
    with pytest.raises(CellfastError, match="is damaged: its offsets do not fit"):
        EncodedFields(path)
    with h5py.File(path, "r+") as file:
        file.attrs["version"] = 2
    seal(path, "encoded")
    with pytest.raises(CellfastError, match="version 2, this cellfast reads 1: upgrade"):
        EncodedFields(path)
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["encoded"] = h5py.ExternalLink(str(path), "encoded")
    with pytest.raises(CellfastError, match="links to other files are refused"):
        EncodedFields(tmp_path / "link.h5")
    path.write_bytes(b"no")
    with pytest.raises(CellfastError, match="cannot be read as HDF5"):
        EncodedFields(path)
