"""Names that become files: one rule, for tables and for the files of other programs."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
from screens import make_fields, make_model, run, write_plate

from cellfast.errors import CellfastError
from cellfast.metadata.batches import batch_of_plate
from cellfast.metadata.names import file_name
from cellfast.model_file import ModelMetadata
from cellfast.screens import PlateStore, Screen
from cellfast.screens.illumination import Illumination
from cellfast.screens.sealed import seal

REFUSED = ["", "../x", "a/b", "a\\b", ".x", "-x", " x", "x ", "x.", "a\nb", "a\x1b[2J", "a\u202eb", "a\u200bb", "a\0b", "a*", "a?", "c:d",
           "NUL", "com1.txt", "x" * 201, "é" * 101]  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_names_that_would_make_odd_files_are_refused(name):
    with pytest.raises(CellfastError, match=r"plate name .* cannot name a file") as caught:
        file_name("plate", name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["Week1_22123", "BR00116991", "plate 1 (a)", "P-1.2", "Плата", "x" * 200, "console"])
def test_names_in_use_are_kept(name):
    assert file_name("plate", name) == name


def _damaged(tmp_path, change):
    path, _ = write_plate(tmp_path / "screen", "P1")
    with h5py.File(path, "r+") as file:
        change(file)
    seal(path, "crops")
    return path


def _well(name):
    def change(file):
        names = file["wells/name"][:]
        names[0] = name
        file["wells/name"][:] = names

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.attrs.__setitem__("plate", "../../x"), "plate name '../../x'"),
        (lambda file: file.attrs.__setitem__("plate", "a\u202eb"), "plate name"),
        (lambda file: file.attrs.__setitem__("batch", "../x"), "batch name '../x'"),
        (_well("../../../x"), "well '../../../x'"),
        (_well("A1"), "expected 'A01'"),
    ],
)
def test_a_crop_store_may_not_name_files_as_it_likes(tmp_path, change, message):
    path = _damaged(tmp_path, change)
    with pytest.raises(CellfastError, match=message):
        PlateStore(path)


@pytest.mark.parametrize("where", ["plate", "batch", "well"])
def test_nothing_is_written_outside_the_output(tmp_path, where):
    write = {"well": _well("../../../../../evil")}.get(where, lambda file: file.attrs.__setitem__(where, "../../../evil"))
    _damaged(tmp_path, write)
    model = make_model(tmp_path / "model.pt", crop=16, view=8)
    result = run("embed", tmp_path / "screen", "--model", model, "-o", tmp_path / "a/b/c/out", "--to", "cpg", "--device", "cpu")
    assert isinstance(result.exception, CellfastError)
    assert "evil" in str(result.exception)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pt", "screen"]


def test_one_plate_in_two_files_is_refused(tmp_path):
    path, _ = write_plate(tmp_path, "P1")
    path.with_name("P2.h5").write_bytes(path.read_bytes())
    with pytest.raises(CellfastError, match="both of plate P1"):
        Screen.open(tmp_path)


def test_batches_and_channels(tmp_path):
    with pytest.raises(CellfastError, match="batch name"):
        batch_of_plate("a..b", r"\.\.")
    with pytest.raises(CellfastError, match="channel"):
        ModelMetadata(["a\0"], 16, 8, 16, "screen", [0.0], [1.0])
    np.save(tmp_path / "x.npy", np.ones((4, 4)))
    (tmp_path / "sub").mkdir()
    np.save(tmp_path / "sub" / "DNA.npy", np.ones((4, 4)))
    with pytest.raises(CellfastError, match=r"channel name '\.\./x'"):
        Illumination(tmp_path / "sub").function("P1", "../x")


def test_a_run_with_a_password_in_its_urls_keeps_it_nowhere(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    make_fields(tmp_path, plates=("P1",), wells=("A02",))
    remote = fsspec.filesystem("memory")
    root = "memory://user:hunter2pw@names"
    for folder in ("images", "locations"):
        remote.put(str(tmp_path / folder), f"{root}/{folder}", recursive=True)
    remote.put_file(str(tmp_path / "load_data.csv"), f"{root}/load_data.csv")
    model = make_model(tmp_path / "model.pt")
    fields = [f"{root}/load_data.csv", "--image-root", f"{root}/images", "--locations", f"{root}/locations"]
    # A second run compares what the first one wrote with what it is asked for.
    for _ in range(2):
        done = run("embed", *fields, "--model", str(model), "-o", str(tmp_path / "out"))
        assert done.exit_code == 0, done.exception
        assert "hunter2pw" not in done.output
    assert "1 of 1 plates were embedded before" in done.output
    for _ in range(2):
        fields[0] = str(tmp_path / "load_data.csv")
        done = run("ingest", "fields", *fields, "--crop-size", "24", "-o", str(tmp_path / "screen"))
        assert done.exit_code == 0, done.exception
    written = [p for folder in ("out", "screen") for p in (tmp_path / folder).rglob("*") if p.is_file()]
    assert len(written) >= 4
    for file in written:
        assert b"hunter2pw" not in file.read_bytes(), file
    remote.rm("/user:hunter2pw@names", recursive=True)
