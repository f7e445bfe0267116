"""What files claim is bounded by what they hold; damage of every kind is one sentence; TIFFs that decoders take differently."""

from __future__ import annotations

import gzip
import io
import json
import struct
import subprocess
import sys
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
import yaml
from click.testing import CliRunner

from cellfast.bounded import check_claim, check_parquet, check_torch_file, load_npy, load_npz
from cellfast.cli import cellfast
from cellfast.errors import CellfastError
from cellfast.export import read_export_metadata
from cellfast.metadata.tables import read_table
from cellfast.model_file import load_model, load_weights
from cellfast.models import ModelConfig, SimCLR
from cellfast.profiles.feature_files import open_source
from cellfast.screens.field_store import greyscale_tiff
from cellfast.screens.illumination import Illumination
from cellfast.screens.image_table import read_image_table
from cellfast.screens.images import ImageError, encoded_plane, image_info, read_plane, read_stack
from cellfast.screens.locations import TableLocations
from cellfast.training.config import parse_assignment, resolve_config

ROOT = Path(__file__).resolve().parent.parent


def write_tiff(path, plane, *, byteorder="<", rows=None, compression=1, tags=(), first=(), drop=(), big=False):
    """A TIFF by hand; ``tags`` replace or are added: code → (type, values); ``first``: such tags before all others."""
    height, width = plane.shape
    rows = rows or height
    strips = [plane[i : i + rows].astype(plane.dtype.newbyteorder(byteorder)).tobytes() for i in range(0, height, rows)]
    if compression == 8:
        strips = [zlib.compress(strip) for strip in strips]
    begin = 16 if big else 8
    offsets = [begin + sum(map(len, strips[:i])) for i in range(len(strips))]
    listed = {
        256: (3, [width]), 257: (3, [height]), 258: (3, [8 * plane.dtype.itemsize]), 259: (3, [compression]), 262: (3, [1]),
        273: (4, offsets), 277: (3, [1]), 278: (4, [rows]), 279: (4, [len(strip) for strip in strips]),
    }  # fmt: skip
    listed.update(dict(tags))
    entries = [*first, *((code, *value) for code, value in sorted(listed.items()) if code not in drop)]
    body = b"".join(strips)
    where = begin + len(body)
    counter, pointer = ("Q", "Q") if big else ("H", "I")
    after = where + struct.calcsize("=" + counter) + len(entries) * (20 if big else 12) + struct.calcsize("=" + pointer)
    listing, values = struct.pack(byteorder + counter, len(entries)), b""
    for code, kind, numbers in entries:
        value = struct.pack(byteorder + {1: "B", 3: "H", 4: "I", 11: "f"}[kind] * len(numbers), *numbers)
        if len(value) > (8 if big else 4):
            place = after + len(values)
            values += value
            value = struct.pack(byteorder + pointer, place)
        listing += struct.pack(byteorder + "HH" + pointer, code, kind, len(numbers)) + value.ljust(8 if big else 4, b"\0")
    head = struct.pack(byteorder + "HHHQ", 43, 8, 0, where) if big else struct.pack(byteorder + "HI", 42, where)
    path.write_bytes(
        (b"II" if byteorder == "<" else b"MM") + head + body + listing + struct.pack(byteorder + pointer, 0) + values
    )
    return path


PLANE = np.random.default_rng(0).integers(0, 60000, (37, 50)).astype(np.uint16)
# Strips of 5 rows in all that have many.
ODD = {
    "fewer rows per strip than the strips have": dict(rows=5, tags={278: (4, [3])}),
    "more rows per strip": dict(rows=5, tags={278: (4, [10])}),
    "no rows per strip": dict(tags={278: (4, [0])}),
    "many strips and no rows per strip": dict(rows=5, drop=[278]),
    "strips shorter than their rows": dict(rows=5, tags={279: (4, [490] * 7 + [200])}),
    "strips longer than their rows": dict(rows=5, tags={279: (4, [510] * 7 + [200])}),
    "no lengths": dict(drop=[279]),
    "a strip too many": dict(rows=5, tags={273: (4, [8, *range(8, 3508, 500), 8]), 279: (4, [500] * 9)}),
    "a strip too few": dict(rows=5, tags={273: (4, [*range(8, 3508, 500)]), 279: (4, [500] * 7)}),
    "predictor without compression": dict(tags={317: (3, [2])}),
    "predictor 0": dict(tags={317: (3, [0])}),
    "predictor for floating point": dict(compression=8, tags={317: (3, [3])}),
    "planes apart": dict(tags={284: (3, [2])}),
    "bits from the right": dict(tags={266: (3, [2])}),
    "turned": dict(tags={274: (3, [3])}),
    "signed": dict(tags={339: (3, [2])}),
    "width twice": dict(first=[(256, 3, [25])]),
    "width as float": dict(tags={256: (11, [50.0])}),
    "tiles and strips": dict(tags={322: (3, [16]), 323: (3, [16])}),
    "deep": dict(tags={32997: (4, [2])}),
    "unknown tag of the standard": dict(tags={290: (3, [2])}),
    "BigTIFF": dict(big=True),
    "Deflate, whose damage DALI does not tell": dict(compression=8),
}
PLAIN = {
    "one strip": {},
    "strips": dict(rows=5),
    "big-endian": dict(rows=5, byteorder=">"),
    "rows per strip without end": dict(tags={278: (4, [2**32 - 1])}),
    "no rows per strip, one strip": dict(drop=[278]),
    "dates and highest value": dict(tags={281: (3, [4095]), 306: (1, list(b"2020:01:01 00:00:00\0"))}),
}


@pytest.mark.parametrize("name", ODD)
def test_files_that_decoders_take_differently_go_to_the_host(tmp_path, name):
    assert encoded_plane(write_tiff(tmp_path / "a.tif", PLANE, **ODD[name])) is None


def test_plain_files_are_decoded_by_dali_as_by_the_host(tmp_path):
    pytest.importorskip("nvidia.dali")
    from cellfast.data.plane_decoder import PlaneDecoder

    for dtype in (np.uint16, np.uint8):
        contents = []
        for number, options in enumerate(PLAIN.values()):
            path = write_tiff(tmp_path / f"{number}.tif", PLANE.astype(dtype), **options)
            np.testing.assert_array_equal(read_plane(path), PLANE.astype(dtype))
            contents.append([encoded_plane(path)])
        for (plane,) in PlaneDecoder(np.dtype(dtype), PLANE.shape, len(PLAIN), torch.device("cpu")).decode(contents):
            np.testing.assert_array_equal(plane.numpy(), PLANE.astype(dtype))


def test_damaged_compressed_files_of_8_bits_are_not_given_to_dali(tmp_path):
    for compression in ("lzw", "zlib", "packbits", "zstd"):
        tifffile.imwrite(tmp_path / "a.tif", PLANE.astype(np.uint8), photometric="minisblack", compression=compression)
        assert encoded_plane(tmp_path / "a.tif") is None


def test_a_field_store_keeps_odd_files_anew(tmp_path):
    odd = write_tiff(tmp_path / "a.tif", PLANE, **ODD["fewer rows per strip than the strips have"])
    assert greyscale_tiff(odd, "a") == (np.uint16, (37, 50), False)
    assert greyscale_tiff(write_tiff(tmp_path / "b.tif", PLANE, rows=5), "b") == (np.uint16, (37, 50), True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(rows=5, tags={273: (4, [*range(8, 3508, 500)]), 279: (4, [500] * 7)}), "7 of its 8 strips or tiles are there"),
        (dict(tags={256: (4, [60000]), 257: (4, [60000])}), "7.2 GB, more than the 3.8 kB"),
        (dict(compression=8, tags={256: (4, [60000]), 257: (4, [60000]), 278: (4, [60000])}), "7.2 GB, more than"),
        (dict(tags={322: (4, [60000]), 323: (4, [60000]), 324: (4, [8]), 325: (4, [3700])}, drop=[273, 278, 279]), "7.2 GB"),
        (dict(tags={259: (3, [34887])}), "compression LERC is not read"),
    ],
)
def test_an_image_larger_than_its_file_is_refused(tmp_path, options, says):
    path = write_tiff(tmp_path / "a.tif", PLANE, **options)
    for read in (read_plane, image_info, read_stack):
        with pytest.raises(ImageError, match=says):
            read(path)


def test_tags_that_claim_more_than_the_file_are_refused(tmp_path):
    path = write_tiff(tmp_path / "a.tif", PLANE, first=[(273, 4, [1] * 4000)])
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack("<HHI", 273, 4, 4000)) + 4 :][:4] = b""
    at = content.index(struct.pack("<HHI", 273, 4, 4000)) + 4
    content[at : at + 4] = struct.pack("<I", 2**31)
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"what its tags hold would be 8\.6 GB"):
        read_plane(path)


def png(width, height, bits=16):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def bomb(kind, folder):
    """(file, code that reads it): some kB or MB that claim some GB."""
    if kind == "tiff":
        # A small image whose one strip inflates to 330 MB.
        packer = zlib.compressobj(9)
        strip = b"".join(packer.compress(bytes(1 << 24)) for _ in range(20)) + packer.flush()
        path = write_tiff(folder / "a.tif", PLANE, compression=8)
        content = bytearray(path.read_bytes())
        for tag, value in ((273, len(content)), (279, len(strip))):
            at = content.index(struct.pack("<HHI", tag, 4, 1)) + 8
            content[at : at + 4] = struct.pack("<I", value)
        path.write_bytes(bytes(content) + strip)
        return path, "from cellfast.screens.images import read_plane as read"
    if kind == "png":
        (folder / "a.png").write_bytes(png(12000, 12000))
        return folder / "a.png", "from cellfast.screens.images import read_plane as read"
    if kind == "npy":
        np.save(folder / "a.npy", np.ones((8, 8)))
        content = (folder / "a.npy").read_bytes()
        (folder / "a.npy").write_bytes(content.replace(b"(8, 8), }", b"(90000, 90000), }").replace(b" " * 8, b"", 1))
        return folder / "a.npy", "from cellfast.screens.ingest_crops import read_crop as read"
    if kind == "npz":
        with zipfile.ZipFile(folder / "P_A01_1.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 28, 4)})
            archive.writestr("features.npy", header.getvalue() + bytes(1000))
        return folder / "P_A01_1.npz", "from cellfast.profiles.feature_files import NpzFile as read"
    if kind == "csv.gz":
        packed = gzip.compress(b"a,b\n" + b"1" * (1 << 24)) * 32
        (folder / "a.csv.gz").write_bytes(packed)
        return folder / "a.csv.gz", "from cellfast.metadata.tables import open_table as read"
    path = folder / "a.pt2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/extra/cellfast.json", json.dumps({"format": "pt2"}) + " " * (100 << 20))
    return path, "from cellfast.export import read_export_metadata as read"


BOMBS = ("tiff", "png", "npy", "npz", "csv.gz", "pt2")


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """{kind: (file, what reading it said, KiB more than after the imports)}: one process reads them all."""
    bombs = {kind: bomb(kind, tmp_path_factory.mktemp("bomb")) for kind in BOMBS}
    imports = [f"{reader.removesuffix('read')}read{number}" for number, (_, reader) in enumerate(bombs.values())]
    code = [
        "import resource, sys\nfrom pathlib import Path\nfrom cellfast.errors import CellfastError",
        *imports,
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss",
        "before = peak()",
        f"for path, read in zip(sys.argv[1:], ({', '.join(f'read{number}' for number in range(len(bombs)))},)):",
        "    said = 'nothing'",
        "    try: read(Path(path))",
        "    except CellfastError as error: said = 'told: ' + str(error)",
        "    print(peak() - before, said)",
    ]
    command = [sys.executable, "-c", "\n".join(code), *(str(path) for path, _ in bombs.values())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = [line.partition(" ") for line in done.stdout.splitlines()]
    return {kind: (bombs[kind][0], said, int(grown)) for kind, (grown, _, said) in zip(BOMBS, lines, strict=True)}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_costs_no_memory(told, kind):
    path, said, grown = told[kind]
    assert said.startswith("told:")
    assert path.name in said
    assert grown < 150 << 10, f"{grown >> 10} MB for a file of {path.stat().st_size:,} bytes"


def test_a_table_that_unpacks_without_end_is_refused(tmp_path):
    packed = gzip.compress(b"Metadata_Well,h000\n" + b"A01,1\n" * (1 << 24))
    (tmp_path / "a.csv.gz").write_bytes(packed)
    for read in (lambda: read_table(tmp_path / "a.csv.gz", "a table"), lambda: open_source([tmp_path / "a.csv.gz"])):
        with pytest.raises(CellfastError, match=r"unpack to more than"):
            read()


@pytest.mark.parametrize("cut", [0, 9, 40, -9, -1])
def test_a_damaged_gzip_table_is_one_sentence(tmp_path, cut):
    packed = bytearray(gzip.compress(b"Metadata_Well,Metadata_Compound,h000\n" + b"A01,DMSO,1.5\n" * 500))
    (tmp_path / "a.csv.gz").write_bytes(packed[: cut or None] if cut <= 0 else packed[:cut] + b"\xff\xff\xff" + packed[cut + 3 :])
    if cut == 0:
        (tmp_path / "a.csv.gz").write_bytes(b"\0" + packed[1:])
    for arguments in (
        ["profile", tmp_path / "a.csv.gz", "-o", tmp_path / "o.parquet"],
        ["evaluate", tmp_path / "a.csv.gz", "-o", tmp_path / "r.json"],
    ):
        error = CliRunner().invoke(cellfast, list(map(str, arguments))).exception
        assert isinstance(error, CellfastError), error
        assert "a.csv.gz: not a readable table" in str(error)


def test_claims_of_parquet_and_of_arrays(tmp_path):
    table = pa.table({"Metadata_Well": ["A01"] * 50, "h000": np.arange(50.0)})
    pq.write_table(table, tmp_path / "a.parquet", compression="snappy")
    check_parquet(tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    # The rows stand in the footer as a varint, zigzag: 50 is 0x64, of which one bit makes 51.
    for at in range(len(content) - 300, len(content) - 8):
        if content[at] == 100:
            (tmp_path / "b.parquet").write_bytes(content[:at] + b"\x66" + content[at + 1 :])
            with suppress(CellfastError):  # and nothing else
                list(open_source([tmp_path / "b.parquet"]).blocks(0))
    with pytest.raises(CellfastError, match=r"its table would be 9\.0 GB, more than the 2\.0 MB"):
        check_claim("a.parquet", "its table", 9e9, 2e6, most=1000)
    np.savez(tmp_path / "a.npz", other=np.zeros(3))
    with pytest.raises(CellfastError, match="expected an array 'features'; this one has other"):
        load_npz(tmp_path / "a.npz", "features")
    np.save(tmp_path / "a.npy", np.asfortranarray(np.arange(6.0).reshape(2, 3)))
    np.testing.assert_array_equal(load_npy(tmp_path / "a.npy"), np.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize("damage", ["footer", "middle", "note", "cut"])
def test_a_damaged_parquet_file_is_one_sentence(tmp_path, damage):
    table = pa.table({"Metadata_Well": ["A01", "A02"] * 50, "h000": np.arange(100.0)})
    table = table.replace_schema_metadata({b"cellfast.profile": b"[" * 100_000 if damage == "note" else b"{}"})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    if damage == "footer":
        content[-60:-20] = b"\xff" * 40
    if damage == "middle":
        content[4:60] = b"\x55" * 56
    (tmp_path / "a.parquet").write_bytes(content[:200] if damage == "cut" else content)
    error = CliRunner().invoke(cellfast, ["profile", str(tmp_path / "a.parquet"), "-o", str(tmp_path / "o.csv")]).exception
    assert isinstance(error, CellfastError), error
    # A note of the wrong kind is told as the note.
    assert "a.parquet: " in str(error)


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e300", "1.5", "x"])
def test_numbers_of_images_and_objects_that_are_none(tmp_path, value):
    (tmp_path / "P").mkdir()
    images = f"ImageNumber,Metadata_Plate,Metadata_Well,FileName_DNA\n{value},P,A01,a.tif\n"
    (tmp_path / "images.csv").write_text(images)
    if value == "nan":
        assert read_image_table(tmp_path / "images.csv", tmp_path).fields[0].image_number == -1
    else:
        with pytest.raises(CellfastError, match="row 2, column ImageNumber: expected a whole number"):
            read_image_table(tmp_path / "images.csv", tmp_path)
    columns = "ImageNumber,ObjectNumber,Location_Center_X,Location_Center_Y"
    (tmp_path / "cells.csv").write_text(f"{columns}\n{value},1,5,5\n")
    with pytest.raises(CellfastError, match="row 2: expected a number in column ImageNumber"):
        TableLocations.read(tmp_path / "cells.csv", ())
    (tmp_path / "cells.csv").write_text(f"{columns}\n1,{'-1' if value == '1.5' else value},1e300,5\n")
    found = TableLocations.read(tmp_path / "cells.csv", ()).by_image["", 1]
    assert found.object_number.tolist() == [-1]
    assert found.x.tolist() == [1e9]


def test_a_table_with_zero_bytes_is_no_text(tmp_path):
    (tmp_path / "a.csv").write_bytes("compound,concentration\nx,1\n".encode("utf-16-le"))
    with pytest.raises(CellfastError, match="it holds zero bytes; save it as UTF-8 text"):
        read_table(tmp_path / "a.csv", "a table")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("augment: " + "[" * 10_000, "nested more than 20 deep"),
        ("a: &a [1]\nb: [*a, *a]", "line 2: aliases"),
        ("plates: &a [*a]", "aliases"),
        ("seed: " + "9" * 6000, "not valid YAML"),
        ("lr: !!float x", "not valid YAML"),
        ("seed: 2001-99-99", "not valid YAML"),
        ("augment: [1, 2]", "expected the name of a preset, or a mapping"),
        ("augment: {1: 2}", "expected the name of a preset, or a mapping"),
        ("recipe: [default]", "recipe"),
        ("encoder: {a: 1}", "encoder"),
        ("steps: .inf", "steps: expected a whole number"),
        ("steps: .nan", "steps: expected a whole number"),
        ("lr: " + "9" * 400, "lr: expected a number"),
        ("plates: {a: 1}", "plates: expected a list"),
        ("- 1", "must hold `key: value` lines"),
        ("#" * (1 << 21), "expected a configuration"),
    ],
)
def test_a_configuration_of_the_wrong_kind_is_one_sentence(tmp_path, text, says):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(CellfastError, match=says) as refused:
        resolve_config(None, tmp_path / "c.yaml")
    assert len(str(refused.value)) < 1000


def test_values_of_set_are_read_alike():
    with pytest.raises(CellfastError, match="the value is not valid YAML: line 1: nested more than 20 deep"):
        parse_assignment("augment=" + "[" * 10_000)
    assert parse_assignment("plates=[A, B]") == ("plates", ["A", "B"])


def test_a_run_repeats_from_its_own_configuration(tmp_path):
    config = resolve_config("perakis2021", None, {"augment.blur_p": 0.25})
    config.save(tmp_path / "c.yaml")
    assert yaml.safe_load((tmp_path / "c.yaml").read_text())["seed"] == 0
    assert resolve_config(None, tmp_path / "c.yaml") == config


def test_model_files_that_claim_more_than_they_hold(tmp_path):
    class Bytes:
        def __reduce__(self):
            return bytearray, (1 << 34,)

    torch.save({"state": Bytes()}, tmp_path / "a.pt")
    torch.save({"state": Bytes()}, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    for name in ("a.pt", "b.pt"):
        with pytest.raises(CellfastError, match="holds a bytearray"):
            load_model(tmp_path / name)
    config = ModelConfig(encoder="cnn4", num_channels=1)
    metadata = dict(channel_names=["a"], crop_size=24, output_size=16, bits=16, scaling="screen", low=[0.0], high=[1.0])
    content = {"format": "cellfast-model", "format_version": 1, "metadata": metadata, "state": SimCLR(config).state_dict()}
    for key, value, says in (
        ("projection_dim", 1 << 28, "its model would be"),
        ("projection_layers", 1 << 28, "268,435,456 layers"),
        ("projection_dim", 7, "expected a tensor"),
    ):
        torch.save({**content, "config": {**config.to_dict(), key: value}}, tmp_path / "c.pt")
        with pytest.raises(CellfastError, match=says):
            load_model(tmp_path / "c.pt")
    torch.save({**content, "config": config.to_dict(), "metadata": {**metadata, "crop_size": 1 << 30}}, tmp_path / "c.pt")
    with pytest.raises(CellfastError, match="at most 16384 px"):
        load_model(tmp_path / "c.pt")
    wide = torch.zeros(1).expand(16, 1 << 30, 3, 3)
    torch.save({**SimCLR(config).encoder.state_dict(), "features.0.weight": wide}, tmp_path / "w.pth")
    with pytest.raises(CellfastError, match=r"its tensor features\.0\.weight would be"):
        load_weights(SimCLR(config), tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "e.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("e/extra/cellfast.json", "[" * 100_000)
    with pytest.raises(CellfastError):
        read_export_metadata(tmp_path / "e.pt2")
    with zipfile.ZipFile(tmp_path / "b.pt2", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("e/extra/cellfast.json", "{}")
    with pytest.raises(CellfastError, match="packed in a way that is not read"):
        check_torch_file(tmp_path / "b.pt2")


def test_an_illumination_function_of_impossible_values(tmp_path):
    values = np.ones((4, 5))
    values[0] = 1e-320
    np.save(tmp_path / "DNA.npy", values)
    with pytest.raises(CellfastError, match="too far apart"):
        Illumination(tmp_path).function("P", "DNA")


def test_memory_that_is_not_there_is_one_sentence(tmp_path, capsys, monkeypatch):
    import cellfast.cli as cli

    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")):

        def fails(*, prog_name, error=error):
            raise error

        monkeypatch.setattr(cli, "cellfast", fails)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 1
        assert "Error: this takes more memory than there is" in capsys.readouterr().err
    monkeypatch.setattr("cellfast.bounded.available_bytes", lambda: 1e6)
    monkeypatch.setattr("cellfast.bounded.ALWAYS_THERE", 1 << 20)
    np.save(tmp_path / "a.npy", np.zeros(1 << 18))
    with pytest.raises(CellfastError, match=r"takes 2\.1 MB of memory, and 1\.0 MB are free"):
        load_npy(tmp_path / "a.npy")
