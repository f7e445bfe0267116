"""Embedding when things go wrong: killed at any moment, files that are missing or broken, no space, no memory, two runs at once."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from screens import assert_same, embed, field_arguments, make_fields, make_model, run, tables

from cellfast.embedding.encoder import CropEncoder
from cellfast.errors import CellfastError
from cellfast.storage.folder import folder_at
from cellfast.storage.locks import LOCK_NAME, STALE_AFTER_S, OutputLock, _system


@pytest.fixture
def fields(tmp_path):
    """A copy of the fields that a test may break."""
    make_fields(tmp_path, sites=3)
    make_model(tmp_path / "model.pt")
    return tmp_path


def image(folder, plate="P1", well="B03", site=1, channel="Actin"):
    return folder / "images" / plate / f"{well}_s{site}_{channel}.tif"


# Imports once, then runs `cellfast embed` in forked children: one thread, slowed down so that a kill can fall anywhere in it.
DRIVER = """
import os, signal, sys, time
import cellfast.cli.embed, cellfast.embedding.embed, cellfast.training.loop
from cellfast.cli import main
from cellfast.embedding import encoder
real = encoder.CropEncoder._encode
def slowly(self, *a):
    time.sleep(0.02)
    return real(self, *a)
encoder.CropEncoder._encode = slowly
arguments = sys.argv[2:]
for line in sys.stdin:
    delay = float(line)
    child = os.fork()
    if child == 0:
        sys.argv = ["cellfast", *arguments]
        try:
            main()
            code = 0
        except SystemExit as error:
            code = error.code or 0
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code)
    if delay >= 0:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.parametrize("source", ["fields", pytest.param("store", marks=pytest.mark.slow)])
def test_killed_at_any_moment_every_cell_is_there_once(clean, tmp_path, source):
    out = tmp_path / "e"
    where = field_arguments(clean) if source == "fields" else [clean / "store"]
    command = [*where, "--model", clean / "model.pt", "-o", out, "--batch-size", "2", "--threads", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, "-", "embed", *map(str, command)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
    )  # fmt: skip
    moments = random.Random(source)

    def attempt(delay):
        driver.stdin.write(f"{delay}\n")
        driver.stdin.flush()
        while not (line := driver.stdout.readline()).startswith("ended"):
            assert line
        return int(line.split()[1])

    killed = 0
    for number in range(6):
        killed += attempt(0.25 + 0.15 * number + moments.uniform(0, 0.3)) == -signal.SIGKILL
        for file in out.glob("*.parquet"):
            if not file.name.startswith("."):
                assert pq.read_metadata(file).num_rows == pq.read_metadata(clean / "clean" / file.name).num_rows
    assert killed >= 2
    assert attempt(-1) == 0
    driver.stdin.close()
    driver.stdout.close()
    assert driver.wait() == 0
    assert_same(tables(out), tables(clean / "clean"))
    keys = ["Metadata_Well", "Metadata_Site", "Metadata_ObjectNumber"]
    assert not any(t.duplicated(keys).any() for t in tables(out).values())
    ledger = json.loads((out / "embeddings.json").read_text())
    assert ledger["rows"] == sum(map(len, tables(out).values()))
    assert not [p for p in out.rglob(".*partial*")]


def test_a_second_run_does_only_what_is_left(clean, tmp_path, monkeypatch):
    calls = []
    real = CropEncoder._encode

    def stopping(self, crops, low, high):
        calls.append(len(crops))
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(self, crops, low, high)

    monkeypatch.setattr(CropEncoder, "_encode", stopping)
    embed("fields", clean, tmp_path / "e", "--batch-size", 8, exit_code=None)
    first = sum(calls[:7])
    embed("fields", clean, tmp_path / "e", "--batch-size", 8)
    total = sum(map(len, tables(clean / "clean").values()))
    assert total <= first + sum(calls[8:]) <= total + 40
    assert sum(calls[8:]) < total
    assert_same(tables(tmp_path / "e"), tables(clean / "clean"))


def test_broken_and_missing_fields_are_quarantined_and_can_be_mended(fields, clean, tmp_path):
    saved = {}
    for path in (image(fields), image(fields, "P2", "A02", 1, "DNA")):
        saved[path] = path.read_bytes()
    image(fields).write_bytes(saved[image(fields)][:200])
    image(fields, "P2", "A02", 1, "DNA").unlink()
    location = fields / "locations" / "P2" / "A10-1-Nuclei.csv"
    centers = location.read_text()
    location.write_text("")
    result = embed("fields", fields, tmp_path / "e", "--retries", 1, exit_code=3)
    quarantine = pd.read_csv(tmp_path / "e" / "quarantine.csv")
    assert list(zip(quarantine["plate"], quarantine["well"], quarantine["reason"], quarantine["tries"])) == [
        ("P1", "B03", "not a readable image", 2),
        ("P2", "A02", "file missing", 2),
        ("P2", "A10", "locations not usable", 2),
    ]
    assert "3 fields were quarantined" in result.output
    ledger = json.loads((tmp_path / "e" / "embeddings.json").read_text())
    for plate in ledger["plates"]:
        assert plate["locations"] == plate["rows"] + sum(plate["dropped"].values())
    assert ledger["totals"]["dropped"] == {"field refused: not a readable image": 7, "field refused: file missing": 8}
    whole = tables(clean / "clean")
    bad = whole["P1"].query("Metadata_Well == 'B03' and Metadata_Site == 1").index
    assert_same({"P1": tables(tmp_path / "e")["P1"]}, {"P1": whole["P1"].drop(bad).reset_index(drop=True)})
    embed("fields", fields, tmp_path / "e", exit_code=3)
    for path, content in saved.items():
        path.write_bytes(content)
    location.write_text(centers)
    embed("fields", fields, tmp_path / "e", "--retry-quarantined")
    assert not (tmp_path / "e" / "quarantine.csv").exists()
    assert_same(tables(tmp_path / "e"), whole)


def test_a_missing_file_of_a_pattern_can_be_mended(fields, tmp_path):
    pattern = r"^(?P<plate>P\d)/(?P<well>[A-Z]\d\d)_s(?P<site>\d)_(?P<channel>DNA|Actin)"
    where = [
        "--pattern",
        pattern,
        "--image-root",
        fields / "images",
        "--locations",
        fields / "locations",
        "--channels",
        "DNA,Actin",
    ]
    command = ["embed", *where, "--model", fields / "model.pt", "-o", tmp_path / "e"]
    content = image(fields).read_bytes()
    image(fields).unlink()
    assert run(*command, "--retries", 0).exit_code == 3
    image(fields).write_bytes(content)
    # The file that came is noticed, and its plate made again.
    assert run(*command).exit_code == 0
    embed("fields", fields, tmp_path / "f")
    columns = ["Metadata_Well", "Metadata_Site", "Metadata_ObjectNumber", "h000"]
    for plate, table in tables(tmp_path / "f").items():
        pd.testing.assert_frame_equal(tables(tmp_path / "e")[plate][columns], table[columns], rtol=1e-4, atol=1e-5)


def test_images_and_locations_that_changed_are_embedded_again(fields, tmp_path):
    formats = ("--to", "parquet", "--to", "cpg")
    embed("fields", fields, tmp_path / "e", *formats)
    path = image(fields, "P2")
    tifffile.imwrite(path, tifffile.imread(path)[::-1].copy())  # of the same size
    os.utime(path, ns=(1, 1))
    again = embed("fields", fields, tmp_path / "e", *formats)
    assert "plate P2 is embedded again: the images of 1 of its 9 fields changed, such as B03 site 1" in again.output
    assert "1 of 2 plates were embedded before and are kept" in again.output
    assert "P2 is embedded again" in str(json.loads((tmp_path / "e" / "embeddings.json").read_text())["notes"])
    location = fields / "locations" / "P1" / "A10-1-Nuclei.csv"
    location.write_text(location.read_text().replace("1", "2", 1))
    assert "plate P1 is embedded again: the locations of 1 of" in embed("fields", fields, tmp_path / "e", *formats).output
    embed("fields", fields, tmp_path / "fresh")
    assert_same(tables(tmp_path / "e"), tables(tmp_path / "fresh"))
    assert "2 of 2 plates" in embed("fields", fields, tmp_path / "e", *formats).output


def test_blocks_of_other_files_are_not_gone_on_with(fields, tmp_path, monkeypatch):
    from cellfast.embedding import run as embedding_run

    def stop(self, plan, **options):
        raise CellfastError("stopped before the plate's file")

    with monkeypatch.context() as patch:
        patch.setattr(embedding_run.EmbedRun, "assemble", stop)
        embed("fields", fields, tmp_path / "e", exit_code=1)
    assert list((tmp_path / "e" / ".embed" / "blocks" / "P1").rglob("*.arrow"))
    os.utime(image(fields), ns=(1, 1))
    result = embed("fields", fields, tmp_path / "e")
    assert "plate P1 was begun with other files or options and is begun anew" in result.output
    assert "plate P2 was begun with other" not in result.output


def test_a_file_server_that_stumbles_is_tried_again(clean, tmp_path, monkeypatch):
    from cellfast.screens import field_cells
    from cellfast.screens.images import ImageError

    real, failed = field_cells.read_plane, set()

    def stumbling(path, **expected):
        if path not in failed and "A10" in str(path):
            failed.add(path)
            raise ImageError(f"{path}: cannot be read (OSError: Stale file handle)", "not a readable image")
        return real(path, **expected)

    monkeypatch.setattr(field_cells, "read_plane", stumbling)
    monkeypatch.setattr("cellfast.embedding.field_source.FIRST_PAUSE_S", 0.001)
    embed("fields", clean, tmp_path / "e")
    assert failed
    assert_same(tables(tmp_path / "e"), tables(clean / "clean"))


def test_strict_stops_and_nothing_usable_is_an_error(fields, tmp_path):
    image(fields).unlink()
    result = embed("fields", fields, tmp_path / "e", "--strict", "--retries", 0, exit_code=1)
    assert "--strict stops here" in str(result.exception)
    for file in (fields / "locations").rglob("*.csv"):
        file.rename(file.with_suffix(".gone"))
    (fields / "locations" / "other.csv").write_text("x\n")
    result = embed("fields", fields, tmp_path / "f", "--retries", 0, exit_code=1)
    assert "no field could be used" in str(result.exception)
    assert "no such file" in str(result.exception)


def test_no_space_stops_cleanly_and_a_rerun_completes(clean, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for out, limit, formats in (("part", 3_000, []), ("plate", 20_000, ["--to", "parquet"])):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            result = embed("fields", clean, tmp_path / out, *formats, exit_code=None)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert isinstance(result.exception, CellfastError), result.output
        assert "no space left" in str(result.exception)
        assert not [p for p in (tmp_path / out).rglob("*") if "partial" in p.name]
        assert not list((tmp_path / out).glob("*.parquet"))
        embed("fields", clean, tmp_path / out)
        assert_same(tables(tmp_path / out), tables(clean / "clean"))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_halves_the_minibatch(clean, tmp_path, monkeypatch, error):
    sizes, real = [], CropEncoder._features

    def small_device(self, x):
        sizes.append(len(x))
        if len(x) > 5:
            raise error
        return real(self, x)

    monkeypatch.setattr(CropEncoder, "_features", small_device)
    result = embed(clean / "store", clean, tmp_path / "e", "--batch-size", 32)
    assert "out of memory with 32 cells at a time; going on with 16" in result.output
    assert sizes[:4] == [32, 16, 8, 4]
    assert max(sizes[4:]) == 4
    assert_same(tables(tmp_path / "e"), tables(clean / "clean"))
    monkeypatch.setattr(CropEncoder, "_features", lambda self, x: (_ for _ in ()).throw(error))
    result = embed("fields", clean, tmp_path / "f", exit_code=1)
    assert "one cell at a time" in str(result.exception)


def test_other_errors_of_the_encoder_are_not_taken_for_memory(clean, tmp_path, monkeypatch):
    def broken(self, x):
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(CropEncoder, "_features", broken)
    assert "a kernel failed" in str(embed("fields", clean, tmp_path / "e", exit_code=1).exception)


def test_a_model_that_gives_no_numbers_is_told(clean, tmp_path, monkeypatch):
    real = CropEncoder._features
    monkeypatch.setattr(CropEncoder, "_features", lambda self, x: real(self, x) * float("nan"))
    result = embed("fields", clean, tmp_path / "e", exit_code=1)
    assert "not finite" in str(result.exception)


def test_two_runs_on_one_output_refuse_each_other(clean, tmp_path):
    with OutputLock(folder_at(tmp_path / "e")):
        result = embed("fields", clean, tmp_path / "e", exit_code=1)
        assert f"process {os.getpid()} on" in str(result.exception)
    embed("fields", clean, tmp_path / "e")
    # What a dead run wrote into the lock file holds nobody up: the kernel let go of it.
    (tmp_path / "e" / LOCK_NAME).write_text(json.dumps({"pid": 1, "host": "elsewhere", "renewed": time.time()}))
    embed("fields", clean, tmp_path / "e")


def test_locks_where_the_kernel_has_none(tmp_path, monkeypatch):
    import socket

    monkeypatch.setattr("cellfast.storage.locks.HEARTBEAT_S", 0.05)
    monkeypatch.setattr("cellfast.storage.locks.LOOK_EVERY_S", 0.2)
    place = folder_at("memory://lock-test")
    with OutputLock(place):
        before = json.loads(place.read_bytes(LOCK_NAME))["beat"]
        with pytest.raises(CellfastError, match="another cellfast embed"):
            OutputLock(place).__enter__()
        time.sleep(0.2)
        assert json.loads(place.read_bytes(LOCK_NAME))["beat"] > before
    assert not place.exists(LOCK_NAME)
    ended = subprocess.Popen(["true"])
    ended.wait()
    gone = {"pid": ended.pid, "host": socket.gethostname(), "system": _system(), "token": "other"}
    place.write_bytes(LOCK_NAME, json.dumps(gone).encode())
    with OutputLock(place):
        pass


class Clock:
    """Seconds that pass when somebody sleeps; what happens meanwhile is called then."""

    def __init__(self, meanwhile=lambda: None):
        self.now, self.meanwhile = 0.0, meanwhile

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.meanwhile()


@pytest.mark.parametrize("wrong_s", [-1e6, 0, 1e6])
def test_a_lock_is_judged_by_whether_it_changes_and_not_by_its_owners_clock(wrong_s):
    place = folder_at("memory://clocks")
    beats = iter(range(1000))
    owner = {"pid": 1, "host": "another-host", "renewed": time.time() + wrong_s, "token": "other"}

    def beat():
        place.write_bytes(LOCK_NAME, json.dumps({**owner, "beat": next(beats)}).encode())

    beat()
    alive = Clock(lambda: beat() if alive.now % 30 == 0 else None)
    with pytest.raises(CellfastError, match="process 1 on another-host"):
        OutputLock(place, clock=alive, sleep=alive.sleep).__enter__()
    assert alive.now <= 30
    dead, told = Clock(), []
    with OutputLock(place, clock=dead, sleep=dead.sleep, tell=told.append):
        assert STALE_AFTER_S <= dead.now < STALE_AFTER_S + 30
    assert "process 1 on another-host" in told[0]
    # An observer that was stopped itself looks once more before it takes a lock.
    beat()
    stopped = Clock(lambda: (setattr(stopped, "now", 1e5), beat()))
    with pytest.raises(CellfastError, match="process 1 on another-host"):
        OutputLock(place, clock=stopped, sleep=stopped.sleep).__enter__()
    place.remove(LOCK_NAME)


def test_a_process_number_of_another_system_says_nothing(monkeypatch):
    place = folder_at("memory://systems")
    clock = Clock(lambda: place.write_bytes(LOCK_NAME, json.dumps({**owner, "beat": 1}).encode()))
    ended = subprocess.Popen(["true"])
    ended.wait()
    # Two containers may have the same host name, and each its own processes.
    import socket

    owner = {"pid": ended.pid, "host": socket.gethostname(), "system": "another container", "token": "other"}
    place.write_bytes(LOCK_NAME, json.dumps(owner).encode())
    with pytest.raises(CellfastError, match="another cellfast embed"):
        OutputLock(place, clock=clock, sleep=clock.sleep).__enter__()
    place.remove(LOCK_NAME)


def test_a_run_that_was_stopped_asks_the_store_before_it_writes():
    place, clock = folder_at("memory://stopped"), Clock()
    with OutputLock(place, clock=clock, sleep=clock.sleep) as lock:
        clock.now += 1000
        lock.check()  # nobody came meanwhile: the lock is renewed
        assert json.loads(place.read_bytes(LOCK_NAME))["beat"] == 2
        clock.now += 1000
        other = json.dumps({"pid": 1, "host": "another-host", "token": "other"}).encode()
        place.write_bytes(LOCK_NAME, other)
        with pytest.raises(CellfastError, match="taken by another cellfast embed"):
            lock.check()
    assert place.read_bytes(LOCK_NAME) == other
    place.remove(LOCK_NAME)


def test_a_run_that_lost_its_lock_stops(clean, tmp_path, monkeypatch):
    monkeypatch.setattr("cellfast.storage.locks.HEARTBEAT_S", 0.02)
    place = folder_at("memory://lost-lock")
    with OutputLock(place) as lock:
        lock.check()
        other = {"pid": 1, "host": "another-host", "renewed": time.time(), "token": "other"}
        place.write_bytes(LOCK_NAME, json.dumps(other).encode())
        deadline = time.monotonic() + 10
        while lock._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(CellfastError, match="taken by another cellfast embed"):
            lock.check()
    # Neither renewing nor leaving touched the other's lock.
    assert json.loads(place.read_bytes(LOCK_NAME)) == other


def test_a_lock_that_cannot_be_renewed_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr("cellfast.storage.locks.HEARTBEAT_S", 0.02)
    monkeypatch.setattr("cellfast.storage.locks.TRUST_S", 0.02)
    place = folder_at("memory://unrenewed-lock")
    with OutputLock(place) as lock:
        real = place.write_bytes

        def refuse(name, content):
            raise OSError("the store is away")

        monkeypatch.setattr(place, "write_bytes", refuse)
        time.sleep(0.2)
        lock.check()  # a late beat is no reason to stop
        monkeypatch.setattr("cellfast.storage.locks.STALE_AFTER_S", 0.05)
        with pytest.raises(CellfastError, match=r"could not be renewed .*OSError: the store is away.*goes on"):
            lock.check()
        monkeypatch.setattr(place, "write_bytes", real)


def test_embedding_stops_before_it_writes_without_its_lock(clean, tmp_path, monkeypatch):
    def lost(lock):
        raise CellfastError("the lock was taken")

    monkeypatch.setattr(OutputLock, "check", lost)
    assert "the lock was taken" in str(embed("fields", clean, tmp_path / "e", exit_code=1).exception)
    assert not list((tmp_path / "e").glob("*.parquet"))


def test_damaged_blocks_and_foreign_files_are_told(clean, tmp_path):
    (tmp_path / "e").mkdir()
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "e" / "P1.parquet")
    assert "not written by cellfast embed" in str(embed("fields", clean, tmp_path / "e", exit_code=1).exception)
    (tmp_path / "e" / "P1.parquet").write_bytes(b"PAR1 but not really")
    assert "damaged" in str(embed("fields", clean, tmp_path / "e", exit_code=1).exception)
    embed("fields", clean, tmp_path / "e", "--force")
    assert_same(tables(tmp_path / "e"), tables(clean / "clean"))
    other = str(embed(clean / "store", clean, tmp_path / "e", exit_code=1).exception)
    assert "embedded before from something else" in other
    (tmp_path / "file").write_text("")
    assert "is a file" in str(embed("fields", clean, tmp_path / "file", exit_code=1).exception)


def test_a_killed_reader_process_is_replaced(clean, tmp_path, monkeypatch):
    from cellfast.embedding import reading

    real = reading.ReaderPool._submit
    killed = []

    def submit(self, unit):
        future = real(self, unit)
        if not killed:
            time.sleep(0.1)
            victim = next(iter(self._pool._processes.values()))
            os.kill(victim.pid, signal.SIGKILL)
            killed.append(victim.pid)
        return future

    monkeypatch.setattr(reading.ReaderPool, "_submit", submit)
    embed("fields", clean, tmp_path / "e", "--readers", "processes", "--workers", 1)
    assert killed
    assert_same(tables(tmp_path / "e"), tables(clean / "clean"))


def test_a_field_of_another_size_is_quarantined_at_once(fields, tmp_path):
    tifffile.imwrite(image(fields), tifffile.imread(image(fields))[:-1])
    embed("fields", fields, tmp_path / "e", exit_code=3)
    quarantine = pd.read_csv(tmp_path / "e" / "quarantine.csv")
    assert quarantine[["reason", "tries"]].values.tolist() == [["wrong size", 1]]
    assert Path(quarantine["files"][0].split()[1]) == image(fields)
