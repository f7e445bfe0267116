"""DALI gives the pixels the memory maps give, cell for cell, and the pixels that tifffile and plain slicing give for fields."""

from __future__ import annotations

import builtins
import sys

import h5py
import numpy as np
import pytest
import tifffile
import torch
from screens import all_crops, collect, raw_screen, write_crops

from cellfast.data import Loader, RowSampler
from cellfast.errors import CellfastError
from cellfast.screens import Screen
from cellfast.screens.cutting import crop_origins, cut_crops

pytest.importorskip("nvidia.dali")

from cellfast.data.dali import FieldCellPipeline, Hdf5Fields, TiffFields


@pytest.fixture(scope="module")
def fields() -> np.ndarray:
    """Five fields of three channels, 40 x 50; like the camera's, most values are multiples of 16, and some are not."""
    rng = np.random.default_rng(0)
    return (rng.integers(0, 4096, (5, 3, 40, 50)) * 16 + rng.integers(0, 2, (5, 3, 40, 50))).astype(np.uint16)


@pytest.fixture(scope="module")
def cells(fields) -> tuple[np.ndarray, np.ndarray]:
    """Cells in the middle, on the border and in the corners."""
    rng = np.random.default_rng(1)
    centers = np.stack((rng.uniform(0, 49, 30), rng.uniform(0, 39, 30)), 1)
    centers[:4] = [(0, 0), (49, 39), (0.4, 38.6), (48.6, 0.4)]
    return np.sort(rng.integers(0, 5, 30)), centers


def cut(fields: np.ndarray, field: int, center: np.ndarray, size: int) -> np.ndarray:
    """Plain slicing of a zero-padded field."""
    padded = np.pad(fields[field], ((0, 0), (size, size), (size, size)))
    x, y = (round(float(value)) + size - size // 2 for value in center)
    return padded[:, y : y + size, x : x + size]


def run(pipeline, sampler, epoch=0) -> tuple[np.ndarray, np.ndarray]:
    crops, rows = [], []
    for batch in pipeline.run(sampler, epoch, range(len(sampler))):
        crops.append(batch.crops.numpy().copy())
        rows.append(batch.rows.numpy())
    return np.concatenate(crops), np.concatenate(rows)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint8])
@pytest.mark.parametrize("options", [{"shuffle": True, "seed": 5}, {"shuffle": False}, {"drop_last": True}])
def test_the_same_pixels_as_memory_maps_for_the_same_rows(tmp_path, dtype, options):
    screen = raw_screen(tmp_path, channels=5, size=12, dtype=dtype)
    dali, mmap = Loader(screen, 4, backend="dali", **options), Loader(screen, 4, backend="mmap", **options)
    for _ in range(2):  # two epochs through one pipeline
        crops, rows = collect(dali)
        expected, expected_rows = collect(mmap)
        np.testing.assert_array_equal(rows, expected_rows)
        assert crops.dtype == dtype
        np.testing.assert_array_equal(crops, expected)
    assert next(iter(dali)).crops.dtype == torch.from_numpy(expected).dtype


def test_a_break_and_a_restored_state_go_on_in_the_same_way(tmp_path):
    screen = raw_screen(tmp_path)
    expected = collect(Loader(screen, 3, seed=1))
    loader = Loader(screen, 3, seed=1, backend="dali")
    crops, rows = [], []
    for batch in loader:
        crops.append(batch.crops.numpy().copy())
        rows.append(batch.rows.numpy())
        if len(rows) == 3:
            break
    state = loader.state_dict()
    loader.load_state_dict(state)  # the same loader: its pipeline was left with minibatches under way
    rest = collect(loader)
    np.testing.assert_array_equal(np.concatenate((*rows, rest[1])), expected[1])
    np.testing.assert_array_equal(np.concatenate((*crops, rest[0])), expected[0])


def test_a_rank_without_rows_gets_an_empty_batch(tmp_path):
    screen = raw_screen(tmp_path, counts=(9,))
    for rank in range(4):
        dali = [batch.rows.tolist() for batch in Loader(screen, 2, rank=rank, world_size=4, backend="dali")]
        assert dali == [batch.rows.tolist() for batch in Loader(screen, 2, rank=rank, world_size=4)]
        assert len(dali) == 2


def test_batches_stay_as_they_are_until_the_next_is_asked_for(tmp_path):
    screen = raw_screen(tmp_path, counts=(100,))
    expected = all_crops(screen)
    for batch in Loader(screen, 4, backend="dali", prefetch=3):
        np.testing.assert_array_equal(batch.crops.numpy(), expected[batch.rows.numpy()])


@pytest.mark.parametrize(
    ("size", "shuffle"),
    [
        (11, True),
        (64, False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((8, True), (8, False), (11, False), (64, True))),
    ],
)
def test_cells_of_fields_in_hdf5(tmp_path, fields, cells, size, shuffle):
    with h5py.File(tmp_path / "fields.h5", "w") as handle:
        handle["fields"] = fields
    field_index, centers = cells
    pipeline = FieldCellPipeline(Hdf5Fields(tmp_path / "fields.h5"), field_index, centers, size, 7)
    crops, rows = run(pipeline, RowSampler(len(pipeline), 7, shuffle=shuffle))
    assert crops.dtype == np.uint16
    assert sorted(rows.tolist()) == list(range(30))
    for crop, row in zip(crops, rows):
        np.testing.assert_array_equal(crop, cut(fields, field_index[row], centers[row], size))


@pytest.mark.parametrize("compression", [None, "lzw", "zlib"])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint8])
def test_cells_of_tiff_fields(tmp_path, fields, cells, compression, dtype):
    values = fields if dtype == np.uint16 else (fields >> 8).astype(np.uint8)
    files = [[tmp_path / f"{f}-{c}.tif" for c in range(3)] for f in range(5)]
    for f in range(5):
        for c in range(3):
            tifffile.imwrite(files[f][c], values[f, c], compression=compression)
    source = TiffFields(files, batch_size=4)
    for got, expected in zip(source.read([3, 0]), values[[3, 0]]):
        np.testing.assert_array_equal(np.stack(got), expected)
    field_index, centers = cells
    crops, rows = run(FieldCellPipeline(source, field_index, centers, 16, 8), RowSampler(30, 8, shuffle=False))
    assert crops.dtype == dtype
    for crop, row in zip(crops, rows):
        np.testing.assert_array_equal(crop, cut(values, field_index[row], centers[row], 16))


def test_palette_inverted_and_turned_tiffs_keep_their_stored_values(tmp_path, fields):
    values = (fields[0] >> 8).astype(np.uint8)
    palette = np.random.default_rng(0).integers(0, 65535, (3, 256), dtype=np.uint16)
    files = [tmp_path / "palette.tif", tmp_path / "inverted.tif", tmp_path / "turned.tif"]
    tifffile.imwrite(files[0], values[0], photometric="palette", colormap=palette)
    tifffile.imwrite(files[1], values[1], photometric="miniswhite")
    tifffile.imwrite(files[2], values[2], extratags=[(274, "H", 1, 3, True)])
    (got,) = TiffFields([files]).read([0])
    np.testing.assert_array_equal(np.stack(got), values)


def test_tiffs_that_dali_would_misread_are_refused_by_name(tmp_path, fields):
    good = tmp_path / "good.tif"
    tifffile.imwrite(good, fields[0, 0])
    makers = {
        "planar.tif": lambda path: tifffile.imwrite(path, fields[0], photometric="rgb", planarconfig="separate"),
        "pages.tif": lambda path: tifffile.imwrite(path, fields[0], photometric="minisblack"),
        "float.tif": lambda path: tifffile.imwrite(path, fields[0, 0].astype(np.float32)),
        "cut.tif": lambda path: path.write_bytes(good.read_bytes()[:6]),
        "text.tif": lambda path: path.write_text("not an image"),
        "absent.tif": lambda path: None,
    }
    for name, make in makers.items():
        make(tmp_path / name)
        with pytest.raises(CellfastError, match=name):
            TiffFields([[good], [tmp_path / name]]).read([0, 1])
    tifffile.imwrite(tmp_path / "eight.tif", (fields[0, 0] >> 8).astype(np.uint8))
    with pytest.raises(CellfastError, match=r"eight\.tif is uint8, the first file is uint16"):
        TiffFields([[good], [tmp_path / "eight.tif"]]).read([0, 1])
    with pytest.raises(CellfastError, match="same number of channel files"):
        TiffFields([[good], [good, good]])


def test_hdf5_of_the_wrong_kind_is_refused(tmp_path, fields):
    path = tmp_path / "fields.h5"
    with h5py.File(path, "w") as handle:
        handle["images"] = fields.astype(np.float32)
        handle["link"] = h5py.ExternalLink("elsewhere.h5", "fields")
    with pytest.raises(CellfastError, match="no dataset 'fields' of its own: it holds images, link"):
        Hdf5Fields(path)
    with pytest.raises(CellfastError, match="links to other files are refused"):
        Hdf5Fields(path, "link")
    with pytest.raises(CellfastError, match=r"must be uint16 or uint8 of shape .N, C, H, W., got float32"):
        Hdf5Fields(path, "images")
    (tmp_path / "text.h5").write_text("no")
    with pytest.raises(CellfastError, match=r"text\.h5 cannot be read as HDF5"):
        Hdf5Fields(tmp_path / "text.h5")


def test_without_dali_the_message_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("nvidia.dali"):
            raise ImportError("No module named 'nvidia.dali'")
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.startswith("nvidia.dali")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CellfastError, match="pip install nvidia-dali"):
        Loader(raw_screen(tmp_path), 4, backend="dali")


@pytest.mark.parametrize("backend", ["mmap", "dali"])
def test_a_screen_and_its_fields_give_the_same_cells(tmp_path, fields, cells, backend):
    """Rows of the crop store through either loader, and the store's centroids cut out of the fields by DALI."""
    field_index, centers = cells
    centers = centers.astype(np.float32)
    centers[5:9] = [(10.5, 11.5), (11.5, 12.5), (12.5, 10.5), (20.5, 21.5)]  # halves round to even
    plates = {"P1": [0, 1, 2], "P2": [3, 4]}
    for plate, members in plates.items():
        written = []
        for field in members:
            own = centers[field_index == field]
            crops = cut_crops(list(fields[field]), crop_origins(own[:, 1], own[:, 0], 16), 16)
            written.append((crops, {"well": f"A{field + 1:02d}", "site": field, "center_y": own[:, 1], "center_x": own[:, 0]}))
        write_crops(tmp_path / "screen", plate, written, capacity=30, channels=["a", "b", "c"])
    screen = Screen.open(tmp_path / "screen")
    table = screen.metadata()
    with h5py.File(tmp_path / "fields.h5", "w") as handle:
        handle["fields"] = fields
    positions = table[["Metadata_Center_X", "Metadata_Center_Y"]].to_numpy()
    pipeline = FieldCellPipeline(Hdf5Fields(tmp_path / "fields.h5"), table["Metadata_Site"].to_numpy(), positions, 16, 7)
    from_fields, rows = run(pipeline, RowSampler(30, 7, seed=3))
    from_store, store_rows = collect(Loader(screen, 7, seed=3, backend=backend))
    np.testing.assert_array_equal(rows, store_rows)
    np.testing.assert_array_equal(from_fields, from_store)
    np.testing.assert_array_equal(from_store, all_crops(screen)[rows])


@pytest.mark.cuda
def test_the_same_pixels_on_a_gpu(tmp_path):
    screen = raw_screen(tmp_path, counts=(300,))
    expected = torch.from_numpy(all_crops(screen).astype(np.int32)).cuda()
    for batch in Loader(screen, 16, backend="dali", device="cuda"):
        assert batch.crops.is_cuda
        assert torch.equal(batch.crops.to(torch.int32), expected[batch.rows.cuda()])


@pytest.mark.data
def test_real_fields_decode_as_tifffile_does(real_data):
    """ExampleHuman's (8-bit) and ExampleSBS's TIFFs, cells anywhere in them."""
    human = sorted((real_data / "cellprofiler" / "ExampleHuman").glob("*.tif"))
    plate = sorted((real_data / "cellprofiler" / "ExampleSBS").glob("Channel1-*.tif"))[:4]
    for files in ([human], [[path] for path in plate]):
        expected = np.stack([np.stack([tifffile.imread(path) for path in channels]) for channels in files])
        rng = np.random.default_rng(0)
        field_index = np.sort(rng.integers(0, len(files), 40))
        centers = rng.uniform(0, 1, (40, 2)) * (expected.shape[-1] - 1, expected.shape[-2] - 1)
        crops, rows = run(FieldCellPipeline(TiffFields(files), field_index, centers, 64, 16), RowSampler(40, 16))
        for crop, row in zip(crops, rows):
            np.testing.assert_array_equal(crop, cut(expected, field_index[row], centers[row], 64))
