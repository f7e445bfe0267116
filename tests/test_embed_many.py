"""Embedding on several processes, on Ray, and from and to object stores: the files are those of one process on a local disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist
from screens import assert_same, embed, field_arguments, run, tables, torchrun

from cellfast.embedding.cells import Block, PlatePlan, cut_into_blocks
from cellfast.embedding.processes import BlockQueue

EMBED = ("-m", "cellfast", "embed")


def test_blocks_cover_every_unit_once_and_end_with_wells():
    wells = ["A01"] * 3 + ["A02"] * 9 + ["B01"] + ["B02"] * 2
    blocks = cut_into_blocks("P", wells, 2)
    assert [(p.start, p.stop) for p in blocks] == [(0, 3), (3, 7), (7, 11), (11, 13), (13, 15)]
    assert cut_into_blocks("P", [], 2) == ()


def test_processes_claim_every_part_once_and_one_of_them_finishes_each_plate():
    plans = [PlatePlan(f"P{i}", "b", 5, ("A01",), tuple(Block(f"P{i}", k, k + 1) for k in range(5)), {}) for i in range(7)]
    store = dist.HashStore()
    claimed, last = [], []

    def work(rank):
        mine = BlockQueue(store, rank, 3, [(p, list(p.blocks)) for p in plans] if rank == 0 else None)
        for part in mine.claims():
            claimed.append(part)
            if mine.is_last(part.plate):
                last.append(part.plate)
                mine.plate_done()
        mine.wait_for_all()
        mine.leave()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert sorted(claimed, key=str) == sorted((p for plan in plans for p in plan.blocks), key=str)
    assert sorted(last) == [p.plate for p in plans]


@pytest.mark.slow
def test_two_processes_write_what_one_does(clean, tmp_path):
    # One plate: its fields are divided.
    table = pd.read_csv(clean / "load_data.csv").query("Metadata_Plate == 'P1'")
    table.to_csv(tmp_path / "one_plate.csv", index=False)
    out = tmp_path / "e"
    done = torchrun(
        *EMBED, *field_arguments(clean, tmp_path / "one_plate.csv"), "--model", clean / "model.pt", "-o", out, "--batch-size", 8
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("cells =") == 1
    assert_same(tables(out), {"P1": tables(clean / "clean")["P1"]})
    assert sorted(p.name for p in out.rglob("*") if p.is_file()) == ["P1.parquet", "embeddings.json", "lock"]
    ledger = json.loads((out / "embeddings.json").read_text())
    assert ledger["rows"] == ledger["totals"]["locations"] == pq.read_metadata(out / "P1.parquet").num_rows


@pytest.mark.slow
def test_two_processes_both_decode_as_asked(clean, tmp_path):
    pytest.importorskip("nvidia.dali")
    out = tmp_path / "e"
    done = torchrun(*EMBED, *field_arguments(clean), "--model", clean / "model.pt", "-o", out, "--decode", "dali")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(tables(out), tables(clean / "clean"))
    decode = json.loads((out / "embeddings.json").read_text())["decode"]
    assert (decode["used"], decode["fields_dali"], decode["fields_host"]) == ("dali", 18, 0)


@pytest.fixture
def bucket(monkeypatch):
    """s3://screens on a local server."""
    pytest.importorskip("s3fs", reason="needs s3fs: pip install 'cellfast[test]'")
    server_module = pytest.importorskip("moto.server", reason="needs moto: pip install 'cellfast[test]'")
    import fsspec

    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    # fsspec keeps one file system per set of options: one made before, by any test, still speaks to the server of then.
    kept = fsspec.get_filesystem_class("s3")
    kept.clear_instance_cache()
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    fs.mkdir("screens")
    yield fs
    kept.clear_instance_cache()
    server.stop()


@pytest.mark.filterwarnings("ignore")
def test_images_and_output_in_an_object_store(clean, tmp_path, bucket):
    bucket.put(str(clean / "images"), "screens/images", recursive=True)
    bucket.put(str(clean / "locations"), "screens/locations", recursive=True)
    bucket.put(str(clean / "load_data.csv"), "screens/load_data.csv")
    table = pd.read_csv(clean / "load_data.csv")
    for channel in ("DNA", "Actin"):
        table[f"URL_{channel}"] = "s3://screens/images/" + table[f"PathName_{channel}"] + "/" + table[f"FileName_{channel}"]
        table = table.drop(columns=[f"PathName_{channel}", f"FileName_{channel}"])
    with bucket.open("screens/urls.csv", "w") as handle:
        table.to_csv(handle, index=False)
    whole = tables(clean / "clean")
    for name, fields in (
        ("paths", ["s3://screens/load_data.csv", "--image-root", "s3://screens/images", "--locations", "s3://screens/locations"]),
        ("urls", ["s3://screens/urls.csv", "--image-root", "s3://screens", "--locations", clean / "locations"]),
        ("local", field_arguments(clean)),
    ):
        out = f"s3://screens/{name}"
        result = run("embed", *fields, "--model", clean / "model.pt", "-o", out)
        assert result.exit_code == 0, f"{result.output} {result.exception!r}"
        found = {plate: pd.read_parquet(bucket.open(f"screens/{name}/{plate}.parquet")) for plate in whole}
        assert_same(found, whole)
        bucket.invalidate_cache()
        assert {f.rsplit("/", 1)[1] for f in bucket.find(f"screens/{name}")} == {"P1.parquet", "P2.parquet", "embeddings.json"}
    again = run("embed", *field_arguments(clean), "--model", clean / "model.pt", "-o", "s3://screens/local")
    assert "2 of 2 plates were embedded before" in again.output
    bucket.rm("screens/images/P1/B03_s1_DNA.tif")
    fields = ["s3://screens/load_data.csv", "--image-root", "s3://screens/images", "--locations", clean / "locations"]
    result = run("embed", *fields, "--model", clean / "model.pt", "-o", tmp_path / "e", "--retries", "0")
    assert result.exit_code == 3, result.output
    assert pd.read_csv(tmp_path / "e" / "quarantine.csv")["reason"].tolist() == ["file missing"]
    gone = run("embed", *fields, "--model", clean / "model.pt", "-o", "nothing://somewhere")
    assert "Protocol not known" in str(gone.exception)


def test_memory_file_system(clean):
    result = run(
        "embed", *field_arguments(clean), "--model", clean / "model.pt", "-o", "memory://out", "--to", "cpg", "--to", "parquet"
    )
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    import fsspec

    fs = fsspec.filesystem("memory")
    for plate, expected in tables(clean / "clean").items():
        assert_same({plate: pd.read_parquet(fs.open(f"/out/{plate}.parquet"))}, {plate: expected})
    assert len(fs.find("/out/workspace_dl/embeddings")) == 2 * 9 - 2
    fs.rm("/out", recursive=True)


@pytest.mark.slow
def test_ray_writes_what_one_process_does(clean, tmp_path):
    pytest.importorskip("ray.data", reason="needs ray: pip install 'cellfast[ray]'")
    command = [sys.executable, "-W", "ignore", "-m", "cellfast", "embed", *field_arguments(clean), "--model", clean / "model.pt"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    process = subprocess.Popen(
        [*map(str, command), "-o", str(tmp_path / "e"), "--engine", "ray"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True,
    )  # fmt: skip
    victim = None
    deadline = time.monotonic() + 100
    # One reader is killed under way: Ray reads its blocks again.
    while process.poll() is None and victim is None and time.monotonic() < deadline:
        listing = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
        victim = next((int(line.split()[0]) for line in listing.splitlines() if "ray::" in line and "_ReadBlock" in line), None)
        time.sleep(0.02)
    if victim is not None:
        os.kill(victim, signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output[-4000:]
    assert victim is not None
    assert_same(tables(tmp_path / "e"), tables(clean / "clean"))


def test_ray_that_is_not_installed_is_told(clean, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    result = embed("fields", clean, tmp_path / "e", "--engine", "ray", exit_code=1)
    assert "cellfast[ray]" in str(result.exception)


# Runs `cellfast embed` with little patience; the process whose rank is VICTIM stops for good once it has written a part.
IMPATIENT = """
import os, signal, sys
from cellfast.cli import main
from cellfast.embedding import blocks, processes
processes.BEAT_S, processes.PATIENCE_S, processes.GRACE_S = 0.2, 4.0, 2.0
real = blocks.BlockFiles.write
def write(self, *a):
    real(self, *a)
    if os.environ["RANK"] == os.environ.get("VICTIM"):
        print("stopped", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
blocks.BlockFiles.write = write
sys.argv = ["cellfast", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_process_ends_the_others_with_one_sentence(clean, tmp_path, victim):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["embed", *field_arguments(clean), "--model", clean / "model.pt", "-o", tmp_path / "e", "--batch-size", 2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", IMPATIENT, *map(str, command)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**environment, "RANK": str(rank), "VICTIM": str(victim)},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        _, told = processes[1 - victim].communicate(timeout=120)
        assert processes[1 - victim].returncode == 1
        errors = [line for line in told.splitlines() if line.startswith("Error")]
        assert len(errors) == 1, told
        assert "stopped" in errors[0]
        assert "run the same command again" in errors[0]
        assert "Traceback" not in told
        # It wakes: it must notice before it writes anything.
        before = sorted(p.name for p in (tmp_path / "e").rglob("*.arrow"))
        processes[victim].send_signal(signal.SIGCONT)
        _, told = processes[victim].communicate(timeout=60)
        assert processes[victim].returncode == 1
        assert "run the same command again" in told
        assert "Traceback" not in told
        assert sorted(p.name for p in (tmp_path / "e").rglob("*.arrow")) == before
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    embed("fields", clean, tmp_path / "e")
    assert_same(tables(tmp_path / "e"), tables(clean / "clean"))
