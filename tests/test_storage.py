"""Folders on a disk and in an object store do the same; the files of a field store are files of fsspec."""

from __future__ import annotations

import pickle
import zlib

import fsspec
import numpy as np
import pytest
import tifffile

from cellfast.errors import CellfastError
from cellfast.screens.field_store import write_field_store
from cellfast.screens.field_store_files import FieldStoreFileSystem, store_url
from cellfast.screens.inputs import FileTimes
from cellfast.storage.folder import LocalFolder, RemoteFolder, folder_at
from cellfast.storage.urls import exists, file_system, read_bytes


@pytest.fixture(params=["local", "fsspec on a disk", "memory"])
def folder(request, tmp_path, monkeypatch):
    if request.param == "local":
        yield folder_at(tmp_path / "out")
    elif request.param == "memory":
        yield folder_at("memory://test-storage/out")
        fsspec.filesystem("memory").store.clear()
        fsspec.filesystem("memory").pseudo_dirs[:] = [""]
    else:
        # Object stores have no folders that would have to be made.
        monkeypatch.setitem(fsspec.config.conf, "file", {"auto_mkdir": True})
        yield RemoteFolder(f"file://{tmp_path}/out")


def test_every_folder_keeps_the_protocol(folder):
    assert folder.names("") == folder.names("plates") == []
    assert not folder.exists("a")
    for missing in (folder.read_bytes, folder.checksum, lambda name: folder.reading(name).__enter__()):
        with pytest.raises(FileNotFoundError):
            missing("a")
    folder.remove("a")

    folder.write_bytes("a", b"one")
    folder.write_bytes("a", b"two")
    with folder.writing("plates/P 1.parquet") as path:
        path.write_bytes(b"rows")
        assert path.suffix == ".parquet"
    half = folder.writing("plates/P2.parquet")
    half.__enter__().write_bytes(b"half")
    assert not half.__exit__(KeyError, KeyError(), None)
    assert folder.names("") == ["a", "plates"]
    assert folder.names("plates") == ["P 1.parquet"]
    assert folder.exists("a")
    assert not folder.exists("plates/P2.parquet")
    assert folder.read_bytes("a") == b"two"
    with folder.reading("plates/P 1.parquet") as file:
        file.seek(2)
        assert file.read() == b"ws"
    assert folder.checksum("a") == {"bytes": 3, "crc32": f"{zlib.crc32(b'two'):08x}"}
    assert folder.path("a").startswith(str(folder))
    assert (folder.on_disk("a") is None) == isinstance(folder, RemoteFolder)

    again = pickle.loads(pickle.dumps(folder))
    assert type(again) is type(folder)
    assert again.read_bytes("a") == b"two"

    folder.remove("plates")
    folder.remove_partial_files("", deep=True)
    assert folder.names("") == ["a"]
    for name in ("../a", "/a", "a//b", "a/", "..\\a", "a\0"):
        with pytest.raises(CellfastError, match="leads out of the output folder"):
            folder.write_bytes(name, b"")
    assert folder.names("") == ["a"]


def test_what_a_location_means(tmp_path):
    assert isinstance(folder_at(f"file://{tmp_path}"), LocalFolder)
    assert isinstance(folder_at("memory://a"), RemoteFolder)
    (tmp_path / "file").write_text("")
    for location, message in (
        (tmp_path / "file", "is a file: expected a folder"),
        ("memory://", "names no folder: expected memory://BUCKET/FOLDER"),
        ("nothing://a", "Protocol not known"),
    ):
        with pytest.raises(CellfastError, match=message):
            folder_at(location)


@pytest.fixture
def store(tmp_path):
    """A field store of two files, under a name that asks for trouble."""
    folder = tmp_path / "odd! a::b"
    folder.mkdir()
    names = [["P1/x::y.tif"], ["P1/b c.tif"]]
    for number in range(2):
        tifffile.imwrite(folder / f"{number}.tif", np.full((4, 5), number, np.uint16))
    write_field_store(folder / "F.h5", [[folder / "0.tif"], [folder / "1.tif"]], names=names)
    return folder / "F.h5"


def test_the_files_of_a_field_store_are_files_of_fsspec(store):
    root = store_url(store)
    expected = {name: (store.parent / f"{n}.tif").read_bytes() for n, name in enumerate(("P1/x::y.tif", "P1/b c.tif"))}
    fs, key = file_system(root)
    assert key == ""
    assert fs.isdir(key)
    assert fs.find(key) == sorted(expected)
    assert fs.ls("P1", detail=False) == ["P1/b c.tif", "P1/x::y.tif"]
    for name, content in expected.items():
        assert read_bytes(f"{root}/{name}") == content
        assert exists(f"{root}/{name}")
        assert fs.size(name) == len(content)
        with fs.open(name) as file:
            np.testing.assert_array_equal(
                tifffile.imread(file), tifffile.imread(store.parent / f"{list(expected).index(name)}.tif")
            )
    assert not exists(f"{root}/P1")
    with pytest.raises(FileNotFoundError):
        read_bytes(f"{root}/P1/none.tif")
    with pytest.raises(FileNotFoundError):
        fs.ls("P2", detail=False)
    with pytest.raises(OSError, match="only read"):
        fs.open("P1/new.tif", "wb")
    assert FileTimes().of(f"{root}/P1/b c.tif") == [store.stat().st_size, store.stat().st_mtime_ns]
    with pytest.raises(CellfastError, match=r"G\.h5: no such field store"):
        file_system(f"fieldstore://{store.parent}/G.h5!/a")


def test_any_program_opens_a_field_store_once_cellfast_is_imported(store, tmp_path):
    # A chain needs a path without its own separator.
    plain = tmp_path / "F.h5"
    plain.write_bytes(store.read_bytes())
    with fsspec.open(f"{store_url(plain)}/P1/b c.tif") as file:
        assert file.read() == (store.parent / "1.tif").read_bytes()
    assert fsspec.get_filesystem_class("fieldstore") is FieldStoreFileSystem
