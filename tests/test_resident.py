"""Resident cells: the batches that streaming gives, chosen by size, and refused where they cannot be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from screens import all_crops, raw_screen

from cellfast.data import Loader
from cellfast.data import resident as resident_module
from cellfast.data.resident import choose_feed
from cellfast.errors import CellfastError

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [np.uint16, np.uint8])
@pytest.mark.parametrize("rows", [None, np.array([17, 2, 9, 0, 22, 5, 11])])
def test_batches_are_those_of_streaming(tmp_path, dtype, rows):
    screen = raw_screen(tmp_path, dtype=dtype)
    loaders = [Loader(screen, 3, rows=rows, seed=4, feed=feed) for feed in ("stream", "resident")]
    for _ in range(2):
        for one, two in zip(*loaders, strict=True):
            assert one.crops.dtype == two.crops.dtype
            assert torch.equal(one.rows, two.rows)
            np.testing.assert_array_equal(two.crops.numpy(), one.crops.numpy())
            np.testing.assert_array_equal(two.crops.numpy(), all_crops(screen)[two.rows.numpy()])
    assert loaders[0].state_dict() == loaders[1].state_dict()


def test_an_epoch_resumes_in_the_middle(tmp_path):
    screen = raw_screen(tmp_path)
    first = Loader(screen, 4, seed=1, feed="resident")
    batches = iter(first)
    next(batches)
    next(batches)
    state = first.state_dict()
    rest = [batch.rows.tolist() for batch in batches]
    second = Loader(screen, 4, seed=1, feed="stream")
    second.load_state_dict(state)
    assert [batch.rows.tolist() for batch in second] == rest


def test_ranks_share_the_global_minibatch(tmp_path):
    screen = raw_screen(tmp_path)
    for kept in (None, np.arange(3, 23)):
        whole = list(Loader(screen, 6, rows=kept, seed=2))
        parts = [list(Loader(screen, 3, rows=kept, seed=2, rank=r, world_size=2, feed="resident")) for r in range(2)]
        for batch, *ranks in zip(whole, *parts, strict=True):
            assert torch.equal(batch.rows, torch.cat([part.rows for part in ranks]))


def test_the_choice_is_by_size_and_says_why(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 << 30, 141 << 30))
    assert choose_feed("auto", 40 << 30, gpu) == ("resident", "fits: 40.00 of 100.0 GiB free on cuda:0")
    assert choose_feed("auto", 60 << 30, gpu) == ("stream", "more than half: 60.00 of 100.0 GiB free on cuda:0")
    assert choose_feed("resident", 60 << 30, gpu)[0] == "resident"
    assert choose_feed("stream", 1, gpu) == ("stream", "as asked")
    assert choose_feed("auto", 1, gpu, streams_only="the dali loader streams") == ("stream", "the dali loader streams")
    with pytest.raises(
        CellfastError, match=r"--feed resident: the cells need 95.00 of 100.0 GiB free on cuda:0; use --feed stream"
    ):
        choose_feed("resident", 95 << 30, gpu)
    assert choose_feed("auto", 1, CPU)[0] == "stream"
    monkeypatch.setattr(resident_module, "available_memory", lambda: 1 << 20)
    with pytest.raises(CellfastError, match="use --feed stream"):
        choose_feed("resident", 1 << 20, CPU)
    with pytest.raises(CellfastError, match="feed must be one of auto, resident, stream, got 'ram'"):
        choose_feed("ram", 1, CPU)


@pytest.mark.cuda
@pytest.mark.parametrize("feed", ["resident", "stream"])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint8])
def test_cells_arrive_on_a_gpu(tmp_path, dtype, feed):
    screen = raw_screen(tmp_path, counts=(300, 41), dtype=dtype)
    expected = torch.from_numpy(all_crops(screen).astype(np.int32)).cuda()
    loader = Loader(screen, 16, device="cuda", feed=feed)
    for batch in loader:
        assert batch.crops.is_cuda
        kept = batch.crops.view(torch.int16).to(torch.int32) & 0xFFFF if dtype == np.uint16 else batch.crops.to(torch.int32)
        assert torch.equal(kept, expected[batch.rows.cuda()])
    assert f"feed {feed}" in " ".join(loader.notes)
