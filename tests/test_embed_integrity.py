"""Embeddings that are unfinished, damaged or cut: refused or made again, and a row is the same wherever a run was cut."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from screens import assert_same, embed, field_arguments, make_model, run, tables

from cellfast.embedding.blocks import BlockFiles
from cellfast.embedding.encoder import CropEncoder
from cellfast.embedding.processes import BlockQueue, Watch
from cellfast.embeddings_folder import BLOCKS, RUN_FILE, checksum, open_folder
from cellfast.errors import CellfastError
from cellfast.profiles.feature_files import open_source
from cellfast.storage.folder import folder_at


@pytest.fixture(scope="module")
def clean(clean, tmp_path_factory):
    """Fields, a model, their crop store, and the embeddings of the store and of the fields."""
    folder = tmp_path_factory.mktemp("integrity") / "work"
    shutil.copytree(clean, folder, ignore=shutil.ignore_patterns("clean"))
    embed(folder / "store", folder, folder / "clean", "--batch-size", 5)
    embed("fields", folder, folder / "fields", "--batch-size", 5)
    return folder


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks per plate, also of a store as small as this one."""
    from cellfast.embedding import cells

    real = cells.cut_into_blocks
    monkeypatch.setattr(cells, "cut_into_blocks", lambda plate, wells, most: real(plate, wells, 12))


def exactly_the_same(a, b):
    assert sorted(tables(a)) == sorted(tables(b))
    for plate, table in tables(a).items():
        pd.testing.assert_frame_equal(table, tables(b)[plate], check_exact=True)


def killed_after(monkeypatch, blocks, source, clean, out, *options):
    """A run that dies after it has written so many blocks."""
    real, written = BlockFiles.write, []

    def write(self, plan, work):
        real(self, plan, work)
        written.append(work.block)
        if len(written) == blocks:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BlockFiles, "write", write)
        embed(source, clean, out, *options, exit_code=None)
    return sorted((out / BLOCKS).rglob("*.arrow"))


@pytest.mark.parametrize("source", ["fields", "store"])
def test_a_row_does_not_depend_on_where_a_run_was_cut(clean, tmp_path, monkeypatch, small_blocks, source):
    where = clean / "store" if source == "store" else "fields"
    embed(where, clean, tmp_path / "whole", "--batch-size", 5)
    for blocks in (1, 3):
        out = tmp_path / f"{blocks}"
        assert killed_after(monkeypatch, blocks, where, clean, out, "--batch-size", 5)
        embed(where, clean, out, "--batch-size", 5)
        exactly_the_same(out, tmp_path / "whole")


def test_minibatches_are_those_of_the_blocks(clean, tmp_path, monkeypatch, small_blocks):
    sizes, real = [], CropEncoder._encode
    monkeypatch.setattr(CropEncoder, "_encode", lambda self, x, *a: sizes.append(len(x)) or real(self, x, *a))
    whole = [len(t) for t in tables(clean / "clean").values()]
    embed(clean / "store", clean, tmp_path / "e", "--batch-size", 1000)
    assert sum(sizes) == sum(whole)
    assert len(sizes) > len(whole)
    assert max(sizes) <= 24


def damaged(content, kind, moments):
    content = bytearray(content)
    at = moments.randrange(len(content))
    if kind == "flip":
        content[at] ^= 1 << moments.randrange(8)
    elif kind == "zeros":
        content[at : at + 64] = bytes(len(content[at : at + 64]))
        content[at] ^= 1
    elif kind == "cut":
        content = content[:at]
    elif kind == "longer":
        content += b"\0" * 8
    else:
        content = bytearray()
    return bytes(content)


KINDS = ("flip", "zeros", "cut", "longer", "empty")


def test_damaged_blocks_are_computed_again(clean, tmp_path, monkeypatch, small_blocks):
    moments = random.Random(1)
    embed(clean / "store", clean, tmp_path / "whole", "--batch-size", 5)
    blocks = killed_after(monkeypatch, 3, clean / "store", clean, tmp_path / "e", "--batch-size", 5)
    assert len(blocks) == 3
    saved = tmp_path / "saved"
    shutil.copytree(tmp_path / "e", saved)
    for kind in (*KINDS, "another part"):
        shutil.rmtree(tmp_path / "e")
        shutil.copytree(saved, tmp_path / "e")
        file = moments.choice(blocks)
        if kind == "another part":
            shutil.copy(blocks[0] if file != blocks[0] else blocks[1], file)
        else:
            file.write_bytes(damaged(file.read_bytes(), kind, moments))
        result = embed(clean / "store", clean, tmp_path / "e", "--batch-size", 5)
        assert "1 block files were damaged; those blocks are computed again" in result.output
        exactly_the_same(tmp_path / "e", tmp_path / "whole")


@pytest.mark.parametrize("layout", ["parquet", "cpg", "anndata"])
def test_a_finished_plate_is_kept_only_if_it_is_as_it_was_written(clean, tmp_path, layout):
    if layout == "anndata":
        pytest.importorskip("anndata")
    moments, out = random.Random(2), tmp_path / "e"
    command = (clean / "store", clean, out, "--batch-size", 5, "--to", layout)
    embed(*command)
    ledger = json.loads((out / "embeddings.json").read_text())
    plate = next(p for p in ledger["plates"] if p["plate"] == "P1")
    assert set(plate["checksums"]) == set(plate["files"][-1:])
    for name, kinds in {plate["files"][0]: KINDS[:2], plate["files"][-1]: KINDS}.items():
        path = out / name
        whole = path.read_bytes()
        for kind in kinds if layout == "parquet" else kinds[:2]:
            path.write_bytes(damaged(whole, kind, moments))
            result = embed(*command)
            assert f"1 files of finished plates were changed or damaged since ({name})" in result.output
            assert "1 of 2 plates were embedded before and are kept" in result.output
            if layout != "anndata":  # HDF5 notes times
                assert path.read_bytes() == whole
    if layout == "cpg":
        return  # another model has a folder of its own there
    path.write_bytes(damaged(whole, "flip", moments))
    make_model(tmp_path / "other.pt", seed=7)
    other = run("embed", clean / "store", "--model", tmp_path / "other.pt", "-o", out, "--to", layout)
    assert "embedded before from something else (model was" in str(other.exception)


def test_a_plate_of_a_killed_run_is_checked_before_there_is_a_ledger(clean, tmp_path, monkeypatch):
    from cellfast.embedding import run as run_module

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_ledger", stop)
        embed(clean / "store", clean, tmp_path / "e", "--batch-size", 5, exit_code=None)
    path = tmp_path / "e" / "P1.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)
    with pytest.raises(CellfastError, match=r"unfinished embedding: it has no embeddings.json; 0 of 2 plates are missing"):
        open_source([tmp_path / "e"])
    with pytest.raises(CellfastError, match=r"P1.parquet: damaged or changed since it was written: its CRC-32 is"):
        open_source([tmp_path / "e"], allow_unfinished=True)
    embed(clean / "store", clean, tmp_path / "e", "--batch-size", 5)
    exactly_the_same(tmp_path / "e", clean / "clean")
    assert sorted(p.name for p in (tmp_path / "e").rglob("*") if p.is_file()) == [
        "P1.parquet",
        "P2.parquet",
        "embeddings.json",
        "lock",
    ]


def test_an_embedding_of_an_earlier_version_is_kept_and_gets_checksums(clean, tmp_path):
    out = tmp_path / "e"
    shutil.copytree(clean / "clean", out)
    ledger = json.loads((out / "embeddings.json").read_text())
    for plate in ledger["plates"]:
        del plate["checksums"], plate["origin"]
    del ledger["checksums"]
    (out / "embeddings.json").write_text(json.dumps(ledger))
    assert open_source([out]).num_rows == ledger["rows"]
    assert "2 of 2 plates were embedded before" in embed(clean / "store", clean, out, "--batch-size", 5).output
    for plate in json.loads((out / "embeddings.json").read_text())["plates"]:
        with open(out / plate["file"], "rb") as handle:
            assert plate["checksums"] == {plate["file"]: checksum(handle)}


def test_profile_and_info_refuse_an_unfinished_embedding(clean, tmp_path, monkeypatch):
    def profile(*options):
        return run("profile", out, "-o", tmp_path / "p.parquet", "--level", "well", "--normalize", "none", *options)

    out = tmp_path / "no ledger"
    shutil.copytree(clean / "clean", out)
    (out / "embeddings.json").unlink()
    for command in (profile(), run("info", out)):
        assert command.exit_code == 1
        assert "an unfinished embedding: it has no embeddings.json" in str(command.exception)
        assert "cellfast embed" in str(command.exception)
        assert "--allow-unfinished" in str(command.exception)
    assert profile("--allow-unfinished").exit_code == 0
    assert "unfinished" in profile("--allow-unfinished").output
    assert run("info", out, "--allow-unfinished").exit_code == 0
    out = tmp_path / "missing"
    shutil.copytree(clean / "clean", out)
    assert profile().exit_code == 0
    assert "P1.parquet" not in run("info", out, "--verify").output
    (out / "P1.parquet").unlink()
    refused = str(profile().exception)
    assert "lacks 1 of the 2 files that its embeddings.json names (P1.parquet)" in refused
    assert f"cellfast embed {clean / 'store'} --model {clean / 'model.pt'} -o {out}" in refused
    assert "lacks 1 of the 2 files" in profile("--allow-unfinished").output
    report = json.loads((tmp_path / "p.report.json").read_text())
    assert "P1.parquet" in report["inputs"]["unfinished"][0]
    out = tmp_path / "under way"
    monkeypatch.setattr("sys.argv", ["bin/cellfast", "embed", "a screen", "-o", "e", "--locations", "s3://user:geheim1@host/x"])
    killed_after(monkeypatch, 1, clean / "store", clean, out)
    assert "2 of 2 plates are missing (P1, P2)" in str(profile().exception)
    assert "`cellfast embed 'a screen' -o e --locations" in str(profile().exception)
    assert f"(in {os.getcwd()})" in str(profile().exception)
    assert "geheim1" not in (out / RUN_FILE).read_text()
    out = tmp_path / "again"
    shutil.copytree(clean / "clean", out)
    killed_after(monkeypatch, 1, clean / "store", clean, out, "--force")
    assert "is being made again by a run that has not ended" in str(profile().exception)
    for broken in (b"", b"[]", b'{"plates": 3}', b"\xff", b"[" * 100_000):
        (out / RUN_FILE).write_bytes(broken)
        assert "has not ended" in str(profile().exception)
        (out / "embeddings.json").write_bytes(broken)
        assert "embeddings.json: damaged" in str(profile().exception)
        shutil.copy(clean / "clean" / "embeddings.json", out)
    embed(clean / "store", clean, out, "--batch-size", 5)
    assert profile().exit_code == 0


def test_a_folder_that_never_was_an_embedding_is_read_as_before(clean, tmp_path):
    for plate in ("P1", "P2"):
        shutil.copy(clean / "clean" / f"{plate}.parquet", tmp_path)
    assert open_folder(tmp_path) is None
    assert open_source([tmp_path]).num_rows == sum(map(len, tables(clean / "clean").values()))


@pytest.mark.parametrize("layout", ["parquet", "cpg"])
def test_damaged_embeddings_are_refused_where_they_are_read(clean, tmp_path, layout):
    moments, out = random.Random(3), tmp_path / "e"
    embed(clean / "store", clean, out, "--batch-size", 5, "--to", layout)
    inside = out if layout == "parquet" else next((out / "workspace_dl" / "embeddings").iterdir())
    path = next(p for p in sorted(inside.rglob("*.parquet")))
    whole = path.read_bytes()
    before = open_source([inside]).read_all()[1]
    for kind in KINDS * 4:
        path.write_bytes(damaged(whole, kind, moments))
        with pytest.raises(CellfastError, match="damaged or changed since it was written"):
            open_source([inside])
    if layout == "parquet":
        with pytest.raises(CellfastError, match="damaged or changed"):
            open_source([path])
        assert "damaged or changed" in str(run("info", out, "--verify").exception)
    path.write_bytes(whole)
    np.testing.assert_array_equal(open_source([inside]).read_all()[1], before)


def test_parquet_files_by_themselves_carry_checksums(clean, tmp_path):
    """Without embeddings.json: a damaged file is refused, or it is read as the same rows under the same names."""
    options = ("--level", "well", "--normalize", "none")
    assert run("profile", clean / "clean", "-o", tmp_path / "wells.parquet", *options).exit_code == 0
    for source in (clean / "clean" / "P1.parquet", tmp_path / "wells.parquet"):
        path, moments = tmp_path / f"alone {source.name}", random.Random(4)
        whole = source.read_bytes()
        path.write_bytes(whole)
        names = open_source([path]).feature_names
        metadata, values = open_source([path]).read_all()
        footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
        column = pq.ParquetFile(path).metadata.row_group(0).column(len(pq.read_schema(path).names) - 1)
        value = column.data_page_offset + column.total_compressed_size // 2
        places = [
            value,
            *(moments.randrange(len(whole)) for _ in range(30)),
            *(moments.randrange(footer, len(whole)) for _ in range(60)),
        ]
        for at in places:
            content = bytearray(whole)
            content[at] ^= 1 << moments.randrange(8)
            path.write_bytes(content)
            try:
                found = open_source([path])
                read = found.read_all()
            except CellfastError:
                continue
            assert at != value
            assert source.name != "wells.parquet", "every byte of profiles is covered"
            assert found.feature_names == names
            pd.testing.assert_frame_equal(read[0], metadata)
            np.testing.assert_array_equal(read[1], values)


def test_the_output_folder_refuses_to_leave_its_root(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").write_text("kept")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "link").symlink_to(tmp_path / "outside")
    names = (
        "../outside/kept",
        "a/../../outside/kept",
        str(tmp_path / "outside" / "kept"),
        "a//b",
        "a/./b",
        "a\0b",
        "..\\x",
        "a/",
    )
    for place in (folder_at(tmp_path / "e"), folder_at(f"file://{tmp_path}/e"), folder_at("memory://root")):
        for name in names:
            for method, *more in (("write_bytes", b"x"), ("read_bytes",), ("exists",), ("names",), ("remove",), ("checksum",)):
                with pytest.raises(CellfastError, match="leads out of the output folder"):
                    getattr(place, method)(name, *more)
    place = folder_at(tmp_path / "e")
    for call in (place.write_bytes, lambda name, _: place.remove(name), lambda name, _: place.read_bytes(name)):
        for name in ("link/new", "link/kept", "link"):
            with pytest.raises(CellfastError, match="a link leads out of the output folder"):
                call(name, b"x")
    assert [p.read_text() for p in (tmp_path / "outside").iterdir()] == ["kept"]
    # A folder that is a link itself is what the user chose.
    (tmp_path / "chosen").symlink_to(tmp_path / "outside")
    folder_at(tmp_path / "chosen").write_bytes("new", b"x")
    assert (tmp_path / "outside" / "new").read_bytes() == b"x"


@pytest.mark.parametrize("well", ["../../../../outside", "/outside", "a/b"])
def test_a_well_of_a_store_cannot_lead_out_of_the_gallery(clean, tmp_path, monkeypatch, well):
    from cellfast.embedding.cells import StoreSource

    real = StoreSource.read

    def read(self, unit):
        chunk = real(self, unit)
        chunk.columns["Metadata_Well"] = np.full(chunk.count, well, object)
        return chunk

    monkeypatch.setattr(StoreSource, "read", read)
    result = embed(clean / "store", clean, tmp_path / "in" / "e", "--to", "cpg", exit_code=1)
    assert isinstance(result.exception, CellfastError)
    assert "cannot name a folder" in str(result.exception)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
    assert sorted(p.name for p in (tmp_path / "in").iterdir()) == ["e"]


@pytest.mark.parametrize("where", ["memory://", "s3://", "s3:///", "nothing://somewhere/x"])
def test_odd_urls_end_in_one_sentence(clean, tmp_path, monkeypatch, where):
    if where.startswith("s3"):
        pytest.importorskip("s3fs", reason="needs s3fs: pip install 'cellfast[test]'")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    for result in (
        run("embed", clean / "store", "--model", clean / "model.pt", "-o", where),
        run("embed", where, *field_arguments(clean)[1:], "--model", clean / "model.pt", "-o", tmp_path / "e"),
        run("embed", *field_arguments(clean)[:1], "--image-root", where, "--locations", where, "--model", clean / "model.pt", "-o", tmp_path / "f"),
    ):  # fmt: skip
        assert result.exit_code != 0
        assert isinstance(result.exception, (CellfastError, OSError, SystemExit)), repr(result.exception)


def test_an_invalid_bucket_ends_in_one_sentence(clean, monkeypatch):
    pytest.importorskip("s3fs", reason="needs s3fs: pip install 'cellfast[test]'")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    result = run("embed", clean / "store", "--model", clean / "model.pt", "-o", "s3://In valid_Bucket!!/e")
    assert "s3://In valid_Bucket!!/e cannot be" in str(result.exception)
    assert "Check the URL" in str(result.exception)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_process_that_is_stopped_or_dead_is_told_within_minutes():
    import torch.distributed as dist

    store, clock = dist.HashStore(), Clock()
    watches = [Watch(store, rank, 3, clock=clock) for rank in range(3)]
    for _ in range(100):
        clock.now += 5
        for watch in watches:
            watch.look()
            watch.check()
    for _ in range(40):  # rank 2 is stopped
        clock.now += 5
        for watch in watches[:2]:
            watch.look()
    with pytest.raises(CellfastError, match=r"process 2 of the run gave no sign for 180 s.*run the same command again"):
        watches[0].check()
    watches[1].check()
    with pytest.raises(CellfastError, match="process 2 was stopped, or could not reach the others, for 200 s"):
        watches[2].check()  # it wakes: its blocks may be another's by now
    for _ in range(40):  # rank 0 ends with its message
        clock.now += 5
        watches[1].look()
    with pytest.raises(CellfastError, match="process 0 of the run gave no sign"):
        watches[1].check()


def test_a_process_that_has_left_is_not_missed():
    import torch.distributed as dist

    store, clock = dist.HashStore(), Clock()
    first, second = Watch(store, 0, 2, clock=clock), Watch(store, 1, 2, clock=clock)
    second.look()
    second.leave()
    for _ in range(200):  # collating and the ledger may take a while
        clock.now += 5
        first.look()
        first.check()


def test_a_store_that_is_gone_ends_in_one_sentence():
    class Gone:
        def set(self, *a):
            raise RuntimeError("Connection reset by peer\nException raised from …")

        add = set

    with pytest.raises(CellfastError, match=r"cannot be reached \(Connection reset by peer\).*run the same command again"):
        BlockQueue(Gone(), 0, 2, [])
    assert threading.active_count() < 50


def test_partial_files_of_killed_runs_are_removed(clean, tmp_path):
    out = tmp_path / "e"
    embed(clean / "store", clean, out, "--batch-size", 5, "--to", "cpg")
    gone = f".P1.gone-host.{2**22 + 1}.0123456789.partial.parquet"
    folders = [out, out / BLOCKS / "P1", *(p for p in (out / "workspace_dl").rglob("*") if p.is_dir() and "profiles" in str(p))]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / gone).write_bytes(b"half")
    (next((out / "workspace_dl" / "collated").iterdir()) / gone).write_bytes(b"half")
    embed(clean / "store", clean, out, "--batch-size", 5, "--to", "cpg")
    assert not list(out.rglob("*.partial*"))
    other = out / ".profiles.another-host.1.0123456789.partial.parquet"  # of `cellfast profile`, which may be at work
    other.write_bytes(b"half")
    embed(clean / "store", clean, out, "--batch-size", 5, "--to", "cpg")
    assert other.exists()


def test_the_store_gives_what_its_fields_give(clean):
    assert_same(tables(clean / "clean"), tables(clean / "fields"))
    assert Path(clean / "clean" / "embeddings.json").exists()
