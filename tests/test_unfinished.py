"""An ingest that did not end, and pixels that are not what was written: told by every command that would use them."""

from __future__ import annotations

import pytest
from screens import make_fields, make_model, run

from cellfast.errors import CellfastError
from cellfast.screens import Screen
from cellfast.screens.crop_writer import PlateWriter


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    make_fields(folder)
    make_model(folder / "model.pt")
    return folder


def ingest(work, screen, *more):
    where = ["--image-root", work / "images", "--locations", work / "locations"]
    return run("ingest", "fields", work / "load_data.csv", *where, "--crop-size", 24, "--workers", 1, "-o", screen, *more)


@pytest.fixture
def screen(work, tmp_path):
    assert ingest(work, tmp_path / "s").exit_code == 0
    return tmp_path / "s"


def commands(work, screen, out):
    training = ["--encoder", "cnn4", "--batch-size", 4, "--steps", 1, "--output-size", 16, "--device", "cpu"]
    return {
        "info": ["info", screen],
        "train": ["train", screen, "-o", out / "run", *training],
        "embed": ["embed", screen, "--model", work / "model.pt", "-o", out / "emb", "--device", "cpu"],
    }


@pytest.mark.parametrize("command", ["info", "train", "embed"])
def test_an_unfinished_ingest_is_refused_unless_it_is_allowed(work, screen, tmp_path, command):
    (screen / "ledger.json").unlink()
    arguments = commands(work, screen, tmp_path)[command]
    refused = run(*arguments)
    assert isinstance(refused.exception, CellfastError), refused.output
    assert "there is no ledger.json" in str(refused.exception)
    assert "--allow-unfinished" in str(refused.exception)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "emb").exists()
    allowed = run(*arguments, "--allow-unfinished")
    assert allowed.exit_code == 0, f"{allowed.output} {allowed.exception!r}"
    assert "the ingest was not finished" in allowed.output


def test_an_ingest_that_stops_leaves_no_ledger_of_an_earlier_one(work, screen, monkeypatch):
    whole = PlateWriter._finish
    monkeypatch.setattr(PlateWriter, "_finish", lambda self: whole(self) if self.plate == "P1" else 1 / 0)
    assert isinstance(ingest(work, screen, "--force").exception, ZeroDivisionError)
    assert not (screen / "ledger.json").exists()
    with pytest.raises(CellfastError, match="the ingest was not finished"):
        Screen.open(screen)
    monkeypatch.undo()
    assert ingest(work, screen).exit_code == 0
    assert Screen.open(screen).unfinished == ""
    assert sorted(path.name for path in screen.iterdir() if path.name != ".ingest.lock") == ["ledger.json", "plates"]


def test_an_ingest_that_does_not_begin_changes_nothing(work, screen):
    before = (screen / "ledger.json").read_bytes()
    assert "ingest into another folder" in str(ingest(work, screen, "--border", "reflect").exception)
    assert (screen / "ledger.json").read_bytes() == before
    assert Screen.open(screen).unfinished == ""


@pytest.mark.parametrize("command", ["train", "embed"])
def test_damaged_pixels_are_told_where_they_are_used(work, screen, tmp_path, command):
    store = Screen.open(screen).plates[0]
    with open(store.path, "r+b") as file:
        for row in range(store.num_cells):
            file.seek(store.offset + row * 2 * 24 * 24 * 2)
            file.write(b"\x07\x77")
    failed = run(*commands(work, screen, tmp_path)[command])
    assert isinstance(failed.exception, CellfastError), failed.output
    assert f"plate {store.plate}: the pixels of" in str(failed.exception)
    assert "row " in str(failed.exception)
    assert not (tmp_path / "run" / "model.pt").exists()
    assert not (tmp_path / "emb" / "embeddings.json").exists()
