"""A run folder under attack: damaged checkpoints and models, two trainings at once, what killed runs leave, a full disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from screens import SMALL, go

from cellfast.atomic import atomic_path, is_abandoned, partial_path, remove_abandoned
from cellfast.errors import CellfastError
from cellfast.model_file import load_model
from cellfast.storage.locks import FolderLock, _system
from cellfast.training.checkpoint import find_checkpoint, load_checkpoint
from cellfast.training.config import TrainConfig
from cellfast.training.loop import train

# Learning rates that do not depend on the number of steps.
EVEN = {"schedule": "constant", "warmup": 0.0}


@pytest.fixture(scope="module")
def finished(screen, tmp_path_factory):
    """A run of 4 steps with a checkpoint after each."""
    run = tmp_path_factory.mktemp("finished") / "run"
    go(screen, run, steps=4, checkpoint_every=1, **EVEN)
    return run


def said_by(screen, run, **values):
    said: list[str] = []
    resume = values.pop("resume", False)
    result = train(screen, run, TrainConfig(**{**SMALL, **values}), resume=resume, say=said.append)
    return result, "\n".join(said)


def damaged_copies(whole: bytes, count: int):
    rng = np.random.default_rng(0)
    positions = [*rng.integers(0, len(whole), count).tolist(), 0, len(whole) - 1, len(whole) - 33, len(whole) - 48]
    for position in positions:
        changed = bytearray(whole)
        changed[position] ^= 1 << int(rng.integers(8))
        yield f"byte {position}", bytes(changed)
    for length in (0, 1, 40, 48, len(whole) // 2, len(whole) - 48, len(whole) - 1):
        yield f"first {length} bytes", whole[:length]
    yield "a byte more", whole + b"\0"
    yield "zeros", bytes(len(whole))


@pytest.mark.parametrize(("name", "load"), [("checkpoints/last.pt", load_checkpoint), ("model.pt", load_model)])
def test_a_damaged_byte_anywhere_is_noticed(finished, tmp_path, name, load):
    whole = (finished / name).read_bytes()
    path = tmp_path / "copy.pt"
    path.write_bytes(whole)
    load(path)
    for what, content in damaged_copies(whole, 60):
        path.write_bytes(content)
        try:
            load(path)
        except CellfastError:
            continue
        pytest.fail(f"{what} went unnoticed")


def test_a_truncated_file_is_called_so(finished, tmp_path):
    path = tmp_path / "last.pt"
    whole = (finished / "checkpoints" / "last.pt").read_bytes()
    for length, match in ((0, "its end is missing"), (5000, "its end is missing"), (len(whole) - 20, "its end, with the digest")):
        path.write_bytes(whole[:length])
        with pytest.raises(CellfastError, match=match):
            load_checkpoint(path)


def test_files_without_a_digest_are_still_read(finished, tmp_path):
    for name, load in (("checkpoints/last.pt", load_checkpoint), ("model.pt", load_model)):
        content = torch.load(finished / name, weights_only=True)
        del content["sealed"]
        torch.save(content, tmp_path / "old.pt")
        load(tmp_path / "old.pt")


def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_it_used(screen, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    last = run / "checkpoints" / "last.pt"
    assert load_checkpoint(run / "checkpoints" / "previous.pt")["step"] == 3
    content = last.read_bytes()
    last.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    result, said = said_by(screen, run, steps=6, resume=True, checkpoint_every=1, **EVEN)
    assert "does not match the digest" in said
    assert "going on from the checkpoint before it" in said
    assert "resumed at step 3 of 6" in said
    assert result.steps == 6
    assert sorted(p.name for p in last.parent.iterdir()) == ["damaged.pt", "last.pt", "previous.pt"]
    assert [load_checkpoint(last.with_name(n))["step"] for n in ("last.pt", "previous.pt")] == [6, 5]
    go(screen, tmp_path / "straight", steps=6, checkpoint_every=1, **EVEN)
    assert load_model(run).digest == load_model(tmp_path / "straight").digest


def test_where_no_checkpoint_is_whole_all_are_named_and_kept(screen, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in ("last.pt", "previous.pt"):
        (run / "checkpoints" / name).write_bytes(b"PK\3\4 no more")
    with pytest.raises(CellfastError, match=r"last\.pt cannot be read.*previous\.pt cannot be read.*force=True"):
        go(screen, run, steps=6, resume=True)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["last.pt", "previous.pt"]


def test_a_missing_last_checkpoint_is_told(finished, tmp_path):
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    last = tmp_path / "checkpoints" / "last.pt"
    last.unlink()
    assert find_checkpoint(last)[0] == last.with_name("previous.pt")
    assert "is missing" in find_checkpoint(last)[1]


def test_resume_without_a_checkpoint_starts_from_the_beginning_and_says_so(screen, tmp_path):
    result, said = said_by(screen, tmp_path / "new", steps=2, resume=True)
    assert result.steps == 2
    assert "holds no checkpoint yet: starting from the beginning" in said
    # Killed before the first checkpoint: a configuration and a metrics file, nothing else.
    killed = tmp_path / "killed"
    killed.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(tmp_path / "new" / name, killed / name)
    assert said_by(screen, killed, steps=2, resume=True)[0].steps == 2
    assert load_model(killed).digest == load_model(tmp_path / "new").digest
    # A finished model is not trained anew without a word.
    shutil.rmtree(killed / "checkpoints")
    with pytest.raises(CellfastError, match="holds a model but no checkpoint"):
        go(screen, killed, steps=2, resume=True)


def test_a_second_training_in_the_folder_is_refused(screen, tmp_path):
    run = tmp_path / "run"
    code = f"import sys; from cellfast.storage.locks import FolderLock; lock = FolderLock({str(run)!r}, 'cellfast train'); lock.acquire(); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        for how in ({}, {"resume": True}, {"force": True}):
            with pytest.raises(CellfastError, match=rf"cellfast train \(process {holder.pid} on .+\) is writing there"):
                go(screen, run, steps=1, **how)
        assert not (run / "config.yaml").exists()
        holder.send_signal(signal.SIGKILL)
    go(screen, run, steps=1)
    assert not (run / ".lock").exists()


def test_a_mistake_leaves_no_folder(screen, tmp_path):
    with pytest.raises(CellfastError, match="fewer than one minibatch"):
        go(screen, tmp_path / "run", steps=1, batch_size=4096)
    assert not (tmp_path / "run").exists()


def test_without_kernel_locks_the_file_is_the_lock(tmp_path, monkeypatch):
    import fcntl

    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with FolderLock(tmp_path, "cellfast train"):
        with pytest.raises(CellfastError, match=rf"process {os.getpid()} on .*no locks"):
            FolderLock(tmp_path, "cellfast train").acquire()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    owner = {"pid": dead.pid, "host": os.uname().nodename, "system": _system(), "command": "cellfast train"}
    (tmp_path / ".lock").write_text(json.dumps(owner))
    with FolderLock(tmp_path, "cellfast train"):
        pass
    # Another machine, and another container of the same name: process numbers there say nothing here.
    for other in ({"host": "elsewhere", "system": "elsewhere"}, {"system": "another container"}):
        (tmp_path / ".lock").write_text(json.dumps({**owner, **other}))
        with pytest.raises(CellfastError, match=f"process {dead.pid} on {other.get('host', '')}"):
            FolderLock(tmp_path, "cellfast train").acquire()


def test_temporary_names_never_collide(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    target = tmp_path / "plate.h5"
    assert len({partial_path(target) for _ in range(100)}) == 100
    long = tmp_path / ("é" * 120 + ".parquet")
    with atomic_path(long) as temporary:
        assert len(temporary.name.encode()) <= 247
        temporary.write_text("x")
    assert long.read_text() == "x"


def test_partial_files_of_dead_processes_are_abandoned_and_others_after_a_day(tmp_path, monkeypatch):
    mine = partial_path(tmp_path / "a.h5")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: dead.pid)
        gone = partial_path(tmp_path / "b.h5")
    exact = gone.with_name(gone.name.replace(".partial", ".exact.partial"))
    with monkeypatch.context() as patch:
        patch.setattr("cellfast.atomic.host_name", lambda: "other.host.org")
        elsewhere = [partial_path(tmp_path / f"{name}.h5") for name in "cd"]
    earlier_version = tmp_path / f".e.{dead.pid}.partial.h5"
    files = [mine, gone, exact, *elsewhere, earlier_version]
    for path in files:
        path.touch()
    yesterday = time.time() - 25 * 3600
    os.utime(elsewhere[1], (yesterday, yesterday))
    assert [is_abandoned(p) for p in files] == [False, True, True, False, True, False]
    assert remove_abandoned(tmp_path) == 3
    assert sorted(tmp_path.iterdir()) == sorted([mine, elsewhere[0], earlier_version])


def test_a_killed_training_leaves_nothing_to_the_next(screen, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    code = f"from cellfast.atomic import partial_path as p; [p({str(run)!r} + n).touch() for n in ('/model.pt', '/checkpoints/last.pt')]"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert len(list(run.rglob(".*.partial*"))) == 2
    go(screen, run, steps=1)
    assert not list(run.rglob(".*.partial*"))


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_a_zombie_does_not_live():
    from cellfast.atomic import process_lives

    ended = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert not process_lives(ended.pid)
    ended.wait()
    assert process_lives(os.getpid())


def test_the_checkpoint_before_is_kept_where_a_killed_run_left_both_names_to_one_file(tmp_path):
    from cellfast.training.checkpoint import _keep

    (tmp_path / "last.pt").write_bytes(b"x")
    os.link(tmp_path / "last.pt", tmp_path / "previous.pt")
    _keep(tmp_path / "last.pt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


def test_a_file_written_again_takes_the_place_of_what_a_killed_process_left(tmp_path):
    target = tmp_path / "profiles.parquet"
    code = f"from cellfast.atomic import partial_path as p; [p({str(tmp_path)!r} + n).touch() for n in ('/profiles.parquet', '/other.parquet')]"
    subprocess.run([sys.executable, "-c", code], check=True)
    with atomic_path(target) as temporary:
        temporary.write_text("whole")
    assert sorted(p.name.split(".")[1] for p in tmp_path.glob(".*.partial*")) == ["other"]
    assert target.read_text() == "whole"


WITHOUT_ROOM = """
    import resource, sys
    from cellfast.cli import cellfast
    from cellfast.errors import CellfastError

    for limit in {limits}:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            cellfast({arguments}, standalone_mode=False)
        except CellfastError as error:
            print("told:", error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print("left:", [str(p) for p in __import__("pathlib").Path({folder!r}).rglob(".*.partial*")])
    cellfast({arguments}, standalone_mode=False)
"""


def run_without_room(limits: list[int], folder: Path, *arguments) -> None:
    """Run a command with each limit of a file's size and then without: it must tell each time, leave nothing half written, and go on."""
    code = textwrap.dedent(WITHOUT_ROOM.format(limits=limits, arguments=[str(a) for a in arguments], folder=str(folder)))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("told: no space left to write ") and str(folder) in line]
    assert len(told) == len(limits), done.stdout
    assert "left: []" in done.stdout
    assert not [word for word in ("Traceback", "Exception", "HDF5") if word in done.stderr], done.stderr


@pytest.mark.slow
def test_a_training_without_room_says_so_and_goes_on_later(screen, tmp_path):
    """300 bytes: not even the configuration; 20,000: TensorBoard's file, no checkpoint; 300,000: not all of the checkpoint."""
    options = (
        "--encoder",
        "cnn4",
        "--batch-size",
        16,
        "--output-size",
        16,
        "--projection-dim",
        8,
        "--device",
        "cpu",
        "--steps",
        3,
    )
    more = ("--threads", 1, "--validation-cells", 16, "--checkpoint-every", 1, "--resume")
    run = tmp_path / "run"
    run_without_room([300, 20_000, 300_000], run, "train", screen, "-o", run, *options, *more)
    assert load_model(run).metadata.step == 3


def crop_index(folder: Path, cells: int = 40) -> Path:
    rng = np.random.default_rng(0)
    lines = ["file,plate,well,site,cell,compound,concentration,moa"]
    for cell in range(cells):
        np.save(folder / f"{cell}.npy", rng.integers(0, 4000, (24, 24, 3)).astype(np.uint16))
        lines.append(f"{cell}.npy,P{cell % 2},B02,1,{cell},DMSO,0,DMSO")
    (folder / "index.csv").write_text("\n".join(lines) + "\n")
    return folder / "index.csv"


def test_an_ingest_without_room_says_so_and_goes_on_later(tmp_path):
    """1000 bytes: not even the store's beginning; 30,000: not all pixels; 75,000: pixels, not the tables."""
    screen = tmp_path / "screen"
    run_without_room([1000, 30_000, 75_000], screen, "ingest", "crops", crop_index(tmp_path), "-o", screen, "--layout", "HWC")
    assert sorted(p.name for p in screen.rglob("*") if p.is_file()) == ["P0.h5", "P1.h5", "ledger.json"]


def test_a_second_ingest_in_the_folder_is_refused_and_partial_files_go(tmp_path):
    from cellfast.screens.crop_index import read_crop_index
    from cellfast.screens.ingest_crops import ingest_crops

    index, screen = read_crop_index(crop_index(tmp_path), layout="HWC"), tmp_path / "screen"
    with FolderLock(screen, "cellfast ingest"):
        with pytest.raises(CellfastError, match=rf"cellfast ingest \(process {os.getpid()} on .*is writing there"):
            ingest_crops(index, screen, show_progress=False)
    (screen / "plates").mkdir(parents=True)
    code = f"from cellfast.atomic import partial_path; partial_path({str(screen / 'plates' / 'P0.h5')!r}).touch()"
    subprocess.run([sys.executable, "-c", code], check=True)
    ingest_crops(index, screen, show_progress=False)
    assert not list(screen.rglob(".*"))
