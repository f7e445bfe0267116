"""Fields to cells on the device: the pixels of tifffile and plain cutting, from HDF5 and TIFF, encoded and plain; what is refused."""

from __future__ import annotations

import io

import h5py
import numpy as np
import pytest
import tifffile
import torch

from cellfast.data.cut_cells import cut_cells
from cellfast.errors import CellfastError
from cellfast.screens.cutting import crop_origins, cut_crops
from cellfast.screens.field_store import EncodedFields, write_field_store
from cellfast.screens.sealed import seal

pytest.importorskip("nvidia.dali")

from cellfast.data.dali import Hdf5Fields
from cellfast.data.device_fields import DeviceFieldCells, FieldDecoder

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def random_fields(dtype=np.uint16, count: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (count, 3, 40, 50), dtype=dtype)


def write_tiffs(folder, fields, **options) -> list[list]:
    files = []
    for number, field in enumerate(fields):
        files.append([folder / f"f{number}_c{channel}.tif" for channel in range(len(field))])
        for path, plane in zip(files[-1], field):
            tifffile.imwrite(path, plane, photometric="minisblack", **options)
    return files


def some_cells(count: int = 30, fields: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    centers = np.stack((rng.uniform(0, 49, count), rng.uniform(0, 39, count)), 1)
    centers[:4] = [(0, 0), (49, 39), (0.4, 38.6), (48.6, 0.4)]
    return rng.integers(0, fields, count), centers


def expected_crops(fields, field_index, origins, size, border) -> np.ndarray:
    parts = [cut_crops(list(fields[f]), origins[i : i + 1], size, border=border) for i, f in enumerate(field_index)]
    return np.concatenate(parts)


def as_numpy(crops: torch.Tensor) -> np.ndarray:
    return crops.cpu().numpy()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [np.uint16, np.uint8])
@pytest.mark.parametrize("border", ["pad", "reflect"])
@pytest.mark.parametrize("size", [1, 9, 16, 120])
def test_cells_are_cut_as_on_the_host(device, dtype, border, size):
    """Windows inside, over the edge, wholly outside, and wider than the field, which is then reflected more than once."""
    fields = random_fields(dtype)
    field, centers = some_cells()
    origins = crop_origins(centers[:, 1], centers[:, 0], size)
    origins[5:8] += [[-300, 4], [7, 300], [-90, 90]]
    there = [torch.from_numpy(array).to(device) for array in (fields, field, origins)]
    crops = cut_cells(*there, size, border=border)
    assert crops.dtype == there[0].dtype
    np.testing.assert_array_equal(as_numpy(crops), expected_crops(fields, field, origins, size, border))
    assert cut_cells(there[0], there[1][:0], there[2][:0], size, border=border).shape == (0, 3, size, size)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kept", ["encoded", "lzw", "vlen", "plain"])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint8])
def test_cells_of_fields_kept_in_hdf5(tmp_path, device, kept, dtype):
    fields = random_fields(dtype)
    path = tmp_path / "fields.h5"
    if kept == "plain":
        with h5py.File(path, "w") as file:
            file["fields"] = fields
        source = Hdf5Fields(path)
    elif kept == "vlen":
        with h5py.File(path, "w") as file:
            data = file.create_dataset("encoded", (5, 3), dtype=h5py.vlen_dtype(np.uint8))
            for index in np.ndindex(5, 3):
                buffer = io.BytesIO()
                tifffile.imwrite(buffer, fields[index])
                data[index] = np.frombuffer(buffer.getvalue(), np.uint8)
        source = EncodedFields(path)
    else:
        files = write_tiffs(tmp_path, fields, compression="lzw" if kept == "lzw" else None)
        assert write_field_store(path, files, ["DNA", "Tubulin", "Actin"]) == []
        source = EncodedFields(path)
        assert (source.num_fields, source.num_channels, source.shape, source.dtype) == (5, 3, (40, 50), np.dtype(dtype))
        np.testing.assert_array_equal(source.encoded(3)[1], np.frombuffer(files[3][1].read_bytes(), np.uint8))
    field, centers = some_cells()
    decoder = FieldDecoder(source, fields_per_group=2, device=device)
    cells = DeviceFieldCells(decoder, field, centers, 16, border="reflect")
    origins = crop_origins(centers[:, 1], centers[:, 0], 16)
    expected = expected_crops(fields, field, origins, 16, "reflect")
    for _ in range(2):
        kept_batches = list(cells.run())  # all are held: none may be written over
        rows = np.concatenate([batch.rows.numpy() for batch in kept_batches])
        assert sorted(rows) == list(range(30))
        crops = np.concatenate([as_numpy(batch.crops) for batch in kept_batches])
        np.testing.assert_array_equal(crops, expected[rows])
        assert all(batch.crops.device.type == device for batch in kept_batches)
    assert decoder.notes


def test_fields_are_decoded_once_and_the_order_can_be_shuffled(tmp_path):
    fields = random_fields()
    path = tmp_path / "fields.h5"
    write_field_store(path, write_tiffs(tmp_path, fields))
    source, asked = EncodedFields(path), []
    plain = source.encoded
    source.encoded = lambda index: asked.append(index) or plain(index)
    field, centers = some_cells(fields=4)
    cells = DeviceFieldCells(FieldDecoder(source, fields_per_group=3), field, centers, 8, seed=2)
    assert sum(len(batch.rows) for batch in cells.run(shuffle_fields=True)) == 30
    assert sorted(asked) == [0, 1, 2, 3]
    assert asked != sorted(asked)
    assert list(DeviceFieldCells(cells.decoder, field[:0], centers[:0], 8).run()) == []


def test_the_random_margin_moves_windows_by_seed_and_epoch(tmp_path):
    fields = random_fields()
    path = tmp_path / "fields.h5"
    write_field_store(path, write_tiffs(tmp_path, fields))
    field, centers = some_cells(count=400)
    cells = DeviceFieldCells(FieldDecoder(EncodedFields(path)), field, centers, 9, random_margin_px=3, seed=1)
    shift = cells.origins(0) - crop_origins(centers[:, 1], centers[:, 0], 9)
    assert set(shift.ravel()) == set(range(-3, 4))
    assert (cells.origins(0) == cells.origins(0)).all()
    assert (cells.origins(0) != cells.origins(1)).any()
    for batch in cells.run(epoch=1):
        rows = batch.rows.numpy()
        expected = expected_crops(fields, field[rows], cells.origins(1)[rows], 9, "pad")
        np.testing.assert_array_equal(as_numpy(batch.crops), expected)


def test_files_whose_values_are_not_stored_plainly_are_stored_anew_and_named(tmp_path):
    fields = random_fields(count=2)
    files = write_tiffs(tmp_path, fields)
    tifffile.imwrite(files[1][2], fields[1, 2], photometric="miniswhite")
    notes = write_field_store(tmp_path / "f.h5", files)
    assert len(notes) == 1
    assert "f1_c2.tif was stored anew" in notes[0]
    (decoded,) = FieldDecoder(EncodedFields(tmp_path / "f.h5")).run([np.array([0, 1])])
    np.testing.assert_array_equal(as_numpy(decoded), fields)


def test_what_cannot_be_kept_or_read_is_refused_by_name(tmp_path):
    fields = random_fields(count=2)
    files = write_tiffs(tmp_path, fields)
    path = tmp_path / "f.h5"
    tifffile.imwrite(tmp_path / "wide.tif", np.zeros((40, 51), np.uint16))
    with pytest.raises(CellfastError, match=r"wide.tif is uint16 \(40, 51\), the first file is uint16 \(40, 50\)"):
        write_field_store(path, [*files, [*files[0][:2], tmp_path / "wide.tif"]])
    assert not path.exists()
    tifffile.imwrite(tmp_path / "pages.tif", np.zeros((2, 40, 50), np.uint16))
    with pytest.raises(CellfastError, match=r"pages\.tif must be a single-page greyscale TIFF"):
        write_field_store(path, [[tmp_path / "pages.tif"] * 3])
    with pytest.raises(CellfastError, match="3 channels need as many names, got A"):
        write_field_store(path, files, ["A"])
    write_field_store(path, files)
    with pytest.raises(CellfastError, match="decode must be one of auto, cpu, mixed, got 'gpu'"):
        FieldDecoder(EncodedFields(path), decode="gpu")
    with pytest.raises(CellfastError, match="decode='mixed' needs a GPU"):
        FieldDecoder(EncodedFields(path), decode="mixed")
    with pytest.raises(CellfastError, match=r"fields must lie in 0..1, got 0..2"):
        DeviceFieldCells(FieldDecoder(EncodedFields(path)), np.array([0, 2]), np.zeros((2, 2)), 8)
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


@pytest.mark.cuda
@pytest.mark.parametrize("decode", ["auto", "cpu", "mixed"])
def test_every_way_of_decoding_gives_the_same_pixels_on_a_gpu(tmp_path, decode):
    fields = random_fields(count=9)
    path = tmp_path / "fields.h5"
    write_field_store(path, write_tiffs(tmp_path, fields, compression="lzw"))
    decoder = FieldDecoder(EncodedFields(path), fields_per_group=4, device="cuda", decode=decode)
    groups = [np.array([0, 1, 2, 3]), np.array([8, 4, 6]), np.array([5])]
    for group, decoded in zip(groups, decoder.run(groups)):
        assert decoded.is_cuda
        np.testing.assert_array_equal(as_numpy(decoded), fields[group])
    assert decoder.decode in ("cpu", "mixed")
    assert decoder.decode in decoder.notes[0]
