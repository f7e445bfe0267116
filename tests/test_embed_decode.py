"""Fields decoded by DALI: the rows, the ledger and the quarantine of the host's decoding; what is chosen, told and refused."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import tifffile
import torch
from screens import assert_same, draw_nuclei, embed, field_arguments, make_fields, make_model, run, tables

from cellfast.data.device_cutting import cut_on_device
from cellfast.embedding import decoding
from cellfast.embedding.dali_reading import DaliReader, plane_facts
from cellfast.embedding.field_source import FieldSource
from cellfast.embedding.options import EmbedOptions
from cellfast.errors import CellfastError
from cellfast.screens.field_cells import FieldReader, _facts
from cellfast.screens.image_table import read_image_table
from cellfast.screens.images import encoded_plane, read_plane
from cellfast.screens.keep_fields import keep_fields
from cellfast.screens.locations import open_locations

pytest.importorskip("nvidia.dali")

from cellfast.data.plane_decoder import PlaneDecoder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decode")
    make_fields(folder, sites=3)
    make_model(folder / "model.pt")
    make_model(folder / "plate.pt", scaling="plate")
    return folder


def ledger(folder):
    return json.loads((folder / "embeddings.json").read_text())


def image(folder, plate="P1", well="B03", site=1, channel="Actin"):
    return folder / "images" / plate / f"{well}_s{site}_{channel}.tif"


@pytest.mark.parametrize(
    ("border", "model", "more"),
    [
        ("pad", "model.pt", []),
        ("reflect", "plate.pt", ["--batch-size", 7, "--workers", 3]),
        ("drop", "model.pt", ["--aggregate", "well"]),
    ],
)
def test_the_same_rows_and_ledger_as_the_host(work, tmp_path, border, model, more):
    embed("fields", work, tmp_path / "host", "--border", border, "--decode", "host", *more, model=model)
    told = embed("fields", work, tmp_path / "dali", "--border", border, "--decode", "dali", *more, model=model)
    assert_same(tables(tmp_path / "host"), tables(tmp_path / "dali"), rtol=0, atol=0)
    host, dali = ledger(tmp_path / "host"), ledger(tmp_path / "dali")
    assert (host["totals"], host["quarantined"]) == (dali["totals"], dali["quarantined"])
    assert dali["totals"]["dropped"] == host["totals"]["dropped"]
    assert host["decode"]["used"] == "host"
    assert "fields_dali" not in host["decode"]
    assert (dali["decode"]["asked"], dali["decode"]["used"], dali["decode"]["fields_dali"]) == ("dali", "dali", 18)
    assert "decode dali (cpu): as asked" in told.output


@pytest.mark.cuda
@pytest.mark.parametrize("border", ["pad", "reflect"])
def test_the_same_rows_on_a_gpu(work, tmp_path, border):
    for decode in ("host", "dali"):
        embed("fields", work, tmp_path / decode, "--border", border, "--decode", decode, "--device", "cuda", "--batch-size", 9)
    assert_same(tables(tmp_path / "host"), tables(tmp_path / "dali"), rtol=1e-5, atol=1e-6)
    decode = ledger(tmp_path / "dali")["decode"]
    assert decode["how"] in ("cpu", "mixed")
    assert decode["fields_dali"] == 18
    assert "fields/s on 8 fields" in decode["reason"]


@pytest.fixture(scope="module")
def store(work):
    """The fields of ``work`` in one HDF5 file, as ``cellfast ingest fields --keep-fields`` writes it."""
    table = read_image_table(work / "load_data.csv", work / "images")
    images = str(work / "images")
    assert keep_fields(table, images, work / "FIELDS.h5", show_progress=False) == (18, [])
    return work / "FIELDS.h5"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_fields_in_hdf5_are_decoded_by_dali(work, store, tmp_path, device):
    """``cellfast embed --image-root FIELDS.h5 --decode dali``: the rows of the folder of images."""
    embed("fields", work, tmp_path / "host", "--decode", "host", "--device", device)
    given = [work / "load_data.csv", "--image-root", store, "--locations", work / "locations", "--model", work / "model.pt"]
    result = run("embed", *given, "-o", tmp_path / "dali", "--decode", "dali", "--device", device)
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    decode = ledger(tmp_path / "dali")["decode"]
    assert (decode["used"], decode["fields_dali"], decode["fields_host"]) == ("dali", 18, 0)
    tolerance = {"rtol": 0, "atol": 0} if device == "cpu" else {"rtol": 1e-5, "atol": 1e-6}
    assert_same(tables(tmp_path / "host"), tables(tmp_path / "dali"), **tolerance)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("border", ["pad", "reflect"])
def test_cells_of_fields_in_hdf5_are_decoded_and_cut_where_they_lie(work, store, border, device):
    """The way of a GPU, whole: bytes out of the HDF5 file, planes of DALI, one gather on their device; it is the host's cutting."""
    table = read_image_table(work / "load_data.csv", store)
    locations = open_locations(str(work / "locations"), table)
    source = FieldSource(table, FieldReader(table.channel_names, locations, None, 24, border, (60, 80), "uint16"), 16)
    units = [unit for plan in source.plans for block in plan.blocks for unit in source.units(block)]
    dali = DaliReader(source, 2, decoding.Decoding("dali", "dali", "cpu", "", 2), torch.device(device))
    count = 0
    for (_, cells), unit in zip(dali.cells(enumerate(units)), units, strict=True):
        expected = source.read(unit)
        assert cells.count == expected.count
        if not cells.count:
            continue
        crops = np.empty((cells.count, 2, 16, 16), np.uint16)
        expected.fill(crops, 0, cells.count)
        planes = torch.stack([torch.as_tensor(plane).to(device).view(torch.int16) for plane in cells.planes]).view(torch.uint16)
        found = cut_on_device(planes, torch.from_numpy(cells.origins).to(device), cells.size, cells.border)
        np.testing.assert_array_equal(found.cpu().numpy(), crops)
        count += cells.count
    dali.close()
    assert dali.decoding.fields_dali == len(units) == 18
    assert count > 100


@pytest.mark.data
def test_real_images_decode_as_tifffile_reads_them(real_data):
    """ExampleHuman's (8-bit) and ExampleSBS's TIFFs: what is left encoded, DALI decodes to the same pixels."""
    human = sorted((real_data / "cellprofiler" / "ExampleHuman").glob("*.tif"))
    plate = sorted((real_data / "cellprofiler" / "ExampleSBS").glob("Channel1-*.tif"))[:4]
    decoded = 0
    for path in (*human, *plate):
        expected = tifffile.imread(path)
        content = encoded_plane(path, expect_shape=expected.shape, expect_dtype=expected.dtype)
        np.testing.assert_array_equal(read_plane(path), expected)
        if content is not None:
            (found,) = PlaneDecoder(expected.dtype, expected.shape, 1, torch.device("cpu")).decode([[content]])
            np.testing.assert_array_equal(found[0].numpy(), expected)
            decoded += 1
    assert decoded


def test_illumination_and_detection_see_the_decoded_pixels(work, tmp_path):
    draw_nuclei(make_fields(tmp_path, sites=3))
    (tmp_path / "illumination").mkdir()
    for channel in ("DNA", "Actin"):
        np.save(tmp_path / "illumination" / f"{channel}.npy", np.linspace(0.5, 2, 60 * 80).reshape(60, 80))
    arguments = [tmp_path / "load_data.csv", "--image-root", tmp_path / "images", "--locations", "detect", "--diameter", 8]
    arguments += ["--illumination", tmp_path / "illumination", "--model", work / "model.pt"]
    for decode in ("host", "dali"):
        result = run("embed", *arguments, "-o", tmp_path / decode, "--decode", decode)
        assert result.exit_code == 0, result.output
    assert_same(tables(tmp_path / "host"), tables(tmp_path / "dali"), rtol=0, atol=0)


def test_broken_files_cost_their_own_fields_and_are_counted_alike(tmp_path):
    make_fields(tmp_path, sites=3)
    make_model(tmp_path / "model.pt")
    rng = np.random.default_rng(0)
    plane = rng.integers(0, 60000, (60, 80)).astype(np.uint16)
    image(tmp_path, site=1).unlink()
    image(tmp_path, site=2).write_bytes(image(tmp_path, site=2).read_bytes()[:3000])
    tifffile.imwrite(image(tmp_path, well="A02"), plane, compression="lzw")
    content = bytearray(image(tmp_path, well="A02").read_bytes())
    content[1000:1200] = bytes(200)  # the header is whole: only decoding finds it
    image(tmp_path, well="A02").write_bytes(content)
    tifffile.imwrite(image(tmp_path, well="A02", site=2), np.full((60, 80), 7, np.uint16))
    image(tmp_path, well="A02", site=3).write_bytes(image(tmp_path, well="A02", site=3, channel="DNA").read_bytes())
    tifffile.imwrite(image(tmp_path, plate="P2"), plane[:50])
    tifffile.imwrite(image(tmp_path, plate="P2", site=2), np.stack([plane, plane]))
    tifffile.imwrite(image(tmp_path, plate="P2", site=3), plane, photometric="miniswhite")  # readable, by the host
    tifffile.imwrite(image(tmp_path, plate="P2", well="A02"), plane, compression="lzma")  # readable, by the host
    for decode in ("host", "dali"):
        embed("fields", tmp_path, tmp_path / decode, "--decode", decode, "--retries", 1, exit_code=3)
    host, dali = ledger(tmp_path / "host"), ledger(tmp_path / "dali")
    assert len(host["quarantined"]) == 7
    assert len({q["reason"] for q in host["quarantined"]}) >= 5
    assert (host["totals"], host["quarantined"]) == (dali["totals"], dali["quarantined"])
    assert_same(tables(tmp_path / "host"), tables(tmp_path / "dali"), rtol=0, atol=0)
    assert (dali["decode"]["fields_dali"], dali["decode"]["fields_host"]) == (11, 7)
    (note,) = (note for note in dali["notes"] if "7 of 18 fields have files that DALI does not decode" in note)
    assert "DALI's first complaint: Critical error" in note  # of the file whose header is whole
    strict = run("embed", *field_arguments(tmp_path), "--model", tmp_path / "model.pt", "-o", tmp_path / "s", "--decode", "dali", "--strict")  # fmt: skip
    assert "--strict stops here" in str(strict.exception)


def test_a_run_that_was_stopped_goes_on_whoever_decodes(work, tmp_path, monkeypatch):
    from cellfast.embedding.blocks import BlockFiles

    embed("fields", work, tmp_path / "whole")
    real, written = BlockFiles.write, []

    def stopped(self, plan, work):
        if len(written) == 5:
            raise CellfastError("no space")
        written.append(work.block)
        real(self, plan, work)

    monkeypatch.setattr(BlockFiles, "write", stopped)
    result = embed("fields", work, tmp_path / "e", "--decode", "dali", exit_code=None)
    assert "no space" in str(result.exception)
    monkeypatch.setattr(BlockFiles, "write", lambda self, plan, work: (written.append(work.block), real(self, plan, work))[1])
    embed("fields", work, tmp_path / "e", "--decode", "dali")
    assert len(written) == len(set(written))
    assert_same(tables(tmp_path / "whole"), tables(tmp_path / "e"), rtol=0, atol=0)
    embed("fields", work, tmp_path / "e", "--decode", "host")  # finished plates are kept: the pixels are the same


def test_auto_takes_the_faster_and_says_so(work, tmp_path, monkeypatch):
    told = embed("fields", work, tmp_path / "few")
    assert "decode host: 18 fields are too few for a choice to pay (from 256)" in told.output
    assert ledger(tmp_path / "few")["decode"]["asked"] == "auto"
    monkeypatch.setattr(decoding, "MEASURE_FROM", 4)
    for name, faster in (("host", "_host_run"), ("dali", "_dali_run")):
        with monkeypatch.context() as patch:
            slow = "_dali_run" if faster == "_host_run" else "_host_run"
            patch.setattr(decoding, slow, lambda *a: lambda: __import__("time").sleep(1.0))
            told = embed("fields", work, tmp_path / name)
        record = ledger(tmp_path / name)["decode"]
        assert (record["asked"], record["used"]) == ("auto", name)
        assert "dali cpu" in record["reason"]
        assert "host" in record["reason"]
        assert "fields/s on 8 fields" in told.output
    assert_same(tables(tmp_path / "host"), tables(tmp_path / "dali"), rtol=0, atol=0)


def test_dali_that_cannot_run_is_told(work, tmp_path, monkeypatch):
    arguments = [*field_arguments(work), "--model", work / "model.pt", "-o", tmp_path / "e", "--decode", "dali"]
    for more in (["--readers", "processes"], ["--engine", "ray"]):
        assert f"--decode dali does not go with {' '.join(more)}" in str(run("embed", *arguments, *more).exception)
    store = run("embed", work, "--model", work / "model.pt", "-o", tmp_path / "e", "--decode", "dali")
    assert store.exit_code == 2
    with pytest.raises(CellfastError, match="decode: expected one of auto, host, dali"):
        EmbedOptions(decode="gpu")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "nvidia.dali", None)
        result = run("embed", *arguments)
        assert isinstance(result.exception, CellfastError)
        assert "--decode dali needs NVIDIA DALI" in str(result.exception)
        assert "pip install nvidia-dali-cuda130" in str(result.exception)
        assert "--decode host" in str(result.exception)
        patch.setattr(decoding, "MEASURE_FROM", 4)
        told = embed("fields", work, tmp_path / "auto")
        assert "decode host: DALI cannot be used" in told.output


def test_a_screen_that_dali_does_not_decode_is_refused(tmp_path):
    make_fields(tmp_path, plates=("P1",))
    make_model(tmp_path / "model.pt")
    for path in (tmp_path / "images").rglob("*.tif"):
        tifffile.imwrite(path, tifffile.imread(path), compression="lzma")
    result = embed("fields", tmp_path, tmp_path / "e", "--decode", "dali", exit_code=None)
    assert isinstance(result.exception, CellfastError)
    assert "none of the first 6 fields that can be read is a plain TIFF" in str(result.exception)


VARIANTS = {
    "plain": {}, "big-endian": {"byteorder": ">"}, "lzw": {"compression": "lzw", "predictor": True}, "zlib": {"compression": "zlib"},
    "big-endian zlib": {"byteorder": ">", "compression": "zlib", "predictor": True}, "tiles": {"tile": (16, 32), "compression": "lzw"},
    "zstd": {"compression": "zstd"}, "packbits": {"compression": "packbits"}, "bigtiff": {"bigtiff": True}, "strips": {"rowsperstrip": 7},
}  # fmt: skip


# Of 16 bits; of compressed 8-bit files, and of Deflate and PackBits, DALI does not tell the damage.
ALIKE = {"plain", "big-endian", "lzw", "tiles", "zstd", "strips"}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_file_that_is_left_encoded_decodes_to_the_pixels_of_the_host(tmp_path, dtype, device):
    rng = np.random.default_rng(0)
    planes = [rng.integers(0, np.iinfo(dtype).max, (37, 50), dtype=dtype) for _ in VARIANTS]
    contents = []
    for number, (plane, options) in enumerate(zip(planes, VARIANTS.values())):
        tifffile.imwrite(tmp_path / f"{number}.tif", plane, photometric="minisblack", **options)
        contents.append(encoded_plane(tmp_path / f"{number}.tif", expect_shape=(37, 50), expect_dtype=np.dtype(dtype)))
        np.testing.assert_array_equal(read_plane(tmp_path / f"{number}.tif"), plane)
    for how in ("cpu", "mixed") if device == "cuda" else ("cpu",):
        decoder = PlaneDecoder(np.dtype(dtype), (37, 50), 11, torch.device(device), how=how)
        broken = contents[2 if dtype == np.uint16 else 0][:-1000].copy()
        kept = {name: (content, plane) for name, content, plane in zip(VARIANTS, contents, planes) if content is not None}
        assert kept.keys() == (ALIKE if dtype == np.uint16 else {"plain", "big-endian", "strips"})
        found, bad = decoder.decode([[content for content, _ in kept.values()], [broken]])
        for (name, (_, plane)), got in zip(kept.items(), found):
            assert np.array_equal(got.cpu().numpy(), plane), name
        assert bad is None


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_what_is_checked_on_the_device_is_what_the_host_checks(dtype):
    rng = np.random.default_rng(0)
    top = np.iinfo(dtype).max
    noise = rng.integers(0, top, (3, 9, 11), dtype=dtype)
    low = noise // 4
    fields = [
        noise,
        low,
        np.stack([noise[0], noise[1], noise[0]]),
        np.stack([np.full((9, 11), top, dtype), noise[1], np.zeros((9, 11), dtype)]),
        np.stack([np.full((9, 11), top - 3, dtype)] * 2),
        noise[:1],
    ]
    for field in fields:
        assert plane_facts(torch.from_numpy(field)) == _facts(list(field))
