"""The loader: the right pixels in the right order, buffers not overwritten in use, threads that end, states that resume."""

from __future__ import annotations

import gc
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from screens import HEADER, all_crops, collect, raw_screen

from cellfast.data import Loader, tune_malloc
from cellfast.data.gather import RowGather
from cellfast.data.warm import available_memory, read_files
from cellfast.errors import CellfastError


@pytest.fixture
def screen(tmp_path):
    return raw_screen(tmp_path)


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "cellfast-loader"]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint8])
@pytest.mark.parametrize("threads", [1, 3])
def test_pixels_belong_to_their_rows(tmp_path, dtype, threads):
    screen = raw_screen(tmp_path, channels=3, size=11, dtype=dtype)
    loader = Loader(screen, 5, seed=1, threads=threads)
    crops, rows = collect(loader)
    assert crops.dtype == dtype
    assert sorted(rows.tolist()) == list(range(23))
    np.testing.assert_array_equal(crops, all_crops(screen)[rows])
    assert len(loader) == 5


def test_tensors_are_small_integers_and_rows_are_global(screen):
    batch = next(iter(Loader(screen, 23, shuffle=False)))
    assert batch.crops.dtype == torch.uint16
    assert batch.rows.dtype == torch.int64
    assert batch.rows.tolist() == list(range(23))
    assert batch.crops.is_contiguous()


@pytest.mark.parametrize("prefetch", [1, 3])
def test_a_batch_stays_as_it_is_until_the_next_is_asked_for(tmp_path, prefetch):
    screen = raw_screen(tmp_path, counts=(200,))
    expected = all_crops(screen)
    for batch in Loader(screen, 4, prefetch=prefetch):
        time.sleep(0.002)  # the thread has had time to fill every buffer it may
        np.testing.assert_array_equal(batch.crops.numpy(), expected[batch.rows.numpy()])


def test_buffers_are_reused(tmp_path):
    screen = raw_screen(tmp_path, counts=(200,))
    addresses = {batch.crops.data_ptr() for batch in Loader(screen, 4, prefetch=2)}
    assert len(addresses) <= 3


def test_epochs_differ_and_repeat_by_seed(screen):
    loader, again = Loader(screen, 6, seed=4), Loader(screen, 6, seed=4)
    first, second = collect(loader)[1].tolist(), collect(loader)[1].tolist()
    assert loader.epoch == 2
    assert first != second
    assert [collect(again)[1].tolist(), collect(again)[1].tolist()] == [first, second]


def test_ranks_see_what_one_process_sees(screen):
    whole = [batch.rows.tolist() for batch in Loader(screen, 6, seed=2)]
    parts = [[batch.rows.tolist() for batch in Loader(screen, 3, seed=2, rank=rank, world_size=2)] for rank in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_state_taken_within_an_epoch_gives_the_rest_of_it(screen, stop):
    uninterrupted = Loader(screen, 6, seed=9)
    expected = [batch.rows.tolist() for _ in range(2) for batch in uninterrupted]
    loader, seen, state = Loader(screen, 6, seed=9), [], None
    for batch in loader:
        seen.append(batch.rows.tolist())
        if len(seen) == stop:
            state = json.loads(json.dumps(loader.state_dict()))
            break
    resumed = Loader(screen, 6, seed=9)
    resumed.load_state_dict(state)
    seen += [batch.rows.tolist() for _ in range(2 if stop < 4 else 1) for batch in resumed]
    assert seen == expected


def test_a_break_ends_the_thread_and_the_next_pass_is_the_next_epoch(screen):
    loader = Loader(screen, 2, seed=3)
    for _batch in loader:
        break
    assert loader_threads() == []
    rows = [batch.rows.tolist() for batch in loader]
    fresh = Loader(screen, 2, seed=3)
    collect(fresh)
    assert rows == [batch.rows.tolist() for batch in fresh]
    assert loader_threads() == []


def test_a_forgotten_iterator_ends_its_thread(screen):
    iterator = iter(Loader(screen, 2))
    next(iterator)
    assert len(loader_threads()) == 1
    del iterator
    gc.collect()
    assert loader_threads() == []


def test_an_error_on_the_thread_reaches_the_consumer(screen, monkeypatch):
    copy = RowGather.copy
    calls = []

    def failing(self, rows, out):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("disk on fire")
        copy(self, rows, out)

    monkeypatch.setattr(RowGather, "copy", failing)
    batches = iter(Loader(screen, 4))
    next(batches), next(batches)
    with pytest.raises(OSError, match="disk on fire"):
        next(batches)
    assert loader_threads() == []


def test_a_file_cut_short_while_it_is_read_is_named(screen):
    loader = Loader(screen, 4, warm=False)
    path = screen.plates[2].path
    next(iter(loader))
    with open(path, "r+b") as handle:
        handle.truncate(HEADER + 100)
    with pytest.raises(CellfastError, match="plate2 was cut short"):
        collect(loader)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("feed", ["stream", "resident"])
def test_pixels_are_compared_with_their_checksums_the_first_time(screen, feed, threads):
    path, row_bytes = screen.plates[2].path, 2 * 9 * 9 * 2

    def damage(row):
        with open(path, "r+b") as handle:
            handle.seek(HEADER + row * row_bytes + 5)
            byte = handle.read(1)
            handle.seek(-1, 1)
            handle.write(bytes([byte[0] ^ 1]))

    loader = Loader(screen, 4, feed=feed, threads=threads)
    collect(loader)
    damage(5)
    collect(loader)  # seen before: not read or not compared again
    with pytest.raises(CellfastError, match=r"plate2: damaged rows \[5\]"):
        collect(Loader(screen, 4, feed=feed, threads=threads))
    # Rows that are not used are not looked at.
    collect(Loader(screen, 4, rows=np.array([1, 2, 11, 13, 22]), feed=feed, threads=threads))


def test_closing_while_iterating_is_an_error_not_a_crash(screen):
    loader = Loader(screen, 1, prefetch=1)
    iterator = iter(loader)
    next(iterator)
    loader.close()
    with pytest.raises(CellfastError, match="closed"):
        list(iterator)
    loader.close()


def test_copy_refuses_rows_and_buffers_that_do_not_fit(screen):
    gather = RowGather(screen)
    out = np.empty((1, 2, 9, 9), np.uint16)
    for row in (-1, 23):
        with pytest.raises(CellfastError, match=r"rows must lie in 0\.\.22"):
            gather.copy(np.array([row]), out)
    for bad in (out.astype(np.uint8), np.empty((2, 2, 9, 9), np.uint16), out.transpose(0, 1, 3, 2)[:, :, ::2]):
        with pytest.raises(ValueError, match="out must be C-contiguous uint16"):
            gather.copy(np.array([0]), bad)


def test_another_runs_state_is_refused(screen):
    state = Loader(screen, 6, seed=1).state_dict()
    with pytest.raises(CellfastError, match="seed was 1, is 2"):
        Loader(screen, 6, seed=2).load_state_dict(state)
    with pytest.raises(CellfastError, match="batch_size was 6, is 5"):
        Loader(screen, 5, seed=1).load_state_dict(state)
    with pytest.raises(CellfastError, match="rows_digest"):
        Loader(screen, 6, seed=1, rows=np.arange(22, -1, -1)).load_state_dict(state)
    with pytest.raises(CellfastError, match="epoch, step missing"):
        Loader(screen, 6).load_state_dict({k: v for k, v in state.items() if k not in ("epoch", "step")})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tar"}, "unknown loader 'tar': choose one of mmap, dali"),
        ({"prefetch": 0}, "prefetch must be at least 1"),
        ({"warm": "yes"}, "warm must be"),
        ({"threads": -1}, "threads must be at least 1"),
    ],
)
def test_bad_options_are_named(screen, options, message):
    with pytest.raises(CellfastError, match=message):
        Loader(screen, 4, **options)


def test_a_store_that_fits_is_warmed_once_and_says_so(screen):
    loader = Loader(screen, 4)
    collect(loader)
    collect(loader)
    assert [note for note in loader.notes if note.startswith("files warmed")] == loader.notes[2:]
    assert "1 thread(s)" in loader.notes[0]


def test_a_store_larger_than_memory_is_not_warmed(screen, monkeypatch):
    monkeypatch.setattr("cellfast.data.loader.available_memory", lambda: 1000)
    loader = Loader(screen, 4)
    assert "8 thread(s)" in loader.notes[0]
    assert "not warmed" in loader.notes[1]
    crops, rows = collect(loader)
    np.testing.assert_array_equal(crops, all_crops(screen)[rows])


def test_reading_keeps_the_store_out_of_this_process(tmp_path):
    """300 MB pass through; mapped they would all be resident."""

    def resident_mb() -> float:
        fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["VmRSS"].split()[0]) / 1024

    path, shape = tmp_path / "plate.bin", (3000, 1, 224, 224)
    with open(path, "wb") as handle:
        handle.truncate(int(np.prod(shape)) * 2)  # a sparse file: no disk is needed
    plate = SimpleNamespace(path=path, offset=0, num_cells=3000, check=lambda rows, crops: None)
    screen = SimpleNamespace(
        plates=[plate], channel_names=["c"], crop_size=224, dtype=np.dtype(np.uint16), num_cells=3000, offsets=np.array([0, 3000])
    )
    collected = Loader(screen, 50, warm=False)
    next(iter(collected))
    before = resident_mb()
    assert sum(len(batch.rows) for batch in collected) == 3000
    assert resident_mb() - before < 60


def test_more_plates_than_open_files_are_allowed(screen, monkeypatch):
    resource = pytest.importorskip("resource")
    limits = {}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (100, 1000))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, values: limits.update({kind: values}))
    RowGather(screen).close()
    assert limits == {resource.RLIMIT_NOFILE: (132, 1000)}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (100, 110))
    with pytest.raises(CellfastError, match=r"4 plates need as many open files; this system allows 110"):
        RowGather(screen)


def test_warming_reads_the_pieces_asked_for(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 20_000_000)
    counted = []
    read, seconds = read_files([(path, 1000, 19_000_000)], advance=counted.append)
    assert read == sum(counted) == 19_000_000
    assert seconds > 0
    with pytest.raises(OSError, match="absent"):
        read_files([(tmp_path / "absent", 0, 10)])


def test_available_memory_is_plausible():
    assert 10 << 20 < available_memory() < 1 << 50


def test_malloc_says_what_it_did():
    assert "malloc" in tune_malloc()


@pytest.mark.cuda
def test_batches_on_a_gpu(tmp_path):
    screen = raw_screen(tmp_path, counts=(300, 211))
    expected = torch.from_numpy(all_crops(screen).astype(np.int32)).cuda()
    for _ in range(2):
        for batch in Loader(screen, 16, device="cuda"):
            assert batch.crops.is_cuda
            torch.cuda._sleep(1_000_000)  # the work on this batch is still queued when the next one is asked for
            assert torch.equal(batch.crops.to(torch.int32), expected[batch.rows.cuda()])
