"""Which file belongs to which field, what its pixels and labels may be, and what a second run keeps of the first."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image
from screens import run

from cellfast.errors import CellfastError
from cellfast.metadata.paths import centroid_place, deep_profiler_place, plate_of_path
from cellfast.screens import Screen
from cellfast.screens.illumination import Illumination
from cellfast.screens.image_files import FileFinder, RemoteFinder
from cellfast.screens.image_table import read_image_table
from cellfast.screens.images import ImageError, read_plane
from cellfast.screens.ingest_crops import read_crop

HEIGHT, WIDTH = 40, 50


def write_image(path, value=1000, dtype=np.uint16):
    """A plane in which the cell at (20, 12), row and column, has the value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plane = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 97).astype(dtype)
    plane[18:23, 10:15] = value
    tifffile.imwrite(path, plane)
    return path


def write_mask(path, boxes, dtype=np.uint16):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((HEIGHT, WIDTH), dtype)
    for top, left, label in boxes:
        mask[top : top + 3, left : left + 3] = label
    if path.suffix == ".png":
        Image.fromarray(mask).save(path)
    else:
        tifffile.imwrite(path, mask)


def write_table(folder, rows):
    pd.DataFrame(rows).to_csv(folder / "load.csv", index=False)


def ingest(folder, locations, *more):
    arguments = ["ingest", "fields", folder / "load.csv", "--image-root", folder / "img", "--locations", folder / locations]
    arguments += ["--crop-size", 8, "--workers", 1, "-o", folder / "s", *more]
    return run(*arguments)


def fails(folder, locations, *more):
    result = ingest(folder, locations, *more)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, CellfastError)
    return str(result.exception)


def cells(folder):
    """{(plate, well): [(x, y, middle pixel of the first channel)]}"""
    screen = Screen.open(folder / "s")
    m, found = screen.metadata(), {}
    pixels = [int(crop[0, 4, 4]) for store in screen.plates for crop in store.crops()]
    for row, pixel in zip(m.itertuples(), pixels):
        place = (row.Metadata_Plate, row.Metadata_Well)
        found.setdefault(place, []).append((float(row.Metadata_Center_X), float(row.Metadata_Center_Y), pixel))
    return found


@pytest.fixture
def two_plates(tmp_path):
    """P1 and P2, whose images have the same names; P2's cell is 2,000."""
    for plate, value in (("P1", 1000), ("P2", 2000)):
        write_image(tmp_path / "img" / plate / "A01_w1.tif", value)
    write_table(
        tmp_path,
        [
            {
                "Metadata_Plate": p,
                "Metadata_Well": "A01",
                "Metadata_Site": 1,
                "FileName_DNA": "A01_w1.tif",
                "PathName_DNA": f"/far/{p}",
            }
            for p in ("P1", "P2")
        ],
    )
    return tmp_path


@pytest.fixture
def one_field(tmp_path):
    write_image(tmp_path / "img" / "A01.tif")
    write_table(tmp_path, [{"Metadata_Plate": "P1", "Metadata_Well": "A01", "Metadata_Site": 1, "FileName_DNA": "A01.tif"}])
    write_mask(tmp_path / "masks" / "A01_cp_masks.tif", [(19, 11, 3)])
    return tmp_path


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("f/SQ1/A01_5.npz", ("SQ1", "A01", 5)),
        ("f/SQ1/A01/5.npz", ("SQ1", "A01", 5)),
        ("f/SQ1/a1-s05.npz", ("SQ1", "A01", 5)),
        ("f/SQ_1_A01_05.npz", ("SQ_1", "A01", 5)),
        ("f/SQ1/A01/A01_5.npz", ("SQ1", "A01", 5)),
        ("f/SQ.1/AA1_5.npz", ("SQ.1", "AA01", 5)),
    ],
)
def test_places_of_features(path, place):
    assert deep_profiler_place(path) == place


def test_a_path_of_features_without_a_place_is_refused(tmp_path):
    with pytest.raises(CellfastError, match=r"^x/features\.npz: its path tells no plate"):
        deep_profiler_place(tmp_path / "x" / "features.npz", tmp_path)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("l/P1/A01-1-Nuclei.csv", (("P1", "A01", 1), 0)),
        ("l/P1/a1-s01-Cells.csv.gz", (("P1", "A01", 1), 2)),
        ("l/P1/A01_01.csv", (("P1", "A01", 1), 1)),
        ("l/P1/A01/1-Nuclei.csv", (("P1", "A01", 1), 0)),
        ("l/P1-A01-1/Nuclei.csv", (("P1", "A01", 1), 0)),
        ("l/batch/P1/analysis/P1-A01-1/Cells.csv", (("P1", "A01", 1), 2)),
        ("l/P1/analysis/A01-1/Nuclei.csv", (("P1", "A01", 1), 0)),
        ("l/P1-A01-1/Image.csv", None),
        ("l/P1/A01-1-Cytoplasm.csv", None),
    ],
)
def test_places_of_centroids(path, found):
    assert centroid_place(path, {"P1", "P2"}) == found


def test_plates_of_folders():
    plates = {"P1", "P1_rep2", "1"}
    assert plate_of_path(("P1", "masks"), plates) == "P1"
    assert plate_of_path(("P1_rep2_masks",), plates) == "P1_rep2"
    assert plate_of_path(("masks_P1",), plates) == "P1"
    assert plate_of_path(("site_1",), plates) is None
    assert plate_of_path(("P10",), plates) is None


def test_one_image_is_not_found_for_two_plates(two_plates):
    (two_plates / "n.csv").write_text("Plate,Well,x,y\nP1,A01,12,20\nP2,A01,12,20\n")
    shutil.move(two_plates / "img" / "P1" / "A01_w1.tif", two_plates / "img")
    shutil.rmtree(two_plates / "img" / "P2")
    assert "plate P2, well A01, site 1 and plate P1, well A01, site 1 have one file" in fails(two_plates, "n.csv")


def test_images_are_looked_for_under_their_plate(two_plates):
    table = pd.read_csv(two_plates / "load.csv").drop(columns="PathName_DNA")
    table.to_csv(two_plates / "load.csv", index=False)
    write_image(two_plates / "img" / "A01_w1.tif", 7)
    fields = read_image_table(two_plates / "load.csv", two_plates / "img").fields
    assert [f.files[0] for f in fields] == [str(two_plates / "img" / p / "A01_w1.tif") for p in ("P1", "P2")]


@pytest.mark.parametrize(
    "row",
    [
        {"FileName_DNA": "file:///data/My%20Img/P1/A01%20%231.tif"},
        {"FileName_DNA": "file:///D:/My Img/P1/A01 #1.tif"},
        {"FileName_DNA": r"D:\lab\P1\A01 #1.tif"},
        {"FileName_DNA": r"P1\A01 #1.tif", "PathName_DNA": r"\\server\share"},
        {"FileName_DNA": "A01 #1.tif", "PathName_DNA": "s3://bucket/x/P1"},
        {"FileName_DNA": "A01%20%231.tif", "PathName_DNA": "/x/P1/"},
        {"URL_OrigDNA": "https://host/x/P1/A01%20%231.tif"},
        {"FileName_DNA": "A01 #1.tif", "URL_DNA": "file:/x/P1/A01%20%231.tif"},
        {"DNA": "P1/A01 #1.tif"},  # DeepProfiler's index.csv
    ],
)
def test_spellings_of_a_file(tmp_path, row):
    path = write_image(tmp_path / "img" / "P1" / "A01 #1.tif")
    write_table(tmp_path, [{"Metadata_Plate": "X", "Metadata_Well": "A01", "Metadata_Site": 1, **row}])
    table = read_image_table(tmp_path / "load.csv", tmp_path / "img")
    assert table.channel_names == ("DNA",)
    assert table.fields[0].files == (str(path),)


def test_names_that_only_look_encoded(tmp_path):
    path = write_image(tmp_path / "a%20b" / "c%23d.tif")
    assert FileFinder(tmp_path).find("a%20b", "c%23d.tif") == str(path)
    assert FileFinder(tmp_path).find("nowhere", "x.tif") == str(tmp_path / "nowhere" / "x.tif")


def test_remote_files_are_looked_for_under_their_plate():
    fsspec = pytest.importorskip("fsspec")
    for name in ("img/P1/a 1.tif", "img/P2/a 1.tif"):
        fsspec.filesystem("memory").pipe(f"/{name}", b"x")
    finder = RemoteFinder("memory://img")
    assert finder.find("", "a 1.tif", "P2") == "memory://img/P2/a 1.tif"
    assert finder.find("file:///data/P1", "a%201.tif", "P1") == "memory://img/P1/a 1.tif"
    assert finder.find("/x/P3", "a 1.tif", "P3") == "memory://img/x/P3/a 1.tif"


def channels_of(tmp_path, *names, **files):
    row = {"Metadata_Plate": "P1", "Metadata_Well": "A01", "Metadata_Site": 1}
    write_table(tmp_path, [row | {f"FileName_{name}": files.get(name, f"{name}.tif") for name in names}])
    (tmp_path / "img").mkdir(exist_ok=True)
    return read_image_table(tmp_path / "load.csv", tmp_path / "img")


def test_channels_are_neither_functions_nor_outlines(tmp_path):
    table = channels_of(tmp_path, "CellOutlines", "IllumDNA", "IllumER", "OrigDNA", "OrigER", "CorrDNA")
    assert table.channel_names == ("OrigDNA", "OrigER")
    assert "CellOutlines (outlines)" in table.notes[0]
    assert table.illumination == {("P1", "OrigDNA"): ("", "IllumDNA.tif"), ("P1", "OrigER"): ("", "IllumER.tif")}
    assert channels_of(tmp_path, "DNA", "OrigDNA", "ER").channel_names == ("OrigDNA", "ER")
    assert channels_of(tmp_path, "DNA", "Flat", Flat="flat.npy").channel_names == ("DNA",)
    assert channels_of(tmp_path, "Illumina", "Original").channel_names == ("Illumina", "Original")
    with pytest.raises(CellfastError, match="no channels among its columns of files: IllumDNA"):
        channels_of(tmp_path, "IllumDNA")


@pytest.mark.parametrize(
    "name", ["P1_IllumDNA.npy", "P1_OrigDNA.npy", "P1/IllumDNA.npy", "batch/P1/P1_IllumDNA.npy", "IllumDNA.npy", "P1/DNA.npy"]
)
def test_illumination_of_orig_channels(tmp_path, name):
    for file in (name, "P2/IllumDNA.npy", "P2_IllumOrigDNA.npy"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / file, np.full((2, 2), 1.0))
    np.save(tmp_path / name, np.array([[1.0, 3.0], [1.0, 3.0]]))
    found = Illumination(tmp_path)
    assert found.function("P1", "OrigDNA").tolist() == [[0.5, 1.5], [0.5, 1.5]]
    with pytest.raises(CellfastError, match="no illumination function for plate P1, channel ER"):
        found.function("P1", "ER")


def test_illumination_that_the_table_names(tmp_path):
    for file, value in (("a/P1/flat.npy", 1.0), ("a/P2/flat.npy", 3.0)):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / file, np.array([[1.0, value]]))
    named = {
        ("P1", "DNA"): ("/far/a/P1", "flat.npy"),
        ("P2", "DNA"): ("s3://x/a/P2", "flat.npy"),
        ("P3", "DNA"): ("/a/P3", "flat.npy"),
    }
    found = Illumination(tmp_path, named)
    assert found.function("P1", "DNA").tolist() == [[1, 1]]
    assert found.function("P2", "DNA").tolist() == [[0.5, 1.5]]
    with pytest.raises(CellfastError, match="no illumination function for plate P3"):
        found.function("P3", "DNA")


def test_masks_of_one_plate_are_not_anothers(two_plates):
    write_mask(two_plates / "masks" / "P1" / "A01_w1_cp_masks.tif", [(19, 11, 3)])
    result = ingest(two_plates, "masks")
    assert result.exit_code == 0, result.output
    assert cells(two_plates) == {("P1", "A01"): [(12, 20, 1000)]}
    assert "P2 A01 site 1: no mask named A01_w1_cp_masks" in result.output
    # The folder that is given may itself be a plate's; so may that of a plate the table does not list.
    assert ingest(two_plates, "masks/P1", "--force").exit_code == 0
    assert list(cells(two_plates)) == [("P1", "A01")]
    table = pd.read_csv(two_plates / "load.csv")
    table[table["Metadata_Plate"] == "P2"].to_csv(two_plates / "load.csv", index=False)
    assert "no mask named A01_w1_cp_masks" in fails(two_plates, "masks")


def test_one_mask_for_two_plates_is_refused(two_plates):
    write_mask(two_plates / "masks" / "A01_w1_cp_masks.tif", [(19, 11, 3)])
    assert "one mask for 2 fields, plate P1, well A01, site 1 and plate P2, well A01" in fails(two_plates, "masks")


def test_masks_in_the_folders_of_their_images(tmp_path):
    for well in ("A01", "A02"):
        write_image(tmp_path / "img" / well / "s1.tif")
    row = {"Metadata_Plate": "P", "Metadata_Site": 1, "FileName_DNA": "s1.tif"}
    write_table(tmp_path, [row | {"Metadata_Well": w, "PathName_DNA": w} for w in ("A01", "A02")])
    write_mask(tmp_path / "masks" / "A02" / "s1_cp_masks.png", [(19, 11, 3)])
    assert ingest(tmp_path, "masks").exit_code == 0
    assert list(cells(tmp_path)) == [("P", "A02")]


def test_centroids_in_folders_of_wells_and_sites(two_plates):
    nuclei = "ImageNumber,ObjectNumber,Location_Center_X,Location_Center_Y\n7,1,12,20\n"
    for plate in ("P1", "P2"):
        folder = two_plates / "analysis" / f"{plate}-A01-1"
        folder.mkdir(parents=True)
        for name in ("Nuclei", "Cells", "Image", "Cytoplasm"):
            (folder / f"{name}.csv").write_text(nuclei)
    result = ingest(two_plates, "analysis")
    assert result.exit_code == 0, result.output
    assert cells(two_plates) == {("P1", "A01"): [(12, 20, 1000)], ("P2", "A01"): [(12, 20, 2000)]}
    assert "no field of the image table" not in result.output
    (two_plates / "analysis" / "P1-A01-1" / "Nuclei.csv").write_text(nuclei + "8,1,12,20\n")
    result = ingest(two_plates, "analysis")
    assert "expected the cells of one field, got those of 2 (ImageNumber)" in result.output
    assert "plate P1 is made again" in result.output
    (two_plates / "l" / "P1").mkdir(parents=True)
    for name in ("A01-1-Nuclei.csv", "a1-s01-Nuclei.csv"):
        (two_plates / "l" / "P1" / name).write_text(nuclei)
    assert "two centroid files of plate P1, well A01, site 1" in fails(two_plates, "l", "--force")


def test_a_binary_mask_is_refused_or_split(one_field):
    boxes = [(4, 4, 255), (4, 30, 255), (19, 11, 255)]
    write_mask(one_field / "masks" / "A01_cp_masks.tif", boxes, np.uint8)
    message = fails(one_field, "masks")
    assert "A01_cp_masks.tif: a binary mask: all its labelled pixels are 255, in 3 pieces" in message
    assert ingest(one_field, "masks", "--split-components").exit_code == 0
    assert [cell[:2] for cell in cells(one_field)["P1", "A01"]] == [(5, 5), (31, 5), (12, 20)]
    # Whatever else one-value masks are saved as.
    for value, dtype in ((1, bool), (1, np.float32), (1, np.uint16)):
        write_mask(one_field / "masks" / "A01_cp_masks.tif", [(t, x, value) for t, x, _ in boxes], dtype)
        assert "a binary mask" in fails(one_field, "masks", "--force")
    (one_field / "n.csv").write_text("Plate,Well,x,y\n")
    assert "--split-components is for label masks" in fails(one_field, "n.csv", "--split-components")


@pytest.mark.parametrize(
    ("boxes", "dtype", "said"),
    [
        ([(19, 11, -1), (4, 4, 2)], np.int16, "labels are numbers from 1, 0 the background; this mask has -1"),
        ([(19, 11, 1.5)], np.float32, "expected a label image [H, W] of whole numbers"),
        ([(19, 11, np.nan)], np.float32, "expected a label image [H, W] of whole numbers"),
        ([(4, 4, 1), (4, 30, 1), (20, 4, 2), (20, 30, 2)], np.uint8, "2 of its 2 labels lie in several pieces of like size"),
    ],
)
def test_masks_that_are_no_labels_are_refused(one_field, boxes, dtype, said):
    write_mask(one_field / "masks" / "A01_cp_masks.tif", boxes, dtype)
    assert said in fails(one_field, "masks")


def test_labels_in_pieces_are_named(one_field):
    write_mask(one_field / "masks" / "A01_cp_masks.tif", [(4, 4, 1), (4, 30, 2), (19, 11, 7), (30, 30, 7)])
    result = ingest(one_field, "masks")
    assert result.exit_code == 0, result.output
    assert "A01 site 1: 1 of 3 labels lie in several pieces: 7 (A01_cp_masks.tif)" in result.output
    assert [cell[:2] for cell in cells(one_field)["P1", "A01"]] == [(5, 5), (31, 5), (21.5, 25.5)]


def test_planes_are_counted_by_the_series(tmp_path):
    three = np.arange(3 * HEIGHT * WIDTH, dtype=np.uint16).reshape(3, HEIGHT, WIDTH)
    tifffile.imwrite(tmp_path / "one_page.tif", three, truncate=True, photometric="minisblack")
    tifffile.imwrite(tmp_path / "axes.tif", three[None, :1], metadata={"axes": "ZCYX"})
    tifffile.imwrite(tmp_path / "two.tif", three[:2], photometric="minisblack")
    with tifffile.TiffWriter(tmp_path / "thumbnail.tif") as writer:
        writer.write(three[0])
        writer.write(three[0, ::4, ::4], subfiletype=1)
    with tifffile.TiffFile(tmp_path / "one_page.tif") as tiff:
        assert len(tiff.pages) == 1
    for name, count in (("one_page.tif", 3), ("two.tif", 2)):
        with pytest.raises(ImageError, match=rf"{count} planes of shape"):
            read_plane(tmp_path / name)
    for name in ("axes.tif", "thumbnail.tif"):
        np.testing.assert_array_equal(read_plane(tmp_path / name), three[0])
    # A set of OME files with a plane each: this file's plane is its own.
    plane = '<TiffData FirstC="{0}"><UUID FileName="ome{0}.ome.tif">urn:uuid:{0}</UUID></TiffData>'
    xml = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0" '
        f'DimensionOrder="XYCZT" Type="uint16" SizeX="{WIDTH}" SizeY="{HEIGHT}" SizeC="2" SizeZ="1" SizeT="1">'
        f"{plane.format(0)}{plane.format(1)}</Pixels></Image></OME>"
    )
    for number in (0, 1):
        tifffile.imwrite(tmp_path / f"ome{number}.ome.tif", three[number], description=xml, metadata=None)
    np.testing.assert_array_equal(read_plane(tmp_path / "ome1.ome.tif"), three[1])


def write_png(path, pixels):
    """A PNG of 16 bits a channel."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    packed = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


def test_colour_pictures_of_16_bits_stay_16_bits(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 65536, (12, 12, 3)).astype(np.uint16)
    write_png(tmp_path / "c.png", pixels)
    np.testing.assert_array_equal(read_crop(tmp_path / "c.png"), pixels.transpose(2, 0, 1))
    with pytest.raises(ImageError, match=r"a colour image \(RGB, 16 bits a channel\)"):
        read_plane(tmp_path / "c.png")


def test_transparency_and_palettes_are_refused(tmp_path):
    grey = np.arange(144, dtype=np.uint8).reshape(12, 12)
    Image.fromarray(grey).convert("LA").save(tmp_path / "la.png")
    Image.fromarray(grey).convert("RGBA").save(tmp_path / "rgba.png")
    Image.fromarray(grey).save(tmp_path / "trns.png", transparency=3)
    write_png(tmp_path / "la16.png", np.full((12, 12, 2), 700, np.uint16))
    tifffile.imwrite(tmp_path / "la.tif", np.stack([grey, grey], -1), photometric="minisblack", extrasamples=["unassalpha"])
    for name in ("la.png", "rgba.png", "trns.png", "la16.png", "la.tif"):
        with pytest.raises(ImageError, match="alpha") as told:
            read_plane(tmp_path / name)
        assert told.value.reason == "colour image"
    with pytest.raises(CellfastError, match="alpha"):
        read_crop(tmp_path / "rgba.png")
    picture = Image.fromarray(grey, mode=None).convert("P")
    picture.save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_plane(tmp_path / "grey.png"), grey)
    picture.putpalette([value for v in range(256) for value in (v, 0, 255 - v)])
    picture.save(tmp_path / "colours.png")
    with pytest.raises(ImageError, match="palette"):
        read_plane(tmp_path / "colours.png")


def test_channels_of_two_pixel_types_are_told(tmp_path):
    write_image(tmp_path / "img" / "d.tif")
    write_image(tmp_path / "img" / "a.tif", 200, np.uint8)
    row = {"Metadata_Plate": "P", "Metadata_Well": "A01", "Metadata_Site": 1, "FileName_DNA": "d.tif", "FileName_Actin": "a.tif"}
    write_table(tmp_path, [row])
    (tmp_path / "n.csv").write_text("Plate,Well,x,y\nP,A01,12,20\n")
    assert "two pixel types: Actin 8-bit, DNA 16-bit" in fails(tmp_path, "n.csv")
    assert ingest(tmp_path, "n.csv", "--channels", "Actin").exit_code == 0


def replace_file(path, content):
    """Other content of the same size, a second later."""
    before = path.stat()
    assert len(content) == before.st_size
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))


def test_what_changed_is_made_again_and_said(one_field):
    image, mask = one_field / "img" / "A01.tif", one_field / "masks" / "A01_cp_masks.tif"
    assert ingest(one_field, "masks").exit_code == 0
    assert "are kept" in ingest(one_field, "masks").output
    write_image(one_field / "other.tif", 5000)
    replace_file(image, (one_field / "other.tif").read_bytes())
    said = "plate P1 is made again: the images of 1 of its 1 fields changed, such as A01 site 1"
    assert said in ingest(one_field, "masks").output
    assert said not in ingest(one_field, "masks").output
    assert cells(one_field) == {("P1", "A01"): [(12, 20, 5000)]}
    write_mask(one_field / "other_mask.tif", [(5, 5, 3)])
    replace_file(mask, (one_field / "other_mask.tif").read_bytes())
    assert "the locations of 1 of its 1 fields changed" in ingest(one_field, "masks").output
    assert cells(one_field)["P1", "A01"][0][:2] == (6, 6)
    table = pd.read_csv(one_field / "load.csv").assign(Metadata_Compound="taxol")
    table.to_csv(one_field / "load.csv", index=False)
    assert "its fields, their files or their treatments are others in the tables" in ingest(one_field, "masks").output
    assert Screen.open(one_field / "s").metadata()["Metadata_Compound"].tolist() == ["taxol"]
    notes = json.loads((one_field / "s" / "ledger.json").read_text())["notes"]
    assert any("made again" in note for note in notes)
    # Another wish is not another input.
    assert "made with locations" in fails(one_field, "masks", "--split-components")


@pytest.mark.parametrize("kind", ["table", "folder"])
def test_other_centroids_are_read_again(one_field, kind):
    path = one_field / ("n.csv" if kind == "table" else "l/P1/A01-1-Nuclei.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("Plate,Well,x,y\nP1,A01,12,20\n")
    locations = "n.csv" if kind == "table" else "l"
    assert ingest(one_field, locations).exit_code == 0
    replace_file(path, b"Plate,Well,x,y\nP1,A01,22,30\n")
    assert "plate P1 is made again" in ingest(one_field, locations).output
    assert cells(one_field)["P1", "A01"][0][:2] == (22, 30)


def test_a_plate_of_an_earlier_version_is_kept_and_said(one_field, monkeypatch):
    (one_field / "n.csv").write_text("Plate,Well,x,y\nP1,A01,12,20\n")
    with monkeypatch.context() as patch:
        patch.setattr("cellfast.screens.ingest_fields.stored_ledger", lambda ledger, task: ledger.__dict__)
        assert ingest(one_field, "n.csv").exit_code == 0
    assert "1 plates were made before the sizes and times of files were recorded" in ingest(one_field, "n.csv").output


def test_crops_that_changed_are_read_again(tmp_path):
    np.save(tmp_path / "a.npy", np.full((8, 8, 3), 7, np.uint8))
    np.save(tmp_path / "other.npy", np.full((8, 8, 3), 9, np.uint8))
    (tmp_path / "i.csv").write_text("file,plate,well,site,cell\na.npy,P,A01,1,1\n")
    arguments = [str(a) for a in ("ingest", "crops", tmp_path / "i.csv", "-o", tmp_path / "s")]
    assert run(*arguments).exit_code == 0
    replace_file(tmp_path / "a.npy", (tmp_path / "other.npy").read_bytes())
    assert "plate P is made again" in run(*arguments).output
    assert Screen.open(tmp_path / "s").plates[0].crops()[0, 0, 0, 0] == 9
